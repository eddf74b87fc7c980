"""Operands as numpy arrays: types, bfloat16, readers and writers of registers, addresses.

Registers hold raw bits: bool for predicates, uint8 to uint64 otherwise. A value that all lanes share has length 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .parse import Op, PtxError

if TYPE_CHECKING:
    from .machine import Machine

    Reader: TypeAlias = Callable[[Machine], np.ndarray]
    Writer: TypeAlias = Callable[[Machine, np.ndarray], None]
    Action: TypeAlias = Callable[[Machine], None]

F16, F32, F64 = np.float16, np.float32, np.float64
U: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
S: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: F16, 32: F32, 64: F64}
# name of a type in an opcode -> (kind, bits)
TYPES: dict[str, tuple[str, int]] = {f"{kind}{width}": (kind, width) for width in (8, 16, 32, 64) for kind in "bus"}
TYPES |= {"f16": ("f", 16), "f32": ("f", 32), "f64": ("f", 64), "bf16": ("bf", 16), "bf16x2": ("bf2", 32)}
TYPES |= {"f32x2": ("ff", 64), "f16x2": ("f2", 32), "pred": ("p", 1), "tf32": ("tf", 32), "e4m3x2": ("e2", 16)}
_SMALLEST_NORMAL = F32(1.17549435e-38)


def width_of(type_name: str) -> int:
    """Bits of a PTX type."""
    return TYPES[type_name][1]


def dtype_of(type_name: str) -> Any:
    """numpy type of a scalar PTX type; raw bits for types that numpy does not have."""
    kind, width = TYPES[type_name]
    return {"s": S, "f": FLOAT, "tf": FLOAT}.get(kind, U)[width]


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(F32)


def narrow(x: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32: to nearest even, NaN to 0x7fff, as `cvt` does."""
    bits = x.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    out = ((bits + (np.uint32(0x7FFF) + even)) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF), out) if nan.any() else out


def _e4m3_values() -> np.ndarray:
    """float32 of every byte: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; all ones are NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[127] = np.nan
    return np.concatenate([magnitude, -magnitude]).astype(F32)


E4M3 = _e4m3_values()
_E4M3_EDGES = ((E4M3[:126] + E4M3[1:127]) / 2).astype(F64)


def widen_e4m3(codes: np.ndarray) -> np.ndarray:
    """float32 of e4m3 bytes."""
    return E4M3[codes]


def narrow_e4m3(x: np.ndarray) -> np.ndarray:
    """e4m3 bytes of floats: to nearest even, what is beyond 448 to it, NaN to 0x7f, as `cvt.rn.satfinite` does."""
    magnitude = np.abs(x.astype(F64))
    code = np.searchsorted(_E4M3_EDGES, magnitude)
    # on an edge it is the lower of two codes here
    on_edge = (code < len(_E4M3_EDGES)) & (magnitude == _E4M3_EDGES[np.minimum(code, len(_E4M3_EDGES) - 1)])
    code = code + (on_edge & (code % 2 == 1)) + np.where(np.signbit(x), 128, 0)
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


def to_odd(x: np.ndarray) -> np.ndarray:
    """float32 of float64, rounded to odd, so that a second rounding is exact."""
    near = x.astype(F32)
    back = near.astype(F64)
    fix = (back != x) & (near.view(np.uint32) & 1 == 0) & np.isfinite(x)
    if fix.any():
        toward = np.where(x > back, F32(np.inf), F32(-np.inf)).astype(F32)
        near = np.where(fix, np.nextafter(near, toward), near)
    return near


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormals to zero of the same sign."""
    small = np.abs(x) < _SMALLEST_NORMAL
    return np.where(small, np.copysign(F32(0), x), x) if small.any() else x


def src(op: Op, bits: int) -> Reader:
    """Reader of raw unsigned bits of this width; a wider register is cut."""
    if op.kind == "imm":
        const = np.array([op.value & ((1 << bits) - 1)], U[bits])
        return lambda vm: const
    if op.kind == "sym":
        return lambda vm: vm.symbol(op.value).astype(U[bits], copy=False)
    if op.kind != "reg":
        raise PtxError(f"operand {op} where a value is expected")
    index = op.value
    if op.width == bits:
        return lambda vm: vm.get(index)
    if op.width > bits:
        return lambda vm: vm.get(index).astype(U[bits])
    raise PtxError(f"{op.name} of {op.width} bits read as {bits}")


def value(op: Op, type_name: str) -> Reader:
    """Reader of values of a PTX type; packed types and bfloat16 stay raw bits."""
    kind, bits = TYPES[type_name]
    if kind == "p":
        return pred(op)
    raw = src(op, bits)
    if kind not in ("s", "f", "tf"):
        return raw
    dtype = dtype_of(type_name)
    return lambda vm: raw(vm).view(dtype)


def pred(op: Op) -> Reader:
    """Reader of a predicate."""
    if op.kind == "imm":
        const = np.array([op.value != 0])
        return lambda vm: const
    index = op.value
    return (lambda vm: ~vm.get(index)) if op.kind == "notreg" else (lambda vm: vm.get(index))


def dst(op: Op, bits: int, signed: bool = False) -> Writer:
    """Writer of typed or raw arrays of this width; a wider register is extended."""
    if op.kind == "sink":
        return lambda vm, x: None
    index, width = op.value, op.width
    if width == 1:
        return lambda vm, x: vm.put(index, x)
    if width < bits:
        raise PtxError(f"{op.name} of {width} bits written with {bits}")
    raw, kinds = U[width], S if signed else U
    if width == bits:
        return lambda vm, x: vm.put(index, x.view(raw))
    return lambda vm, x: vm.put(index, x.view(kinds[bits]).astype(kinds[width]).view(raw))


def address_of(op: Op, bits: int) -> Reader:
    """Reader of an address, one per lane."""
    base = src(op.value, bits)
    if op.offset == 0:
        return lambda vm: vm.full(base(vm))
    add = U[bits](op.offset & ((1 << bits) - 1))
    return lambda vm: vm.full(base(vm) + add)


def vector(op: Op) -> list[Op]:
    """Operands of a vector, or the one operand."""
    return list(op.value) if op.kind == "vec" else [op]


def whole_warps(vm: Machine, x: np.ndarray) -> np.ndarray:
    """`[warps, 32]` of a full array; every warp must be whole."""
    if vm.act is not None:
        lanes = vm.act.reshape(-1, 32) if vm.n % 32 == 0 else None
        if lanes is None or (lanes[:, 0] % 32).any() or (np.diff(lanes) != 1).any():
            raise PtxError(f"{vm.where()}: a warp-wide instruction with part of a warp")
    return x.reshape(-1, 32)
