"""Instructions on 8-bit numbers against torch's own e4m3, and fragments by the formulas of the PTX manual."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from .parse import PtxError

Execute = Callable[..., np.ndarray]
Unit = tuple[str, bool]
_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
_PLAIN = "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"
_SCALED = "mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0"


def fp8_units(execute: Execute, rng: np.random.Generator) -> Iterator[Unit]:
    """(what, whether it is right); `execute` runs a program as `units.execute` does."""
    yield "cvt.rn.satfinite.e4m3x2.f32", _cvt_f32(execute, rng)
    yield "cvt.rn.satfinite.e4m3x2.f16x2", _cvt_f16(execute, rng)
    yield "cvt.rn.f16x2.e4m3x2", _cvt_back(execute)
    a, b, c = _bytes(rng, 16, 32), _bytes(rng, 8, 32), rng.integers(-8, 9, (16, 8)).astype(np.float32)
    product = _values(a) @ _values(b).T
    yield "mma.m16n8k32.e4m3", bool((_mma(execute, _PLAIN, "", a, b, c) == product + c).all())
    for left, right in ((127, 127), (128, 125)):
        got = _mma(execute, _SCALED, f"mov.b32 %r30, {left}; mov.b32 %r31, {right};", a, b, c)
        want = product * 2.0 ** (left + right - 254) + c
        yield f"mma.m16n8k32.e4m3 by block scales {left} and {right}", bool((got == want).all())
    yield "refused: block scales that differ", _refuses(execute, a, b, c)
    for where in ("shared memory", "registers"):
        yield f"wgmma.m64n8k32.e4m3, A in {where}", _wgmma(execute, rng, where == "registers")


def _bytes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Codes of multiples of an eighth below 2, whose products add exactly in any order."""
    values = torch.from_numpy(rng.integers(-15, 16, shape).astype(np.float32) / 8)
    return values.to(_E4M3).view(torch.uint8).numpy()


def _values(codes: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(codes)).view(_E4M3).float().numpy()


def _edge_cases() -> np.ndarray:
    """Every number, the middles between neighbours and what lies beside them, zeros, tiny and huge values."""
    numbers = np.unique(_values(np.array([code for code in range(256) if code & 127 != 127], np.uint8)))
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = [np.nextafter(middles, np.float32(to)) for to in (np.inf, -np.inf)]
    more = [0.0, -0.0, 1e-20, -1e-20, 449, 463, 464, 480, -480, 1e30, -1e30, np.inf, -np.inf]
    return np.concatenate([numbers, middles, *beside, more]).astype(np.float32)


def _rounded(x: np.ndarray) -> np.ndarray:
    """Bytes by torch, which knows no cutting off."""
    return torch.from_numpy(x).clamp(-_LARGEST, _LARGEST).to(_E4M3).view(torch.uint8).numpy()


def _cvt_f32(execute: Execute, rng: np.random.Generator) -> bool:
    more = rng.standard_normal(1024).astype(np.float32) * 30
    x = np.concatenate([_edge_cases(), more])[:1024].astype(np.float32)
    y = rng.permutation(x)
    body = """mad.wide.u32 %rd3, %r1, 8, %rd1; mad.wide.u32 %rd4, %r1, 2, %rd2;
    ld.global.b32 %r2, [%rd3]; ld.global.b32 %r3, [%rd3+4];
    cvt.rn.satfinite.e4m3x2.f32 %rs1, %r2, %r3;
    st.global.b16 [%rd4], %rs1;"""
    got = execute(body, np.stack([x, y], 1), 2 * len(x), threads=len(x)).reshape(-1, 2)
    nan = execute(body, np.array([[np.nan, 1.0]] * 32, np.float32), 64)
    # the first operand is the upper byte
    return bool((got[:, 1] == _rounded(x)).all() and (got[:, 0] == _rounded(y)).all() and nan[1] & 0x7F == 0x7F)


def _cvt_f16(execute: Execute, rng: np.random.Generator) -> bool:
    more = rng.standard_normal(2048).astype(np.float32) * 30
    x = np.concatenate([_edge_cases(), more])[:2048].clip(-60000, 60000).astype(np.float16)
    body = """mad.wide.u32 %rd3, %r1, 4, %rd1; mad.wide.u32 %rd4, %r1, 2, %rd2;
    ld.global.b32 %r2, [%rd3]; cvt.rn.satfinite.e4m3x2.f16x2 %rs1, %r2;
    st.global.b16 [%rd4], %rs1;"""
    got = execute(body, x, 2048, threads=1024)
    return bool((got == _rounded(x.astype(np.float32))).all())


def _cvt_back(execute: Execute) -> bool:
    codes = np.array([code for code in range(256) if code & 127 != 127] + [0, 1], np.uint8)
    body = """mad.wide.u32 %rd3, %r1, 2, %rd1; mad.wide.u32 %rd4, %r1, 4, %rd2;
    ld.global.b16 %rs1, [%rd3]; cvt.rn.f16x2.e4m3x2 %r2, %rs1; st.global.b32 [%rd4], %r2;"""
    got = execute(body, codes, 512, threads=128).view(np.float16)
    return bool((got.astype(np.float32) == _values(codes)).all())


