"""Moves, conversions, comparisons, selection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..operands import (
    F16,
    F32,
    F64,
    FLOAT,
    TYPES,
    U,
    dst,
    dtype_of,
    flush,
    narrow,
    narrow_e4m3,
    pred,
    src,
    to_odd,
    value,
    widen,
    widen_e4m3,
    width_of,
)
from ..parse import Instr, PtxError

if TYPE_CHECKING:
    from ..machine import Machine
    from ..operands import Action, Reader

_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def mov(ins: Instr) -> Action:
    """A register, a constant, or a register taken apart or put together."""
    type_name, (to, frm) = ins.parts[-1], ins.ops
    if type_name == "pred":
        out, a = dst(to, 1), pred(frm)
        return lambda vm: out(vm, a(vm))
    bits = width_of(type_name)
    if to.kind == "vec":
        width = bits // len(to.value)
        whole, outs = src(frm, bits), [dst(op, width) for op in to.value]

        def take_apart(vm: Machine) -> None:
            x = whole(vm)
            for i, write in enumerate(outs):
                write(vm, (x >> x.dtype.type(width * i)).astype(U[width]))

        return take_apart
    out = dst(to, bits)
    if frm.kind == "vec":
        width = bits // len(frm.value)
        pieces = [src(op, width) for op in frm.value]

        def put_together(vm: Machine) -> None:
            total = np.zeros(1, U[bits])
            for i, piece in enumerate(pieces):
                total = total | (piece(vm).astype(U[bits]) << U[bits](width * i))
            out(vm, total)

        return put_together
    a = src(frm, bits)
    return lambda vm: out(vm, a(vm))


def cvta(ins: Instr) -> Action:
    """Generic addresses are global ones here."""
    if ins.parts[1] not in ("param", "to"):
        raise PtxError("cvta other than of a parameter, or to global")
    out, a = dst(ins.ops[0], 64), src(ins.ops[1], 64)
    return lambda vm: out(vm, a(vm))


def cvt(ins: Instr) -> Action:
    """Conversions between all types."""
    to, frm = ins.parts[-2], ins.parts[-1]
    mods = set(ins.parts[1:-2])
    if to == "e4m3x2":
        return _two_to_e4m3(ins)
    if frm == "e4m3x2":
        return _two_from_e4m3(ins)
    if mods - {"rn", "rna", "sat", "ftz", *_TO_INTEGRAL}:
        raise PtxError(f"modifiers {sorted(mods)}")
    (to_kind, to_bits), (from_kind, from_bits) = TYPES[to], TYPES[frm]
    if to_kind in ("bf2", "f2"):
        return _two_to_half(ins)
    out, a = dst(ins.ops[0], to_bits, signed=to_kind == "s"), value(ins.ops[1], frm)
    if from_kind in ("u", "s") and to_kind in ("u", "s"):
        dtype = dtype_of(to)
        if "sat" not in mods:
            return lambda vm: out(vm, a(vm).astype(dtype))
        info = np.iinfo(dtype)
        if from_bits == 64 and from_kind == "u":
            raise PtxError("saturation from u64")
        return lambda vm: out(vm, np.clip(a(vm).astype(np.int64), info.min, info.max).astype(dtype))
    if "sat" in mods:
        raise PtxError("saturation of floats")
    load = a
    if from_kind == "bf":

        def load(vm: Machine) -> np.ndarray:
            return widen(a(vm))
    elif "ftz" in mods and frm == "f32":

        def load(vm: Machine) -> np.ndarray:
            return flush(a(vm))

    rounding = [_TO_INTEGRAL[name] for name in mods & set(_TO_INTEGRAL)]
    if to_kind in ("u", "s"):
        return _to_integer(ins, load)
    if to_kind == "tf":
        return _to_tf32(ins, load)

    def to_float(vm: Machine) -> None:
        x = load(vm)
        for how in rounding:
            x = how(x)
        if to_kind != "bf":
            out(vm, x.astype(FLOAT[to_bits]))
        else:
            exact = x.astype(F32) if x.dtype in (F16, F32) else to_odd(x.astype(F64))
            out(vm, narrow(exact))

    return to_float


def _two_to_half(ins: Instr) -> Action:
    """Two float32 to a pair of half precision, the first one in the upper half."""
    if ins.parts[-1] != "f32" or ins.parts[1:-2] != ("rn",):
        raise PtxError("packed cvt other than from f32 with rn")
    bfloat = ins.parts[-2] == "bf16x2"
    out, high, low = dst(ins.ops[0], 32), value(ins.ops[1], "f32"), value(ins.ops[2], "f32")

    def half(x: np.ndarray) -> np.ndarray:
        return narrow(x) if bfloat else x.astype(F16).view(np.uint16)

    return lambda vm: out(vm, (half(high(vm)).astype(np.uint32) << np.uint32(16)) | half(low(vm)))


def _two_to_e4m3(ins: Instr) -> Action:
    """Two float32, the first one to the upper byte, or a pair of float16, to a pair of e4m3."""
    if ins.parts[1:-2] != ("rn", "satfinite") or ins.parts[-1] not in ("f32", "f16x2"):
        raise PtxError("cvt to e4m3x2")
    out = dst(ins.ops[0], 16)

    def packed(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return (narrow_e4m3(high).astype(np.uint16) << np.uint16(8)) | narrow_e4m3(low)

    if ins.parts[-1] == "f32":
        first, second = value(ins.ops[1], "f32"), value(ins.ops[2], "f32")
        return lambda vm: out(vm, packed(first(vm), second(vm)))
    pair = src(ins.ops[1], 32)

    def run(vm: Machine) -> None:
        halves = np.ascontiguousarray(pair(vm)).view(F16).reshape(-1, 2)
        out(vm, packed(halves[:, 1], halves[:, 0]))

    return run


def _two_from_e4m3(ins: Instr) -> Action:
    """A pair of e4m3 to a pair of float16, which holds every e4m3 number."""
    if ins.parts[1:] != ("rn", "f16x2", "e4m3x2"):
        raise PtxError("cvt from e4m3x2")
    out, pair = dst(ins.ops[0], 32), src(ins.ops[1], 16)

    def run(vm: Machine) -> None:
        codes = np.ascontiguousarray(pair(vm)).view(np.uint8)
        out(vm, widen_e4m3(codes).astype(F16).view(np.uint32))

    return run


def _to_integer(ins: Instr, load: Reader) -> Action:
    """A float to an integer: clamped to its range, NaN to zero."""
    to = ins.parts[-2]
    (how,) = (_TO_INTEGRAL[part] for part in ins.parts[1:-2] if part in _TO_INTEGRAL)
    out, dtype = dst(ins.ops[0], width_of(to), signed=to[0] == "s"), dtype_of(to)
    low, high = float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
    if width_of(to) == 64:
        high = float(np.nextafter(high, 0))

    def run(vm: Machine) -> None:
        x = how(load(vm).astype(F64))
        out(vm, np.clip(np.where(np.isnan(x), 0.0, x), low, high).astype(dtype))

    return run


def _to_tf32(ins: Instr, load: Reader) -> Action:
    out, away = dst(ins.ops[0], 32), "rna" in ins.parts

    def run(vm: Machine) -> None:
        bits = load(vm).view(np.uint32)
        half = np.uint32(0x1000) if away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        out(vm, (bits + half) & np.uint32(0xFFFFE000))

    return run


def setp(ins: Instr) -> Action:
    """Comparison, joined with a predicate where there is a third operand."""
    type_name, how = ins.parts[-1], ins.parts[1]
    join = [part for part in ins.parts[2:-1] if part != "ftz"]
    if ins.ops[0].kind == "vec":
        raise PtxError("setp with two destinations")
    is_float, bfloat = TYPES[type_name][0] in ("f", "bf"), TYPES[type_name][0] == "bf"
    a, b, out = value(ins.ops[1], type_name), value(ins.ops[2], type_name), dst(ins.ops[0], 1)
    unordered = how.endswith("u") and how[:-1] in _COMPARE
    fn = None if how in ("nan", "num") else _COMPARE[how[:-1] if unordered else how]

    def test(vm: Machine) -> np.ndarray:
        x, y = a(vm), b(vm)
        if bfloat:
            x, y = widen(x), widen(y)
        if not is_float:
            return fn(x, y)
        nan = np.isnan(x) | np.isnan(y)
        if fn is None:
            return nan if how == "nan" else ~nan
        return fn(x, y) | nan if unordered else fn(x, y) & ~nan

    if not join:
        return lambda vm: out(vm, test(vm))
    c, joined = pred(ins.ops[3]), {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join[0]]
    return lambda vm: out(vm, joined(test(vm), c(vm)))


def selp(ins: Instr) -> Action:
    """One of two values by a predicate."""
    bits = width_of(ins.parts[-1])
    out, a, b, c = dst(ins.ops[0], bits), src(ins.ops[1], bits), src(ins.ops[2], bits), pred(ins.ops[3])
    return lambda vm: out(vm, np.where(c(vm), a(vm), b(vm)))
