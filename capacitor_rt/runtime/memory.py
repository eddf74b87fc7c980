"""Device memory: arenas, tensors given back while work on them is queued, and what to say when memory runs out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import InputError
from .arena import ALIGNMENT

MIB = 1 << 20


class DeviceMemoryError(InputError, torch.OutOfMemoryError):
    """What was asked for does not fit on the device. Code that catches torch's own error catches this one."""


def new_arena(nbytes: int, device: torch.device) -> Tensor:
    """Uninitialised uint8 memory that starts on a 256-byte boundary."""
    block = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -block.data_ptr() % ALIGNMENT
    return block[start : start + nbytes]


def copy_into(out: Tensor, value: Tensor) -> Tensor:
    """Write `value` to `out`, which a caller may have made under `torch.inference_mode`; returns `out`."""
    with torch.no_grad(), torch.inference_mode(out.is_inference()):
        return out.copy_(value)


def retire(tensors: Iterable[Tensor], stream: torch.cuda.Stream | None = None) -> None:
    """Before the last reference goes: what a stream (the current one) has queued may still use these tensors.

    The allocator otherwise gives their memory to the stream that allocated them, at once.
    """
    for t in tensors:
        if t.is_cuda:
            t.record_stream(stream or torch.cuda.current_stream(t.device))


def free_bytes(device: torch.device) -> int | None:
    """What an allocation could get now, torch's own cached blocks included; None where it is not known."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: in torch's allocator, or in the driver, which loads modules and instantiates graphs."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def amount(nbytes: int | None) -> str:
    """For messages: mebibytes, or "an unknown number of" them."""
    return "an unknown number of MiB" if nbytes is None else f"{nbytes / MIB:.1f} MiB"
