"""Floating-point arithmetic: float32 and float64, pairs of float32, float16 and bfloat16, alone and in pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..operands import F16, F32, F64, TYPES, dst, flush, narrow, to_odd, value, widen
from ..parse import Instr, PtxError

if TYPE_CHECKING:
    from ..machine import Machine
    from ..operands import Action

_MODIFIERS = {"rn", "ftz", "approx", "full", "NaN"}
Function = Callable[..., Any]


def arithmetic(ins: Instr) -> Action:
    """Everything whose type is a float."""
    name, modifiers, type_name = ins.parts[0], set(ins.parts[1:-1]), ins.parts[-1]
    if modifiers - _MODIFIERS:
        raise PtxError(f"modifiers {sorted(modifiers - _MODIFIERS)} of {name}")
    kind, bits = TYPES[type_name]
    out = dst(ins.ops[0], bits)
    args = [value(op, type_name) for op in ins.ops[1:]]
    if kind == "f" and bits > 16:
        fn = _function(_WIDE, name, modifiers)
        if bits == 64 and name not in ("add", "sub", "mul", "div", "min", "max", "neg", "abs", "sqrt"):
            raise PtxError(f"{name}.f64")
        if "ftz" in modifiers:
            return lambda vm: out(vm, flush(fn(*[flush(arg(vm)) for arg in args])))
        return lambda vm: out(vm, fn(*[arg(vm) for arg in args]))
    if "ftz" in modifiers:
        raise PtxError(f"{name}.ftz.{type_name}")
    if kind == "ff":
        pair = _function(_WIDE, name, modifiers)
        return lambda vm: out(vm, pair(*_unpacked([arg(vm) for arg in args], F32)).view(np.uint64))
    half = _function(_HALF, name, modifiers)
    packed = kind in ("f2", "bf2")

    def run(vm: Machine) -> None:
        x: Sequence[np.ndarray] = [arg(vm) for arg in args]
        if packed:
            x = _unpacked(x, F16 if kind == "f2" else np.uint16)
        if kind in ("bf", "bf2"):
            y = narrow(to_odd(half(*[widen(v).astype(F64) for v in x])))
        else:
            y = half(*[v.astype(F64) for v in x]).astype(F16)
        out(vm, y.view(np.uint32) if packed else y)

    return run


def _function(table: dict[str, Function], name: str, modifiers: set[str]) -> Function:
    if name in ("min", "max") and "NaN" in modifiers:
        return {"min": np.minimum, "max": np.maximum}[name]
    if name not in table:
        raise PtxError(f"unknown opcode {name}")
    return table[name]


def _unpacked(x: Sequence[np.ndarray], dtype: Any) -> list[np.ndarray]:
    """Packed registers as arrays of their elements, all of one length."""
    count = max(map(len, x))
    return [np.ascontiguousarray(np.broadcast_to(v, (count,))).view(dtype) for v in x]


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if a.dtype != F32:
        return a * b + c
    return (a.astype(F64) * b + c).astype(F32)


def _through_float64(fn: Function) -> Function:
    return lambda x: fn(x.astype(F64)).astype(F32)


_HALF: dict[str, Function] = {
    "fma": _fma,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
}
_WIDE: dict[str, Function] = _HALF | {
    "div": np.divide,
    "sqrt": np.sqrt,
    "ex2": _through_float64(np.exp2),
    "lg2": _through_float64(np.log2),
    "rcp": _through_float64(np.reciprocal),
    "rsqrt": _through_float64(lambda x: 1.0 / np.sqrt(x)),
}
