"""Command line of the executed PTX; one line per check, exit code 1 where one failed."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .cases import Case

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
# of the breaks of real kernels; the rest are barriers and waits that another one makes redundant
NOTICED_FLOOR = {80: 0.9, 90: 0.9, 100: 0.8}
_QUICK_CCS = (90, 80, 120)


class Result(NamedTuple):
    """A line of the report: its verdict, its text, and an error over eager's."""

    ok: bool
    text: str
    ratio: float = float("nan")


def _quick(args: argparse.Namespace) -> Iterator[Result]:
    from .case_sets import quick

    for cc in args.cc or _QUICK_CCS:
        yield from _run_cases(quick(cc), args)
        if cc == 90 and not args.only and (not args.op or "expand" in args.op):
            yield _two_forms_of_expand()


def _two_forms_of_expand() -> Result:
    """The kernel of specialised warps leaves the bits that the plain one leaves."""
    from capacitor_kernels.gemm import GemmConfig
    from capacitor_kernels.ops.expand import HOPPER

    from . import cases
    from .compare import same_bits

    forms = (cases.Form(90, config=config) for config in (HOPPER, GemmConfig(128, 128, 64, 8, 8, 3)))
    made = (cases.expand(form, 2, 256, 384, 512, sms=3) for form in forms)
    ok, text = same_bits(*made)
    return Result(ok, f"sm_90 bf16 expand by specialised warps against the plain kernel: {text}")


def _cases(args: argparse.Namespace) -> Iterator[Result]:
    from .case_sets import CCS, odd, rows
    from .cases import DTYPES

    for cc in args.cc or CCS:
        for dtype in args.dtype or ["bf16"]:
            yield from _run_cases((*rows(cc, DTYPES[dtype]), *odd(cc, DTYPES[dtype])), args)


def _run_cases(makes: Iterable[Callable[[], Case]], args: argparse.Namespace) -> Iterator[Result]:
    from .cases import NAMES
    from .compare import run_case

    for make in makes:
        case = make()
        if args.op and case.op not in args.op:
            continue
        if args.only not in case.name:
            continue
        verdict = run_case(case, bits=not args.no_bits)
        what = f"sm_{case.cc} {NAMES[case.dtype]} {case.op} {case.name}"
        yield Result(verdict.ok, f"{what}: {verdict.text} ({verdict.seconds:.1f} s)", verdict.ratio)


def _bits(args: argparse.Namespace) -> Iterator[Result]:
    from .bit_classes import foreign, pairs
    from .compare import same_bits

    for cc in args.cc or (90, 80, 120):
        for pair in pairs(cc):
            if not args.op or pair.many.op in args.op:
                ok, text = same_bits(pair.many, pair.few)
                yield Result(ok, f"sm_{cc} bits of {pair.text}: {text}")
        if not args.op or "project" in args.op:
            pair = foreign(cc)
            same, text = same_bits(pair.many, pair.few)
            yield Result(not same, f"sm_{cc} bits of {pair.text}: {text}, as they may")


def _chained(args: argparse.Namespace) -> Iterator[Result]:
    """The quick cases again, each launch early: every access to global memory must come behind the wait."""
    from capacitor_kernels.launch import chained

    from .case_sets import quick
    from .early import check

    for cc in args.cc or (90, 100, 120):
        for kernel, wrong in check(cc):
            yield Result(not wrong, f"sm_{cc} early: {kernel}: {wrong or 'the wait stands in front'}")
        with chained():
            for result in _run_cases(quick(cc), args):
                yield result._replace(text=f"chained {result.text}")


def _units(args: argparse.Namespace) -> Iterator[Result]:
    from .units import units

    for what, ok in units():
        yield Result(ok, f"instruction {' '.join(what.split())}")


def _gelu(args: argparse.Namespace) -> Iterator[Result]:
    from .gelu import check_gelu

    for cc in args.cc or _QUICK_CCS:
        for kind in ("fit", "erf"):
            ok, text = check_gelu(cc, kind)
            yield Result(ok, f"sm_{cc} {text}")


def _selftest(args: argparse.Namespace) -> Iterator[Result]:
    from .breaks import SELF_TEST_CCS, self_test

    total = noticed = 0
    for cc in args.cc or SELF_TEST_CCS:
        findings = []
        for finding in self_test(cc, tuple(args.op or ()), args.every):
            findings.append(finding.noticed)
            sign = "noticed" if finding.noticed else "missed"
            print(f"     sm_{cc} {finding.op}, {finding.what}: {sign}: {finding.text[:160]}", flush=True)
        share = sum(findings) / max(1, len(findings))
        total, noticed = total + len(findings), noticed + sum(findings)
        yield Result(share >= NOTICED_FLOOR.get(cc, 0.8), f"sm_{cc}: {sum(findings)} of {len(findings)} breaks noticed")
    yield Result(total > 0, f"{noticed} of {total} broken kernels were noticed")


