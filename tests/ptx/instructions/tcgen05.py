from __future__ import annotations

import numpy as np

def _tcgen05(ins: Instr, program: Program):
    p, what = ins.parts, ins.parts[1]
    if what in ("wait__ld", "wait__st", "relinquish_alloc_permit") or what.startswith("fence"):
        return lambda vm: None
    if what == "alloc":
        at, count = address_of(ins.ops[0], 32), ins.ops[1].value

        def alloc(vm):
            lanes = whole_warps(vm, vm.lanes())[:, 0]
            if count & (count - 1) or not 32 <= count <= 512:
                raise PtxError(f"tcgen05.alloc of {count} columns")
            address = at(vm).reshape(-1, 32)[:, 0]
            if vm.tmem is None:
                vm.tmem = np.full((int(vm.cta_slot[-1]) + 1, 128, 512), 0x7FC0DEAD, np.uint32)
                vm.columns = np.zeros(len(vm.tmem), np.int64)
            start = vm.columns[vm.cta_slot[lanes]]
            if (start + count > 512).any():
                raise PtxError(f"{vm.where()}: tensor memory is full")
            vm.columns[vm.cta_slot[lanes]] += count
            vm.shared.store(address, start.astype(np.uint32), 4, lanes, "tcgen05.alloc")

        return alloc
    if what == "dealloc":
        count = ins.ops[1].value

        def dealloc(vm):
            vm.columns[vm.cta_slot[whole_warps(vm, vm.lanes())[:, 0]]] -= count

        return dealloc
    if what == "commit":
        at = address_of(ins.ops[0], 64)

        def commit(vm):
            for lane, a in zip(vm.lanes().tolist(), at(vm).tolist()):
                b = barrier_at(vm, lane, a)
                slot = int(vm.cta_slot[lane])
                b.reads += [(g, row) for s, g, row in vm.tc_reads if s == slot]
                vm.tc_columns = {k: b if k[0] == slot else v for k, v in vm.tc_columns.items()}
                vm.tc_reads = [r for r in vm.tc_reads if r[0] != slot]
                b.pending -= 1
                b.settle()

        return commit
    if what in ("ld", "st"):
        return _tmem_access(ins)
    if what == "mma":
        return _tcgen05_mma(ins)
    raise PtxError(f"tcgen05.{what}")


