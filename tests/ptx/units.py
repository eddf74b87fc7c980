"""Single instructions against independent scalar code, and programs that must be refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from .fp8_units import fp8_units
from .instructions import compile_program
from .machine import Machine
from .parse import PtxError, parse

_HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry t(.param .u64 .ptr .global .align 1 t_param_0, .param .u64 .ptr .global .align 1 t_param_1)
.reqntid %d
{
	.reg .pred %%p<20>; .reg .b16 %%rs<40>; .reg .b32 %%r<200>; .reg .b64 %%rd<40>;
	ld.param.b64 %%rd1, [t_param_0]; ld.param.b64 %%rd2, [t_param_1];
	mov.u32 %%r1, %%tid.x;
"""
_THREADS = 256
Unit = tuple[str, bool]


def units() -> Iterator[Unit]:
    """(what, whether it is right) of every check."""
    rng = np.random.default_rng(0)
    yield from _integers(rng)
    yield from _floats(rng)
    yield from _shuffles(rng)
    yield "mma.m16n8k16.bf16", _mma(rng)
    yield "ldmatrix.trans", _ldmatrix(rng)
    yield from fp8_units(execute, rng)
    for what, (body, message) in _REFUSED.items():
        yield f"refused: {what}", _refused(body, message)


def execute(body: str, data: np.ndarray, out_bytes: int, threads: int = 32, shared: int = 0) -> np.ndarray:
    """uint8 output of a program that reads `data` at %rd1 and writes at %rd2; %r1 is the thread."""
    program = parse(_HEAD % threads + body + "\n\tret;\n}\n")
    actions, granule = compile_program(program)
    machine = Machine(program, actions, shared, granule)
    source = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy())
    target = torch.zeros(out_bytes, dtype=torch.uint8)
    machine.memory.add("in", source.data_ptr(), source.numel())
    machine.memory.add("out", target.data_ptr(), target.numel())
    params = {f"t_param_{i}": np.array([t.data_ptr()], np.uint64) for i, t in enumerate((source, target))}
    machine.launch((1, 1, 1), params)
    return target.numpy()


def _three(body: str, a: Any, b: Any, c: Any) -> np.ndarray:
    """%r5 of a program that finds three words of its thread in %r2, %r3 and %r4."""
    data = np.stack([np.asarray(x).view(np.uint32) for x in (a, b, c)], 1)
    around = f"""mad.wide.u32 %rd3, %r1, 12, %rd1; mad.wide.u32 %rd4, %r1, 4, %rd2;
    ld.global.b32 %r2, [%rd3]; ld.global.b32 %r3, [%rd3+4]; ld.global.b32 %r4, [%rd3+8];
    {body}
    st.global.b32 [%rd4], %r5;"""
    return execute(around, data, 4 * len(data), threads=len(data)).view(np.uint32)


def _equal(got: np.ndarray, want: Iterable[int]) -> bool:
    return [int(x) for x in got] == [int(x) & 0xFFFFFFFF for x in want]


def _signed(x: int) -> int:
    return x - 2**32 if x >= 2**31 else x


def _quotient(x: int, y: int) -> int:
    q = abs(_signed(x)) // abs(_signed(y))
    return -q if (_signed(x) < 0) != (_signed(y) < 0) else q


def _permuted(x: int, y: int, selector: int) -> int:
    both, out = [(x | y << 32) >> 8 * i & 255 for i in range(8)], 0
    for i in range(4):
        k = selector >> 4 * i & 15
        out |= (both[k & 7] if k < 8 else (255 if both[k & 7] & 128 else 0)) << 8 * i
    return out


