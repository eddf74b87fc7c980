"""Everything that needs a GPU, in one command.

    python -m bench gpu --out bench/results/NAME        all stages, in eight minutes
    python -m bench gpu --out DIR --minutes 60          the same with every size, batch and compiled variant
    python -m bench gpu --out DIR --only tests,kernels  some of them

Stages run as processes of their own, in order of their value, and leave their files in DIR as they go: a log of each,
`ceilings.jsonl`, `kernels.jsonl`, `model.jsonl`, `flux2.jsonl`, `cache.jsonl`, and `summary.json`, which is rewritten
after each stage. A stage gets its share of the minutes that are left; what it measured until then counts. Exit code 1
when a GPU test, a result's check or a stage failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# below it, only what needs no compiler of its own is measured, but for one row
LONG_MINUTES = 20.0
LEAST_SECONDS = 0.5
PACE = 0.75


@dataclass(frozen=True)
class Stage:
    """A process to run: arguments after the interpreter, where its output goes, its time limit in seconds.

    Attributes:
        before: command that it runs under.
        share: of the time that is left, in proportion to the stages after it.
        paced: takes `--minutes` and ends by itself.
    """

    name: str
    arguments: tuple[str, ...]
    log: str
    limit: int
    before: tuple[str, ...] = ()
    share: float = 1.0
    paced: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: ok, failed, timeout, or skipped with the reason."""

    stage: str
    status: str
    seconds: float
    detail: str = ""


def stages(out: Path, device: str, minutes: float = 60.0) -> tuple[Stage, ...]:
    """Every stage, in the order in which a short lease should spend its time."""
    on = ("--device", device)
    kernels = ("-m", "bench", "kernels", *on)
    tiny = (*kernels, "--tiny", "--check-only")
    # compilers take minutes, which a short lease has not
    compiled = ("--compile", "none" if device == "cpu" else "first" if minutes < LONG_MINUTES else "named")
    rows = (*on, *compiled, *(("--shape", "encode:1x32") if device == "cpu" else ()))
    launches = (*kernels, "--out", str(out / "kernels.jsonl"))
    if minutes < LONG_MINUTES:
        launches += ("--compile", "none")
    if device == "cpu":
        launches += ("--op", "grn")
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests")
    caching = ("-m", "bench", "cache", *on, "--out", str(out / "cache.jsonl"))
    return (
        Stage("tests", tests, "tests.log", 600, share=6),
        Stage("ceilings", ("-m", "bench", "gpu", "--measure-ceilings", device, "--out", str(out)), "ceilings.log", 60),
        Stage("kernels", launches, "kernels.log", 900, share=4),
        Stage("model", _timed("model", out, rows), "model.log", 1800, share=5, paced=True),
        Stage("flux2", _timed("flux2", out, rows), "flux2.log", 1800, share=2, paced=True),
        Stage("cache", caching, "cache.log", 600),
        Stage("sanitizer", tiny, "sanitizer.log", 180, ("compute-sanitizer", "--error-exitcode", "9")),
    )


def _timed(command: str, out: Path, options: tuple[str, ...]) -> tuple[str, ...]:
    return ("-m", "bench", command, *options, "--out", str(out / f"{command}.jsonl"))


def run_stage(stage: Stage, out: Path, seconds: float = math.inf) -> Outcome:
    """Run one stage for at most `seconds`, its output to the log and a short account as the result."""
    if stage.before and shutil.which(stage.before[0]) is None:
        return Outcome(stage.name, "skipped", 0.0, f"{stage.before[0]} is not installed")
    limit = min(stage.limit, seconds)
    if limit < LEAST_SECONDS:
        return Outcome(stage.name, "skipped", 0.0, "no time left: give more --minutes")
    command = [*stage.before, sys.executable, *stage.arguments]
    if stage.paced:
        # what begins before then ends before the limit
        command += ["--minutes", f"{PACE * limit / 60:.2f}"]
    start = time.monotonic()
    with (out / stage.log).open("w") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env=_environment()
            ).returncode
        except subprocess.TimeoutExpired:
            return Outcome(
                stage.name,
                "timeout",
                time.monotonic() - start,
                f"over {limit:.0f} s, what it measured is kept",
            )
    lines = (out / stage.log).read_text().strip().splitlines()
    last = lines[-1] if lines else ""
    # pytest says 5 when it collected nothing to run
    status = "ok" if code == 0 or (stage.name == "tests" and code == 5) else "failed"
    return Outcome(stage.name, status, time.monotonic() - start, last[-200:])


def _environment() -> dict[str, str]:
    return {"PYTHONUNBUFFERED": "1", **os.environ}


def write_ceilings(out: Path, device: str) -> None:
    """Measure the ceilings and append them to ceilings.jsonl."""
    import torch

    from ._records import append_line, ceilings_line
    from ._timing import environment, measure_ceilings

    where = torch.device(device)
    line = ceilings_line(measure_ceilings(where), environment(where))
    append_line(out / "ceilings.jsonl", line)
    print(f"{line['tflops']:.1f} TFLOP/s, {line['gbps']:.0f} GB/s")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    names = [stage.name for stage in stages(Path(), "cuda")]
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="Put results into this folder.")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="Spend this long on all stages together (default: 8)."
    )
    parser.add_argument("--only", help=f"Run these stages, separated by commas, of {','.join(names)}.")
    parser.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="Measure there; cpu only tries the command itself out.",
    )
    parser.add_argument("--measure-ceilings", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    only = args.only.split(",") if args.only else names
    unknown = sorted(set(only) - set(names))
    if unknown:
        parser.error(f"--only {','.join(unknown)} unknown: choose from {','.join(names)}")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.measure_ceilings:
        write_ceilings(args.out, args.measure_ceilings)
        return 0
    if args.device == "cuda" and not _has_gpu():
        print("no CUDA GPU here; --device cpu tries the command itself out", file=sys.stderr)
        return 2
    outcomes = run_stages([s for s in stages(args.out, args.device, args.minutes) if s.name in only], args)
    print(summary_table(args.out))
    late = any(o.stage == "tests" and o.status == "timeout" for o in outcomes)
    return 1 if late or any(o.status == "failed" for o in outcomes) else 0


def run_stages(chosen: Sequence[Stage], args: argparse.Namespace) -> list[Outcome]:
    """Run stages in order, each with its share of the time that is left."""
    begin, outcomes = time.monotonic(), []
    for number, stage in enumerate(chosen):
        left = 60 * args.minutes - (time.monotonic() - begin)
        seconds = left * stage.share / sum(s.share for s in chosen[number:])
        outcomes.append(run_stage(stage, args.out, seconds))
        (args.out / "summary.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
        done = outcomes[-1]
        print(f"{done.stage:10} {done.status:8} {done.seconds:6.1f} s  {done.detail}", flush=True)
    return outcomes


def summary_table(out: Path) -> str:
    """The published rows as measured so far, for the terminal."""
    from ._records import read_folder
    from .report import Results, published_rows, source

    results = Results(read_folder(out))
    if not results.gpus:
        return "nothing was measured on a GPU"
    return "\n\n".join("\n".join([gpu, *published_rows(results, gpu), source(results, gpu)]) for gpu in results.gpus)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
