"""Predict the time of every launch from its machine code, without a GPU. A model, not a measurement.

    python -m bench sass                      eight calls and batch 1 by latency rows on H200, RTX 5090, A100; table to
                                              bench/results/model.md
    python -m bench sass --gpu h200 --case encode:128:256 --detail          one call, cycles by pipe, to the terminal
    python -m bench sass --case encode:1:1024:latency       by the rows for one image; :gluon: by the form of expand
                                              that CAPACITOR_EXPAND=gluon asks for
    python -m bench sass --case encode:128:256:fp8          the encoder in e4m3
    python -m bench sass --case encode:1:256:early          launches that start early, as with dependent_launch
    python -m bench sass --case encode:128:256:overlap      two branches of half the images, as with overlap
    python -m bench sass --hiding 0           epilogues exposed; 1: fully hidden under another CTA; the page has 0.5
    python -m bench sass --json FILE          the totals as JSON, and every launch with --detail
    python -m bench sass --before FILE        beside an earlier --json; bench/results/model-before.json by default

The launches are those of the runtime's plans, compiled as they would be. From the SASS follow the cycles of every pipe
before, in and after the products; from the grid, registers and shared memory how CTAs share an SM; L2, DRAM and the
rate of a whole-GPU product set a floor. Compiled kernels are cached in TRITON_CACHE_DIR, which is `.triton_cache` in
the current directory unless set. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ._gpu_model import GPUS, HIDING, Gpu

if TYPE_CHECKING:
    from ._predict import Branches, CallPrediction, Prediction

RESULTS = Path(__file__).parent / "results"
DEFAULT_TABLE = RESULTS / "model.md"
BEFORE = RESULTS / "model-before.json"
CALLS = (
    "encode:128:256",
    "encode:32:512",
    "encode:1:256",
    "encode:1:512",
    "encode:1:1024",
    "decode:1:512",
    "decode:1:1024",
    "decode:1:2048",
    "decode:32:512",
    "encode:1:256:latency",
    "encode:1:512:latency",
    "encode:1:1024:latency",
    "decode:1:1024:latency",
    "encode:128:256:gluon",
    "encode:32:512:gluon",
    "decode:1:1024:gluon",
    "encode:128:256:fp8",
    "encode:32:512:fp8",
    "encode:1:256:fp8",
    "encode:1:1024:fp8",
    "encode:1:256:latency:fp8",
    "encode:1:1024:latency:fp8",
    "encode:1:256:early",
    "encode:1:512:early",
    "encode:128:256:gluon:early",
    "encode:128:256:overlap",
    "encode:128:256:gluon:overlap",
    "encode:128:256:gluon:overlap:early",
)
ASSUMPTIONS = """\
## What the model assumes

Clocks, rates and capacities are in `bench/_gpu_model.py`, costs of instructions in `bench/_machine_code.py`.

- wgmma reads B once for each warpgroup, and A unless it is in registers; copies into shared memory take the same 128 B
  per clock. That, and not the tensor pipe, limits tiles of 128 x 128 on sm_90: 125 % of the cycles of the products.
- A CTA takes its busiest pipe in each region, and latencies. CTAs on one SM lie half way between in phase and ideally
  interleaved. A loop over K takes at least iterations x latency / (stages - 1).
- Between two launches of a graph 1.3 us pass, and 0.5 where the second starts early: guesses.
- A grid is whole waves, and a tail that spreads over the SMs.
- Bytes from L2 are counted once for a CTA and address; from DRAM come weights, and activations beyond the share of L2
  that is theirs.
- e4m3: sm_90 multiplies twice as fast as in bf16; sm_120 twice as fast by the plain instruction and four times by the
  block-scaled one, whose 1005 TFLOP/s against 255 others have measured (Dao-AILab/quack, gemm_sm120.py). A ceiling of a
  whole-GPU product is as many times that of bf16; no product in e4m3 was measured for this.
- `overlap`: CTAs of both halves on the SMs, one after another as they end (`bench/_branches.py`). One queue hands them
  out, all of the launch that came first before any of the next: a second launch comes in at tails, and where it fits.
  CTAs of two launches on an SM lie half way between turns and ideally interleaved, and all that use L2, DRAM or the
  rate of a product wait alike where it is full. Activations of both halves count against L2. A launch that starts early
  takes places when all CTAs of the one before are at their epilogues, and keeps them idle. Launches and gaps in the
  table are then the sums over both halves, which do not follow each other.
- Not modelled: power, bank conflicts, the instruction cache, skew at barriers, hit rates of L2, host time, copies in
  and out of the arena.

