"""Real kernels broken on purpose, one place at a time: every break is to be noticed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from capacitor_kernels.gemm import GemmConfig
from capacitor_kernels.ops.expand import HOPPER
from capacitor_kernels.ops.resize import ResizeConfig

from . import cases, fp8_cases
from .cases import DTYPES, Case, Form
from .compare import run_case

SELF_TEST_CCS = (80, 90, 100)
# of shared or tensor memory by all threads, and branches; copies and mbarriers are one thread's
_ACCESS = (
    r"\b(?:ld|st)\.shared|matrix\.|wgmma\.(?:mma|wait)|tcgen05\.(?:ld|st|alloc)|cp\.async\.c[ag]"
    r"|try_wait|\bbra\b|\n\$L__BB"
)
# of thousands of instructions: a part of the breaks takes a smaller part of theirs
_LONG = ("expand by specialised warps",)
_BARRIER_WAIT = r"\tmbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;"


@dataclass(frozen=True)
class Break:
    """One change of a kernel's PTX."""

    what: str
    ptx: str


@dataclass(frozen=True)
class Finding:
    """Whether a break was noticed, and by what."""

    cc: int
    op: str
    what: str
    noticed: bool
    text: str


def broken_cases(cc: int) -> dict[str, Callable[[], Case]]:
    """One case per op whose tiles are cut in every direction, and one through tensor descriptors."""
    form, grid = Form(cc), (7, 5)
    through = Form(cc, config=GemmConfig(64, 64, 64, 8, 4, 3, tma=True))
    turned = Form(cc, config=GemmConfig(128, 128, 64, 8, 8, 3, tma=True, transposed=True))
    by_descriptors = {"expand by descriptors": lambda: cases.expand(through, 1, 35, 200, 264)} if cc >= 90 else {}
    if cc == 90:
        specialised = Form(cc, config=HOPPER)
        by_descriptors |= {
            "project transposed": lambda: cases.project(turned, 1, 35, 264, 200),
            "expand by specialised warps": lambda: cases.expand(specialised, 2, 128, 384, 256, sms=1),
        }
    if cc == 90 or cc == 120:
        by_descriptors |= {
            "expand_fp8": lambda: fp8_cases.expand(form, 1, 35, 200, 264),
            "project_fp8": lambda: fp8_cases.project(form, 1, 35, 264, 200),
        }
    return by_descriptors | {
        "expand": lambda: cases.expand(form, 1, 35, 200, 264),
        "project": lambda: cases.project(form, 1, 35, 264, 200),
        "dwconv": lambda: cases.dwconv(form, 1, *grid, 200),
        "grn": lambda: cases.grn(form, 1, 3, 200),
        "head": lambda: cases.head(form, 1, grid, 200, 24, norm=True),
        "patchify": lambda: cases.patchify(form, 1, grid, 16, 200, "uint8", latents=24),
        "unpatchify": lambda: cases.unpatchify(form, 1, grid, 16, 200, "bf16", "fp32"),
        "whiten": lambda: cases.whiten(form, 1, grid, 24),
        # a warp alone, as the config row has it, needs none of its barriers
        "resize": lambda: cases.resize(Form(cc, DTYPES["uint8"], ResizeConfig(8, 256, 4)), [(20, 31), (9, 50)], 10, 13),
    }


