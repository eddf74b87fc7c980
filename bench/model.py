"""Encode and decode end to end: this runtime beside the same model in plain torch, compiled and captured.

    python -m bench model                                 on the GPU: the published rows, then all sizes and batches
    python -m bench model --minutes 3 --compile none      what fits in three minutes
    python -m bench model --shape encode:8x512 --compile all
    python -m bench model --device cpu                    tiny model and shapes, to test the benchmark itself

Prints a line for each contender and appends it as JSON to bench/results/model-<gpu>.jsonl; how it is measured stands in
bench/_endtoend.py. Weights are random, which changes neither time nor memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ._contenders import Contender, Shape

DTYPES = ("bfloat16", "float16", "float32")
SIZES, BATCHES = (256, 512, 1024, 2048), (1, 8, 32, 128)
# rows of the published tables, in the order of their value
NAMED = (
    ("encode", 128, 256, "card: encode 256x256, batch 128"),
    ("encode", 32, 512, "card: encode 512x512, batch 32"),
    ("decode", 1, 512, "capacitor_decoder: decode 512x512, batch 1"),
    ("decode", 1, 1024, "capacitor_decoder: decode 1024x1024, batch 1"),
    ("decode", 1, 2048, "capacitor_decoder: decode 2048x2048, batch 1"),
)
TINY_NAMED = (("encode", 2, 64, "tiny: encode 64x64, batch 2"), ("decode", 1, 32, "tiny: decode 32x32, batch 1"))


def plan_jobs(
    contenders: Sequence[Contender], shapes: Sequence[Shape], sweep: Sequence[Shape], how: str
) -> list[tuple[Shape, Sequence[Contender]]]:
    """Named rows by all that need no compiler, then the compiled ones, then the sweep by the first two.

    With these two come those that differ for single images alone, and in the sweep those that are of it.
    """
    quick = [c for c in contenders if c.compiles == "no"]
    slow = [c for c in contenders if c.compiles != "no"]
    first = [*quick[:2], *(c for c in quick[2:] if c.single)]
    jobs: list[tuple[Shape, Sequence[Contender]]] = [(shape, quick) for shape in shapes]
    compiled = {"none": [], "first": shapes[:1], "named": shapes, "all": [*shapes, *sweep]}[how]
    # one at a time, so that what runs out of time loses no more than one
    jobs += [(shape, [*first, contender]) for contender in slow for shape in compiled]
    jobs += [(shape, [*first, *(c for c in quick[2:] if c.sweeps)]) for shape in sweep]
    return [(shape, [c for c in group if shape.batch == 1 or not c.single]) for shape, group in jobs]


def parse_shape(text: str) -> Shape:
    """DIRECTION:BATCHxSIZE, e.g. encode:8x512."""
    from ._contenders import Shape

    direction, _, rest = text.partition(":")
    batch, _, size = rest.partition("x")
    if direction not in ("encode", "decode") or not (batch.isdigit() and size.isdigit()) or int(batch) < 1:
        raise SystemExit(f"--shape {text} is not DIRECTION:BATCHxSIZE, e.g. encode:8x512 or decode:1x1024")
    if int(size) < 1 or int(size) % 32:
        raise SystemExit(f"--shape {text}: {size} is not a positive multiple of 32")
    return Shape(direction, int(batch), int(size))


def arguments(module: str, doc: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line that `python -m bench model` and `flux2` share."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {module}", description=doc.splitlines()[0])
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        help="Measure DIRECTION:BATCHxSIZE, e.g. encode:8x512, instead of the usual ones.",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="Begin nothing new after this time.")
    parser.add_argument(
        "--compile",
        choices=("none", "first", "named", "all"),
        help="Compile these rows by torch.compile (default: named, none on the CPU).",
    )
    parser.add_argument("--no-sweep", action="store_true", help="Measure the published rows only.")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="Compute in this dtype; on a GPU it is bfloat16, on the CPU float32."
    )
    parser.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="Measure there; cpu only tries the command itself out.",
    )
    parser.add_argument("--out", type=Path, help=f"Append to this file instead of bench/results/{module}-<gpu>.jsonl.")
    return parser.parse_args(argv)


def run(module: str, contenders: Sequence[Contender], args: argparse.Namespace, facts: dict[str, Any]) -> int:
    """Measure what the command line asks for; 1 when this runtime was wrong or broke."""
    from ._contenders import TINY, TINY_FLUX2, Setting, Shape
    from ._device import busy, release
    from ._endtoend import HEADER, Bench
    from ._processes import ending_on_sigterm
    from ._records import append_line, ceilings_line, default_results
    from ._timing import environment, measure_ceilings

    begin, device = time.monotonic(), torch.device(args.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    setting = Setting(device, dtype) if on_gpu else Setting(device, dtype, TINY, TINY_FLUX2)
    shapes = [parse_shape(text) for text in args.shape] or [Shape(*row) for row in (NAMED if on_gpu else TINY_NAMED)]
    sweep = [] if args.shape or args.no_sweep or not on_gpu else _sweep(shapes)
    if not on_gpu:
        contenders = [c for c in contenders if not c.graphs_only]
        print("on the CPU the kernels are interpreted and the model is tiny: these times say nothing about it")
    warning = busy(device)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    facts = environment(device) | {"busy": warning, "cudnn_benchmark": torch.backends.cudnn.benchmark} | facts
    out = args.out or default_results(device, module)
    ceilings = measure_ceilings(device)
    # from here on the device belongs to the contenders' processes
    release(device)
    append_line(out, ceilings_line(ceilings, facts))
    print(f"ceilings: {ceilings.tflops:.1f} TFLOP/s, {ceilings.gbps:.0f} GB/s ({ceilings.source})\n{HEADER}")
    compiled = args.compile or ("named" if on_gpu else "none")
    jobs = plan_jobs(contenders, shapes, sweep, compiled)
    with ending_on_sigterm(), Bench(setting, ceilings, facts, out, module, rounds=15 if on_gpu else 1) as bench:
        bench.run(jobs, begin + 60 * args.minutes)
    return 1 if bench.broken else 0


def _sweep(named: Sequence[Shape]) -> list[Shape]:
    """Every size and batch of both directions that is not a named row, small ones first."""
    from ._contenders import Shape

    known = {(s.direction, s.batch, s.size) for s in named}
    every = [(d, b, s) for s in SIZES for b in BATCHES for d in ("encode", "decode")]
    return sorted((Shape(*x) for x in every if x not in known), key=lambda s: s.pixels)


def check_device(args: argparse.Namespace) -> bool:
    """Choose the interpreter before triton is imported, or say that there is no GPU."""
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        return True
    if torch.cuda.is_available():
        return True
    print("no CUDA GPU here: run on one, or use --device cpu to try the benchmark out", file=sys.stderr)
    return False


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = arguments("model", __doc__, argv)
    if not check_device(args):
        return 2
    from ._contenders import CAPACITORS

    return run("model", CAPACITORS, args, {})


if __name__ == "__main__":
    sys.exit(main())
