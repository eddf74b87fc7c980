"""Shared memory of the CTAs in flight, with the state of each granule for the first `watched` of them.

A granule is as wide as the narrowest access of the program. Of each it is known who wrote it in which epoch (an epoch
ends at a barrier of the CTA) and in which epoch each warp read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import UNSIGNED, MemoryFault, same_bits

if TYPE_CHECKING:
    from .machine import Machine

# where dynamic shared memory starts; the first KB belongs to the system on sm_90
SHARED_BASE = 1024
# epoch of a read or write that has not finished
PENDING = np.int32(2**30)
_NEVER = np.int32(-1)
State = tuple[np.ndarray, np.ndarray, np.ndarray]


class Shared:
    """Memory of `ctas` CTAs, `size` bytes each, of `warps` warps each."""

    def __init__(self, vm: Machine, ctas: int, size: int, granule: int, watched: int, warps: int) -> None:
        self.vm, self.size, self.granule = vm, size, granule
        self.watched = min(watched, ctas)
        self.pitch = (size + 15) & ~15
        raw = np.full(max(16, ctas * self.pitch), 0xFF, np.uint8)
        self.views = {width: raw.view(dtype) for width, dtype in UNSIGNED.items()}
        self.per_cta = self.pitch // granule
        count = max(1, self.watched * self.per_cta)
        self.write_epoch = np.full(count, _NEVER, np.int32)
        self.write_warp = np.full(count, -1, np.int16)
        self.read_epoch = np.full((warps, count), _NEVER, np.int32)
        self.epoch = np.ones(max(1, ctas), np.int32)

    def place(self, address: np.ndarray, width: int, lanes: np.ndarray, what: str) -> np.ndarray:
        """Byte offsets into the memory of all CTAs, after a check of bounds and alignment."""
        offset = address.astype(np.int64) - SHARED_BASE
        bad = (offset < 0) | (offset + width > self.size) | (offset & (width - 1) != 0)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise MemoryFault(
                f"{self.vm.where()}: out-of-bounds or misaligned {what} of {width} bytes by {self.vm.who(lanes[i])} "
                f"at shared byte {int(offset[i])} of {self.size}"
            )
        return offset + self.vm.cta_slot[lanes] * self.pitch

    def granules(self, flat: np.ndarray, width: int, lanes: np.ndarray) -> State | None:
        """(granules `[lanes, k]`, warps, epochs) of the watched lanes; None where there are none."""
        if not self.watched:
            return None
        count = len(lanes)
        if lanes[-1] >= self.vm.watched_lanes:
            count = int(np.searchsorted(lanes, self.vm.watched_lanes))
        if count == 0:
            return None
        first = (flat[:count] // self.granule)[:, None]
        each = max(1, width // self.granule)
        touched = first + np.arange(each) if each > 1 else first
        return touched, self.vm.warp[lanes[:count]], self.epoch[self.vm.cta_slot[lanes[:count]]]

    def note_read(self, flat: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """Refuse a read of what was never written, or is being written by another warp."""
        state = self.granules(flat, width, lanes)
        if state is None:
            return
        touched, warp, epoch = state
        written = self.write_epoch[touched]
        if (written < 0).any():
            self._fault("read of shared memory that was never written", written < 0, touched, lanes)
        bad = (written == PENDING) | ((written == epoch[:, None]) & (self.write_warp[touched] != warp[:, None]))
        if bad.any():
            self._fault("read races with a write (no barrier or wait between)", bad, touched, lanes)
        self.read_epoch[warp[:, None], touched] = epoch[:, None]

    def note_write(
        self, flat: np.ndarray, width: int, lanes: np.ndarray, same: np.ndarray | None = None, pending: bool = False
    ) -> None:
        """Refuse a write that races with a write or an earlier read.

        Args:
            same: lanes that write what is there already; two warps may do that (Triton stores replicas).
            pending: the write is asynchronous, and ends at `finish_write`.
        """
        state = self.granules(flat, width, lanes)
        if state is None:
            return
        touched, warp, epoch = state
        written, writer = self.write_epoch[touched], self.write_warp[touched]
        bad = (written == epoch[:, None]) & (writer != warp[:, None])
        if same is not None:
            bad &= ~same[: len(touched), None]
        bad |= written == PENDING
        if bad.any():
            self._fault("write races with a write", bad, touched, lanes)
        reads = self.read_epoch[:, touched]
        other = np.arange(len(reads))[:, None, None] != warp[None, :, None]
        bad = ((reads == PENDING) | ((reads == epoch[None, :, None]) & other)).any(0)
        if bad.any():
            self._fault("write races with an earlier read (no barrier between)", bad, touched, lanes)
        self.write_epoch[touched] = PENDING if pending else epoch[:, None]
        self.write_warp[touched] = warp[:, None]

    def finish_write(self, flat: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """An asynchronous write of these lanes has been waited for by them."""
        state = self.granules(flat, width, lanes)
        if state is not None:
            self.write_epoch[state[0]] = state[2][:, None]

    def settle_copy(self, flat: np.ndarray, lane: int) -> None:
        """A tensor copy has landed: visible to whoever waited for it."""
        state = self.granules(flat, 16, np.full(len(flat), lane))
        if state is not None:
            self.write_epoch[state[0]] = 0

    def load(self, address: np.ndarray, width: int, lanes: np.ndarray, what: str = "ld.shared") -> np.ndarray:
        """Elements of `width` bytes at these addresses."""
        flat = self.place(address, width, lanes, what)
        self.note_read(flat, width, lanes)
        return self.views[width][flat >> (width.bit_length() - 1)]

    def store(
        self, address: np.ndarray, values: np.ndarray, width: int, lanes: np.ndarray, what: str = "st.shared"
    ) -> None:
        """Write elements of `width` bytes."""
        flat = self.place(address, width, lanes, what)
        view, at = self.views[width], flat >> (width.bit_length() - 1)
        raw = np.ascontiguousarray(values)
        self.note_write(flat, width, lanes, same_bits(view[at], raw))
        view[at] = raw
        same = same_bits(view[at], raw)
        if not same.all():
            i = int(np.flatnonzero(~same)[0])
            raise MemoryFault(
                f"{self.vm.where()}: two threads write different values to shared byte {int(flat[i]) % self.pitch} "
                f"at once, one of them {self.vm.who(lanes[i])}"
            )

    def _fault(self, what: str, bad: np.ndarray, touched: np.ndarray, lanes: np.ndarray) -> None:
        i, j = (int(x[0]) for x in np.nonzero(bad))
        at = int(touched[i, j])
        raise MemoryFault(
            f"{self.vm.where()}: {what} at shared byte {at % self.per_cta * self.granule} by {self.vm.who(lanes[i])}; "
            f"last write by warp {int(self.write_warp[at])}"
        )