def _golden(args: argparse.Namespace) -> Iterator[Result]:
    from capacitor_kernels.launch import E4M3_COMPUTE_CAPABILITY
    from capacitor_rt import ModelConfig

    from .golden import check_folder, check_fp8

    for folder in args.golden or (GOLDEN / "p16", GOLDEN / "p8"):
        for cc in args.cc or (80, 90, 100, 120):
            for dtype in args.dtype or ["bf16"]:
                lines = check_folder(folder, cc, dtype, args.every_decode)
                config = ModelConfig.from_json(folder / "config.json")
                in_fp8 = dtype == "bf16" and cc >= E4M3_COMPUTE_CAPABILITY
                if in_fp8 and config.encoder_depth and not config.dico:
                    lines = itertools.chain(lines, check_fp8(folder, cc))
                for line in lines:
                    yield Result(line.ok, line.text, line.ratio)


def _large(args: argparse.Namespace) -> Iterator[Result]:
    from .large import large_cases, run_large

    for cc in args.cc or (80, 90, 100):
        for large in large_cases(cc):
            if not args.op or large.case.op in args.op:
                ok, text = run_large(large)
                yield Result(ok, f"sm_{cc} large {large.case.op} of {large.images} images: {text}")


PARTS = {
    "units": _units,
    "gelu": _gelu,
    "bits": _bits,
    "chained": _chained,
    "quick": _quick,
    "cases": _cases,
    "selftest": _selftest,
    "golden": _golden,
    "large": _large,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx",
        description="Run the PTX that Triton makes of the kernels on the CPU, check every access, compare the results "
        "with float64. Without a part, the quick one runs. See tests/ptx/README.md.",
    )
    part = parser.add_argument_group("parts")
    part.add_argument(
        "--quick", action="store_true", help="Run small shapes: every op on sm_90, the products elsewhere."
    )
    part.add_argument("--cases", action="store_true", help="Run every config row at its own shape, and odd shapes.")
    part.add_argument("--units", action="store_true", help="Check single instructions against scalar code.")
    part.add_argument("--gelu", action="store_true", help="Compare GELU with the exact one at every bfloat16 number.")
    part.add_argument("--bits", action="store_true", help="Compare the bits of few images' tiles with those of many.")
    part.add_argument("--chained", action="store_true", help="Run small shapes by launches that start early.")
    part.add_argument("--selftest", action="store_true", help="Break real kernels and count the breaks noticed.")
    part.add_argument("--large", action="store_true", help="Run the last CTAs of tensors of over 2^31 elements.")
    part.add_argument(
        "--golden",
        type=Path,
        nargs="*",
        metavar="DIR",
        help="Run whole models: folders of config.json, model.safetensors and io.safetensors, or the project's.",
    )
    part.add_argument("--all", action="store_true", help="Run everything.")
    parser.add_argument("--cc", type=int, action="append", help="Compute capability, e.g. 90. Repeat for several.")
    parser.add_argument("--op", action="append", help="Run the cases of this op alone. Repeat for several.")
    parser.add_argument("--only", default="", metavar="TEXT", help="Run the cases whose name contains this.")
    parser.add_argument("--dtype", action="append", choices=["bf16", "fp16", "fp32"], help="The default is bf16.")
    parser.add_argument("--every-decode", action="store_true", help="Run all recorded decodes of golden folders.")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="Take one in N breaks of each kernel.")
    parser.add_argument("--no-bits", action="store_true", help="Do not ask what the bits of results depend on.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; returns the exit code."""
    args = _parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: kernels cannot be compiled then, unset it", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".triton_cache"))
    import torch

    torch.set_num_threads(1)
    chosen = [name for name in PARTS if args.all or getattr(args, name) not in (False, None)] or ["quick"]
    count, failed, worst = 0, 0, 0.0
    start = time.perf_counter()
    for name in chosen:
        for result in PARTS[name](args):
            count, failed = count + 1, failed + (not result.ok)
            worst = max(worst, result.ratio if result.ratio == result.ratio else 0.0)
            print(f"{'PASS' if result.ok else 'FAIL'} {result.text}", flush=True)
    seconds = time.perf_counter() - start
    errors = f"errors at most {worst:.2f} of eager's, " if worst else ""
    print(f"{count} checks, {failed} failed, {errors}{seconds:.0f} s")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
