from __future__ import annotations

import numpy as np

def _mov(ins: Instr, program: Program):
    t, (d, s) = ins.parts[-1], ins.ops
    if t == "pred":
        out, a = dst(d, 1), pred(s)
        return lambda vm: out(vm, a(vm))
    bits = width_of(t)
    if d.kind == "vec":
        part = bits // len(d.value)
        a, outs = src(s, bits), [dst(o, part) for o in d.value]

        def unpack(vm):
            x = a(vm)
            for i, out in enumerate(outs):
                out(vm, (x >> x.dtype.type(part * i)).astype(U[part]))

        return unpack
    out = dst(d, bits)
    if s.kind == "vec":
        part = bits // len(s.value)
        ins_ = [src(o, part) for o in s.value]

        def pack(vm):
            total = None
            for i, a in enumerate(ins_):
                x = a(vm).astype(U[bits]) << U[bits](part * i)
                total = x if total is None else total | x
            out(vm, total)

        return pack
    a = src(s, bits)
    return lambda vm: out(vm, a(vm))


def _cvt(ins: Instr, program: Program):
    to, frm = ins.parts[-2], ins.parts[-1]
    mods = set(ins.parts[1:-2])
    if mods - {"rn", "rz", "rna", "rni", "rzi", "rmi", "rpi", "sat", "ftz", "satfinite"}:
        raise PtxError(f"modifiers {mods}")
    (tk, tb), (fk, fb) = TYPES[to], TYPES[frm]
    if tk in ("bf2", "f2"):
        out, hi, lo = dst(ins.ops[0], 32), value(ins.ops[1], frm), value(ins.ops[2], frm)
        if fk != "f" or fb != 32 or mods - {"rn"}:
            raise PtxError("packed cvt other than from f32 with rn")
        cut = narrow if tk == "bf2" else (lambda x: x.astype(F16).view(np.uint16))
        return lambda vm: out(vm, (cut(hi(vm)).astype(np.uint32) << np.uint32(16)) | cut(lo(vm)))
    out, a = dst(ins.ops[0], tb, signed=tk == "s"), value(ins.ops[1], frm)
    if fk in "us" and tk in "us":
        if "sat" in mods:
            info = np.iinfo(dtype_of(to))

            def saturate(vm):
                x = a(vm)
                wide = x.astype(np.int64) if fk == "s" or fb < 64 else x
                out(vm, np.clip(wide, info.min, info.max).astype(dtype_of(to)))

            return saturate
        dt = dtype_of(to)
        return lambda vm: out(vm, a(vm).astype(dt))
    load = a
    if fk == "bf":
        load = lambda vm: widen(a(vm))  # noqa: E731
    if tk in "us":
        how = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[(mods & {"rni", "rzi", "rmi", "rpi"}).pop()]
        info = np.iinfo(dtype_of(to))
        dt = dtype_of(to)

        def to_int(vm):
            x = how(load(vm).astype(F64))
            x = np.where(np.isnan(x), 0.0, x)
            y = np.clip(x, float(info.min), float(info.max))
            if tb == 64:
                y = np.where(y >= float(info.max), np.nextafter(float(info.max), 0), y)
            out(vm, y.astype(dt))

        return to_int
    if tk == "tf":
        def tf32(vm):
            b = load(vm).view(np.uint32)
            if "rna" in mods:
                b = b + np.uint32(0x1000)
            else:
                b = b + (np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1)))
            out(vm, b & np.uint32(0xFFFFE000))

        return tf32
    rounding = mods & {"rni", "rzi", "rmi", "rpi"}
    how = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding.pop()] if rounding else None
    if "rz" in mods or "sat" in mods:
        raise PtxError(f"cvt modifiers {mods}")

    def to_float(vm):
        x = load(vm)
        if how is not None:
            x = how(x)
        if tk == "bf":
            out(vm, narrow(to_odd(x.astype(F64)) if fb == 64 or fk in "us" else x))
        else:
            out(vm, x.astype(FLOAT[tb]))

    return to_float


_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}  # fmt: skip


def _setp(ins: Instr, program: Program):
    t, how = ins.parts[-1], ins.parts[1]
    rest = [p for p in ins.parts[2:-1] if p != "ftz"]
    a, b = value(ins.ops[1], t), value(ins.ops[2], t)
    cast = (lambda x: widen(x)) if TYPES[t][0] == "bf" else (lambda x: x)
    if how in ("nan", "num"):
        test = lambda x, y: (np.isnan(x) | np.isnan(y)) == (how == "nan")  # noqa: E731
    elif how.endswith("u") and how[:-1] in _COMPARE:
        fn = _COMPARE[how[:-1]]
        test = lambda x, y: fn(x, y) | np.isnan(x) | np.isnan(y)  # noqa: E731
    else:
        test = _COMPARE[how]
        if how == "ne" and TYPES[t][0] in ("f", "bf"):
            test = lambda x, y: (x != y) & ~np.isnan(x) & ~np.isnan(y)  # noqa: E731
    d = ins.ops[0]
    if d.kind == "vec":
        raise PtxError("setp with two destinations")
    out = dst(d, 1)
    if rest:
        c, join = pred(ins.ops[3]), {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[rest[0]]
        return lambda vm: out(vm, join(test(cast(a(vm)), cast(b(vm))), c(vm)))
    return lambda vm: out(vm, test(cast(a(vm)), cast(b(vm))))


def _selp(ins: Instr, program: Program):
    bits = width_of(ins.parts[-1])
    out, a, b, c = dst(ins.ops[0], bits), src(ins.ops[1], bits), src(ins.ops[2], bits), pred(ins.ops[3])
    return lambda vm: out(vm, np.where(c(vm), a(vm), b(vm)))


def _cvta(ins: Instr, program: Program):
    if ins.parts[1] != "param":
        raise PtxError("cvta other than of a parameter")
    out, a = dst(ins.ops[0], 64), src(ins.ops[1], 64)
    return lambda vm: out(vm, a(vm))
