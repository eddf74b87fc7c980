"""wgmma (sm_90): products of a warpgroup, operands in shared memory, which are read until the group is waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..operands import F32, dst, pred, src, vector, widen_e4m3
from ..parse import Instr, PtxError
from ..shared import PENDING
from .mma import WIDEN, product
from .tiles import K, swizzle_width, tile

if TYPE_CHECKING:
    from ..machine import Machine
    from ..operands import Action

_WIDTHS = {0: 1, 1: 8, 2: 4, 3: 2}
_WARPS = 4


def wgmma(ins: Instr) -> Action:
    """Products, groups of them, and waits."""
    what = ins.parts[1]
    if what == "fence":
        return lambda vm: None
    if what == "commit_group":

        def commit(vm: Machine) -> None:
            vm.wg_commits = vm.wg_commits.copy()
            vm.wg_commits[vm.lanes()] += 1

        return commit
    if what == "wait_group":
        keep = ins.ops[0].value
        return lambda vm: _wait(vm, keep)
    if what != "mma_async":
        raise PtxError(f"wgmma.{what}")
    return _mma_async(ins)


def _mma_async(ins: Instr) -> Action:
    parts = ins.parts
    shape = next(part for part in parts if part.startswith("m64n"))
    n, k = map(int, shape[4:].split("k"))
    type_name = parts[-2]
    bytes_each = 1 if type_name == "e4m3" else 2
    if k != 2 * K // bytes_each or type_name not in (*WIDEN, "e4m3") or parts[-1] != type_name or parts[-3] != "f32":
        raise PtxError(f"wgmma {shape} of {type_name}")
    convert = WIDEN.get(type_name, widen_e4m3)
    raw = np.uint8 if bytes_each == 1 else np.uint16
    d, a, b, scale_d = ins.ops[:4]
    registers, flags = vector(d), [op.value for op in ins.ops[4:]]
    if len(registers) != n // 2:
        raise PtxError("accumulators of wgmma")
    if flags[:2] != [1, 1]:
        raise PtxError("wgmma with negated operands")
    in_registers = a.kind == "vec"
    # 8-bit operands have K innermost
    transposes = flags[2:] or [0, 0]
    transposed_a, transposed_b = (0, transposes[0]) if in_registers else transposes
    outs, accumulators = [dst(op, 32) for op in registers], [src(op, 32) for op in registers]
    read_a = [src(op, 32) for op in a.value] if in_registers else [src(a, 64)]
    read_b, accumulate = src(b, 64), pred(scale_d)

    def run(vm: Machine) -> None:
        groups = _warpgroups(vm)
        if in_registers:
            # half of k, half of m, group, warp, row, thread of the row, element of its register
            m = convert(np.stack([vm.full(read(vm)) for read in read_a]).view(raw))
            m = m.reshape(2, 2, -1, _WARPS, 8, 4, 4 // bytes_each).transpose(2, 3, 1, 4, 0, 5, 6)
            x = np.ascontiguousarray(m).reshape(-1, 64, k)
        else:
            x = convert(_operand(vm, vm.full(read_a[0](vm)), groups, 64, bool(transposed_a), "wgmma A").view(raw))
        w = convert(_operand(vm, vm.full(read_b(vm)), groups, n, bool(transposed_b), "wgmma B").view(raw))
        # group, warp, half of m, row, eighth of n, thread of the row, element of the pair
        y = product(x, w.transpose(0, 2, 1)).reshape(-1, _WARPS, 2, 8, n // 8, 4, 2)
        add = accumulate(vm)
        if (add != add[0]).any():
            raise PtxError(f"{vm.where()}: scale-d differs between threads")
        for i, out in enumerate(outs):
            part = np.ascontiguousarray(y[:, :, i // 2 % 2, :, i // 4, :, i % 2]).reshape(-1)
            out(vm, accumulators[i](vm).view(F32) + part if add[0] else part)

    return run


def _warpgroups(vm: Machine) -> np.ndarray:
    """First lane of each warpgroup; every one must be whole."""
    lanes = vm.lanes().reshape(-1, 128) if vm.n % 128 == 0 else None
    if lanes is None or (lanes[:, 0] % 128).any() or (np.diff(lanes) != 1).any():
        raise PtxError(f"{vm.where()}: wgmma with part of a warpgroup")
    return lanes[:, 0]


def _operand(
    vm: Machine, descriptors: np.ndarray, groups: np.ndarray, rows: int, mn_major: bool, what: str
) -> np.ndarray:
    per_group = descriptors.reshape(-1, 128)
    if (per_group != per_group[:, :1]).any():
        raise PtxError(f"{vm.where()}: {what} descriptor differs inside a warpgroup")
    one = per_group[:, 0].astype(np.int64)
    width = swizzle_width(vm, one >> 62 & 3, _WIDTHS, what)
    return tile(vm, one, width, groups, rows, mn_major, what, _note)


def _note(vm: Machine, flat: np.ndarray, lanes: np.ndarray, groups: np.ndarray) -> None:
    """The reads last until the group is waited for: a write before that is a race."""
    shared = vm.shared
    state = shared.granules(flat, 16, lanes)
    if state is None:
        return
    shared.note_read(flat, 16, lanes)
    touched, warp, _ = state
    _mark(vm, touched, warp, PENDING)
    mine = lanes[: len(touched)]
    vm.wg_reads.append([mine, vm.wg_commits[mine], touched, warp])


def _mark(vm: Machine, touched: np.ndarray, warp: np.ndarray, epoch: np.ndarray | np.int32) -> None:
    for w in range(_WARPS):
        vm.shared.read_epoch[(warp + w)[:, None], touched] = epoch


def _wait(vm: Machine, keep: int) -> None:
    """End the reads of all groups of the active lanes but the newest `keep`."""
    active = np.zeros(vm.lane_count, bool)
    active[vm.lanes()] = True
    left = []
    for lanes, group, touched, warp in vm.wg_reads:
        done = (group < vm.wg_commits[lanes] - keep) & active[lanes]
        if done.any():
            epoch = vm.shared.epoch[vm.cta_slot[lanes[done]]]
            _mark(vm, touched[done], warp[done], epoch[:, None])
        if not done.all():
            left.append([lanes[~done], group[~done], touched[~done], warp[~done]])
    vm.wg_reads = left
    # a granule may be read by a group that goes on as well
    for _, _, touched, warp in left:
        _mark(vm, touched, warp, PENDING)
