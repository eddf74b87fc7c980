"""Compile every shipped config row ahead of time, without a GPU, and tabulate what the compiler made of it.

    python -m bench aot                       all rows of kernels/configs and the sizes that have spilled before, table
                                              to bench/results/aot.md
    python -m bench aot --all                 all rows, and 64 to 16,384 tokens in bf16, fp16 and e4m3, to the terminal
    python -m bench aot --cc 90 --family expand --out -        some of them, table to the terminal
    python -m bench aot --json FILE           the same facts as JSON
    python -m bench aot --known bench/results/aot.json      compile what has changed since the table was written

A row is compiled for the compute capability of its file: every different launch that the runtime's plans of the known
models queue with it goes through Triton's compiler and ptxas; registers and stack come from the cubin. Whitening, which
plans fold into other ops, attention, which serves the FLUX.2 VAE, and resizing are called by hand. At a size, it is
what plans queue with the configs that `lookup` returns there, masked tiles and analytical defaults included. Compiled
kernels are cached in TRITON_CACHE_DIR, which is `.triton_cache` in the current directory unless set. TRITON_INTERPRET
must not be set.

Beside the table lies what each launch compiled to, by a fingerprint of all that the compiler is given. With `--known` a
launch whose fingerprint is there is believed, but for one in sixteen, drawn anew each time, which is compiled and
compared. That is what `make test` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from capacitor_kernels import OPS

from ._compile import INSTRUCTIONS, compile_launch, ctas_per_sm, fingerprint
from ._row_launches import identity, launches_at, launches_of

if TYPE_CHECKING:
    from capacitor_kernels.launch import Launch

DEFAULT_TABLE = Path(__file__).parent / "results" / "aot.md"
DEFAULT_KNOWN = DEFAULT_TABLE.with_suffix(".json")
SAMPLE = 1 / 16
"""Of the launches that are known, the share that is compiled all the same."""
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


class Size(NamedTuple):
    """One image size at which the launches of some ops are compiled.

    Attributes:
        grid: rows and columns of patches of an image.
        families: ops to compile; all when empty.
    """

    cc: int
    dtype: str
    grid: tuple[int, int]
    use: str
    families: tuple[str, ...] = ()


# in whose forms the models with channel attention differ
OF_SIBLINGS = ("expand", "dwconv", "channel_attention", "rmsnorm")
# 14 x 14 tokens are no multiple of 16: masked tiles, and stores that are not vectorised. At 128 x 128 no row is near.
SPILLED_BEFORE = (
    *(Size(cc, "bf16", (14, 14), "throughput", ("head", "project", *OF_SIBLINGS)) for cc in (80, 89, 90, 100, 120)),
    Size(90, "bf16", (14, 14), "throughput", ("patchify",)),
    Size(90, "fp16", (14, 14), "throughput", ("patchify", "expand", "project")),
    Size(90, "bf16", (128, 128), "throughput", ("expand", "project")),
    Size(89, "bf16", (15, 17), "throughput", ("project",)),
    Size(80, "bf16", (16, 16), "latency", ("unpatchify",)),
    Size(80, "bf16", (32, 32), "latency", ("unpatchify",)),
    Size(120, "bf16", (8, 8), "latency", ("project",)),
    *(Size(89, dtype, (8, 8), "latency", ("project",)) for dtype in ("bf16", "fp16")),
    *(Size(80, dtype, (8, 8), "latency", ("expand",)) for dtype in ("bf16", "fp16")),
    *(Size(80, dtype, (15, 17), "throughput", ("expand", "project")) for dtype in ("bf16", "fp16")),
    Size(80, "fp16", (15, 17), "latency", ("project",)),
    Size(100, "fp16", (16, 16), "throughput", ("project",)),
)
# rows in e4m3 are those of products alone; masked tiles, few tokens and one image are by default
IN_FP8 = ("dwconv", "expand_fp8", "grn", "project_fp8")
SIZES_IN_FP8 = tuple(
    Size(cc, "e4m3", grid, use, IN_FP8)
    for cc in (89, 90, 100, 120)
    for grid, use in (
        *(((n, n), "throughput") for n in (14, 16, 32, 64)),
        ((7, 5), "throughput"),
        *(((n, n), "latency") for n in (14, 16, 32)),
    )
)
GRIDS = ((8, 8), (14, 14), (15, 17), (16, 16), (32, 32), (64, 64), (128, 128))


@dataclass(frozen=True)
class Facts:
    """What one launch compiled to.

    Attributes:
        source: "row" of a config file, or "size" of an image.
        shape: the row's shape; or the rows, columns and images of the first call that queues the launch.
        config: the row's config; or the tile and compiler options of the launch.
        queued_by: the plans that queue it.
        registers: per thread.
        stack: bytes of local memory per thread; anything above zero is spilled registers.
        smem: bytes of shared memory per CTA.
        ctas: CTAs that fit on an SM by registers, shared memory and threads.
        dot: whether the kernel multiplies matrices.
        instructions: counts in the PTX of matrix and copy instructions.
        warps: of a CTA, specialised ones included.
        fingerprint: of what the compiler was given.
    """

    source: str
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
    warps: int
    fingerprint: str


class Compiled(NamedTuple):
    """What the compiler says of a launch; fields as in `Facts`."""

    registers: int
    stack: int
    smem: int
    warps: int
    dot: bool
    instructions: dict[str, int]


class _Known:
    """Launches that were compiled before, by fingerprint; in worker processes too."""

    launches: ClassVar[dict[str, Compiled]] = {}
    sample: ClassVar[float] = SAMPLE

    @classmethod
    def read(cls, path: str | None, sample: float) -> None:
        cls.sample = sample
        cls.launches = {}
        if path is not None:
            cls.launches = {key: Compiled(*fields) for key, fields in json.loads(Path(path).read_text()).items()}


def compile_row(cc: int, family: str, index: int) -> list[Facts]:
    """Facts of every different launch of one config row."""
    from capacitor_kernels import config_rows

    row = config_rows.rows(cc, family)[index]
    where: dict[str, Any] = {"family": family, "cc": cc, "dtype": row.dtype, "use": row.use, "shape": dict(row.shape)}
    config = dataclasses.asdict(row.config)
    return [_facts(launch, "row", config, queued_by, **where) for launch, queued_by in launches_of(row)]


def compile_sizes(sizes: Sequence[Size]) -> list[Facts]:
    """Facts of every different launch at some image sizes, each machine code once."""
    facts, seen = [], set()
    for size in sizes:
        for family, shape, launch, queued_by in launches_at(*size):
            if (size.cc, identity(launch)) in seen:
                continue
            seen.add((size.cc, identity(launch)))
            tile = {name.lower(): value for name, value in launch.args.items() if name.startswith("BLOCK")}
            options = {name: launch.options.get(name) for name in ("num_warps", "num_stages", "maxnreg")}
            where: dict[str, Any] = {
                "family": family,
                "cc": size.cc,
                "dtype": size.dtype,
                "use": size.use,
                "shape": shape,
            }
            facts.append(_facts(launch, "size", tile | options, queued_by, **where))
    return facts


def _facts(launch: Launch, source: str, config: dict[str, Any], queued_by: str, *, cc: int, **where: Any) -> Facts:
    what = f"{launch.kernel.__name__} for sm_{cc}, {where}, {config}"
    key = fingerprint(launch, cc)
    known = compiled = _Known.launches.get(key)
    if compiled is None or random.random() < _Known.sample:
        try:
            compiled = _compile(launch, cc)
        except Exception as error:
            raise RuntimeError(f"{what}: {error}") from error
        if known is not None and compiled != known:
            raise RuntimeError(f"{what}: {compiled} was {known} in the file of known launches: run python -m bench aot")
    return Facts(
        source=source,
        kernel=launch.kernel.__name__,
        cc=cc,
        config=config,
        queued_by=queued_by,
        ctas=ctas_per_sm(cc, compiled.registers, compiled.smem, compiled.warps),
        fingerprint=key,
        **compiled._asdict(),
        **where,
    )


def _compile(launch: Launch, cc: int) -> Compiled:
    kernel, registers, stack = compile_launch(launch, cc)
    counts = {name: len(re.findall(regex, kernel.asm["ptx"])) for name, regex in INSTRUCTIONS.items()}
    return Compiled(
        registers=registers,
        stack=stack,
        smem=kernel.metadata.shared,
        # specialised warps come on top of those asked for
        warps=kernel.metadata.num_warps,
        dot="tt.dot" in kernel.asm.get("ttir", "") or "warp_group_dot" in kernel.asm["ttgir"],
        instructions={name: count for name, count in counts.items() if count},
    )


def compile_rows(
    ccs: Sequence[int],
    families: Sequence[str],
    jobs: int,
    every_size: bool = False,
    known: str | None = None,
    sample: float = SAMPLE,
) -> list[Facts]:
    """Facts of all rows of these compute capabilities and families (all families when empty), in file order.

    Those of sizes follow: `SPILLED_BEFORE` and `SIZES_IN_FP8`, or all of `GRIDS` in all dtypes and uses. Launches in
    the file `known` are compiled by a share of `sample`.
    """
    from capacitor_kernels import config_rows
    from capacitor_kernels.launch import E4M3_COMPUTE_CAPABILITY

    names = tuple(families) or OPS
    rows = [(cc, name, i) for name in names for cc in ccs for i in range(len(config_rows.rows(cc, name)))]
    sizes = (*SPILLED_BEFORE, *SIZES_IN_FP8)
    if every_size:
        sizes = tuple(
            Size(cc, dtype, grid, use)
            for cc in ccs
            for dtype in ("bf16", "fp16", "e4m3")
            if dtype != "e4m3" or cc >= E4M3_COMPUTE_CAPABILITY
            for use in config_rows.USES
            for grid in GRIDS
        )
    wanted = [
        size._replace(families=tuple(name for name in names if not size.families or name in size.families))
        for size in sizes
        if size.cc in ccs
    ]
    # what one launch shares between sizes is found by one process
    groups = [[s for s in wanted if s[:2] == key and s.families] for key in dict.fromkeys(s[:2] for s in wanted)]
    if jobs == 1:
        _Known.read(known, sample)
        by_item = [*(compile_row(*item) for item in rows), *map(compile_sizes, groups)]
    else:
        begin: dict[str, Any] = {"initializer": _Known.read, "initargs": (known, sample)}
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), **begin) as pool:
            running = [pool.submit(compile_row, *item) for item in rows]
            running += [pool.submit(compile_sizes, group) for group in groups]
            by_item = [future.result() for future in running]
    return [fact for facts in by_item for fact in facts]


def table(facts: Sequence[Facts]) -> str:
    """The facts as a markdown page."""
    import triton

    lines = [
        "# What the compiler makes of every shipped config row",
        "",
        f"Written by `python -m bench aot`, Triton {triton.__version__} and the ptxas in its wheel, no GPU needed. "
        "Compiled are the launches that the runtime's plans queue with a row, each different one once; at the end, "
        "those of image sizes that have spilled before, with the configs that `lookup` returns there. "
        "Stack above zero means spilled registers; CTAs per SM follow from registers, shared memory and threads.",
        "",
    ]
    for family in sorted({fact.family for fact in facts if fact.source == "row"}):
        lines += _section(family, [fact for fact in facts if fact.source == "row" and fact.family == family])
    sizes = [fact for fact in facts if fact.source == "size"]
    if sizes:
        lines += _section("Sizes of images", sorted(sizes, key=lambda fact: (fact.family, fact.cc, fact.dtype)))
    return "\n".join(lines)


def _known_json(facts: Sequence[Facts]) -> str:
    launches = {f.fingerprint: json.dumps([getattr(f, name) for name in Compiled._fields]) for f in facts}
    return "{\n" + ",\n".join(f'"{key}": {launches[key]}' for key in sorted(launches)) + "\n}\n"


def _section(title: str, facts: Sequence[Facts]) -> list[str]:
    head = [f"## {title}", "", f"| {' | '.join(COLUMNS)} |", "|" + len(COLUMNS) * "---|"]
    return [*head, *map(_table_row, facts), ""]


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
    parser.add_argument("--all", action="store_true", help="Compile every size of image too, which takes long.")
    parser.add_argument("--out", help="Write the table to this file; - prints it, as --all does by default.")
    parser.add_argument("--json", help="Write the facts to this file as JSON too.")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="Compile in this many processes.")
    parser.add_argument("--known", help="Compile what is not in this file, which a whole run writes beside its table.")
    parser.add_argument("--sample", type=float, default=SAMPLE, help="Share of what is known to compile all the same.")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: kernels cannot be compiled then, unset it", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.cwd() / ".triton_cache"))
    from capacitor_kernels.gpu_limits import COMPUTE_CAPABILITIES

    chosen = args.cc or COMPUTE_CAPABILITIES, args.family or ()
    facts = compile_rows(*chosen, args.jobs, args.all, args.known, args.sample)
    out = args.out or ("-" if args.all else str(DEFAULT_TABLE))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(fact) for fact in facts], indent=1) + "\n")
    if out == "-":
        print(table(facts))
    else:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(table(facts))
        if out == str(DEFAULT_TABLE):
            DEFAULT_KNOWN.write_text(_known_json(facts))
    spilled = [fact for fact in facts if fact.stack]
    for fact in spilled:
        print(f"spills: {_table_row(fact)}", file=sys.stderr)
    print(f"{len(facts)} launches, {len(spilled)} of them spill", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