def breaks(text: str) -> Iterator[Break]:
    """PTX with one change at a time: a barrier or wait dropped, a mask, an address, an operand, a shuffle changed."""

    def line(at: int) -> int:
        return text[:at].count("\n") + 1

    def cut(match: re.Match[str], new: str = "") -> str:
        return text[: match.start()] + new + text[match.end() :]

    def first(pattern: str) -> Iterator[re.Match[str]]:
        match = re.search(pattern, text)
        return iter([match] if match else [])

    for group in _barriers(text):
        lines = ", ".join(str(line(m.start())) for m in group)
        ends = zip([0, *(m.end() for m in group)], [*(m.start() for m in group), len(text)], strict=True)
        kept = [text[start:end] for start, end in ends]
        yield Break(f"barrier at line {lines} dropped", "".join(kept))
    for m in re.finditer(r"cp\.async\.wait_group \t?(\d+)", text):
        later = int(m[1]) + 2
        yield Break(
            f"cp.async.wait_group {m[1]} at line {line(m.start())} for {later}", cut(m, f"cp.async.wait_group {later}")
        )
    if "wgmma.wait_group" in text:
        yield Break("every wgmma wait dropped", re.sub(r"wgmma\.wait_group\.sync\.aligned \d+;", "", text))
    for m in re.finditer(_BARRIER_WAIT, text):
        yield Break(f"mbarrier wait at line {line(m.start())} dropped", cut(m))
    for what in ("st", "ld"):
        guarded = rf"\t@(%p\d+) ({what}\.global[^;]*);"
        if re.search(guarded, text):
            yield Break(f"masks of {what}.global dropped", re.sub(guarded, r"\t\2;", text))
            yield Break(f"masks of {what}.global turned round", re.sub(guarded, r"\t@!\1 \2;", text))
    for m in first(r"(tcgen05\.mma[^\[]*\[ %r\d+ \+ 0 \], \[ %r\d+ \+ )8"):
        yield Break("tcgen05.mma takes A 8 columns on", cut(m, m[1] + "16"))
    for m in first(r"(cp\.async\.cg\.shared\.global \[ %r\d+ \+ 0 \], \[ %rd\d+ \+ )0"):
        yield Break("first cp.async reads 16 bytes on", cut(m, m[1] + "16"))
    for m in first(r"(ldmatrix[^;]*\[%r\d+)(\+(\d+))?\]"):
        yield Break("first ldmatrix reads 16 bytes on", cut(m, f"{m[1]}+{int(m[3] or 0) + 16}]"))
    for m in first(r"(cvt\.rn\.bf16x2\.f32 \t%r\d+, )(%r\d+), (%r\d+);"):
        yield Break("halves of a pair swapped", cut(m, f"{m[1]}{m[3]}, {m[2]};"))
    for m in first(r"(cvt\.rn\.satfinite\.e4m3x2\.f32\s+%?\w+, )(%r\d+), (%r\d+);"):
        yield Break("bytes of a pair swapped", cut(m, f"{m[1]}{m[3]}, {m[2]};"))
    for m in first(r"fma\.rn\.f16x2 \t(%r\d+), (%r\d+), (%r\d+), (%r\d+);"):
        yield Break("two weights without their gain", cut(m, f"mov.b32 \t{m[1]}, {m[4]};"))
    for m in first(r"(mma[^{;]*e4m3[^{;]*\{[^}]*\}\s*,\s*\{\s*)(%r\d+)(\s*,\s*)(%r\d+)"):
        yield Break("rows of A in 8 bits swapped", cut(m, f"{m[1]}{m[4]}{m[3]}{m[2]}"))
    # another set of distances that adds every lane once would not be a break
    for m in first(r"(shfl\.sync\.bfly\.b32 \t%r\d+, %r\d+, )(\d+)"):
        yield Break("shuffle by another distance", cut(m, f"{m[1]}{int(m[2]) // 2 or 2}"))
    for m in first(r"(m(?:ul|ad)\.wide\.[su]32 \t%rd\d+, %r\d+, )(2|4)\b"):
        yield Break("a stride twice as wide", cut(m, f"{m[1]}{int(m[2]) * 2}"))
    for m in first(r"(fma\.rn\.f32 \t%r\d+, )(%r\d+), (%r\d+), (%r\d+);"):
        yield Break("product and sum of an fma swapped", cut(m, f"{m[1]}{m[2]}, {m[4]}, {m[3]};"))
    for m in first(r"(st\.global\.[\w.]+ \[ %rd\d+ \+ )0"):
        yield Break("first store 16 bytes on", cut(m, m[1] + "16"))


def _barriers(text: str) -> list[list[re.Match[str]]]:
    """Barriers of the CTA in groups that do one another's work: no access of all threads lies between."""
    groups: list[list[re.Match[str]]] = [[]]
    for m in re.finditer(rf"(\tbar\.sync \t\d+(?:, \d+)?;)|{_ACCESS}", text):
        if m[1]:
            groups[-1].append(m)
        elif groups[-1]:
            groups.append([])
    return [group for group in groups if group]


def self_test(cc: int, ops: tuple[str, ...] = (), every: int = 1) -> Iterator[Finding]:
    """Break the kernels of some ops (all when empty); of each op's breaks take one in `every`.

    Raises:
        AssertionError: a kernel that is not broken fails.
    """
    for op, make in broken_cases(cc).items():
        if ops and op not in ops:
            continue
        seen: list[str] = []
        whole = run_case(make(), mutate=partial(_keep, seen))
        assert whole.ok, f"sm_{cc} {op}, not broken: {whole.text}"
        step = every if every == 1 or op not in _LONG else 3 * every
        changes = [(text, change) for text in dict.fromkeys(seen) for change in breaks(text)]
        for text, change in changes[step // 2 :: step]:
            verdict = run_case(make(), mutate=partial(_replace, text, change))
            if verdict.ok and op in _LONG:
                verdict = run_case(make(), mutate=partial(_replace, text, change), last_warps_first=False)
            yield Finding(cc, op, change.what, not verdict.ok, verdict.text)


def _keep(seen: list[str], text: str) -> str:
    seen.append(text)
    return text


def _replace(whole: str, change: Break, text: str) -> str:
    return change.ptx if text == whole else text
