"""Memory in which the workers of a data loader leave batches for the process that trains, over and over.

Torch makes new shared memory for every tensor that leaves a worker: each of its pages is made, mapped and unmapped in
both processes, which takes longer than reading a batch. Here one mapping serves all batches. A batch lies in a run of
its units: a worker takes the run and fills it, what goes through the loader's queue is where it is, and it is free
again when the last tensor of it is gone in the process that got it. Where all units are taken the batch goes torch's
way. The memory is anonymous, is made when the first worker is, takes what was in use at most at a time, and ends with
the last process that has it: reading without workers takes neither addresses nor a descriptor.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import threading
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError

UNIT = 64 << 10
UNITS = 1 << 14
"""A gibibyte of addresses."""
_HEAD = 2 * 8 * UNITS
# what numpy has as well
_PLAIN = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64)


class Handle(NamedTuple):
    """Where a tensor of a batch lies: a run of units, and the number that the run was given."""

    serial: int
    first: int
    units: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SharedBatches:
    """The memory of a dataset's batches. Processes share it through fork, or are sent it when they are spawned.

    Attributes:
        token: finds it in every process.
        is_open: whether the memory is there: from the first fork or spawn on that a worker may come of.

    Args:
        fd, token: of memory that another process has made.

    Raises:
        OSError: there is no memory of the kind on this system.
    """

    def __init__(self, fd: int | None = None, token: str | None = None):
        if not hasattr(os, "memfd_create"):
            raise OSError("no anonymous files")
        self.token = token or uuid.uuid4().hex
        self._lock = threading.Lock()
        self._runs: dict[int, Handle] = {}
        self._sent: set[int] = set()
        self._pid = os.getpid()
        self.is_open = False
        if fd is not None:
            self._map_in(fd)
        _pools[self.token] = self

    def open(self) -> bool:
        """Make the memory, before there is a process that could share it; whether it is there."""
        # a worker has what it was given, or its batches would lie where no other process can read them
        if not self.is_open and os.getpid() == self._pid:
            with suppress(OSError), self._lock:
                if not self.is_open:
                    fd = os.memfd_create("capacitor-batches")
                    try:
                        os.ftruncate(fd, _HEAD + UNIT * UNITS)
                        self._map_in(fd)
                    except OSError:
                        os.close(fd)
                        raise
        return self.is_open

    def _map_in(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _HEAD + UNIT * UNITS)
        # of each unit, in the run that it belongs to: 0 free, its serial while it is under way, the negative of that
        # once it has arrived; and the process that took it
        self._states = np.frombuffer(self._map, np.int64, UNITS)
        self._owners = np.frombuffer(self._map, np.int64, UNITS, 8 * UNITS)
        self.fd = fd
        weakref.finalize(self, os.close, fd)
        self.is_open = True

    def __reduce__(self) -> tuple[Any, ...]:
        # in a pickle that goes nowhere at once there is nothing to share
        is_sent = get_spawning_popen() is not None and self.open()
        return _attached, (DupFd(self.fd), self.token) if is_sent else (None, "")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Memory for a tensor, None where there is no room."""
        nbytes = math.prod(shape) * dtype.itemsize
        count = -(-nbytes // UNIT)
        if not 0 < count <= UNITS or not self.open():
            return None
        with self._alone():
            first = self._room(count)
            if first is None:
                self._reclaim()
                first = self._room(count)
            if first is None:
                return None
            serial = int.from_bytes(os.urandom(7), "little") | 1
            self._states[first : first + count] = serial
            self._owners[first : first + count] = os.getpid()
        handle = Handle(serial, first, count, dtype, shape)
        tensor = self._tensor(handle, self._drop)
        self._runs[tensor.data_ptr()] = handle
        return tensor

    def handle(self, tensor: Tensor) -> Handle | None:
        """Where a tensor that `empty` made in this process lies; None of any other."""
        handle = self._runs.get(tensor.data_ptr())
        if handle is None or tensor.shape != handle.shape or tensor.dtype != handle.dtype:
            return None
        return handle if tensor.is_contiguous() else None

    def send(self, handle: Handle) -> None:
        """From now on the run is another process's to free."""
        self._sent.add(handle.serial)

    def receive(self, handle: Handle) -> Tensor:
        """The tensor of a run that another process has sent.

        Raises:
            CacheError: that process had died, and its run was given to another.
        """
        with self._alone():
            if int(self._states[handle.first]) != handle.serial:
                raise CacheError("a batch of a data loader's worker was lost with it: iterate anew")
            self._states[handle.first : handle.first + handle.units] = -handle.serial
        return self._tensor(handle, self._free)

    def taken(self) -> int:
        """Units that are in use."""
        return 0 if not self.is_open else int(np.count_nonzero(self._states))

    def _tensor(self, handle: Handle, end: Any) -> Tensor:
        nbytes = math.prod(handle.shape) * handle.dtype.itemsize
        memory = np.frombuffer(self._map, np.uint8, nbytes, _HEAD + handle.first * UNIT)
        # the tensor's storage holds the array
        weakref.finalize(memory, end, handle).atexit = False
        return torch.from_numpy(memory).view(handle.dtype).view(handle.shape)

    def _drop(self, handle: Handle) -> None:
        """A tensor is gone in the process that made it."""
        self._runs = {at: run for at, run in self._runs.items() if run.serial != handle.serial}
        if handle.serial in self._sent:
            self._sent.discard(handle.serial)
        else:
            self._free(handle)

    def _free(self, handle: Handle) -> None:
        # no lock: only free units are taken, and only this process frees its own
        self._states[handle.first : handle.first + handle.units] = 0

    def _room(self, count: int) -> int | None:
        """The first of `count` free units in a row."""
        taken = np.flatnonzero(self._states != 0)
        starts = np.concatenate([[0], taken + 1])
        lengths = np.concatenate([taken, [UNITS]]) - starts
        fitting = np.flatnonzero(lengths >= count)
        return int(starts[fitting[0]]) if len(fitting) else None

    def _reclaim(self) -> None:
        """Free what dead workers had under way."""
        under_way = self._states > 0
        for pid in np.unique(self._owners[under_way]).tolist():
            if not os.path.exists(f"/proc/{pid}"):
                self._states[under_way & (self._owners == pid)] = 0

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread of one process at a time; the kernel opens the lock of a process that dies."""
        with self._lock:
            fcntl.lockf(self.fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self.fd, fcntl.LOCK_UN)


_pools: weakref.WeakValueDictionary[str, SharedBatches] = weakref.WeakValueDictionary()


class SharedBatch(dict[str, Any]):
    """A batch that is pickled as where its tensors lie, and arrives as a plain dict."""

    def __reduce__(self) -> tuple[Any, ...]:
        rest, handles, small = dict(self), {}, {}
        for key, value in self.items():
            if not isinstance(value, Tensor):
                continue
            found = _find(value)
            if found is not None:
                pool, handle = found
                pool.send(handle)
                handles[key] = pool.token, handle
            elif value.nbytes <= UNIT and value.dtype in _PLAIN and not value.requires_grad:
                # torch would open a connection for each, to send the descriptor of its memory
                small[key] = value.numpy()
            else:
                continue
            # in its place among the keys
            rest[key] = None
        return _received, (rest, handles, small)


def is_shared(value: Any) -> bool:
    """Whether a tensor lies in memory that this module has given."""
    return isinstance(value, Tensor) and _find(value) is not None


def _find(tensor: Tensor) -> tuple[SharedBatches, Handle] | None:
    for pool in list(_pools.values()):
        handle = pool.handle(tensor)
        if handle is not None:
            return pool, handle
    return None


def _received(
    rest: dict[str, Any], handles: dict[str, tuple[str, Handle]], small: dict[str, np.ndarray]
) -> dict[str, Any]:
    for key, (token, handle) in handles.items():
        pool = _pools.get(token)
        if pool is None:
            raise CacheError("a batch came to a process that does not have its dataset: collate it otherwise")
        rest[key] = pool.receive(handle)
    rest |= {key: torch.from_numpy(array) for key, array in small.items()}
    return rest


def _attached(fd: Any, token: str) -> SharedBatches | None:
    return None if fd is None else SharedBatches(fd.detach(), token)


def _before_fork() -> None:
    """A child has what is there now; which forks make a loader's worker no one can tell."""
    for pool in list(_pools.values()):
        pool.open()


os.register_at_fork(before=_before_fork)


def shared_batches() -> SharedBatches | None:
    """Memory for the batches of one dataset; None on a system that has none of the kind."""
    try:
        return SharedBatches()
    except OSError:
        return None