_INTEGER = {
    "mul.hi.u32 %r5, %r2, %r3;": lambda x, y, z: x * y >> 32,
    "mul.hi.s32 %r5, %r2, %r3;": lambda x, y, z: _signed(x) * _signed(y) >> 32,
    "mad.lo.s32 %r5, %r2, %r3, %r4;": lambda x, y, z: x * y + z,
    "div.s32 %r5, %r2, %r3;": lambda x, y, z: _quotient(x, y),
    "rem.s32 %r5, %r2, %r3;": lambda x, y, z: _signed(x) - _quotient(x, y) * _signed(y),
    "and.b32 %r3, %r3, 63; shl.b32 %r5, %r2, %r3;": lambda x, y, z: x << (y & 63) if y & 63 < 32 else 0,
    "and.b32 %r3, %r3, 63; shr.s32 %r5, %r2, %r3;": lambda x, y, z: _signed(x) >> min(y & 63, 31),
    "bfe.u32 %r5, %r2, 4, 14;": lambda x, y, z: x >> 4 & 0x3FFF,
    "bfe.s32 %r5, %r2, 27, 1;": lambda x, y, z: -(x >> 27 & 1),
    "lop3.b32 %r5, %r2, %r3, %r4, 0xE8;": lambda x, y, z: (x & y) | (x & z) | (y & z),
    "prmt.b32 %r5, %r2, %r3, %r4;": _permuted,
    "min.s32 %r5, %r2, %r3;": lambda x, y, z: min(_signed(x), _signed(y)),
    "min.relu.s32 %r5, %r2, %r3;": lambda x, y, z: max(min(_signed(x), _signed(y)), 0),
    "setp.lt.u32 %p1, %r2, %r3; selp.b32 %r5, %r2, %r4, %p1;": lambda x, y, z: x if x < y else z,
    "setp.gt.s32 %p1, %r2, 0; mov.b32 %r5, 7; @%p1 add.s32 %r5, %r2, 1; @!%p1 sub.s32 %r5, %r2, %r3;": lambda x, y, z: (
        x + 1 if _signed(x) > 0 else x - y
    ),
    # a loop whose lanes leave at different times
    "mov.b32 %r5, 0; and.b32 %r6, %r2, 15;\n$L_a: add.s32 %r5, %r5, %r6; sub.s32 %r6, %r6, 1; "
    "setp.gt.s32 %p1, %r6, 0; @%p1 bra $L_a;": lambda x, y, z: (x & 15) * ((x & 15) + 1) // 2,
}


def _integers(rng: np.random.Generator) -> Iterator[Unit]:
    words = [rng.integers(0, 2**32, _THREADS, dtype=np.uint64).astype(np.uint32) for _ in range(3)]
    words[1][:8] = [1, 0xFFFFFFFF, 7, 8, 3, 31, 32, 33]
    rows = list(zip(*(word.tolist() for word in words), strict=True))
    for body, function in _INTEGER.items():
        yield body, _equal(_three(body, *words), [function(*row) for row in rows])


def _bfloat(x: Fraction) -> int:
    """Bits of the nearest even bfloat16 of an exact value in the normal range."""
    if x == 0:
        return 0
    sign, x = (0x8000, -x) if x < 0 else (0, x)
    exponent = 0
    while x >= 2:
        x, exponent = x / 2, exponent + 1
    while x < 1:
        x, exponent = x * 2, exponent - 1
    mantissa, rest = divmod(x * 128, 1)
    mantissa += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and mantissa & 1)
    return sign | (((exponent + 127) << 7) + int(mantissa) - 128)


def _exact(bits: int) -> Fraction:
    """Value of bfloat16 bits."""
    return Fraction(float(np.array([int(bits) << 16], np.uint32).view(np.float32)[0]))


