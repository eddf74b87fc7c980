"""tcgen05 (sm_100): tensor memory, and products that last until their mbarrier is waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..memory import MemoryFault
from ..operands import F32, address_of, dst, pred, src, vector, whole_warps, widen_e4m3
from ..parse import Instr, PtxError
from ..shared import PENDING
from .mbarrier import barrier_at
from .mma import WIDEN, product
from .tiles import K, swizzle_width, tile

if TYPE_CHECKING:
    from ..machine import Machine
    from ..operands import Action

LANES, COLUMNS = 128, 512
_WIDTHS = {0: 1, 2: 8, 4: 4, 6: 2}
# what tensor memory holds before it is written: a NaN
_UNWRITTEN = 0x7FC0DEAD
# columns of tensor memory that an operand of 16 half-precision values takes, or of 32 in 8 bits
_A_COLUMNS = K // 2
# kind -> code of a type -> bits of an element, and them as float32. Of 8 bits also others exist, e5m2 and narrower ones
_TYPES = {
    "kind__f16": {0: (np.uint16, WIDEN["f16"]), 1: (np.uint16, WIDEN["bf16"])},
    "kind__f8f6f4": {0: (np.uint8, widen_e4m3)},
}


def tcgen05(ins: Instr) -> Action:
    """Tensor memory given out, read, written, multiplied; products committed to an mbarrier."""
    what = ins.parts[1]
    if what in ("wait__ld", "wait__st", "relinquish_alloc_permit") or what.startswith("fence"):
        return lambda vm: None
    known = {"alloc": _alloc, "dealloc": _dealloc, "commit": _commit, "ld": _access, "st": _access, "mma": _mma}
    if what not in known:
        raise PtxError(f"tcgen05.{what}")
    return known[what](ins)


def _alloc(ins: Instr) -> Action:
    at, count = address_of(ins.ops[0], 32), ins.ops[1].value
    if count & (count - 1) or not 32 <= count <= COLUMNS:
        raise PtxError(f"tcgen05.alloc of {count} columns")

    def run(vm: Machine) -> None:
        lanes = whole_warps(vm, vm.lanes())[:, 0]
        address = at(vm).reshape(-1, 32)[:, 0]
        if vm.tmem is None or vm.columns is None:
            vm.tmem = np.full((int(vm.cta_slot[-1]) + 1, LANES, COLUMNS), _UNWRITTEN, np.uint32)
            vm.columns = np.zeros(len(vm.tmem), np.int64)
        start = vm.columns[vm.cta_slot[lanes]]
        if (start + count > COLUMNS).any():
            raise PtxError(f"{vm.where()}: tensor memory is full")
        vm.columns[vm.cta_slot[lanes]] += count
        vm.shared.store(address, start.astype(np.uint32), 4, lanes, "tcgen05.alloc")

    return run


def _dealloc(ins: Instr) -> Action:
    count = ins.ops[1].value

    def run(vm: Machine) -> None:
        _, columns = _tensor_memory(vm)
        lanes = whole_warps(vm, vm.lanes())[:, 0]
        slots = vm.cta_slot[lanes]
        others = np.arange(vm.tmem_epoch.shape[1])[None, :] != vm.warp[lanes][:, None]
        if (others & (vm.tmem_epoch[slots] == vm.shared.epoch[slots][:, None])).any():
            raise MemoryFault(f"{vm.where()}: another warp may still use tensor memory (no barrier between)")
        columns[slots] -= count

    return run


def _commit(ins: Instr) -> Action:
    forms = [("b64",), ("shared__cluster", "b64")]
    if ins.parts[2:4] != ("cta_group__1", "mbarrier__arrive__one") or ins.parts[4:] not in forms:
        raise PtxError("form of tcgen05.commit")
    at = address_of(ins.ops[0], 64 if ins.parts[4] == "b64" else 32)

    def run(vm: Machine) -> None:
        for lane, address in zip(vm.lanes().tolist(), at(vm).tolist(), strict=True):
            barrier = barrier_at(vm, lane, address)
            slot = int(vm.cta_slot[lane])
            barrier.reads += [(granules, warp) for owner, granules, warp in vm.tc_reads if owner == slot]
            vm.tc_reads = [read for read in vm.tc_reads if read[0] != slot]
            # the later commit covers what the earlier ones do
            vm.tc_columns = {key: barrier if key[0] == slot else owner for key, owner in vm.tc_columns.items()}
            barrier.arrive()

    return run


def _tensor_memory(vm: Machine) -> tuple[np.ndarray, np.ndarray]:
    if vm.tmem is None or vm.columns is None:
        raise PtxError(f"{vm.where()}: tensor memory that was not allocated")
    return vm.tmem, vm.columns


def _access(ins: Instr) -> Action:
    """tcgen05.ld and tcgen05.st: a warp and its quarter of the lanes."""
    store, shape = ins.parts[1] == "st", ins.parts[4]
    registers = vector(ins.ops[-1] if store else ins.ops[0])
    at = address_of(ins.ops[0] if store else ins.ops[1], 32)
    if shape not in ("32x32b", "16x32bx2") or ins.parts[5] != f"x{len(registers)}":
        raise PtxError("shape of tcgen05.ld or st")
    # columns from the first half of the warp's lanes to the second
    apart = ins.ops[1 if store else 2].value if shape == "16x32bx2" else 0
    reads, writes = [src(op, 32) for op in registers if store], [dst(op, 32) for op in registers if not store]

    def run(vm: Machine) -> None:
        tmem, columns = _tensor_memory(vm)
        address, lanes = whole_warps(vm, at(vm)), vm.lanes()
        if (address != address[:, :1]).any():
            raise PtxError(f"{vm.where()}: tensor memory address differs inside a warp")
        base = address.reshape(-1).astype(np.int64)
        row, column, inside = base >> 16, base & 0xFFFF, lanes % 32
        if shape == "32x32b":
            row = row + inside
        else:
            row, column = row + inside % 16, column + inside // 16 * apart
        slot = vm.cta_slot[lanes]
        if (row // 32 != vm.warp[lanes] % 4).any():
            raise PtxError(f"{vm.where()}: a warp outside its quarter of tensor memory")
        if (column + len(registers) > columns[slot]).any():
            raise PtxError(f"{vm.where()}: tensor memory that was not allocated")
        vm.tmem_epoch[slot, vm.warp[lanes]] = vm.shared.epoch[slot]
        first, last = int(column.min()), int(column.max()) + len(registers)
        busy = [key for key in vm.tc_columns if first < key[2] and key[1] < last and (slot == key[0]).any()]
        if busy:
            raise MemoryFault(
                f"{vm.where()}: tensor memory columns {first} to {last} of {vm.who(lanes[0])} while a product that "
                "nobody waited for uses them"
            )
        for i, read in enumerate(reads):
            tmem[slot, row, column + i] = read(vm)
        if not store:
            block = tmem[slot[:, None], row[:, None], column[:, None] + np.arange(len(registers))]
            for i, write in enumerate(writes):
                write(vm, np.ascontiguousarray(block[:, i]))

    return run


class _Shape:
    """What an instruction descriptor says: rows, columns and types of a product with float32 accumulators."""

    def __init__(self, vm: Machine, bits: np.ndarray, kind: str) -> None:
        if (bits != bits[0]).any():
            raise PtxError(f"{vm.where()}: instruction descriptors differ")
        b = int(bits[0])
        accumulator, a_type, b_type = b >> 4 & 3, b >> 7 & 7, b >> 10 & 7
        # no sparsity, no saturation, no negation
        if accumulator != 1 or a_type != b_type or a_type not in _TYPES[kind] or b & 15 or b >> 13 & 3:
            raise PtxError(f"{vm.where()}: instruction descriptor {b:#x}")
        self.raw, self.convert = _TYPES[kind][a_type]
        self.n, self.m = (b >> 17 & 63) << 3, (b >> 24 & 31) << 4
        self.a_mn_major, self.b_mn_major = bool(b >> 15 & 1), bool(b >> 16 & 1)
        if self.raw == np.uint8 and (self.a_mn_major or self.b_mn_major):
            # they may, but nothing here has 8-bit operands whose K is not innermost
            raise PtxError(f"{vm.where()}: 8-bit operand that is MN major")
        if self.m not in (64, 128) or self.n % 8:
            raise PtxError(f"{vm.where()}: tcgen05.mma of {self.m} x {self.n}")

    def place(self, vm: Machine, address: np.ndarray) -> tuple[np.ndarray, int]:
        """(lanes of the rows, first column) of an operand in tensor memory."""
        base, column = address.astype(np.int64) >> 16, address.astype(np.int64) & 0xFFFF
        if (base != base[0]).any() or (column != column[0]).any():
            raise PtxError(f"{vm.where()}: tensor memory addresses differ between CTAs")
        if base[0] and (self.m == 128 or base[0] != 16):
            raise PtxError(f"{vm.where()}: tensor memory lane {base[0]} for {self.m} rows")
        rows = np.arange(self.m)
        if self.m == 64:
            rows = rows // 16 * 32 + rows % 16
        return rows + int(base[0]), int(column[0])


def _mma(ins: Instr) -> Action:
    """d (+)= a @ b, d in tensor memory, a there or in shared memory, b in shared memory."""
    kind = ins.parts[-1]
    if ins.parts[2:-1] != ("cta_group__1",) or kind not in _TYPES:
        raise PtxError("kind of tcgen05.mma")
    d, a, b, descriptor, accumulate = ins.ops
    at, from_tmem = address_of(d, 32), a.kind == "mem"
    read_a = address_of(a, 32) if from_tmem else src(a, 64)
    read_b, read_shape, keep = src(b, 64), src(descriptor, 32), pred(accumulate)

    def run(vm: Machine) -> None:
        tmem, columns = _tensor_memory(vm)
        lanes = vm.lanes()
        slots = vm.cta_slot[lanes]
        if len(np.unique(slots)) != len(slots):
            raise PtxError(f"{vm.where()}: tcgen05.mma by more than one thread of a CTA")
        shape = _Shape(vm, vm.full(read_shape(vm)), kind)
        if from_tmem:
            rows, column = shape.place(vm, read_a(vm))
            vm.tc_columns |= {(s, column, column + _A_COLUMNS): None for s in slots.tolist()}
            raw = np.ascontiguousarray(tmem[slots][:, rows, column : column + _A_COLUMNS])
        else:
            raw = _operand(vm, vm.full(read_a(vm)), lanes, shape.m, shape.a_mn_major, "tcgen05 A")
        x = shape.convert(raw.view(shape.raw))
        w = _operand(vm, vm.full(read_b(vm)), lanes, shape.n, shape.b_mn_major, "tcgen05 B")
        w = shape.convert(w.view(shape.raw))
        y = product(x, w.transpose(0, 2, 1))
        rows, column = shape.place(vm, at(vm))
        if column + shape.n > int(columns[slots].min()):
            raise PtxError(f"{vm.where()}: tensor memory that was not allocated")
        vm.tc_columns |= {(s, column, column + shape.n): None for s in slots.tolist()}
        where = (slots[:, None, None], rows[None, :, None], np.arange(column, column + shape.n))
        add = np.broadcast_to(keep(vm), (vm.n,))[:, None, None]
        tmem[where] = np.where(add, tmem[where].view(F32) + y, y).astype(F32).view(np.uint32)

    return run


def _operand(
    vm: Machine, descriptors: np.ndarray, lanes: np.ndarray, rows: int, mn_major: bool, what: str
) -> np.ndarray:
    bits = descriptors.astype(np.int64)
    if (bits >> 46 & 7 != 1).any() or (bits >> 52 & 1).any():
        raise PtxError(f"{vm.where()}: {what} descriptor version")
    width = swizzle_width(vm, bits >> 61 & 7, _WIDTHS, what)
    return tile(vm, bits, width, lanes, rows, mn_major, what, _note)


def _note(vm: Machine, flat: np.ndarray, lanes: np.ndarray, askers: np.ndarray) -> None:
    """The products read until the mbarrier that they are committed to is waited for."""
    shared = vm.shared
    state = shared.granules(flat, 16, lanes)
    if state is None:
        return
    # the tensor core is another reader than the thread that asks: data of other warps needs a barrier either way
    shared.note_read(flat, 16, lanes)
    touched, warp, _ = state
    shared.read_epoch[warp[:, None], touched] = PENDING
    slots = vm.cta_slot[lanes[: len(touched)]]
    for slot in np.unique(slots).tolist():
        mine = slots == slot
        vm.tc_reads.append((slot, touched[mine].reshape(-1), int(warp[mine][0])))
