"""Global memory: the buffers of a launch, found by address, with every access checked."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import PtxError

if TYPE_CHECKING:
    from .machine import Machine

# an access of 16 bytes is one element, too
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
_MANY = np.int32(-1)
Found = list[tuple["Region", "np.ndarray | None", np.ndarray]]


class MemoryFault(PtxError):
    """An access outside every buffer, misaligned, racing, or of memory that was never written."""


class Shadow:
    """Which bytes of a tensor have been written, over several launches; `start` is a multiple of 16."""

    def __init__(self, base: int, size: int) -> None:
        self.base, self.size = base, size
        self.start = base & ~15
        self.written = np.zeros((base + size + 15 & ~15) - self.start, np.uint8)

    def covers(self, base: int, size: int) -> bool:
        return self.base <= base and base + size <= self.base + self.size

    def fill(self, base: int, size: int) -> None:
        """Mark bytes as written."""
        self.written[base - self.start :][:size] = 1

    def of(self, start: int, size: int) -> np.ndarray:
        """The marks of `size` bytes at `start`, a multiple of 16."""
        return self.written[start - self.start :][:size]


class Region:
    """One buffer that a kernel may touch.

    Args:
        unit: bytes of an element, over which two CTAs are told apart.
        marks: which of its bytes have been written, where that is known.

    Attributes:
        views: the memory as unsigned elements of 1 to 16 bytes.
        aliased: whether two arguments are this buffer; then reads are remembered, too.
    """

    def __init__(self, name: str, base: int, size: int, unit: int, shadow: Shadow | None) -> None:
        self.name, self.base, self.size, self.unit = name, base, size, unit
        self.end = base + size
        self.start = base & ~15
        total = (self.end + 15 & ~15) - self.start
        raw = np.frombuffer((ctypes.c_uint8 * total).from_address(self.start), dtype=np.uint8)
        self.views = {width: raw.view(dtype) for width, dtype in UNSIGNED.items()}
        self.marks = None if shadow is None else _as_elements(shadow.of(self.start, total))
        self.aliased = False
        self._total = total
        self._writers: np.ndarray | None = None
        self._readers: np.ndarray | None = None

    def note_read(self, vm: Machine, index: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """Refuse what was never written, or written by another CTA of this launch."""
        if self.marks is not None:
            unwritten = self.marks[width][index] != _ALL[width]
            if unwritten.any():
                self._fault(vm, "read of memory that was never written", unwritten, index, width, lanes)
        if self._writers is None and not self.aliased:
            return
        cta = (vm.cta_id[lanes] + 1).astype(np.int32)
        for slot in self._slots(index, width):
            if self._writers is not None:
                writer = self._writers[slot]
                bad = (writer != 0) & (writer != cta)
                if bad.any():
                    self._fault(
                        vm, f"read races with a write by CTA {int(writer[bad][0]) - 1}", bad, index, width, lanes
                    )
            if self.aliased:
                if self._readers is None:
                    self._readers = np.zeros(self._total // self.unit, np.int32)
                before = self._readers[slot]
                self._readers[slot] = np.where((before == 0) | (before == cta), cta, _MANY)

    def note_write(self, vm: Machine, index: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """Refuse what another CTA of this launch writes, or has read."""
        if self.marks is not None:
            self.marks[width][index] = _ALL[width]
        if self._writers is None:
            self._writers = np.zeros(self._total // self.unit, np.int32)
        cta = (vm.cta_id[lanes] + 1).astype(np.int32)
        for slot in self._slots(index, width):
            before = self._writers[slot]
            bad = (before != 0) & (before != cta)
            self._writers[slot] = cta
            bad |= self._writers[slot] != cta
            if bad.any():
                self._fault(vm, "write races with a write by another CTA", bad, index, width, lanes)
            if self._readers is not None:
                reader = self._readers[slot]
                bad = (reader != 0) & (reader != cta)
                if bad.any():
                    self._fault(vm, "write races with a read by another CTA", bad, index, width, lanes)

    def store(self, vm: Machine, index: np.ndarray, values: np.ndarray, width: int, lanes: np.ndarray) -> None:
        self.note_write(vm, index, width, lanes)
        view = self.views[width]
        view[index] = values
        other = ~same_bits(view[index], np.ascontiguousarray(values))
        if other.any():
            self._fault(vm, "two threads write different values at once", other, index, width, lanes)

    def _slots(self, index: np.ndarray, width: int) -> list[np.ndarray]:
        count = max(1, width // self.unit)
        first = index * width // self.unit
        return [first + i for i in range(count)]

    def _fault(self, vm: Machine, what: str, bad: np.ndarray, index: np.ndarray, width: int, lanes: np.ndarray) -> None:
        at = int(np.flatnonzero(bad)[0])
        address = self.start + int(index[at]) * width
        raise MemoryFault(
            f"{vm.where()}: {what}: {width} bytes by {vm.who(lanes[at])} at {address:#x}, "
            f"{self.name}{address - self.base:+d} of {self.size} bytes; {int(bad.sum())} lanes"
        )


class Global:
    """Device memory: the buffers of one launch."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._bases = np.zeros(0, np.uint64)
        self._ends = np.zeros(0, np.uint64)

    def add(self, name: str, address: int, size: int, unit: int = 2, shadow: Shadow | None = None) -> None:
        """Make `size` bytes known, which an argument of this name points at.

        Raises:
            PtxError: they overlap another argument without being the same buffer.
        """
        if size <= 0:
            return
        for other in self.regions:
            if other.base == address and other.size == size:
                other.aliased = True
                return
            if other.base < address + size and address < other.end:
                raise PtxError(f"arguments {other.name} and {name} overlap")
        self.regions.append(Region(name, address, size, min(unit, 2), shadow))
        self.regions.sort(key=lambda r: r.base)
        self._bases = np.array([r.base for r in self.regions], np.uint64)
        self._ends = np.array([r.end for r in self.regions], np.uint64)

    def load(
        self, vm: Machine, address: np.ndarray, width: int, lanes: np.ndarray, what: str = "ld.global"
    ) -> np.ndarray:
        """Elements of `width` bytes at these addresses."""
        found = self._find(vm, address, width, lanes, what)
        for region, pick, index in found:
            region.note_read(vm, index, width, lanes if pick is None else lanes[pick])
        if found[0][1] is None:
            region, _, index = found[0]
            return region.views[width][index]
        out = np.empty(len(address), UNSIGNED[width])
        for region, pick, index in found:
            out[pick] = region.views[width][index]
        return out

    def store(self, vm: Machine, address: np.ndarray, values: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """Write elements of `width` bytes."""
        for region, pick, index in self._find(vm, address, width, lanes, "st.global"):
            if pick is None:
                region.store(vm, index, values, width, lanes)
            else:
                region.store(vm, index, values[pick], width, lanes[pick])

    def _find(self, vm: Machine, address: np.ndarray, width: int, lanes: np.ndarray, what: str) -> Found:
        """[(region, selection or None, index of the element)] of accesses inside bounds."""
        vm.check_waited(lanes)
        odd = (address & np.uint64(width - 1)) != 0
        if odd.any():
            self._fault(vm, f"misaligned {what}", odd, address, width, lanes)
        if not self.regions:
            self._fault(vm, f"out-of-bounds {what}", np.ones(len(address), bool), address, width, lanes)
        low, high = int(address.min()), int(address.max())
        at = int(np.searchsorted(self._bases, np.uint64(low), side="right")) - 1
        if at >= 0 and high + width <= self.regions[at].end:
            return [(self.regions[at], None, _index(self.regions[at], address, width))]
        which = np.searchsorted(self._bases, address, side="right").astype(np.int64) - 1
        bad = (which < 0) | (address + np.uint64(width) > self._ends[np.maximum(which, 0)])
        if bad.any():
            self._fault(vm, f"out-of-bounds {what}", bad, address, width, lanes)
        found: Found = []
        for k in np.unique(which).tolist():
            pick = np.flatnonzero(which == k)
            found.append((self.regions[k], pick, _index(self.regions[k], address[pick], width)))
        return found

    def _fault(
        self, vm: Machine, what: str, bad: np.ndarray, address: np.ndarray, width: int, lanes: np.ndarray
    ) -> None:
        i = int(np.flatnonzero(bad)[0])
        at = int(address[i])
        near = min(self.regions, key=lambda r: min(abs(at - r.base), abs(at - r.end)), default=None)
        where = "no buffers"
        if near is not None:
            where = f"{near.name}{at - near.base:+d} of {near.size} bytes"
        raise MemoryFault(
            f"{vm.where()}: {what} of {width} bytes by {vm.who(lanes[i])} at {at:#x}, nearest buffer {where}; "
            f"{int(bad.sum())} lanes"
        )


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether the bits of each element are equal."""
    if a.dtype.itemsize < 16:
        return a == b
    return (a.view(np.uint64).reshape(-1, 2) == b.view(np.uint64).reshape(-1, 2)).all(1)


def _as_elements(marks: np.ndarray) -> dict[int, np.ndarray]:
    return {width: marks.view(dtype) for width, dtype in UNSIGNED.items()}


def _index(region: Region, address: np.ndarray, width: int) -> np.ndarray:
    return ((address - np.uint64(region.start)) >> np.uint64(width.bit_length() - 1)).astype(np.int64)


# every byte of an element written
_ALL = {width: marks[0] for width, marks in _as_elements(np.ones(16, np.uint8)).items()}