def _floats(rng: np.random.Generator) -> Iterator[Unit]:
    n = _THREADS
    pairs = [
        rng.integers(0x3D80, 0x4200, n).astype(np.uint32) | (rng.integers(0, 2, n).astype(np.uint32) << 15)
        for _ in "abc"
    ]
    # sums whose rounding is decided far below the last bit
    pairs[2][:64] = 0x3C00 + np.arange(64)
    body = "fma.rn.bf16x2 %r5, %r2, %r3, %r4;"
    want = [_bfloat(_exact(x) * _exact(y) + _exact(z)) for x, y, z in zip(*pairs, strict=True)]
    yield body, _equal(_three(body, *[x | x << 16 for x in pairs]), [w | w << 16 for w in want])
    x, y = (rng.standard_normal(n).astype(np.float32) for _ in "xy")
    x[:4] = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32).view(np.float32)
    fx, fy = ([Fraction(float(v)) for v in values] for values in (x, y))
    body = "cvt.rn.bf16x2.f32 %r5, %r2, %r3;"
    yield body, _equal(_three(body, x, y, y), [_bfloat(p) << 16 | _bfloat(q) for p, q in zip(fx, fy, strict=True)])
    body = "fma.rn.f32 %r5, %r2, %r3, %r4;"
    fused = [np.float32(float(p * q + r)).view(np.uint32) for p, q, r in zip(fx, fy, fx[::-1], strict=True)]
    yield body, _equal(_three(body, x, y, x[::-1].copy()), fused)
    scaled = x * np.float32(300)
    body = "cvt.rzi.u32.f32 %r5, %r2;"
    yield body, _equal(_three(body, scaled, y, y), [max(0, int(v)) for v in scaled])
    body = "cvt.rmi.f32.f32 %r5, %r2;"
    yield body, _equal(_three(body, scaled, y, y), np.floor(scaled).view(np.uint32))


def _shuffles(rng: np.random.Generator) -> Iterator[Unit]:
    words = rng.integers(0, 2**32, _THREADS, dtype=np.uint64).astype(np.uint32)
    lane = [i % 32 for i in range(_THREADS)]
    sources = {
        "shfl.sync.bfly.b32 %r5, %r2, 5, 31, -1;": [i - k + (k ^ 5) for i, k in enumerate(lane)],
        # segments of 8 lanes
        "shfl.sync.down.b32 %r5, %r2, 3, 6175, -1;": [i + 3 if k % 8 < 5 else i for i, k in enumerate(lane)],
        "shfl.sync.up.b32 %r5, %r2, 2, 0, -1;": [i - 2 if k >= 2 else i for i, k in enumerate(lane)],
    }
    for body, source in sources.items():
        yield body, _equal(_three(body, words, words, words), words[source])


