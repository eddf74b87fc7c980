"""`torch.cuda` of a machine with one GPU, for one without: it computes no kernel, and fails where a real one would.

`install()` puts the streams, events, graphs and memory of the fake GPU in the place of torch's, tensors on "cuda" that
hold their values on the CPU, and a driver for Triton that takes every launch and checks its arguments. It lasts as long
as the process.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import fake_tensor
import fake_triton
import torch
from fake_gpu import gpu
from fake_streams import DEFAULT, CUDAGraph, Event, Stream, current_stream, handles, set_stream, use_stream

REAL: dict[str, Any] = {}
"""What torch has under the names that were taken."""


def empty_cache() -> None:
    gpu.refuse("giving memory back to the driver")
    # the allocator of pinned memory keeps its own pools
    gpu.pools.empty()


def get_device_properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name=f"fake GPU of compute capability {gpu.cc / 10}",
        major=gpu.cc // 10,
        minor=gpu.cc % 10,
        total_memory=gpu.limit,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        warp_size=32,
    )


def install(cc: int = 90) -> None:
    """Make torch and Triton of this process believe in the GPU."""
    gpu.reset(cc)
    put = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": nullcontext,
        "current_stream": current_stream,
        "default_stream": lambda device=None: DEFAULT,
        "set_stream": set_stream,
        "stream": use_stream,
        "synchronize": lambda device=None: gpu.synchronize(),
        "is_current_stream_capturing": lambda: gpu.stream in gpu.captures,
        "graph_pool_handle": lambda: (0, next(handles)),
        "get_device_properties": get_device_properties,
        "get_device_capability": lambda device=None: divmod(gpu.cc, 10),
        "get_device_name": lambda device=None: get_device_properties().name,
        "mem_get_info": lambda device=None: (gpu.limit - gpu.allocated, gpu.limit),
        "memory_allocated": lambda device=None: gpu.allocated,
        "empty_cache": empty_cache,
    }
    for name, value in put.items():
        REAL.setdefault(name, getattr(torch.cuda, name))
        setattr(torch.cuda, name, value)
    # `torch.cuda.graph` empties that of pinned memory by itself
    torch._C._host_emptyCache = gpu.host_pools.empty
    torch.version.cuda = "13.0"
    fake_tensor.install()
    fake_triton.install()
