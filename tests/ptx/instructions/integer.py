from __future__ import annotations

import numpy as np

def _trunc_div(a, b):
    if (b == 0).any():
        raise PtxError("integer division by zero")
    if a.dtype.kind == "u":
        return a // b
    if a.dtype == np.int32:
        return np.trunc(a.astype(F64) / b).astype(np.int64).astype(np.int32)
    q = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -q, q)


def _rem(a, b):
    return a - _trunc_div(a, b) * b


def _mul_hi(a, b, bits, signed):
    if bits == 32:
        wide = np.int64 if signed else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(S[32] if signed else U[32])
    if bits == 64 and not signed:
        m = np.uint64(0xFFFFFFFF)
        s = np.uint64(32)
        al, ah, bl, bh = a & m, a >> s, b & m, b >> s
        low = al * bl
        mid1, mid2 = ah * bl + (low >> s), al * bh
        mid = (mid1 & m) + mid2
        return ah * bh + (mid1 >> s) + (mid >> s)
    if bits == 16:
        wide = np.int32 if signed else np.uint32
        return ((a.astype(wide) * b.astype(wide)) >> wide(16)).astype(S[16] if signed else U[16])
    raise PtxError(f"mul.hi of {bits} bits")


def _shift(left: bool):
    def f(a, n):
        bits = a.dtype.itemsize * 8
        big = n >= np.uint32(bits)
        amount = np.where(big, np.uint32(0), n).astype(a.dtype)
        out = np.left_shift(a, amount) if left else np.right_shift(a, amount)
        if big.any():
            out = np.where(big, (a >> a.dtype.type(bits - 1)) if (not left and a.dtype.kind == "i") else a.dtype.type(0), out)
        return out

    return f


def _bfe(a, pos, length):
    bits = a.dtype.itemsize * 8
    wide = a.astype(np.int64 if a.dtype.kind == "i" else np.uint64)
    pos, length = (pos & np.uint32(255)).astype(wide.dtype), (length & np.uint32(255)).astype(wide.dtype)
    if bits == 64:
        raise PtxError("bfe of 64 bits")
    unsigned = wide & wide.dtype.type((1 << bits) - 1)
    field = np.where(length >= bits, unsigned >> pos, (unsigned >> pos) & ((wide.dtype.type(1) << np.minimum(length, wide.dtype.type(32))) - 1))
    if a.dtype.kind == "i":
        sign_at = np.minimum(pos + length - 1, 31)
        sign = (unsigned >> sign_at) & 1
        field = np.where((length > 0) & (length < 32) & (sign == 1), field | (-1 << np.minimum(length, 32)), field)
    return field.astype(a.dtype)


_BINARY = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
           "or": np.bitwise_or, "xor": np.bitwise_xor, "div": _trunc_div, "rem": _rem}  # fmt: skip


def _int_op(ins: Instr):
    name, parts, ops, t = ins.parts[0], ins.parts, ins.ops, ins.parts[-1]
    kind, bits = TYPES[t]
    signed = kind == "s"
    if kind == "p":
        d = dst(ops[0], 1)
        a = pred(ops[1])
        if name == "not":
            return lambda vm: d(vm, ~a(vm))
        if name == "mov":
            return lambda vm: d(vm, a(vm))
        b, fn = pred(ops[2]), {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name]
        return lambda vm: d(vm, fn(a(vm), b(vm)))
    if len(parts) > 2 and parts[1] not in ("lo", "hi", "wide", t):
        raise PtxError(f"modifier {parts[1]} of {name}")
    if name in _BINARY:
        a, b, d, fn = value(ops[1], t), value(ops[2], t), dst(ops[0], bits), _BINARY[name]
        return lambda vm: d(vm, fn(a(vm), b(vm)))
    if name in ("mul", "mad"):
        how = parts[1]
        a, b = value(ops[1], t), value(ops[2], t)
        out = bits * 2 if how == "wide" else bits
        d = dst(ops[0], out)
        wide = (S if signed else U)[out]
        if how == "wide":
            product = lambda vm: a(vm).astype(wide) * b(vm).astype(wide)  # noqa: E731
        elif how == "lo":
            product = lambda vm: a(vm) * b(vm)  # noqa: E731
        else:
            product = lambda vm: _mul_hi(a(vm), b(vm), bits, signed)  # noqa: E731
        if name == "mul":
            return lambda vm: d(vm, product(vm))
        c = value(ops[3], ("s" if signed else "u") + str(out))
        return lambda vm: d(vm, product(vm) + c(vm))
    if name in ("shl", "shr"):
        a, n, d, fn = value(ops[1], t), src(ops[2], 32), dst(ops[0], bits), _shift(name == "shl")
        return lambda vm: d(vm, fn(a(vm), n(vm)))
    if name == "not":
        a, d = value(ops[1], t), dst(ops[0], bits)
        return lambda vm: d(vm, ~a(vm))
    if name in ("neg", "abs"):
        a, d, fn = value(ops[1], t), dst(ops[0], bits), np.negative if name == "neg" else np.abs
        return lambda vm: d(vm, fn(a(vm)))
    if name == "bfe":
        a, p, n, d = value(ops[1], t), src(ops[2], 32), src(ops[3], 32), dst(ops[0], bits)
        return lambda vm: d(vm, _bfe(a(vm), p(vm), n(vm)))
    raise PtxError(f"{name} is not implemented")


def _prmt(ins: Instr, program: Program):
    if len(ins.parts) != 2:
        raise PtxError("prmt modes")
    out, a, b, s = dst(ins.ops[0], 32), src(ins.ops[1], 32), src(ins.ops[2], 32), src(ins.ops[3], 32)

    def run(vm):
        both = a(vm).astype(np.uint64) | (b(vm).astype(np.uint64) << np.uint64(32))
        sel, total = s(vm).astype(np.uint64), np.zeros(1, np.uint64)
        for i in range(4):
            pick = (sel >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = (byte >> np.uint64(7)) * np.uint64(255)
            total = total | (np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * i))
        out(vm, total.astype(np.uint32))

    return run


def _lop3(ins: Instr, program: Program):
    out, table = dst(ins.ops[0], 32), ins.ops[4].value
    a, b, c = (src(op, 32) for op in ins.ops[1:4])

    def run(vm):
        x, y, z = a(vm), b(vm), c(vm)
        total = np.zeros(1, np.uint32)
        for i in range(8):
            if table >> i & 1:
                total = total | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        out(vm, total)

    return run
