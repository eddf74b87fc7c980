"""Instructions of a whole warp: shuffles, elections, matrices from and to shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..memory import UNSIGNED
from ..operands import Op, address_of, dst, src, vector, whole_warps
from ..parse import Instr, PtxError

if TYPE_CHECKING:
    from ..machine import Machine
    from ..operands import Action

_LANE = np.arange(32, dtype=np.int64)


def shfl(ins: Instr) -> Action:
    """shfl.sync: the value of another lane of the warp."""
    mode, to = ins.parts[2], ins.ops[0]
    first, second = to.value if to.kind == "vec" else (to, Op("sink"))
    out, out_ok = dst(first, 32), dst(second, 1)
    value, by, clamp = src(ins.ops[1], 32), src(ins.ops[2], 32), src(ins.ops[3], 32)

    def of_warps(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.int64)
        return x.reshape(-1, 1) if len(x) == 1 else x.reshape(-1, 32)

    def run(vm: Machine) -> None:
        x = whole_warps(vm, vm.full(value(vm)))
        distance, limits = of_warps(by(vm)) & 31, of_warps(clamp(vm))
        bound, segment = limits & 31, limits >> 8 & 31
        top = (_LANE & segment) | (bound & ~segment)
        if mode == "up":
            other = _LANE - distance
            ok = other >= top
        else:
            other = {
                "bfly": _LANE ^ distance,
                "idx": (_LANE & segment) | (distance & ~segment),
                "down": _LANE + distance,
            }[mode]
            ok = other <= top
        other = np.broadcast_to(np.where(ok, other, _LANE), x.shape)
        out(vm, np.ascontiguousarray(np.take_along_axis(x, other, 1)).reshape(-1))
        out_ok(vm, np.broadcast_to(ok, x.shape).reshape(-1))

    return run


def elect(ins: Instr) -> Action:
    """elect.sync: the first lane of each warp."""
    lane_op, pred_op = ins.ops[0].value
    out, out_chosen = dst(lane_op, 32), dst(pred_op, 1)

    def run(vm: Machine) -> None:
        lanes = whole_warps(vm, vm.lanes())
        out(vm, np.zeros(1, np.uint32))
        out_chosen(vm, (lanes == lanes[:, :1]).reshape(-1))

    return run


def _rows(vm: Machine, address: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(addresses of the rows of `count` matrices, lanes that give them): 8 lanes of each warp for a matrix."""
    addresses, lanes = whole_warps(vm, address)[:, : 8 * count], vm.lanes().reshape(-1, 32)[:, : 8 * count]
    return np.ascontiguousarray(addresses).reshape(-1), np.ascontiguousarray(lanes).reshape(-1)


def ldmatrix(ins: Instr) -> Action:
    """8x8 matrices of 16-bit elements from shared memory, rows of 16 bytes."""
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16":
        raise PtxError("ldmatrix shape")
    outs, transposed, at = [dst(op, 32) for op in vector(ins.ops[0])], "trans" in ins.parts, address_of(ins.ops[1], 32)

    def run(vm: Machine) -> None:
        address, lanes = _rows(vm, at(vm), len(outs))
        rows = vm.shared.load(address, 16, lanes, "ldmatrix").view(np.uint16).reshape(-1, len(outs), 8, 8)
        for i, out in enumerate(outs):
            matrix = rows[:, i].transpose(0, 2, 1) if transposed else rows[:, i]
            out(vm, np.ascontiguousarray(matrix).view(np.uint32).reshape(-1))

    return run


def stmatrix(ins: Instr) -> Action:
    """8x8 matrices of 16-bit elements to shared memory, rows of 16 bytes."""
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16":
        raise PtxError("stmatrix shape")
    values, transposed, at = (
        [src(op, 32) for op in vector(ins.ops[1])],
        "trans" in ins.parts,
        address_of(ins.ops[0], 32),
    )

    def run(vm: Machine) -> None:
        address, lanes = _rows(vm, at(vm), len(values))
        rows = np.empty((vm.n // 32, len(values), 8, 8), np.uint16)
        for i, read in enumerate(values):
            matrix = np.ascontiguousarray(vm.full(read(vm))).view(np.uint16).reshape(-1, 8, 8)
            rows[:, i] = matrix.transpose(0, 2, 1) if transposed else matrix
        vm.shared.store(address, rows.reshape(-1, 8).view(UNSIGNED[16])[:, 0], 16, lanes, "stmatrix")

    return run
