"""What a time is held against: the ceilings of the device, measured in the same run, and where the figures come from.

Calls are timed by `capacitor_rt.runtime.timing`; on the CPU that only serves to test the benchmarks themselves.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

from capacitor_rt.runtime.forecast import Ceilings
from capacitor_rt.runtime.timing import Call, Variant, time_variants

from ._device import nvidia_smi


def floor_us(ceilings: Ceilings, flops: float, nbytes: float) -> float:
    """Microseconds that neither ceiling lets a launch go below."""
    return max(flops / (ceilings.tflops * 1e6), nbytes / (ceilings.gbps * 1e3))


def measure_ceilings(device: torch.device) -> Ceilings:
    """What this device reaches now, not what is specified: 8192^3 in bf16 and a copy of 1 GiB; tiny ones on the CPU.

    Values are random; bytes of the copy count as read and as written.
    """
    on_gpu = device.type == "cuda"
    size, dtype, nbytes = (8192, torch.bfloat16, 1 << 30) if on_gpu else (256, torch.float32, 4 << 20)

    def matmul() -> Call:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    def copy() -> Call:
        source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    timed = time_variants(
        [Variant("matmul", matmul, 3 * size * size * dtype.itemsize), Variant("copy", copy, 2 * nbytes)], device
    )
    tflops = 2 * size**3 / timed["matmul"].us / 1e6
    what = f"measured: a {size}^3 product in {str(dtype).removeprefix('torch.')} and a copy of {nbytes >> 20} MiB"
    return Ceilings(tflops, 2 * nbytes / timed["copy"].us / 1e3, what)


def environment(device: torch.device) -> dict[str, Any]:
    """Where a figure comes from: device, driver, clocks, versions, commit, date."""
    facts: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": device.type,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_output("git", "-C", str(Path(__file__).parent), "status", "--porcelain", "-uno")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if device.type != "cuda":
        return facts | {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    facts |= nvidia_smi(device, *fields)
    return facts | {"cuda": torch.version.cuda, "sms": torch.cuda.get_device_properties(device).multi_processor_count}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
