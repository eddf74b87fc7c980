"""mbarriers, and the tensor copies (TMA) that land when their mbarrier is waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..memory import UNSIGNED, MemoryFault
from ..operands import address_of, dst, src
from ..parse import Instr, PtxError
from ..shared import SHARED_BASE
from ..tensor_map import ROW_LIMITS

if TYPE_CHECKING:
    from ..machine import Machine
    from ..operands import Action


class Barrier:
    """An mbarrier of `count` arrivals per phase, made by a warp in an epoch of its CTA.

    Attributes:
        pending, nbytes: arrivals and bytes still expected in this phase.
        copies: tensor copies that land when the phase is waited for.
        reads: (granules, warp) that products read until then.
        waits: epoch in which each warp last waited.
    """

    def __init__(self, count: int, warp: int, epoch: int) -> None:
        self.warp, self.epoch = warp, epoch
        self.count = self.pending = count
        self.nbytes, self.phase = 0, 0
        self.copies: list[Any] = []
        self.reads: list[Any] = []
        self.waits: dict[int, int] = {}

    def settle(self) -> None:
        """Go to the next phase where this one is complete."""
        if self.pending < 0:
            raise PtxError("more arrivals at an mbarrier than it was made for")
        if self.pending == 0 and self.nbytes == 0:
            self.phase ^= 1
            self.pending = self.count

    def arrive(self, nbytes: int = 0) -> None:
        self.nbytes += nbytes
        self.pending -= 1
        self.settle()


def barrier_at(vm: Machine, lane: int, address: int) -> Barrier:
    """The mbarrier of a lane's CTA at this address; something is about to happen to it."""
    key = (int(vm.cta_slot[lane]), address)
    if key not in vm.barriers:
        raise PtxError(f"{vm.where()}: no mbarrier at shared byte {address - SHARED_BASE} of {vm.who(lane)}")
    vm.events += 1
    barrier: Barrier = vm.barriers[key]
    _check_made(vm, barrier, lane)
    return barrier


def _check_made(vm: Machine, barrier: Barrier, lane: int) -> None:
    if barrier.warp != vm.warp[lane] and barrier.epoch == _epoch(vm, lane):
        raise MemoryFault(f"{vm.where()}: {vm.who(lane)} uses an mbarrier that another warp made (no barrier between)")


def _epoch(vm: Machine, lane: int) -> int:
    return int(vm.shared.epoch[vm.cta_slot[lane]])


def mbarrier(ins: Instr) -> Action:
    """Making, ending, arriving with bytes to come, waiting."""
    what = ins.parts[1]
    if what == "init":
        at, count = address_of(ins.ops[0], 32), ins.ops[1].value

        def init(vm: Machine) -> None:
            for lane, address in zip(vm.lanes().tolist(), at(vm).tolist(), strict=True):
                vm.barriers[(int(vm.cta_slot[lane]), address)] = Barrier(count, int(vm.warp[lane]), _epoch(vm, lane))

        return init
    if what == "inval":
        at = address_of(ins.ops[0], 32)

        def inval(vm: Machine) -> None:
            for lane, address in zip(vm.lanes().tolist(), at(vm).tolist(), strict=True):
                waits = barrier_at(vm, lane, address).waits
                if any(warp != vm.warp[lane] and epoch == _epoch(vm, lane) for warp, epoch in waits.items()):
                    raise MemoryFault(f"{vm.where()}: another warp may still wait for this mbarrier")
                del vm.barriers[(int(vm.cta_slot[lane]), address)]

        return inval
    if ins.parts[1:3] == ("arrive", "expect_tx"):
        at, nbytes = address_of(ins.ops[1], 32), src(ins.ops[2], 32)

        def expect(vm: Machine) -> None:
            rows = zip(vm.lanes().tolist(), at(vm).tolist(), vm.full(nbytes(vm)).tolist(), strict=True)
            for lane, address, count in rows:
                barrier_at(vm, lane, address).arrive(count)

        return expect
    if ins.parts[1:] in (("arrive", "shared__cta", "b64"), ("arrive", "shared", "b64")):
        at, times = address_of(ins.ops[1], 32), ins.ops[2].value if len(ins.ops) > 2 else 1

        def arrive(vm: Machine) -> None:
            for lane, address in zip(vm.lanes().tolist(), at(vm).tolist(), strict=True):
                for _ in range(times):
                    barrier_at(vm, lane, address).arrive()

        return arrive
    if ins.parts[1:3] == ("try_wait", "parity"):
        return _wait(ins)
    raise PtxError("form of mbarrier")


