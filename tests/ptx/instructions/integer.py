"""Integer arithmetic and logic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..operands import F64, TYPES, S, U, dst, pred, src, value
from ..parse import Instr, PtxError

if TYPE_CHECKING:
    from ..machine import Machine
    from ..operands import Action, Reader


def arithmetic(ins: Instr) -> Action:
    """Everything whose type is an integer, raw bits or a predicate."""
    name, parts, ops = ins.parts[0], ins.parts, ins.ops
    kind, bits = TYPES[parts[-1]]
    if kind == "p":
        return _logic(ins)
    if parts[1:] == ("relu", "s32") and name in ("min", "max"):
        out, a, b, two = dst(ops[0], 32), value(ops[1], "s32"), value(ops[2], "s32"), _BINARY[name]
        return lambda vm: out(vm, np.maximum(two(a(vm), b(vm)), np.int32(0)))
    if len(parts) > 2 and parts[1] not in ("lo", "hi", "wide", parts[-1]):
        raise PtxError(f"modifier {parts[1]} of {name}")
    if name in ("mul", "mad"):
        return _multiply(ins)
    out, a = dst(ops[0], bits), value(ops[1], parts[-1])
    if name in _UNARY:
        one = _UNARY[name]
        return lambda vm: out(vm, one(a(vm)))
    if name in _BINARY:
        b, two = value(ops[2], parts[-1]), _BINARY[name]
        return lambda vm: out(vm, two(a(vm), b(vm)))
    if name in ("shl", "shr"):
        amount, shift = src(ops[2], 32), _shift_left if name == "shl" else _shift_right
        return lambda vm: out(vm, shift(a(vm), amount(vm)))
    if name == "bfe":
        position, length = src(ops[2], 32), src(ops[3], 32)
        return lambda vm: out(vm, _extract(a(vm), position(vm), length(vm)))
    raise PtxError(f"unknown opcode {name}")


def _logic(ins: Instr) -> Action:
    out, a = dst(ins.ops[0], 1), pred(ins.ops[1])
    if ins.parts[0] == "not":
        return lambda vm: out(vm, ~a(vm))
    b, join = pred(ins.ops[2]), {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[ins.parts[0]]
    return lambda vm: out(vm, join(a(vm), b(vm)))


def _multiply(ins: Instr) -> Action:
    (name, how, type_name), ops = ins.parts, ins.ops
    kind, bits = TYPES[type_name]
    signed = kind == "s"
    a, b = value(ops[1], type_name), value(ops[2], type_name)
    out_bits = bits * 2 if how == "wide" else bits
    out, wide = dst(ops[0], out_bits), (S if signed else U)[out_bits]
    product: Reader
    if how == "wide":

        def product(vm: Machine) -> np.ndarray:
            return a(vm).astype(wide) * b(vm).astype(wide)
    elif how == "lo":

        def product(vm: Machine) -> np.ndarray:
            return a(vm) * b(vm)
    else:

        def product(vm: Machine) -> np.ndarray:
            return _high(a(vm), b(vm), bits, signed)

    if name == "mul":
        return lambda vm: out(vm, product(vm))
    c = value(ops[3], ("s" if signed else "u") + str(out_bits))
    return lambda vm: out(vm, product(vm) + c(vm))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotient towards zero."""
    if (b == 0).any():
        raise PtxError("integer division by zero")
    if a.dtype.kind == "u":
        return a // b
    if a.dtype == np.int32:
        return np.trunc(a.astype(F64) / b).astype(np.int64).astype(np.int32)
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divide(a, b) * b


def _high(a: np.ndarray, b: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Upper half of a product."""
    kinds = S if signed else U
    if bits < 64:
        wide = kinds[2 * bits]
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(kinds[bits])
    if signed:
        raise PtxError("mul.hi.s64")
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    cross = a1 * b0 + (a0 * b0 >> half)
    middle = (cross & low) + a0 * b1
    return a1 * b1 + (cross >> half) + (middle >> half)


def _shift_left(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    bits = a.dtype.itemsize * 8
    big = amount >= np.uint32(bits)
    out = np.left_shift(a, np.where(big, np.uint32(0), amount).astype(a.dtype))
    return np.where(big, a.dtype.type(0), out) if big.any() else out


def _shift_right(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Arithmetic for signed types."""
    bits = a.dtype.itemsize * 8
    big = amount >= np.uint32(bits)
    out = np.right_shift(a, np.where(big, np.uint32(0), amount).astype(a.dtype))
    if not big.any():
        return out
    return np.where(big, a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else a.dtype.type(0), out)


def _extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: a field of 32-bit words, sign-extended for signed types."""
    bits = a.dtype.itemsize * 8
    if bits == 64:
        raise PtxError("bfe of 64 bits")
    wide = a.astype(np.int64 if a.dtype.kind == "i" else np.uint64)
    one = wide.dtype.type(1)
    position = (position & np.uint32(255)).astype(wide.dtype)
    length = (length & np.uint32(255)).astype(wide.dtype)
    unsigned = wide & wide.dtype.type((1 << bits) - 1)
    mask = (one << np.minimum(length, wide.dtype.type(32))) - one
    field = np.where(length >= bits, unsigned >> position, (unsigned >> position) & mask)
    if a.dtype.kind == "i":
        sign = (unsigned >> np.minimum(position + length - 1, 31)) & 1
        extended = field | (-1 << np.minimum(length, 32))
        field = np.where((length > 0) & (length < 32) & (sign == 1), extended, field)
    return field.astype(a.dtype)


_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {"not": np.invert, "neg": np.negative, "abs": np.abs}
_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "div": _divide,
    "rem": _remainder,
}


def prmt(ins: Instr) -> Action:
    """Four bytes of two words, chosen by nibbles of a third."""
    if len(ins.parts) != 2:
        raise PtxError("mode of prmt")
    out, a, b, selector = dst(ins.ops[0], 32), src(ins.ops[1], 32), src(ins.ops[2], 32), src(ins.ops[3], 32)

    def run(vm: Machine) -> None:
        both = a(vm).astype(np.uint64) | (b(vm).astype(np.uint64) << np.uint64(32))
        nibbles, total = selector(vm).astype(np.uint64), np.zeros(1, np.uint64)
        for i in range(4):
            pick = (nibbles >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = (byte >> np.uint64(7)) * np.uint64(255)
            total = total | (np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * i))
        out(vm, total.astype(np.uint32))

    return run


def lop3(ins: Instr) -> Action:
    """Any function of three bits, by its truth table."""
    out, table = dst(ins.ops[0], 32), ins.ops[4].value
    a, b, c = (src(op, 32) for op in ins.ops[1:4])

    def run(vm: Machine) -> None:
        x, y, z = a(vm), b(vm), c(vm)
        total = np.zeros(1, np.uint32)
        for i in range(8):
            if table >> i & 1:
                total = total | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        out(vm, total)

    return run
