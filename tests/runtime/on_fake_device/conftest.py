"""Tests of a process that believes in a GPU; `test_fake_device.py` starts it, and no other collects them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

STARTED = os.environ.get("CAPACITOR_FAKE_GPU") == "1"
collect_ignore_glob = [] if STARTED else ["*"]
if STARTED:
    # launches compute nothing here, and must not be judged or remembered
    os.environ["CAPACITOR_SELF_CHECK"] = "0"
    import fake_cuda

    fake_cuda.install()
    # what is imported stays: collections are then quick
    gc.freeze()


@pytest.fixture(autouse=True)
def gpu(request) -> Iterator[object]:
    """A new GPU, which must not have seen a fault in the end. Parametrised indirectly by a compute capability."""
    from fake_gpu import gpu
    from fake_triton import forget_kernels

    forget_kernels()
    gc.collect()
    gpu.reset(getattr(request, "param", 90))
    torch.cuda.set_stream(torch.cuda.default_stream())
    yield gpu
    gc.collect()
    assert gpu.settle() == []


@pytest.fixture
def faults(gpu) -> Iterator[list[str]]:
    """Faults that a test makes on purpose."""
    yield gpu.faults
    gpu.faults.clear()
    gpu.freed.clear()
