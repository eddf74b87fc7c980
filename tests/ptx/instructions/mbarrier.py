from __future__ import annotations

import numpy as np

class Barrier:
    """An mbarrier: arrivals and bytes still expected in the phase, and what is waited for through it."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes, self.phase = 0, 0
        self.copies: list = []  # tensor copies that land when the phase is waited for
        self.reads: list = []  # granules that products read until then

    def settle(self) -> None:
        if self.pending < 0:
            raise PtxError("more arrivals at an mbarrier than it was made for")
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


def barrier_at(vm: Machine, lane: int, address: int) -> Barrier:
    key = (int(vm.cta_slot[lane]), address)
    if key not in vm.barriers:
        raise PtxError(f"{vm.where()}: no mbarrier at shared {address - SHARED_BASE} of {vm.who(lane)}")
    vm.events += 1
    return vm.barriers[key]


def _mbarrier(ins: Instr, program: Program):
    what = ins.parts[1]
    if what == "init":
        at, count = address_of(ins.ops[0], 32), ins.ops[1].value

        def init(vm):
            for lane, a in zip(vm.lanes().tolist(), at(vm).tolist()):
                vm.barriers[(int(vm.cta_slot[lane]), a)] = Barrier(count)

        return init
    if what == "inval":
        at = address_of(ins.ops[0], 32)

        def inval(vm):
            for lane, a in zip(vm.lanes().tolist(), at(vm).tolist()):
                barrier_at(vm, lane, a)
                del vm.barriers[(int(vm.cta_slot[lane]), a)]

        return inval
    if ins.parts[1:3] == ("arrive", "expect_tx"):
        at, n = address_of(ins.ops[1], 32), src(ins.ops[2], 32)

        def expect(vm):
            for lane, a, k in zip(vm.lanes().tolist(), at(vm).tolist(), vm.full(n(vm)).tolist()):
                b = barrier_at(vm, lane, a)
                b.bytes += k
                b.pending -= 1
                b.settle()

        return expect
    if ins.parts[1:3] != ("try_wait", "parity"):
        raise PtxError("mbarrier form")
    out, at, parity = dst(ins.ops[0], 1), address_of(ins.ops[1], 32), src(ins.ops[2], 32)

    def wait(vm):
        lanes, address, p = vm.lanes(), at(vm), vm.full(parity(vm))
        key = vm.cta_slot[lanes] * (1 << 32) + address.astype(np.int64) * 2 + (p & 1)
        done = np.zeros(vm.n, bool)
        kinds, index = np.unique(key, return_inverse=True)
        for k, kind in enumerate(kinds.tolist()):
            mine = index == k
            b = vm.barriers.get((kind >> 32, (kind & 0xFFFFFFFF) >> 1))
            if b is None:
                raise PtxError(f"{vm.where()}: wait for an mbarrier that was not made")
            done[mine] = ok = b.phase != (kind & 1)
            if ok:
                for flat, data, lane in b.copies:
                    vm.shared.views[16][flat >> 4] = data
                    vm.shared.settle_copy(flat, lane)
                for g, row in b.reads:
                    vm.shared.read_epoch[row, g] = -1
                b.copies, b.reads = [], []
                vm.tc_columns = {k: v for k, v in vm.tc_columns.items() if v is not b}
        out(vm, done)

    return wait


def _tensor_copy(ins: Instr, program: Program):
    """cp.async.bulk.tensor.2d from global memory; the box lands when its mbarrier is waited for."""
    if ins.parts[2:8] != ("bulk", "tensor", "2d", "shared__cluster", "global", "mbarrier__complete_tx__bytes"):
        raise PtxError("tensor copy form")
    to, bar = address_of(ins.ops[0], 32), address_of(ins.ops[2], 32)
    desc, (x, y) = src(ins.ops[1].value[0], 64), (src(o, 32) for o in ins.ops[1].value[1].value)

    def copy(vm):
        rows = zip(vm.lanes().tolist(), to(vm).tolist(), vm.full(desc(vm)).tolist(), vm.full(x(vm)).view(np.int32).tolist(),
                   vm.full(y(vm)).view(np.int32).tolist(), bar(vm).tolist())  # fmt: skip
        for lane, where, token, x0, y0, barrier in rows:
            d = vm.descriptors[token]
            data = d.box(x0, y0)  # uint8 [rows, bytes]
            height, width = data.shape
            if where % 128 or width % 16 or width > {0: 256, 1: 32, 2: 64, 3: 128}[d.swizzle]:
                raise PtxError(f"{vm.where()}: tensor copy to {where} of rows of {width} bytes, swizzle {d.swizzle}")
            address = where + np.arange(height)[:, None] * width + np.arange(0, width, 16)[None, :]
            if d.swizzle:
                address = address ^ ((address >> 7 & ((2 << d.swizzle - 1) - 1)) << 4)
            who = np.full(address.size, lane)
            flat = vm.shared.place(address.reshape(-1), 16, who, "tensor copy")
            vm.shared.note_write(flat, 16, who, pending=True)
            vm.shared.views[16][flat >> 4] = np.full(16, 0xFF, np.uint8).view(np.complex128)
            b = barrier_at(vm, lane, barrier)
            b.copies.append((flat, np.ascontiguousarray(data).view(np.complex128).reshape(-1), lane))
            b.bytes -= data.size
            b.settle()

    return copy
