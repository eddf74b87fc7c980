"""Memory that the workers of a pool share, counted in bytes: no more than there is is handed out, and no worker waits
for ever.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np

_PAUSE_SECONDS = 0.002


@dataclass
class Allowance:
    """Half of `total` is shared out: a process that keeps to its share need not ask. The other half is handed out in
    the order of asking: a process that waits lets none past, and gets more than all of that half once no other has any
    of it. What a process has taken is in its slot; the slot of a dead process must be set to 0. There is no deadlock as
    long as no process waits while it has something, and each gives back what it has without waiting for more.

    Args:
        slots: int64 `[processes]` in memory that they share: what each has of the common half.
        number: of this process.
        fd, byte: file and byte in it whose lock is the queue; the kernel opens that of a process that dies. -1: there
            is one process.
        waiting: entered while one waits.
    """

    total: int
    slots: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    number: int = 0
    fd: int = -1
    byte: int = 0
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext

    def __post_init__(self) -> None:
        self.share = self.total // (2 * len(self.slots))
        self.common = self.total // 2
        self._mine = 0

    def have(self, nbytes: int) -> None:
        """Take note that this process has so much in common, whether it may or not."""
        if nbytes != self._mine:
            self.slots[self.number] = self._mine = nbytes

    def take(self, nbytes: int, *, wait: bool) -> bool:
        """Have `nbytes` in common instead of what it has, if there is room or, with `wait`, once there is."""
        if nbytes <= self._mine:
            self.have(nbytes)
            return True
        # no other process takes any between the look and the note
        if not self._lock(wait):
            return False
        try:
            if not self._has_room(nbytes, wait):
                if not wait:
                    return False
                with self.waiting():
                    while not self._has_room(nbytes, wait):
                        time.sleep(_PAUSE_SECONDS)
            self.have(nbytes)
        finally:
            if self.fd >= 0:
                fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, self.byte)
        return True

    def _has_room(self, nbytes: int, at_any_rate: bool) -> bool:
        others = int(self.slots.sum()) - self._mine
        return others + nbytes <= self.common or (at_any_rate and others <= 0)

    def _lock(self, wait: bool) -> bool:
        if self.fd < 0:
            return True
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self.byte)
        except OSError:
            if not wait:
                return False
            with self.waiting():
                fcntl.lockf(self.fd, fcntl.LOCK_EX, 1, self.byte)
        return True
