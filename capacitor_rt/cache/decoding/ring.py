"""Shared memory of a pool: what each worker is at, and a ring of pixels."""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import CacheError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("capacitor_rt")
_PAGE = 4096
# cudaHostRegisterPortable
_PORTABLE = 1
# one worker's marks: input (int64; -1 is none), since (float64, CLOCK_MONOTONIC; 0 while it waits for its turn), and
# what it has of the memory in common for pixels, and for files (int64, bytes)
_MARK_BYTES = 64


class SharedMemory:
    """Anonymous memory with a descriptor that processes inherit. It has no name, so nothing is left of it.

    Attributes:
        fd: to be inherited.
    """

    def __init__(self, workers: int, ring_bytes: int, fd: int | None = None):
        self.workers = workers
        begin = -(-workers * _MARK_BYTES // _PAGE) * _PAGE
        total = begin + ring_bytes
        if fd is None:
            fd = _anonymous(total)
        self.fd = fd
        self._map = mmap.mmap(fd, total)
        everything = np.frombuffer(self._map, np.uint8)
        self.ring = everything[begin:]
        marks = everything[: workers * _MARK_BYTES].reshape(workers, _MARK_BYTES)
        self.inputs = marks[:, :8].view(np.int64)[:, 0]
        self.since = marks[:, 8:16].view(np.float64)[:, 0]
        self.of_pixels, self.of_files = (marks[:, i : i + 8].view(np.int64)[:, 0] for i in (16, 24))

    def close(self) -> None:
        """Give the descriptor back; the memory goes with the last view of it."""
        os.close(self.fd)


def _anonymous(nbytes: int) -> int:
    try:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("capacitor-ring")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, nbytes)
    except OSError as e:
        raise CacheError(f"no shared memory of {nbytes} bytes for decoding: {e.strerror}: use a smaller ring") from e
    return fd


@dataclass(frozen=True)
class Span:
    """Bytes `begin` to `end` of the ring."""

    begin: int
    end: int


class Allocator:
    """Spans of a ring, the lowest that is free first, so that no more memory is touched than is used."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self._free = [Span(0, nbytes)]

    def take(self, nbytes: int) -> Span | None:
        """A span of this size, or None for now."""
        for i, span in enumerate(self._free):
            if span.end - span.begin >= nbytes:
                taken = Span(span.begin, span.begin + nbytes)
                rest = Span(taken.end, span.end)
                self._free[i : i + 1] = [rest] if rest.begin < rest.end else []
                return taken
        return None

    def give(self, span: Span) -> None:
        """Return a span that was taken."""
        if span.begin == span.end:
            return
        self._free.append(span)
        self._free.sort(key=lambda s: s.begin)
        joined: list[Span] = []
        for s in self._free:
            if joined and joined[-1].end == s.begin:
                joined[-1] = Span(joined[-1].begin, s.end)
            else:
                joined.append(s)
        self._free = joined


def pin(memory: np.ndarray, device: torch.device) -> bool:
    """Page-lock memory, so that GPUs read it directly; False where the driver refuses, and copies take longer."""
    import torch

    cudart: Any = torch.cuda.cudart()
    # without it the first GPU would get a context, and the memory be locked for no other
    with torch.cuda.device(device):
        code = int(cudart.cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE))
        if not code:
            return True
        # CUDA keeps the error for whoever launches a kernel next
        with suppress(RuntimeError):
            torch.empty(1, device=device).fill_(0)
    _log.warning(
        "%d MiB cannot be page-locked (CUDA error %d): copies to the GPU go through the host", memory.nbytes >> 20, code
    )
    return False


def unpin(memory: np.ndarray) -> None:
    """Undo `pin`."""
    import torch

    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(memory.ctypes.data)