def _mma(execute: Execute, opcode: str, scales: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """[16, 8] of the instruction on A `[16, 32]`, B^T `[8, 32]` and C; `scales` puts scales in %r30 and %r31."""
    word = np.zeros((32, 10), np.uint32)
    for t in range(32):
        group, k = t >> 2, t % 4
        for i in range(16):
            row, column = group + (8 if i // 4 % 2 else 0), k * 4 + (i & 3) + (16 if i >= 8 else 0)
            word[t, i // 4] |= np.uint32(int(a[row, column]) << 8 * (i & 3))
        for i in range(8):
            row = k * 4 + (i & 3) + (16 if i >= 4 else 0)
            word[t, 4 + i // 4] |= np.uint32(int(b[group, row]) << 8 * (i & 3))
        for i in range(4):
            word[t, 6 + i] = np.float32(c[group + 8 * (i >= 2), k * 2 + (i & 1)]).view(np.uint32)
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd3+{4 * i}];" for i in range(10))
    stores = "".join(f"st.global.b32 [%rd4+{4 * i}], %r{16 + i};" for i in range(4))
    operands = "{%r16,%r17,%r18,%r19}, {%r10,%r11,%r12,%r13}, {%r14,%r15}, {%r16,%r17,%r18,%r19}"
    operands += ", %r30, {0, 0}, %r31, {0, 0}" if scales else ""
    at = "mad.wide.u32 %rd3, %r1, 40, %rd1; mad.wide.u32 %rd4, %r1, 16, %rd2;"
    d = execute(f"{at} {loads} {scales} {opcode} {operands}; {stores}", word, 512).view(np.float32).reshape(32, 4)
    out = np.zeros((16, 8), np.float32)
    for t in range(32):
        for i in range(4):
            out[(t >> 2) + 8 * (i >= 2), t % 4 * 2 + (i & 1)] = d[t, i]
    return out


def _refuses(execute: Execute, *operands: np.ndarray) -> bool:
    try:
        _mma(execute, _SCALED, "mov.b32 %r30, %r1; mov.b32 %r31, 127;", *operands)
    except PtxError as error:
        return "scales of a product differ" in str(error)
    return False


def _wgmma(execute: Execute, rng: np.random.Generator, in_registers: bool) -> bool:
    """64 x 8 x 32 by one warpgroup; operands without swizzle, in cores of 8 rows of 16 bytes."""
    a, b = _bytes(rng, 64, 32), _bytes(rng, 8, 32)

    def cores(x: np.ndarray) -> np.ndarray:
        # the two halves of K of eight rows lie side by side, 128 bytes each
        return x.reshape(-1, 8, 2, 16).transpose(0, 2, 1, 3).reshape(-1)

    fragments = np.zeros((128, 16), np.uint8)
    for t in range(128):
        for i in range(16):
            row = t // 32 * 16 + t % 32 // 4 + (8 if i // 4 % 2 else 0)
            fragments[t, i] = a[row, t % 4 * 4 + (i & 3) + (16 if i >= 8 else 0)]
    # 2304 bytes go to shared memory, 18 by each thread
    data = np.concatenate([cores(a), cores(b), fragments.reshape(-1)])
    copy = "mul.lo.s32 %r2, %r1, 18; mov.b32 %r3, global_smem; add.s32 %r3, %r3, %r2; cvt.u64.u32 %rd5, %r2;"
    copy += "add.s64 %rd3, %rd1, %rd5;" + "".join(
        f"ld.global.b16 %rs1, [%rd3+{2 * i}]; st.shared.b16 [%r3+{2 * i}], %rs1;" for i in range(9)
    )
    loads = "mad.wide.u32 %rd4, %r1, 16, %rd1;"
    loads += "".join(f"ld.global.b32 %r{10 + i}, [%rd4+{2304 + 4 * i}];" for i in range(4))
    # in units of 16 bytes: the other half of K 128 bytes on, the next eight rows 256
    layout = (128 >> 4) << 16 | (256 >> 4) << 32
    start = "mov.b32 %r4, global_smem; shr.u32 %r4, %r4, 4; cvt.u64.u32 %rd6, %r4;"
    start += f"add.s64 %rd7, %rd6, {layout}; add.s64 %rd8, %rd6, {layout + (2048 >> 4)};"
    zero = "".join(f"mov.b32 %r{20 + i}, 0;" for i in range(4)) + "setp.ne.u32 %p1, %r4, %r4;"
    left = "{%r10,%r11,%r12,%r13}" if in_registers else "%rd7"
    opcode = "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3"
    product = f"""wgmma.fence.sync.aligned; {opcode} {{%r20,%r21,%r22,%r23}}, {left}, %rd8, %p1, 1, 1;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""
    stores = "mad.wide.u32 %rd9, %r1, 16, %rd2;"
    stores += "".join(f"st.global.b32 [%rd9+{4 * i}], %r{20 + i};" for i in range(4))
    body = "\n".join([copy, loads, "bar.sync 0;", start, zero, product, stores])
    d = execute(body, data, 2048, threads=128, shared=2304).view(np.float32).reshape(128, 4)
    want = _values(a) @ _values(b).T
    return all(
        d[t, i] == want[t // 32 * 16 + t % 32 // 4 + 8 * (i >= 2), t % 4 * 2 + (i & 1)]
        for t in range(128)
        for i in range(4)
    )
