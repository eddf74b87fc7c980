"""Compile every shipped config row ahead of time, without a GPU, and tabulate what the compiler made of it.

    python -m bench.aot                       all rows of kernels/configs, table to bench/results/aot.md
    python -m bench.aot --cc 90 --family expand --out -        some of them, table to the terminal
    python -m bench.aot --json FILE           the same facts as JSON

A row is compiled for the compute capability of its file by running its family's `example` launches through Triton's
compiler and ptxas; registers and stack come from the cubin. Compiled kernels are cached in TRITON_CACHE_DIR, which is
`.triton_cache` in the current directory unless set. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from capacitor_kernels import OPS

DEFAULT_TABLE = Path(__file__).parent / "results" / "aot.md"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_POINTERS = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "uint8": "*u8",
    "int32": "*i32",
    "int64": "*i64",
}
_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "tma": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.cg|cp\.async\.ca",
}


@dataclass(frozen=True)
class Facts:
    """What one kernel of one row compiled to.

    Attributes:
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
    registers: int
    stack: int
    smem: int
    ctas: int
    dot: bool
    instructions: dict[str, int]


def load_families(modules: Iterable[str] = OPS) -> None:
    """Import the kernel modules, so that their families are registered; absent modules are skipped."""
    for name in modules:
        try:
            import_module(f"capacitor_kernels.ops.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"capacitor_kernels.ops.{name}":
                raise


def signature(launch: Any) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """(types by name, constexpr values by position, divisibility hints by position) of a launch.

    Follows what Triton's just-in-time path specialises on: pointers and integers divisible by 16, integers equal to 1.
    """
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list] = {}
    aligned = [["tt.divisibility", 16]]
    for at, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[at,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = _POINTERS[str(value.dtype).removeprefix("torch.")]
            hints[at,] = aligned
        elif isinstance(value, TensorDescriptor):
            inner = _POINTERS[str(value.base.dtype).removeprefix("torch.")][1:]
            types[name] = f"tensordesc<{inner}{list(value.block_shape)}>"
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                hints[at,] = aligned
    return types, constants, hints


def compile_launch(launch: Any, cc: int) -> tuple[Any, int, int]:
    """(compiled kernel, registers per thread, stack bytes per thread) of a launch for a compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, hints = signature(launch)
    source = ASTSource(launch.kernel, types, constants, hints)
    kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=dict(launch.options))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no register usage: {usage!r}")
    return kernel, int(found[1]), int(found[2])


def ctas_per_sm(cc: int, registers: int, smem: int, warps: int) -> int:
    """CTAs that fit on one SM; registers are given out to a warp in units of 256."""
    from capacitor_kernels.tuning import REGISTERS_PER_SM, SMEM_RESERVED_PER_CTA, limits

    limit = limits(cc)
    by_registers = REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256 * warps)
    by_smem = limit.smem_per_sm // (smem + SMEM_RESERVED_PER_CTA)
    return min(by_registers, by_smem, limit.threads_per_sm // (32 * warps), 32)


def compile_row(cc: int, family: str, index: int) -> list[Facts]:
    """Facts of every launch of one config row."""
    import torch

    from capacitor_kernels import tuning

    load_families()
    row = tuning.rows(cc, family)[index]
    example = next(f.example for f in tuning.families() if f.name == family)
    if example is None:
        raise ValueError(f"family {family} registers no example launches to compile")
    facts = []
    for launch in example(row.shape, getattr(torch, _DTYPES[row.dtype]), row.config):
        try:
            kernel, registers, stack = compile_launch(launch, cc)
        except Exception as error:
            raise RuntimeError(f"{launch.kernel.__name__} for sm_{cc}, {row.config}: {error}") from error
        counts = {name: len(re.findall(regex, kernel.asm["ptx"])) for name, regex in _INSTRUCTIONS.items()}
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

    load_families()
    names = families or [f.name for f in tuning.families()]
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
        f"Written by `python -m bench.aot`, Triton {triton.__version__} and the ptxas in its wheel, no GPU needed. "
        "Stack above zero means spilled registers; CTAs per SM follow from registers, shared memory and threads.",
        "",
    ]
    for family in sorted({fact.family for fact in facts}):
        lines += [
            f"## {family}",
            "",
            "| sm | kernel | dtype | use | shape | config | registers | stack B | smem B | CTAs/SM | instructions |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_table_row(fact) for fact in facts if fact.family == family]
        lines.append("")
    return "\n".join(lines)


def _table_row(fact: Facts) -> str:
    shape = " ".join(f"{key}={value}" for key, value in fact.shape.items())
    set_fields = {key: value for key, value in fact.config.items() if value not in (None, False)}
    config = " ".join(f"{key}={value}" for key, value in set_fields.items())
    instructions = " ".join(f"{name}:{count}" for name, count in fact.instructions.items()) or "-"
    cells = (fact.cc, fact.kernel, fact.dtype, fact.use, shape, config, fact.registers, fact.stack, fact.smem)
    return "| " + " | ".join(map(str, (*cells, fact.ctas, instructions))) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--cc", type=int, action="append", help="compute capability, e.g. 90; all when absent")
    parser.add_argument("--family", action="append", help="kernel family; all when absent")
    parser.add_argument("--out", default=str(DEFAULT_TABLE), help="markdown table, - for the terminal")
    parser.add_argument("--json", help="write the facts here as JSON as well")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
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