def _tmem_access(ins: Instr):
    p, store = ins.parts, ins.parts[1] == "st"
    shape = p[4]
    vec = vector(ins.ops[-1] if store else ins.ops[0])
    at = address_of(ins.ops[0] if store else ins.ops[1], 32)
    split = (ins.ops[1] if store else ins.ops[2]).value if shape == "16x32bx2" else 0
    if shape not in ("32x32b", "16x32bx2") or p[5] != f"x{len(vec)}":
        raise PtxError("tcgen05.ld shape")
    regs = [src(o, 32) for o in vec] if store else [dst(o, 32) for o in vec]

    def run(vm):
        address, lanes = whole_warps(vm, at(vm)), vm.lanes()
        if (address != address[:, :1]).any():
            raise PtxError(f"{vm.where()}: tensor memory address differs inside a warp")
        lane, inside = address.reshape(-1).astype(np.int64) >> 16, lanes % 32
        column = address.reshape(-1).astype(np.int64) & 0xFFFF
        if shape == "32x32b":
            lane = lane + inside
        else:
            lane, column = lane + inside % 16, column + inside // 16 * split
        slot = vm.cta_slot[lanes]
        if (lane // 32 != vm.warp[lanes] % 4).any():
            raise PtxError(f"{vm.where()}: a warp outside its quarter of tensor memory")
        if (column + len(regs) > vm.columns[slot]).any():
            raise PtxError(f"{vm.where()}: tensor memory that was not allocated")
        first, last = int(column.min()), int(column.max()) + len(regs)
        if vm.tc_columns and any(first < k[2] and k[1] < last and (slot == k[0]).any() for k in vm.tc_columns):
            raise MemoryFault(f"{vm.where()}: tensor memory columns {first} to {last} while a product that nobody waited for uses them")
        if store:
            for i, r in enumerate(regs):
                vm.tmem[slot, lane, column + i] = r(vm)
        else:
            block = vm.tmem[slot[:, None], lane[:, None], column[:, None] + np.arange(len(regs))]
            for i, r in enumerate(regs):
                r(vm, np.ascontiguousarray(block[:, i]))

    return run


def _tcgen05_mma(ins: Instr):
    if ins.parts[2:] != ("cta_group__1", "kind__f16"):
        raise PtxError("tcgen05.mma kind")
    d, a, b, i, keep = ins.ops
    at, from_tmem = address_of(d, 32), a.kind == "mem"
    ra, rb, ri, rk = address_of(a, 32) if from_tmem else src(a, 64), src(b, 64), src(i, 32), pred(keep)
    widths = {0: 1, 2: 8, 4: 4, 6: 2}

    def run(vm):
        lanes = vm.lanes()
        slots = vm.cta_slot[lanes]
        if len(np.unique(slots)) != len(slots):
            raise PtxError(f"{vm.where()}: tcgen05.mma by more than one thread of a CTA")
        bits = vm.full(ri(vm))
        if (bits != bits[0]).any():
            raise PtxError("instruction descriptors differ")
        bits = int(bits[0])
        # dtype 1: float32; operand types 0: f16, 1: bf16; no sparsity, no negation
        dtype, ta, tb = bits >> 4 & 3, bits >> 7 & 7, bits >> 10 & 7
        if dtype != 1 or ta != tb or ta > 1 or bits & 7 or bits >> 13 & 3:
            raise PtxError(f"{vm.where()}: instruction descriptor {bits:#x}")
        conv = WIDEN["bf16" if ta else "f16"]
        n, m = (bits >> 17 & 63) << 3, (bits >> 24 & 31) << 4
        if m not in (64, 128) or n % 8:
            raise PtxError(f"{vm.where()}: tcgen05.mma of {m} x {n}")
        rows = np.arange(m)
        rows = rows if m == 128 else rows // 16 * 32 + rows % 16

        def place(address):
            base, column = address.astype(np.int64) >> 16, address.astype(np.int64) & 0xFFFF
            if (base != base[0]).any() or (column != column[0]).any():
                raise PtxError("tensor memory addresses differ between CTAs")
            if base[0] and (m == 128 or base[0] != 16):
                raise PtxError(f"{vm.where()}: tensor memory lane {base[0]} for {m} rows")
            return rows + int(base[0]), int(column[0])

        if from_tmem:
            lane, column = place(ra(vm))
            vm.tc_columns |= {(s, column, column + 8): None for s in slots.tolist()}
            am = conv(np.ascontiguousarray(vm.tmem[slots][:, lane, column : column + 8]).view(np.uint16))
        else:
            am = conv(_blackwell_tile(vm, vm.full(ra(vm)), lanes, m, bits >> 15 & 1, "tcgen05 A", widths))
        bm = conv(_blackwell_tile(vm, vm.full(rb(vm)), lanes, n, bits >> 16 & 1, "tcgen05 B", widths))
        y = np.matmul(am, bm.transpose(0, 2, 1))
        lane, column = place(at(vm))
        if column + n > int(vm.columns[slots].min()):
            raise PtxError(f"{vm.where()}: tensor memory that was not allocated")
        vm.tc_columns |= {(s, column, column + n): None for s in slots.tolist()}
        old = vm.tmem[slots[:, None, None], lane[None, :, None], np.arange(column, column + n)].view(F32)
        add = np.broadcast_to(rk(vm), (vm.n,))[:, None, None]
        vm.tmem[slots[:, None, None], lane[None, :, None], np.arange(column, column + n)] = np.where(add, old + y, y).astype(F32).view(np.uint32)

    return run


def _blackwell_tile(vm, v, lanes, rows, mn_major, what, widths):
    v = v.astype(np.int64)
    if (v >> 46 & 7 != 1).any() or (v >> 52 & 1).any():
        raise PtxError(f"{vm.where()}: {what} descriptor version")
    return tile(vm, v, widths, v >> 61 & 7, lanes, rows, mn_major, what, _tcgen05_note)


def _tcgen05_note(vm: Machine, flat: np.ndarray, lanes: np.ndarray, first: np.ndarray) -> None:
    """The products read until the mbarrier that they are committed to is waited for."""
    shared = vm.shared
    found = shared.granules(flat, 16, lanes)
    if found is None:
        return
    # the tensor core is another reader than the thread that asks: data of other warps needs a barrier either way
    shared.note_read(flat, 16, lanes)
    g, warp, _ = found
    shared.read_epoch[warp[:, None], g] = PENDING
    for slot in np.unique(vm.cta_slot[lanes[: len(g)]]).tolist():
        mine = vm.cta_slot[lanes[: len(g)]] == slot
        vm.tc_reads.append((slot, g[mine].reshape(-1), int(warp[mine][0])))
