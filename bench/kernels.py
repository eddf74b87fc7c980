"""Time every op against eager torch and torch.compile.

    python -m bench kernels                               all ops at the model card's sizes, on the GPU
    python -m bench kernels --op expand --op project --size 128x256 --compile all
    python -m bench kernels --device cpu                  a tiny model under the interpreter, to test the bench itself

Prints a line for each op and appends it as JSON to bench/results/kernels-<gpu>.jsonl. An op is called as the runtime's
plan does; one whose result does not agree with plain torch gets no time. The ceilings are measured in the same run.
Ops run in a process of their own, which is replaced where one breaks it: that op has a row that says so. torch.compile
takes its time too, so only the first size is compiled unless `--compile all`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# relative rms difference from eager torch beyond which no time is taken: a few roundings, far below a wrong kernel
AGREEMENT = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 2e-4}
MEASURE_SECONDS, COMPILE_SECONDS = 180.0, 900.0
COLUMNS = (
    f"{'op':12} {'images':>14} {'dtype':>8} {'us':>10} {'TFLOP/s':>8} {'GB/s':>8} {'% floor':>8} {'x eager':>8} "
    f"{'x compile':>9}"
)


def parse_images(text: str, use: str) -> Any:
    """BATCHxPIXELS, e.g. 128x256: that many square images of so many pixels per side."""
    from ._cases import Images

    try:
        batch, pixels = (int(part) for part in text.split("x"))
    except ValueError:
        raise SystemExit(f"--size {text} is not BATCHxPIXELS, e.g. 128x256") from None
    if batch < 1 or pixels < 16 or pixels % 16:
        raise SystemExit(f"--size {text}: the batch must be positive and {pixels} a positive multiple of 16")
    return Images(batch, pixels, pixels, use)


def parse_ops(names: Sequence[str]) -> Sequence[str]:
    """Names of ops, all when there are none."""
    from capacitor_kernels import OPS

    unknown = sorted(set(names) - set(OPS))
    if unknown:
        raise SystemExit(f"--op {' '.join(unknown)} unknown: choose from {' '.join(OPS)}")
    return names or OPS


def difference(case: Any, device: Any) -> float:
    """Largest relative rms difference between an op's outputs and eager torch's."""
    import torch

    prepared = case.prepare(device)
    prepared.call()
    worst = 0.0
    for got, want in zip(prepared.outputs(), case.plain(*prepared.plain_args), strict=True):
        got, want = got.double(), want.double()
        gap = (got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30)
        worst = max(worst, float("inf") if torch.isnan(gap) else gap.item())
    return worst


def _identity(op: str, images: Any, model: Any, dtype: Any) -> dict[str, Any]:
    """What a line is a measurement of."""
    line = {"bench": "kernels", "op": op, "images": str(images), "use": images.use}
    return line | {"dtype": str(dtype).removeprefix("torch."), "dim": model.model_dim, "hidden": model.hidden_dim}


def measure(case: Any, device: Any, ceilings: Any, *, compiled: bool, replays: int) -> dict[str, Any]:
    """The figures of one op at one size, as a dict ready for JSON."""
    import torch

    from capacitor_rt.runtime.timing import Variant, time_variants

    from ._timing import floor_us

    gap = difference(case, device)
    line = _identity(case.op, case.images, case.model, case.dtype) | {"difference": gap}
    dtype = line["dtype"]
    if not gap <= AGREEMENT[dtype]:
        return line | {"refused": f"differs from eager torch by {gap:.2e}, more than {AGREEMENT[dtype]:.0e}"}

    def plain(function: Any) -> Any:
        arguments = case.prepare(device).plain_args
        return lambda: function(*arguments)

    functions = {"eager": case.plain}
    if compiled:
        torch._dynamo.reset()
        functions["compile"] = torch.compile(case.plain, dynamic=False)
    flops, nbytes = case.step.flops, case.step.nbytes
    variants = [Variant("op", lambda: case.prepare(device).call, nbytes)]
    variants += [Variant(name, partial(plain, function), nbytes) for name, function in functions.items()]
    timed = time_variants(variants, device, replays)
    ours = timed["op"]
    line |= {"us": ours.us, "p20": ours.p20, "p80": ours.p80, "flops": flops, "bytes": nbytes}
    line |= {"tflops": flops / ours.us / 1e6, "gbps": nbytes / ours.us / 1e3}
    line["percent_of_floor"] = 100 * floor_us(ceilings, flops, nbytes) / ours.us
    for name in ("eager", "compile"):
        if name in timed:
            line |= {f"{name}_us": timed[name].us, f"x_{name}": timed[name].us / ours.us}
    return line


class OpBench:
    """Measures one op after another in the process that it is made in."""

    def __init__(self, device: Any, dtype: Any, model: Any, cc: int, ceilings: Any):
        self._device, self._dtype, self._model, self._cc, self._ceilings = device, dtype, model, cc, ceilings

    def measure(self, op: str, images: Any, compiled: bool, replays: int) -> dict[str, Any]:
        """See `measure`."""
        from ._cases import make_case

        case = make_case(op, images, self._model, self._dtype, self._cc)
        return measure(case, self._device, self._ceilings, compiled=compiled, replays=replays)


def format_line(line: dict[str, Any]) -> str:
    """A line of the printed table."""
    head = f"{line['op']:12} {line['images']:>14} {line['dtype']:>8}"
    for reason in ("refused", "missing"):
        if reason in line:
            return f"{head} {reason}: {line[reason]}"
    compiled = f"{line['x_compile']:9.2f}" if "x_compile" in line else f"{'-':>9}"
    return (
        f"{head} {line['us']:10.1f} {line['tflops']:8.1f} {line['gbps']:8.0f} {line['percent_of_floor']:8.1f} "
        f"{line['x_eager']:8.2f} {compiled}"
    )


def run(args: argparse.Namespace) -> int:
    """Measure what the command line asks for; 1 when an op was refused or broke."""
    import torch

    from capacitor_kernels import compute_capability
    from capacitor_kernels.launch import E4M3_COMPUTE_CAPABILITY
    from capacitor_rt import ModelConfig

    from ._cases import GPU_IMAGES, IN_FP8, TINY_IMAGES, make_cases
    from ._contenders import TINY
    from ._device import release
    from ._records import append_line, ceilings_line, default_results
    from ._timing import environment, measure_ceilings
    from ._workers import MEMORY, Failure, Worker

    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    usual = GPU_IMAGES if on_gpu and not args.tiny else TINY_IMAGES
    ops, images = parse_ops(args.op), [parse_images(text, args.use) for text in args.size] or usual
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    model = ModelConfig() if on_gpu and not args.tiny else TINY
    cc = compute_capability(device)
    if cc < E4M3_COMPUTE_CAPABILITY and not args.op:
        ops = [op for op in ops if op not in IN_FP8]
    if args.check_only:
        return _check_only(make_cases(ops, images, model, dtype, cc), device)
    facts = environment(device)
    out = Path(args.out) if args.out else default_results(device, "kernels")
    ceilings = measure_ceilings(device)
    # from here on the device belongs to the process of the ops
    release(device)
    append_line(out, ceilings_line(ceilings, facts))
    print(f"ceilings: {ceilings.tflops:.1f} TFLOP/s, {ceilings.gbps:.0f} GB/s ({ceilings.source})")
    if not on_gpu:
        print("on the CPU the kernels are interpreted: these times say nothing about them")
    print(COLUMNS, flush=True)
    broken = 0
    worker = Worker(OpBench, device, dtype, model, cc, ceilings)
    for op in ops:
        for size in images:
            compiled = on_gpu and (args.compile == "all" or (args.compile == "first" and size == images[0]))
            seconds = COMPILE_SECONDS if compiled else MEASURE_SECONDS
            try:
                line = worker.ask("measure", op, size, compiled, 21 if on_gpu else 3, seconds=seconds)
                broken += "refused" in line
            except Failure as failure:
                line = _identity(op, size, model, dtype) | {"missing": failure.reason}
                broken += failure.kind != MEMORY
            append_line(out, line | {"ceilings": [ceilings.tflops, ceilings.gbps]} | facts)
            print(format_line(line), flush=True)
    worker.stop()
    return 1 if broken else 0


def _check_only(wanted: Iterable[Any], device: Any) -> int:
    wrong = 0
    for case in wanted:
        gap = difference(case, device)
        agrees = gap <= AGREEMENT[str(case.dtype).removeprefix("torch.")]
        print(f"{case.op:12} {case.images!s:>14} difference {gap:.2e} {'ok' if agrees else 'WRONG'}", flush=True)
        wrong += not agrees
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", default=[], help="Time this op instead of all.")
    parser.add_argument(
        "--size", action="append", default=[], help="Take BATCHxPIXELS images, e.g. 128x256, instead of the usual ones."
    )
    parser.add_argument(
        "--use", default="throughput", choices=("throughput", "latency"), help="Take configs for this use with --size."
    )
    parser.add_argument(
        "--dtype", choices=sorted(AGREEMENT), help="Compute in this dtype; on a GPU it is bfloat16, on the CPU float32."
    )
    parser.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="Measure there; cpu only tries the command itself out.",
    )
    parser.add_argument("--out", help="Append to this file instead of bench/results/kernels-<gpu>.jsonl.")
    parser.add_argument(
        "--compile", default="first", choices=("first", "all", "none"), help="Compile at these sizes by torch.compile."
    )
    parser.add_argument(
        "--tiny", action="store_true", help="Take the tiny model on a GPU too, as for compute-sanitizer."
    )
    parser.add_argument("--check-only", action="store_true", help="Compare with eager torch and time nothing.")
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
