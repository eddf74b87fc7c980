"""Time every launch against eager torch and torch.compile.

    python -m bench.kernels                               all launches at the model card's sizes, on the GPU
    python -m bench.kernels --op expand --op project --size 128x256 --compile all
    python -m bench.kernels --device cpu                  tiny sizes under the interpreter, to test the bench itself

Prints a line for each launch and appends it as JSON to bench/results/kernels-<gpu>.jsonl. A launch whose result does
not agree with plain torch gets no time. The ceilings are measured in the same run. torch.compile takes its time too, so
only the first size is compiled unless `--compile all`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# relative rms difference from eager torch beyond which no time is taken: a few roundings, far below a wrong kernel
AGREEMENT = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 2e-4}
COLUMNS = (
    f"{'op':12} {'images':>14} {'dtype':>8} {'us':>10} {'TFLOP/s':>8} {'GB/s':>8} {'% floor':>8} {'x eager':>8} "
    f"{'x compile':>9}"
)


def parse_size(text: str, use: str) -> Any:
    """BATCHxSIZE, e.g. 128x256: that many square images of so many pixels a side."""
    from ._cases import Size

    try:
        batch, pixels = (int(part) for part in text.split("x"))
    except ValueError:
        raise SystemExit(f"--size {text} is not BATCHxPIXELS, e.g. 128x256") from None
    if batch < 1 or pixels < 16 or pixels % 16:
        raise SystemExit(f"--size {text}: the batch must be positive and {pixels} a positive multiple of 16")
    return Size(batch, pixels // 16, pixels // 16, use=use)


def difference(case: Any, device: Any) -> float:
    """Largest relative rms difference between a launch's outputs and eager torch's."""
    import torch

    prepared = case.prepare(device)
    prepared.launch()
    plain = case.plain(*prepared.plain_args)
    worst = 0.0
    for got, want in zip(prepared.outputs(), plain if isinstance(plain, tuple) else (plain,), strict=True):
        # uint8 images and the like compare as numbers
        got, want = got.double(), want.double()
        gap = (got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30)
        worst = max(worst, float("inf") if torch.isnan(gap) else gap.item())
    return worst


def measure(case: Any, device: Any, ceilings: Any, *, compiled: bool, replays: int) -> dict[str, Any]:
    """The figures of one launch, as a dict ready for JSON."""
    import torch

    from ._timing import Variant, time_variants

    gap = difference(case, device)
    dtype = str(case.dtype).removeprefix("torch.")
    line = {"bench": "kernels", "op": case.op, "images": str(case.size), "use": case.size.use, "dtype": dtype}
    line |= {"dim": case.size.dim, "hidden": case.size.hidden, "difference": gap}
    if not gap <= AGREEMENT[dtype]:
        return line | {"refused": f"differs from eager torch by {gap:.2e}, more than {AGREEMENT[dtype]:.0e}"}

    def plain(function: Any) -> Any:
        arguments = case.prepare(device).plain_args
        return lambda: function(*arguments)

    functions = {"eager": case.plain}
    if compiled:
        torch._dynamo.reset()
        functions["compile"] = torch.compile(case.plain, dynamic=False)
    variants = [Variant("kernel", lambda: case.prepare(device).launch, case.nbytes)]
    variants += [Variant(name, partial(plain, function), case.nbytes) for name, function in functions.items()]
    timed = time_variants(variants, device, replays)
    ours = timed["kernel"]
    line |= {"us": ours.us, "p20": ours.p20, "p80": ours.p80, "flops": case.flops, "bytes": case.nbytes}
    line |= {"tflops": case.flops / ours.us / 1e6, "gbs": case.nbytes / ours.us / 1e3}
    line["percent_of_floor"] = 100 * ceilings.floor_us(case.flops, case.nbytes) / ours.us
    for name in ("eager", "compile"):
        if name in timed:
            line |= {f"{name}_us": timed[name].us, f"x_{name}": timed[name].us / ours.us}
    return line


def format_line(line: dict[str, Any]) -> str:
    """A line of the printed table."""
    head = f"{line['op']:12} {line['images']:>14} {line['dtype']:>8}"
    if "refused" in line:
        return f"{head} refused: {line['refused']}"
    compiled = f"{line['x_compile']:9.2f}" if "x_compile" in line else f"{'-':>9}"
    return (
        f"{head} {line['us']:10.1f} {line['tflops']:8.1f} {line['gbs']:8.0f} {line['percent_of_floor']:8.1f} "
        f"{line['x_eager']:8.2f} {compiled}"
    )


def run(args: argparse.Namespace) -> int:
    """Measure what the command line asks for; 1 when a launch was refused."""
    import torch

    from . import _cases as catalogue
    from ._timing import append_line, ceilings_line, default_results, environment, measure_ceilings

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    unknown = sorted(set(args.op) - set(catalogue.builders()))
    if unknown:
        raise SystemExit(f"--op {' '.join(unknown)} unknown: choose from {' '.join(catalogue.builders())}")
    sizes = catalogue.GPU_SIZES if on_gpu and not args.tiny else catalogue.TINY_SIZES
    sizes = [parse_size(text, args.use) for text in args.size] or sizes
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    wanted = list(catalogue.cases(args.op, sizes, dtype))
    if args.check_only:
        return _check_only(wanted, device)
    facts = environment(device)
    out = Path(args.out) if args.out else default_results(device, "kernels")
    ceilings = measure_ceilings(device)
    append_line(out, ceilings_line(ceilings, facts))
    print(f"ceilings: {ceilings.tflops:.1f} TFLOP/s ({ceilings.matmul_dtype}), {ceilings.gbs:.0f} GB/s")
    if not on_gpu:
        print("on the CPU the kernels are interpreted: these times say nothing about them")
    print(COLUMNS, flush=True)
    refused = 0
    for case in wanted:
        compiled = on_gpu and (args.compile == "all" or (args.compile == "first" and case.size == sizes[0]))
        line = measure(case, device, ceilings, compiled=compiled, replays=21 if on_gpu else 3)
        append_line(out, line | {"ceilings": [ceilings.tflops, ceilings.gbs]} | facts)
        print(format_line(line), flush=True)
        refused += "refused" in line
    return 1 if refused else 0


def _check_only(wanted: Sequence[Any], device: Any) -> int:
    wrong = 0
    for case in wanted:
        gap = difference(case, device)
        agrees = gap <= AGREEMENT[str(case.dtype).removeprefix("torch.")]
        print(f"{case.op:12} {case.size!s:>14} difference {gap:.2e} {'ok' if agrees else 'WRONG'}", flush=True)
        wrong += not agrees
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", default=[], help="launch to time; all when absent")
    parser.add_argument("--size", action="append", default=[], help="BATCHxPIXELS, e.g. 128x256")
    parser.add_argument("--use", default="throughput", choices=("throughput", "latency"), help="configs for --size")
    parser.add_argument("--dtype", choices=sorted(AGREEMENT), help="bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", help="JSON lines file; bench/results/kernels-<gpu>.jsonl when absent")
    parser.add_argument("--compile", default="first", choices=("first", "all", "none"), help="sizes for torch.compile")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the GPU too, as for compute-sanitizer")
    parser.add_argument("--check-only", action="store_true", help="compare with eager torch, time nothing")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        # before triton is imported, which happens in run()
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA GPU here: run on one, or use --device cpu to try the benchmark out", file=sys.stderr)
            return 2
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
