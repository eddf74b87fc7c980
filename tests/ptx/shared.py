from __future__ import annotations

import numpy as np

class Shared:
    """Shared memory of the CTAs in flight, with the state of each granule for the first `watched` of them.

    A granule is as wide as the narrowest access of the program. Of each it is known who wrote it in which epoch
    (an epoch ends at a barrier of the CTA) and in which epoch each warp read it.
    """

    def __init__(self, vm, ctas: int, size: int, granule: int, watched: int, warps: int) -> None:
        self.vm, self.size, self.granule, self.watched = vm, size, granule, min(watched, ctas)
        self.pitch = (size + 15) & ~15
        raw = np.full(max(16, ctas * self.pitch), 0xFF, U8)
        self.views = {w: raw.view(t) for w, t in UNSIGNED.items()}
        self.per = self.pitch // granule
        count = max(1, self.watched * self.per)
        self.write_epoch = np.full(count, -1, np.int32)  # -1: never written
        self.write_warp = np.full(count, -1, np.int16)
        self.read_epoch = np.full((warps, count), -1, np.int32)
        self.epoch = np.ones(max(1, ctas), np.int32)

    def place(self, address: np.ndarray, width: int, lanes: np.ndarray, what: str) -> np.ndarray:
        """Byte offsets into the flat array; checks bounds and alignment."""
        offset = address.astype(np.int64) - SHARED_BASE
        bad = (offset < 0) | (offset + width > self.size) | (offset & (width - 1) != 0)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise MemoryFault(f"{self.vm.where()}: {what} of {width} bytes by {self.vm.who(lanes[i])} at shared {int(offset[i])} of {self.size}: out of bounds or misaligned")
        return offset + self.vm.cta_slot[lanes] * self.pitch

    def granules(self, flat: np.ndarray, width: int, lanes: np.ndarray):
        """(granule indices [lanes, k], warps, epochs) of the watched lanes; None where there are none."""
        if not self.watched:
            return None
        n = len(lanes) if lanes[-1] < self.vm.watched_lanes else int(np.searchsorted(lanes, self.vm.watched_lanes))
        if n == 0:
            return None
        k = max(1, width // self.granule)
        g = flat[:n, None] // self.granule + np.arange(k) if k > 1 else (flat[:n] // self.granule)[:, None]
        return g, self.vm.warp[lanes[:n]], self.epoch[self.vm.cta_slot[lanes[:n]]]

    def _race(self, kind: str, bad: np.ndarray, g: np.ndarray, lanes: np.ndarray) -> None:
        i, j = (int(x[0]) for x in np.nonzero(bad))
        at = int(g[i, j]) % self.per * self.granule
        raise MemoryFault(f"{self.vm.where()}: {kind} at shared byte {at} by {self.vm.who(lanes[i])}; last write by warp {int(self.write_warp[g[i, j]])}")

    def note_read(self, flat, width, lanes) -> None:
        found = self.granules(flat, width, lanes)
        if found is None:
            return
        g, warp, epoch = found
        written = self.write_epoch[g]
        if (written < 0).any():
            self._race("read of shared memory that was never written", written < 0, g, lanes)
        bad = (written == PENDING) | ((written == epoch[:, None]) & (self.write_warp[g] != warp[:, None]))
        if bad.any():
            self._race("read races with a write (no barrier or wait between)", bad, g, lanes)
        self.read_epoch[warp[:, None], g] = epoch[:, None]

    def note_write(self, flat, width, lanes, same: np.ndarray | None = None, pending: bool = False) -> None:
        """`same`: lanes that write what is there already; two warps may do that (Triton stores replicas)."""
        found = self.granules(flat, width, lanes)
        if found is None:
            return
        g, warp, epoch = found
        written, writer = self.write_epoch[g], self.write_warp[g]
        bad = (written == epoch[:, None]) & (writer != warp[:, None])
        if same is not None:
            bad &= ~same[: len(g), None]
        bad |= written == PENDING
        if bad.any():
            self._race("write races with a write", bad, g, lanes)
        reads = self.read_epoch[:, g]  # [warps, lanes, k]
        other = np.arange(len(reads))[:, None, None] != warp[None, :, None]
        bad = ((reads == PENDING) | ((reads == epoch[None, :, None]) & other)).any(0)
        if bad.any():
            self._race("write races with an earlier read (no barrier between)", bad, g, lanes)
        self.write_epoch[g] = PENDING if pending else epoch[:, None]
        self.write_warp[g] = warp[:, None]

    def finish_write(self, flat, width, lanes) -> None:
        found = self.granules(flat, width, lanes)
        if found is not None:
            self.write_epoch[found[0]] = found[2][:, None]

    def settle_copy(self, flat, lane: int) -> None:
        """A tensor copy has landed: visible to whoever waited for it."""
        found = self.granules(flat, 16, np.full(len(flat), lane))
        if found is not None:
            self.write_epoch[found[0]] = 0

    def load(self, address, width, lanes, what="ld.shared"):
        flat = self.place(address, width, lanes, what)
        self.note_read(flat, width, lanes)
        return self.views[width][flat >> (width.bit_length() - 1)]

    def store(self, address, values, width, lanes, what="st.shared") -> None:
        flat = self.place(address, width, lanes, what)
        view, at = self.views[width], flat >> (width.bit_length() - 1)
        raw = np.ascontiguousarray(values)
        self.note_write(flat, width, lanes, same_bits(view[at], raw))
        view[at] = raw
        same = same_bits(view[at], raw)
        if not same.all():
            i = int(np.flatnonzero(~same)[0])
            raise MemoryFault(f"{self.vm.where()}: two threads write different values to shared byte {int(flat[i]) % self.pitch} at once, one of them {self.vm.who(lanes[i])}")


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether the bits of each element are equal."""
    if a.dtype.itemsize < 16:
        return a == b
    return (a.view(U64).reshape(-1, 2) == b.view(U64).reshape(-1, 2)).all(1)
