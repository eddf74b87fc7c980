from __future__ import annotations

import numpy as np

class MemoryFault(PtxError):
    """An access outside every registered buffer, misaligned, racing, or of memory that was never written."""


@dataclass
class Region:
    """One buffer that the kernel may touch."""

    name: str
    base: int
    size: int
    views: dict = field(default_factory=dict)
    writers: np.ndarray | None = None  # CTA + 1 that wrote each 2 bytes (1 for byte buffers)

    def __post_init__(self) -> None:
        self.start = self.base & ~15
        total = (self.base + self.size + 15 & ~15) - self.start
        raw = np.frombuffer((ctypes.c_uint8 * total).from_address(self.start), dtype=U8)
        self.views = {w: raw.view(t) for w, t in UNSIGNED.items()}


class Global:
    """Device memory: the buffers of a launch, found by address."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.bases = np.zeros(0, U64)

    def add(self, name: str, address: int, size: int) -> None:
        if size <= 0 or any(r.base == address and r.size >= size for r in self.regions):
            return
        self.regions = [r for r in self.regions if r.base != address]
        self.regions.append(Region(name, address, size))
        self.regions.sort(key=lambda r: r.base)
        self.bases = np.array([r.base for r in self.regions], U64)

    def _fault(self, vm, what: str, address: np.ndarray, bad: np.ndarray, width: int, lanes) -> None:
        i = int(np.flatnonzero(bad)[0])
        a = int(address[i])
        near = min(self.regions, key=lambda r: min(abs(a - r.base), abs(a - r.base - r.size)), default=None)
        where = "no buffers" if near is None else (
            f"{near.name} [{near.size} bytes] at {a - near.base:+d}" + (" (past its end)" if a >= near.base + near.size else "")
        )
        raise MemoryFault(f"{vm.where()}: {what} of {width} bytes by {vm.who(lanes[i])} at {a:#x}: nearest buffer {where}; {int(bad.sum())} lanes")

    def find(self, vm, address: np.ndarray, width: int, lanes: np.ndarray, what: str, size: np.ndarray | None = None):
        """[(region, selection or None, index)] of accesses; raises outside bounds. `size` bytes are touched, not width."""
        odd = (address & U64(width - 1)) != 0
        if odd.any():
            self._fault(vm, f"misaligned {what}", address, odd, width, lanes)
        if not self.regions:
            self._fault(vm, what, address, np.ones(len(address), bool), width, lanes)
        low, high = int(address.min()), int(address.max())
        at = int(np.searchsorted(self.bases, low, side="right")) - 1
        r = self.regions[max(at, 0)]
        if at >= 0 and high + width <= r.base + r.size:
            return [(r, None, ((address - U64(r.start)) >> U64(width.bit_length() - 1)).astype(np.int64))]
        which = np.searchsorted(self.bases, address, side="right").astype(np.int64) - 1
        ends = np.array([r.base + r.size for r in self.regions], U64)
        extent = np.full(len(address), width, U64) if size is None else size.astype(U64)
        bad = (which < 0) | (address + extent > ends[np.maximum(which, 0)])
        if bad.any():
            self._fault(vm, f"out-of-bounds {what}", address, bad, width, lanes)
        out = []
        for k in np.unique(which):
            pick = np.flatnonzero(which == k)
            r = self.regions[k]
            out.append((r, pick, ((address[pick] - U64(r.start)) >> U64(width.bit_length() - 1)).astype(np.int64)))
        return out

    def load(self, vm, address, width, lanes, what="ld.global"):
        found = self.find(vm, address, width, lanes, what)
        if found[0][1] is None:
            r, _, i = found[0]
            return r.views[width][i]
        out = np.empty(len(address), UNSIGNED[width])
        for r, pick, i in found:
            out[pick] = r.views[width][i]
        return out

    def store(self, vm, address, values, width, lanes):
        for r, pick, i in self.find(vm, address, width, lanes, "st.global"):
            part = values if pick is None else values[pick]
            who = lanes if pick is None else lanes[pick]
            if vm.check_global_races:
                if r.writers is None:
                    r.writers = np.zeros((r.size + 31) // 2, np.int32)
                cta = (vm.cta_id[who] + 1).astype(np.int32)
                for half in range(max(1, width // 2)):
                    slot = i * width // 2 + half
                    old = r.writers[slot]
                    clash = (old != 0) & (old != cta)
                    if width > 1 and clash.any():
                        raise MemoryFault(f"{vm.where()}: {r.name} is written by CTA {int(old[clash][0]) - 1} and by {vm.who(who[np.flatnonzero(clash)[0]])}")
                    r.writers[slot] = cta
            r.views[width][i] = part
