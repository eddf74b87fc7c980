"""mma.sync: products of fragments in registers, float32 accumulators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..operands import F16, F32, F64, dst, src, vector, whole_warps, widen, widen_e4m3
from ..parse import Instr, PtxError

if TYPE_CHECKING:
    from ..machine import Machine
    from ..operands import Action

Load = Callable[[list[np.ndarray]], np.ndarray]
# 16-bit operands of products as float32
WIDEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": widen,
    "f16": lambda bits: bits.view(F16).astype(F32),
}
_MOST_FRAGMENTS = 64


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 of a @ b, summed in float64: in float32 a row's bits would depend on its place, as BLAS orders sums."""
    return np.matmul(a.astype(F64, copy=False), b.astype(F64, copy=False)).astype(F32)


def mma(ins: Instr) -> Action:
    """d = a @ b + c of 16x8 tiles."""
    parts = ins.parts
    shape = next(part for part in parts if part.startswith("m16n8"))
    scaled = "block_scale" in parts
    d_type, a_type, b_type, c_type = parts[-5:-1] if scaled else parts[-4:]
    if d_type != "f32" or c_type != "f32" or a_type != b_type or "row" not in parts or "col" not in parts:
        raise PtxError("form of mma")
    load_a, load_b = _loaders(shape, a_type)
    factor = _block_scale(ins) if scaled else None
    outs = [dst(op, 32) for op in vector(ins.ops[0])]
    read_a, read_b, read_c = ([src(op, 32) for op in vector(ops)] for ops in ins.ops[1:4])

    def run(vm: Machine) -> None:
        xa, xb = [vm.full(read(vm)) for read in read_a], [vm.full(read(vm)) for read in read_b]
        whole_warps(vm, xa[0])
        # warp, half of m, row, thread of the row, element of the pair
        y = product(_kept(vm, "a", xa, load_a), _kept(vm, "b", xb, load_b)).reshape(-1, 2, 8, 4, 2)
        if factor is not None:
            y = y * factor(vm)
        for i, out in enumerate(outs):
            out(vm, read_c[i](vm).view(F32) + y[:, i // 2, :, :, i % 2].reshape(-1))

    return run


def _block_scale(ins: Instr) -> Callable[[Machine], np.ndarray]:
    """The factor of each warp's product; of scales that differ within a warp nothing is known here."""
    if "scale_vec__1X" not in ins.parts or "kind__mxf8f6f4" not in ins.parts or ins.parts[-1] != "ue8m0":
        raise PtxError("form of block-scaled mma")
    # of each register one byte counts, which the two constants behind it choose, and the threads that give it
    reads = [(src(ins.ops[at], 32), ins.ops[at + 1].value[0].value) for at in (4, 6)]

    def factor(vm: Machine) -> np.ndarray:
        total = np.zeros((vm.n // 32, 1, 1, 1, 1), F64)
        for read, byte in reads:
            scales = np.ascontiguousarray(vm.full(read(vm))).view(np.uint8).reshape(-1, 32, 4)[:, :, byte]
            if (scales != scales[:, :1]).any() or (scales == 255).any():
                raise PtxError(f"{vm.where()}: scales of a product differ")
            total += scales[:, 0].astype(F64).reshape(-1, 1, 1, 1, 1) - 127
        return np.exp2(total).astype(F32)

    return factor


def _loaders(shape: str, type_name: str) -> tuple[Load, Load]:
    """Functions from registers to a `[warps, 16, k]` and b `[warps, k, 8]` as float32."""
    if shape == "m16n8k16" and type_name in WIDEN:
        convert = WIDEN[type_name]

        def load_a(x: list[np.ndarray]) -> np.ndarray:
            # half of k, half of m, warp, row, thread of the row, element of the pair
            m = convert(np.stack(x).view(np.uint16)).reshape(2, 2, -1, 8, 4, 2)
            return np.ascontiguousarray(m.transpose(2, 1, 3, 0, 4, 5)).reshape(-1, 16, 16)

        def load_b(x: list[np.ndarray]) -> np.ndarray:
            # half of k, warp, column, thread of the column, element of the pair
            m = convert(np.stack(x).view(np.uint16)).reshape(2, -1, 8, 4, 2)
            return np.ascontiguousarray(m.transpose(1, 0, 3, 4, 2)).reshape(-1, 16, 8)

        return load_a, load_b
    if shape == "m16n8k32" and type_name == "e4m3":

        def load_a(x: list[np.ndarray]) -> np.ndarray:
            # half of k, half of m, warp, row, thread of the row, element of the four
            m = widen_e4m3(np.stack(x).view(np.uint8)).reshape(2, 2, -1, 8, 4, 4)
            return np.ascontiguousarray(m.transpose(2, 1, 3, 0, 4, 5)).reshape(-1, 16, 32)

        def load_b(x: list[np.ndarray]) -> np.ndarray:
            # half of k, warp, column, thread of the column, element of the four
            m = widen_e4m3(np.stack(x).view(np.uint8)).reshape(2, -1, 8, 4, 4)
            return np.ascontiguousarray(m.transpose(1, 0, 3, 4, 2)).reshape(-1, 32, 8)

        return load_a, load_b
    if shape in ("m16n8k8", "m16n8k4") and type_name == "tf32":
        halves = 2 if shape == "m16n8k8" else 1

        def cut(x: list[np.ndarray]) -> np.ndarray:
            return (np.stack(x) & np.uint32(0xFFFFE000)).view(F32)

        def load_a(x: list[np.ndarray]) -> np.ndarray:
            m = cut(x).reshape(halves, 2, -1, 8, 4)
            return np.ascontiguousarray(m.transpose(2, 1, 3, 0, 4)).reshape(-1, 16, 4 * halves)

        def load_b(x: list[np.ndarray]) -> np.ndarray:
            m = cut(x).reshape(halves, -1, 8, 4)
            return np.ascontiguousarray(m.transpose(1, 0, 3, 2)).reshape(-1, 4 * halves, 8)

        return load_a, load_b
    raise PtxError(f"mma {shape} of {type_name}")


def _kept(vm: Machine, key: str, registers: list[np.ndarray], load: Load) -> np.ndarray:
    """A fragment is used by several products: keep its wide form while its registers are the same arrays."""
    if vm.act is not None:
        return load(registers)
    name = (key, *map(id, registers))
    if name not in vm.fragments:
        if len(vm.fragments) > _MOST_FRAGMENTS:
            vm.fragments.clear()
        # the registers are kept, too: an id is only good while its object lives
        vm.fragments[name] = (load(registers).astype(F64), registers)
    return vm.fragments[name][0]