def _wait(ins: Instr) -> Action:
    out, at, parity = dst(ins.ops[0], 1), address_of(ins.ops[1], 32), src(ins.ops[2], 32)

    def run(vm: Machine) -> None:
        lanes, address, p = vm.lanes(), at(vm), vm.full(parity(vm))
        keys = vm.cta_slot[lanes] * (1 << 32) + address.astype(np.int64) * 2 + (p & 1)
        done = np.zeros(vm.n, bool)
        kinds, index = np.unique(keys, return_inverse=True)
        for i, kind in enumerate(kinds.tolist()):
            barrier = vm.barriers.get((kind >> 32, (kind & 0xFFFFFFFF) >> 1))
            if barrier is None:
                raise PtxError(f"{vm.where()}: wait for an mbarrier that was not made")
            done[index == i] = passed = barrier.phase != (kind & 1)
            for lane in lanes[index == i][::32].tolist():
                _check_made(vm, barrier, lane)
                barrier.waits[int(vm.warp[lane])] = _epoch(vm, lane)
            if passed:
                _land(vm, barrier)
        out(vm, done)

    return run


def _land(vm: Machine, barrier: Barrier) -> None:
    """What was under way until this phase is over."""
    for flat, data, lane in barrier.copies:
        vm.shared.views[16][flat >> 4] = data
        vm.shared.settle_copy(flat, lane)
    for granules, warp in barrier.reads:
        vm.shared.read_epoch[warp, granules] = -1
    barrier.copies, barrier.reads = [], []
    vm.tc_columns = {columns: owner for columns, owner in vm.tc_columns.items() if owner is not barrier}


def tensor_copy(ins: Instr) -> Action:
    """cp.async.bulk.tensor.2d from global memory; the box lands when its mbarrier is waited for."""
    form = [part for part in ins.parts[2:] if part not in ("shared__cta", "shared__cluster")]
    if form != ["bulk", "tensor", "2d", "global", "mbarrier__complete_tx__bytes"]:
        raise PtxError("form of the tensor copy")
    to, bar = address_of(ins.ops[0], 32), address_of(ins.ops[2], 32)
    descriptor_op, coordinates = ins.ops[1].value
    descriptor = src(descriptor_op, 64)
    x, y = (src(op, 32) for op in coordinates.value)

    def run(vm: Machine) -> None:
        vm.check_waited(vm.lanes())
        rows = zip(
            vm.lanes().tolist(),
            to(vm).tolist(),
            vm.full(descriptor(vm)).tolist(),
            vm.full(x(vm)).view(np.int32).tolist(),
            vm.full(y(vm)).view(np.int32).tolist(),
            bar(vm).tolist(),
            strict=True,
        )
        for lane, where, token, x0, y0, barrier_address in rows:
            if token not in vm.descriptors:
                raise PtxError(f"{vm.where()}: no tensor descriptor at {token:#x}")
            tensor = vm.descriptors[token]
            data = tensor.box(x0, y0)
            height, width = data.shape
            if where % 128 or width % 16 or width > ROW_LIMITS[tensor.swizzle]:
                raise PtxError(
                    f"{vm.where()}: tensor copy to shared byte {where - SHARED_BASE} of rows of {width} bytes, "
                    f"swizzle {tensor.swizzle}"
                )
            address = where + np.arange(height)[:, None] * width + np.arange(0, width, 16)[None, :]
            if tensor.swizzle:
                units = 1 << tensor.swizzle
                address = address ^ ((address >> 7 & (units - 1)) << 4)
            owners = np.full(address.size, lane)
            flat = vm.shared.place(address.reshape(-1), 16, owners, "tensor copy")
            vm.shared.note_write(flat, 16, owners, pending=True)
            vm.shared.views[16][flat >> 4] = np.full(16, 0xFF, np.uint8).view(UNSIGNED[16])
            barrier = barrier_at(vm, lane, barrier_address)
            barrier.copies.append((flat, np.ascontiguousarray(data).view(UNSIGNED[16]).reshape(-1), lane))
            barrier.nbytes -= data.size
            barrier.settle()

    return run
