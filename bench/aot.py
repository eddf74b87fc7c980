"""Compile every shipped config row ahead of time, without a GPU, and tabulate what the compiler made of it.

    python -m bench aot                       all rows of kernels/configs, table to bench/results/aot.md
    python -m bench aot --cc 90 --family expand --out -        some of them, table to the terminal
    python -m bench aot --json FILE           the same facts as JSON

A row is compiled for the compute capability of its file: every different launch that the runtime's plans of the known
models queue with it goes through Triton's compiler and ptxas; registers and stack come from the cubin. Whitening, which
plans fold into other ops, is called by hand. Compiled kernels are cached in TRITON_CACHE_DIR, which is `.triton_cache`
in the current directory unless set. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from capacitor_kernels import OPS

from ._compile import INSTRUCTIONS, compile_launch, ctas_per_sm
from ._row_launches import launches_of

DEFAULT_TABLE = Path(__file__).parent / "results" / "aot.md"
COLUMNS = (
    "sm",
    "kernel",
    "dtype",
    "use",
    "shape",
    "config",
    "queued by",
    "registers",
    "stack B",
    "smem B",
    "CTAs/SM",
    "instructions",
)


@dataclass(frozen=True)
class Facts:
    """What one launch of one row compiled to.

    Attributes:
        queued_by: the plans that queue it.
        registers: per thread.
        stack: bytes of local memory per thread; anything above zero is spilled registers.
        smem: bytes of shared memory per CTA.
        ctas: CTAs that fit on an SM by registers, shared memory and threads.
        dot: whether the kernel multiplies matrices.
        instructions: counts in the PTX of matrix and copy instructions.
    """

    family: str
    kernel: str
    cc: int
    dtype: str
    use: str
    shape: dict[str, int]
    config: dict[str, Any]
    queued_by: str
    registers: int
    stack: int
    smem: int
    ctas: int
    dot: bool
    instructions: dict[str, int]


def compile_row(cc: int, family: str, index: int) -> list[Facts]:
    """Facts of every different launch of one config row."""
    from capacitor_kernels import tuning

    row = tuning.rows(cc, family)[index]
    facts = []
    for launch, queued_by in launches_of(row):
        try:
            kernel, registers, stack = compile_launch(launch, cc)
        except Exception as error:
            raise RuntimeError(f"{launch.kernel.__name__} for sm_{cc}, {row.config}: {error}") from error
        counts = {name: len(re.findall(regex, kernel.asm["ptx"])) for name, regex in INSTRUCTIONS.items()}
        smem, warps = kernel.metadata.shared, launch.options["num_warps"]
        facts.append(
            Facts(
                family=family,
                kernel=launch.kernel.__name__,
                cc=cc,
                dtype=row.dtype,
                use=row.use,
                shape=dict(row.shape),
                config=dataclasses.asdict(row.config),
                queued_by=queued_by,
                registers=registers,
                stack=stack,
                smem=smem,
                ctas=ctas_per_sm(cc, registers, smem, warps),
                dot="tt.dot" in kernel.asm["ttir"],
                instructions={name: count for name, count in counts.items() if count},
            )
        )
    return facts


def compile_rows(ccs: Sequence[int], families: Sequence[str], jobs: int) -> list[Facts]:
    """Facts of all rows of these compute capabilities and families (all families when empty), in file order."""
    from capacitor_kernels import tuning

    names = families or OPS
    work = [(cc, name, i) for name in names for cc in ccs for i in range(len(tuning.rows(cc, name)))]
    if jobs == 1:
        return [fact for item in work for fact in compile_row(*item)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return [fact for facts in pool.map(compile_row, *zip(*work, strict=True)) for fact in facts]


def table(facts: Sequence[Facts]) -> str:
    """The facts as a markdown page."""
    import triton

    lines = [
        "# What the compiler makes of every shipped config row",
        "",
        f"Written by `python -m bench aot`, Triton {triton.__version__} and the ptxas in its wheel, no GPU needed. "
        "Compiled are the launches that the runtime's plans queue with a row, each different one once. "
        "Stack above zero means spilled registers; CTAs per SM follow from registers, shared memory and threads.",
        "",
    ]
    for family in sorted({fact.family for fact in facts}):
        lines += [
            f"## {family}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|" + len(COLUMNS) * "---|",
        ]
        lines += [_table_row(fact) for fact in facts if fact.family == family]
        lines.append("")
    return "\n".join(lines)


def _table_row(fact: Facts) -> str:
    shape = " ".join(f"{key}={value}" for key, value in fact.shape.items())
    set_fields = {key: value for key, value in fact.config.items() if value not in (None, False)}
    config = " ".join(f"{key}={value}" for key, value in set_fields.items())
    instructions = " ".join(f"{name}:{count}" for name, count in fact.instructions.items()) or "-"
    what = (fact.cc, fact.kernel, fact.dtype, fact.use, shape, config, fact.queued_by)
    cells = (*what, fact.registers, fact.stack, fact.smem, fact.ctas, instructions)
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cc", type=int, action="append", help="Compile rows for this compute capability, e.g. 90, instead of all."
    )
    parser.add_argument("--family", action="append", help="Compile rows of this family instead of all.")
    parser.add_argument("--out", default=str(DEFAULT_TABLE), help="Write the table to this file; - prints it.")
    parser.add_argument("--json", help="Write the facts to this file as JSON too.")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="Compile in this many processes.")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: kernels cannot be compiled then, unset it", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.cwd() / ".triton_cache"))
    from capacitor_kernels.tuning import COMPUTE_CAPABILITIES

    facts = compile_rows(args.cc or COMPUTE_CAPABILITIES, args.family or (), args.jobs)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(fact) for fact in facts], indent=1) + "\n")
    if args.out == "-":
        print(table(facts))
    else:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