How far to trust it: it ranks launches and changes. A published warp-specialised product at (65536, 1024, 1024) reaches
672 TFLOP/s on an H100 (facebookexperimental/triton #1065), the same accounting about 820: milliseconds on sm_90 are
expected to be 10 to 25 % optimistic. Of an A100's product at 8192^3, 223 TFLOP/s (triton #743), it makes about 250.
"""


class CallName(NamedTuple):
    """What is asked for: `direction:batch:size` of square images.

    `:latency` after it takes the rows for one image, `:gluon` the form of expand that CAPACITOR_EXPAND=gluon gives,
    `:fp8` the encoder in e4m3, `:overlap` two branches of half the images each, `:early` in the end launches that start
    while the one before is at its end.
    """

    direction: str
    batch: int
    size: int
    use: str
    expand: str = ""
    precision: str = ""
    early: bool = False
    overlap: bool = False

    @classmethod
    def parse(cls, text: str) -> CallName:
        """Raises `argparse.ArgumentTypeError` in words for what is no call."""
        early = text.endswith(":early")
        given = text.removesuffix(":early")
        overlap = given.endswith(":overlap")
        given = given.removesuffix(":overlap")
        expand = "gluon" if given.endswith(":gluon") else ""
        precision = "fp8" if given.endswith(":fp8") else ""
        direction, *numbers = given.removesuffix(":gluon").removesuffix(":fp8").split(":")
        use = numbers.pop() if numbers and numbers[-1] in ("latency", "throughput") else "throughput"
        sound = direction in ("encode", "decode") and len(numbers) == 2 and all(n.isdecimal() for n in numbers)
        if not sound or int(numbers[0]) < 1 or int(numbers[1]) < 32 or int(numbers[1]) % 32:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no call: write direction:batch:size, e.g. encode:128:256, sizes being multiples of 32, "
                "with :latency for the rows of one image, with :gluon for expand's other form, with :fp8 for e4m3, "
                "with :overlap for two branches, with :early in the end for launches that start early"
            )
        if precision and direction != "encode":
            raise argparse.ArgumentTypeError(f"{text!r}: only encoders have launches in fp8, write encode")
        if use == "latency" and numbers[0] != "1":
            raise argparse.ArgumentTypeError(
                f"{text!r}: rows for latency are for one image at a time, write {direction}:1"
            )
        if overlap and int(numbers[0]) % 2:
            raise argparse.ArgumentTypeError(f"{text!r}: only an even batch has halves, write an even number of images")
        return cls(direction, int(numbers[0]), int(numbers[1]), use, expand, precision, early, overlap)

    def runs_on(self, cc: int) -> bool:
        """Whether GPUs of this compute capability have such launches."""
        return (not self.expand or cc == 90) and (not self.precision or cc >= 89) and (not self.early or cc >= 90)

    def __str__(self) -> str:
        form = (" latency" if self.use == "latency" else "") + (f" expand={self.expand}" if self.expand else "")
        form += (f" {self.precision}" if self.precision else "") + (" overlap" if self.overlap else "")
        form += " early" if self.early else ""
        return f"{self.direction} {self.batch}x{self.size}²{form}"


def predict_named(call: CallName, gpu: Gpu, hiding: float = HIDING) -> CallPrediction:
    """A call of full_capacitor, in bfloat16 or blocks in e4m3: uint8 pixels to encode, float32 latents to decode."""
    import torch

    from capacitor_rt.config import KNOWN_MODELS
    from capacitor_rt.runtime.plan import PlanKey

    from ._predict import predict_call

    given = torch.uint8 if call.direction == "encode" else torch.float32
    size = call.batch, call.size, call.size
    key = PlanKey(call.direction, *size, torch.bfloat16, given, "nchw", gpu.cc, call.use)
    key = replace(key, precision=call.precision or None, dependent=call.early)
    before = os.environ.get("CAPACITOR_EXPAND")
    try:
        os.environ["CAPACITOR_EXPAND"] = call.expand or before or ""
        return predict_call(KNOWN_MODELS["full_capacitor"], key, gpu, str(call), hiding, call.overlap)
    finally:
        os.environ["CAPACITOR_EXPAND"] = before or ""


def page(found: Sequence[CallPrediction], before: Mapping[str, Any], hiding: float) -> str:
    """The predictions as a markdown page."""
    import triton

    lines = [
        "# Modelled times",
        "",
        f"Written by `python -m bench sass`, Triton {triton.__version__} and the ptxas in its wheel. **Modelled, not "
        "measured**: predicted from the machine code of the launches; no GPU has run them. What one CTA does beside "
        f"products hides under another's products by {hiding:.0%} of what is possible.",
        "",
    ]
    if before:
        lines += [f"Before: the kernels and configs of commit {before['commit']}.", ""]
    lines += [*_totals(found, before), "", ASSUMPTIONS]
    for call in found:
        lines += [*_section(call), ""]
    return "\n".join(lines)


def _totals(found: Sequence[CallPrediction], before: Mapping[str, Any]) -> Iterator[str]:
    yield "| GPU | call | ms | launches | gaps | floor by arithmetic | % of floor |" + (
        " before, ms | change |" if before else ""
    )
    yield "|---|---|---:|---:|---:|---:|---:|" + ("---:|---:|" if before else "")
    for call in found:
        cells = [call.gpu, call.name, f"{call.ms:.3f}", f"{call.kernels:.3f}", f"{call.gaps:.3f}", f"{call.floor:.3f}"]
        cells.append(f"{call.floor / call.ms:.0%}")
        if before:
            was = before["ms"].get(f"{call.gpu}: {call.name}")
            cells += ["-", "-"] if was is None else [f"{was:.3f}", f"{call.ms / was - 1:+.1%}"]
        yield f"| {' | '.join(cells)} |"


def _section(call: CallPrediction) -> Iterator[str]:
    runs = ", ".join(f"{call.runs.count(size)} x {size}" for size in dict.fromkeys(call.runs))
    yield f"## {call.name} on {call.gpu}: {call.ms:.3f} ms"
    yield ""
    if call.branches:
        yield _bounds(call.branches)
        yield ""
    yield f"Runs of images: {runs}. Microseconds by launch, and what each would take if only that bound it."
    yield ""
    yield "| launch | n | grid | CTAs/SM | waves | registers/stack | us each | ms | limit | SM | L2 | DRAM | rate |"
    yield "|---|---:|---|---:|---:|---|---:|---:|---|---:|---:|---:|---:|"
    for launch in call.launches:
        yield _row(launch)


def _bounds(of: Branches) -> str:
    return (
        f"Two branches of half the images: **{of.expected:.3f} ms**, {of.turns:.3f} if CTAs of both on an SM gain "
        f"nothing from one another; no schedule takes less than {of.floor:.3f}. One half after the other "
        f"{of.sequence:.3f}, the whole batch as one branch {of.whole:.3f}, by the same simulation. Below are the "
        "launches of a half, alone."
    )


def _row(launch: Prediction) -> str:
    cells = [
        launch.kernel.removesuffix("_kernel"),
        launch.count,
        "x".join(map(str, launch.grid)),
        launch.ctas,
        f"{launch.waves:.2f}",
        f"{launch.registers}/{launch.stack}",
        f"{launch.us:.1f}",
        f"{launch.us * launch.count / 1e3:.3f}",
        launch.limit,
        *(f"{us:.1f}" for us in launch.parts.values()),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _detail(call: CallPrediction) -> Iterator[str]:
    """Cycles of one CTA by region and pipe, the busiest first."""
    for launch in call.launches:
        yield f"- `{launch.kernel}`, cycles per CTA:"
        for region, pipes in launch.pipes.items():
            busiest = sorted(pipes.items(), key=lambda item: -item[1])
            yield f"  - {region}: " + ", ".join(f"{pipe} {cycles}" for pipe, cycles in busiest if cycles)
    yield ""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench sass", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="append", choices=sorted(GPUS), help="Predict for this GPU instead of three.")
    parser.add_argument(
        "--case",
        action="append",
        type=CallName.parse,
        metavar="CALL",
        help="Predict this call, e.g. encode:128:256, instead of all.",
    )
    parser.add_argument("--hiding", type=float, default=HIDING, help="0: epilogues exposed, 1: hidden; default 0.5.")
    parser.add_argument("--detail", action="store_true", help="Give cycles by pipe too.")
    parser.add_argument("--out", help="Write the page to this file; - prints it, as a selection does by default.")
    parser.add_argument("--json", help="Write the totals to this file as JSON, with --detail every launch.")
    parser.add_argument("--before", type=Path, default=BEFORE, help="Compare with this file, which --json wrote.")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: kernels cannot be compiled then, unset it", file=sys.stderr)
        return 2
    if not 0 <= args.hiding <= 1:
        parser.error(f"--hiding {args.hiding} is not from 0 to 1")
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.cwd() / ".triton_cache"))
    calls = args.case or [CallName.parse(text) for text in CALLS]
    found = []
    for gpu in args.gpu or ("h200", "5090", "a100"):
        for call in calls if args.case else (c for c in calls if c.runs_on(GPUS[gpu].cc)):
            found.append(predict_named(call, GPUS[gpu], args.hiding))
            print(f"{found[-1].gpu}: {call}: {found[-1].ms:.3f} ms", file=sys.stderr)
    if args.json:
        Path(args.json).write_text(json.dumps(as_json(found, args.detail), indent=1) + "\n")
    before = json.loads(args.before.read_text()) if args.before.is_file() else {}
    text = page(found, before, args.hiding)
    chosen = args.gpu or args.case or args.detail or args.json or args.hiding != HIDING
    out = args.out or ("-" if chosen else str(DEFAULT_TABLE))
    if out == "-":
        print(text)
        print("\n".join(line for call in found if args.detail for line in _detail(call)))
    else:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text)
    return 0


def as_json(found: Sequence[CallPrediction], detail: bool) -> dict[str, Any]:
    """The commit, the milliseconds of every call, and with `detail` every launch."""
    import torch

    from ._timing import environment

    facts = environment(torch.device("cpu"))
    milliseconds = {f"{call.gpu}: {call.name}": round(call.ms, 4) for call in found}
    totals = {"commit": facts["commit"], "triton": facts["triton"], "ms": milliseconds}
    return totals | ({"calls": [asdict(call) for call in found]} if detail else {})


if __name__ == "__main__":
    sys.exit(main())
