"""The state of the device around a measurement: who else uses it, what memory a call takes, what float32 means."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

BUSY_BYTES = 1 << 30
BUSY_PERCENT = 5


@dataclass(frozen=True)
class Memory:
    """Bytes of one contender, weights included.

    Attributes:
        peak_bytes: largest sum of live tensors during a warm call, by torch's allocator; CUDA graphs' pools count.
        device_bytes: what the driver gave out for it, caches of the allocator included.
    """

    peak_bytes: int
    device_bytes: int


class MemoryMeter:
    """Growth since the meter was made, so that what others hold does not count."""

    def __init__(self, device: torch.device):
        self.device = device
        self._live, self._free = self._now()

    def measure(self, call) -> Memory | None:
        """Run `call` once, warm, and say what it and everything built since takes; None without a GPU."""
        if self.device.type != "cuda":
            return None
        self._now()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        return Memory(peak - self._live, max(0, self._free - free))

    def _now(self) -> tuple[int, int]:
        release(self.device)
        if self.device.type != "cuda":
            return 0, 0
        return torch.cuda.memory_allocated(self.device), torch.cuda.mem_get_info(self.device)[0]


def release(device: torch.device) -> None:
    """Return what nothing refers to any more to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def nvidia_smi(device: torch.device, *fields: str) -> dict[str, str]:
    """What the driver's tool says of a GPU, by the names of its query fields; empty where it cannot be asked."""
    try:
        # its own numbers are those of the machine, ours those of CUDA_VISIBLE_DEVICES
        command = ["nvidia-smi", "-i", gpu_uuid(device), f"--query-gpu={','.join(fields)}"]
    # asked of a device that is not there, torch fails in more than one way
    except (AssertionError, AttributeError, RuntimeError):
        return {}
    try:
        done = subprocess.run([*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def gpu_uuid(device: torch.device) -> str:
    """A GPU's name among all of the machine, as the driver's tool writes it: GPU-xxxxxxxx-xxxx-..."""
    text = str(torch.cuda.get_device_properties(device.index or 0).uuid)
    return text if text.startswith(("GPU-", "MIG-")) else f"GPU-{text}"


def busy(device: torch.device) -> str | None:
    """A warning if other processes hold memory or compute on the GPU; call it before this one does."""
    if device.type != "cuda":
        return None
    try:
        percent, mib = (int(value) for value in nvidia_smi(device, "utilization.gpu", "memory.used").values())
    except ValueError:
        return None
    if percent <= BUSY_PERCENT and mib << 20 <= BUSY_BYTES:
        return None
    return f"GPU in use by others: {percent} % busy, {mib} MiB taken before the first measurement"


def clocks(device: torch.device) -> dict[str, int]:
    """SM clock in MHz, temperature in degrees and power in watts now, right after a measurement; empty on the CPU."""
    if device.type != "cuda":
        return {}
    found = nvidia_smi(device, "clocks.sm", "temperature.gpu", "power.draw")
    try:
        values = [round(float(value)) for value in found.values()]
    except ValueError:
        return {}
    return dict(zip(("clock_mhz", "celsius", "watts"), values, strict=False))


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products in float32, not in TF32, for the truth."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before


def why(error: BaseException) -> str:
    """One line for a row: why a contender has no figures."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
