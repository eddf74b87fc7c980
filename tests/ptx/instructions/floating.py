from __future__ import annotations

import numpy as np

def _float_op(ins: Instr):
    name, parts, ops, t = ins.parts[0], ins.parts, ins.ops, ins.parts[-1]
    mods = parts[1:-1]
    unknown = set(mods) - {"rn", "ftz", "approx", "full", "NaN"}
    if unknown:
        raise PtxError(f"modifiers {unknown} of {name}")
    kind, bits = TYPES[t]
    d = dst(ops[0], bits)
    a = [value(op, t) for op in ops[1:]]
    if kind in ("bf", "bf2"):
        return _bf16_op(name, kind, d, a, mods)
    if kind == "ff":
        if "ftz" in mods or name not in ("fma", "add", "sub", "mul"):
            raise PtxError(f"{name}.f32x2 with {mods}")
        pair = _FLOAT_FN[name]

        def two(vm):
            x = [v(vm) for v in a]
            n = max(map(len, x))
            x = [np.ascontiguousarray(np.broadcast_to(v, (n,))).view(F32) for v in x]
            d(vm, pair(*x).view(np.uint64))

        return two
    if kind == "f2" or (kind == "f" and bits == 16):
        dt = F16
        cast = lambda x: x.view(F16) if kind == "f" else x  # noqa: E731

        def half(vm):
            x = [v(vm) for v in a]
            if kind == "f2":
                n = max(map(len, x))
                x = [np.broadcast_to(v, (n,)).copy().view(F16) for v in x]
            y = _half(name, [v.astype(F64) for v in x]).astype(dt)
            d(vm, y.view(np.uint32) if kind == "f2" else cast(y))

        return half
    fn = _FLOAT_FN.get(name)
    if name in ("min", "max"):
        fn = {"min": np.minimum, "max": np.maximum}[name] if "NaN" in mods else fn
    if fn is None:
        raise PtxError(f"{name}.{t} is not implemented")
    if bits == 64 and name in ("fma", "mad"):
        raise PtxError("fma.f64")
    if "ftz" in mods:
        return lambda vm: d(vm, flush(fn(*[flush(v(vm)) for v in a])))
    if len(a) == 1:
        x = a[0]
        return lambda vm: d(vm, fn(x(vm)))
    if len(a) == 2:
        x, y = a
        return lambda vm: d(vm, fn(x(vm), y(vm)))
    x, y, z = a
    return lambda vm: d(vm, fn(x(vm), y(vm), z(vm)))


def _fma32(a, b, c):
    return (a.astype(F64) * b + c).astype(F32)


def _via64(fn):
    return lambda x: fn(x.astype(F64)).astype(F32)


_FLOAT_FN = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": _fma32, "min": np.fmin,
    "max": np.fmax, "neg": np.negative, "abs": np.abs, "ex2": _via64(np.exp2), "lg2": _via64(np.log2),
    "rcp": _via64(np.reciprocal), "rsqrt": _via64(lambda x: 1.0 / np.sqrt(x)), "sqrt": np.sqrt,
}  # fmt: skip


def _half(name, x):
    return {"fma": lambda a, b, c: a * b + c, "add": np.add, "sub": np.subtract, "mul": np.multiply,
            "min": np.fmin, "max": np.fmax, "neg": np.negative, "abs": np.abs}[name](*x)  # fmt: skip


def _bf16_op(name, kind, d, a, mods):
    fn = {"fma": lambda x, y, z: x * y + z, "add": np.add, "sub": np.subtract, "mul": np.multiply,
          "min": np.fmin, "max": np.fmax, "neg": np.negative, "abs": np.abs}[name]  # fmt: skip

    def run(vm):
        x = [v(vm) for v in a]
        if kind == "bf2":
            n = max(map(len, x))
            x = [np.ascontiguousarray(np.broadcast_to(v, (n,))).view(np.uint16) for v in x]
        y = narrow(to_odd(fn(*[widen(v).astype(F64) for v in x])))
        d(vm, y.view(np.uint32) if kind == "bf2" else y)

    return run