def _mma(rng: np.random.Generator) -> bool:
    """Fragments by the formulas of the PTX manual, thread by thread; small integers, so that every sum is exact."""
    a, b, c = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8)), rng.integers(-8, 9, (16, 8))

    def bits(v: Any) -> int:
        return int(np.float32(v).view(np.uint32))

    word = np.zeros((32, 12), np.uint32)
    for t in range(32):
        group, k = t >> 2, t % 4
        for i in range(8):
            row, column = group + (8 if i in (2, 3, 6, 7) else 0), k * 2 + (i & 1) + (8 if i >= 4 else 0)
            word[t, i // 2] |= bits(a[row, column]) >> 16 << 16 * (i & 1)
        for i in range(4):
            row = k * 2 + (i & 1) + (8 if i >= 2 else 0)
            word[t, 4 + i // 2] |= bits(b[row, group]) >> 16 << 16 * (i & 1)
            word[t, 6 + i] = bits(c[group + 8 * (i >= 2), k * 2 + (i & 1)])
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd3+{4 * i}];" for i in range(10))
    stores = "".join(f"st.global.b32 [%rd4+{4 * i}], %r{16 + i};" for i in range(4))
    registers = "{%r16,%r17,%r18,%r19}, {%r10,%r11,%r12,%r13}, {%r14,%r15}, {%r16,%r17,%r18,%r19}"
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {registers};"
    body = f"mad.wide.u32 %rd3, %r1, 48, %rd1; mad.wide.u32 %rd4, %r1, 16, %rd2; {loads} {product} {stores}"
    d = execute(body, word, 512).view(np.float32).reshape(32, 4)
    want = a @ b + c
    return all(d[t, i] == want[(t >> 2) + 8 * (i >= 2), t % 4 * 2 + (i & 1)] for t in range(32) for i in range(4))


def _ldmatrix(rng: np.random.Generator) -> bool:
    body = """shl.b32 %r2, %r1, 4; mov.b32 %r3, global_smem; add.s32 %r3, %r3, %r2;
    mad.wide.u32 %rd3, %r1, 16, %rd1; mad.wide.u32 %rd4, %r1, 16, %rd2;
    ld.global.v4.b32 {%r4,%r5,%r6,%r7}, [%rd3]; st.shared.v4.b32 [%r3], {%r4,%r5,%r6,%r7}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r8,%r9,%r10,%r11}, [%r3];
    st.global.v4.b32 [%rd4], {%r8,%r9,%r10,%r11};"""
    m = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    d = execute(body, m, 512, shared=512).view(np.uint16).reshape(32, 4, 2)
    return all(d[t, i, e] == m[i, t % 4 * 2 + e, t // 4] for t in range(32) for i in range(4) for e in range(2))


_STORE_OWN = "mov.b32 %r2, global_smem; shl.b32 %r3, %r1, 2; add.s32 %r4, %r2, %r3; st.shared.b32 [%r4], %r1;"
# what is refused -> (program, what the message says of it)
_REFUSED = {
    "an opcode that is not known": ("popc.b32 %r2, %r1;", r"popc\.b32.* not implemented"),
    "a form that is not known": ("add.rz.f32 %r2, %r1, %r1;", r"add\.rz\.f32.* not implemented"),
    "load out of bounds": (
        "ld.global.b32 %r2, [%rd1+512];",
        r"^t \(sm_90a\) line \d+: `ld\.global.*`: out-of-bounds .* of 4 bytes by CTA 0 thread 0 at 0x\w+.*in\+512",
    ),
    "misaligned load": ("ld.global.v2.b32 {%r2, %r3}, [%rd1+4];", r"misaligned ld\.global of 8 bytes .*in\+4 of 512"),
    "store of different values to one address": (
        "st.global.b32 [%rd2], %r1;",
        "two threads write different values at once: 4 bytes .*out\\+0",
    ),
    "shared memory never written": (
        "mov.b32 %r2, global_smem; ld.shared.b32 %r3, [%r2+8];",
        "never written at shared byte 8 by CTA 0 thread 0",
    ),
    "shared memory out of bounds": (
        "mov.b32 %r2, global_smem; st.shared.b32 [%r2+512], %r1;",
        "st.shared of 4 bytes by CTA 0 thread 0 at shared byte 512 of 512",
    ),
    "shared memory of another warp without a barrier": (
        _STORE_OWN + "xor.b32 %r5, %r3, 128; add.s32 %r5, %r5, %r2; ld.shared.b32 %r6, [%r5];",
        "read races with a write .* at shared byte 128 by CTA 0 thread 0; last write by warp 1",
    ),
    "predicate never written": ("@%p5 add.s32 %r5, %r1, 1;", "%p5 is read before it is written"),
    "address never written": ("ld.global.b32 %r2, [%rd9];", "misaligned ld.global"),
    "global memory before the launch in front is waited for": (
        "ld.global.b32 %r2, [%rd1]; griddepcontrol.wait;",
        "global memory is touched before the launch in front is waited for",
    ),
    "a barrier that one warp never reaches": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L_a; bar.sync 0, 64;\n$L_a: mov.b32 %r2, 0;",
        "deadlock: 32 lanes wait for ever at a barrier",
    ),
    "part of a warp that shuffles": (
        "setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;",
        "part of a warp",
    ),
}


def _refused(body: str, message: str) -> bool:
    try:
        execute(body, np.zeros(128, np.uint32), 512, threads=64, shared=512)
    except PtxError as error:
        return re.search(message, str(error)) is not None
    return False
