"""Everything that needs a GPU, in one command.

    python -m bench gpu --out bench/results/NAME        all stages, in eight minutes
    python -m bench gpu --out DIR --minutes 60          the same with every size, batch and compiled variant
    python -m bench gpu --out DIR --only tests,kernels  some of them

Needs what the runtime needs, and pytest; tests and stages that need more are skipped with the name of what is missing.
Stages run as processes of their own, in order of their value, and leave their files in DIR as they go: a log of each,
`correctness.jsonl`, `tests.jsonl` and the tests' logs in `tests`, `ceilings.jsonl`, `kernels.jsonl`, `model.jsonl`,
`flux2.jsonl`, `cache.jsonl`, and `summary.json`, which is rewritten after each stage. First comes the runtime's
self-check: where it disagrees with plain torch, the summary begins with that, and the measurements go on. A stage gets
its share of the minutes that are left; one that is ended leaves what it measured. Exit code 1 when a check, a GPU test
or a stage failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ._processes import ending_on_sigterm, running, tail

# below it, no launch is compiled by torch.compile, and of our model only one row is
LONG_MINUTES = 20.0
LEAST_SECONDS = 0.5
# what a benchmark says in its last line where it lacks a package
NOT_MEASURED = " not measured: "


@dataclass(frozen=True)
class Stage:
    """A process to run: arguments after the interpreter, where its output goes, its time limit in seconds.

    Attributes:
        before: command that it runs under.
        share: of the time that is left, in proportion to the stages after it.
        pace: of its limit, it is told to spend this part by `--minutes`, and ends by itself; None for a stage that
            takes no such option.
    """

    name: str
    arguments: tuple[str, ...]
    log: str
    limit: int
    before: tuple[str, ...] = ()
    share: float = 1.0
    pace: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: ok, failed, timeout, or skipped with the reason."""

    stage: str
    status: str
    seconds: float
    detail: str = ""


def stages(out: Path, device: str, minutes: float = 60.0) -> tuple[Stage, ...]:
    """Every stage, in the order in which a short lease should spend its time."""
    on, into = ("--device", device), ("--out", str(out))
    short, cpu = minutes < LONG_MINUTES, device == "cpu"
    kernels = ("-m", "bench", "kernels", *on)
    launches = (*kernels, "--out", str(out / "kernels.jsonl"))
    # compilers take minutes, which a short lease has not, but for the best form of the baseline
    launches += ("--compile", "none") if short else ()
    ours = ("--compile", "none" if cpu else "first" if short else "named")
    theirs = ("--compile", "none" if cpu else "named")
    rows = (*on, *(("--shape", "encode:1x32") if cpu else ()))
    launches += ("--op", "grn") if cpu else ()
    correctness, tests = (("-m", f"bench.{name}", *into, *on) for name in ("_correctness", "_gpu_tests"))
    peaks = ("-m", "bench", "gpu", "--measure-ceilings", device, *into)
    caching = ("-m", "bench", "cache", *on, *(("--set", "256", "--images", "4", "--workers", "0") if cpu else ()))
    caching += ("--out", str(out / "cache.jsonl"))
    tiny = (*kernels, "--tiny", "--check-only")
    return (
        Stage("correctness", correctness, "correctness.log", 60, share=2, pace=0.9),
        Stage("tests", tests, "tests.log", 900, share=6, pace=0.95),
        Stage("ceilings", peaks, "ceilings.log", 60),
        Stage("kernels", launches, "kernels.log", 900, share=4),
        # what begins before then ends before the limit
        Stage("model", _timed("model", out, (*rows, *ours)), "model.log", 1800, share=5, pace=0.75),
        Stage("flux2", _timed("flux2", out, (*rows, *theirs)), "flux2.log", 1800, share=4, pace=0.75),
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
    if stage.pace is not None:
        command += ["--minutes", f"{stage.pace * limit / 60:.2f}"]
    with running(*command, log=out / stage.log) as process:
        code, took = process.wait(limit), process.seconds
    if code is None:
        return Outcome(stage.name, "timeout", took, f"over {limit:.0f} s, what it measured is kept")
    detail = tail(out / stage.log)[-400:]
    if code < 0:
        detail = f"ended by signal {-code}, what it measured is kept: {detail}"
    status = "failed" if code else "skipped" if NOT_MEASURED in detail else "ok"
    return Outcome(stage.name, status, took, detail)


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
    chosen = [s for s in stages(args.out, args.device, args.minutes) if s.name in only]
    with ending_on_sigterm():
        outcomes = run_stages(chosen, args.out, args.minutes)
    print(summary_text(args.out))
    late = any(o.stage in ("correctness", "tests") and o.status == "timeout" for o in outcomes)
    return 1 if late or any(o.status == "failed" for o in outcomes) else 0


def run_stages(chosen: Sequence[Stage], out: Path, minutes: float) -> list[Outcome]:
    """Run stages in order, each with its share of the time that is left, and keep `summary.json` up to date."""
    begin, outcomes = time.monotonic(), []
    for number, stage in enumerate(chosen):
        left = 60 * minutes - (time.monotonic() - begin)
        seconds = left * stage.share / sum(s.share for s in chosen[number:])
        outcomes.append(run_stage(stage, out, seconds))
        unfinished = out / "summary.json.tmp"
        unfinished.write_text(json.dumps(summary(outcomes, out), indent=1) + "\n")
        os.replace(unfinished, out / "summary.json")
        done = outcomes[-1]
        print(f"{done.stage:11} {done.status:8} {done.seconds:6.1f} s  {done.detail}", flush=True)
    return outcomes


def summary(outcomes: Sequence[Outcome], out: Path) -> list[dict]:
    """One entry per stage; the self-check and the tests also give their rows, by name."""
    from ._records import read_lines

    entries = []
    for outcome in outcomes:
        entry, path = asdict(outcome), out / f"{outcome.stage}.jsonl"
        if outcome.stage in ("correctness", "tests") and path.is_file():
            kept = ("name", "dtype", "error", "bound", "ok", "problem", "file", "which", "status", "detail", "failed")
            entry["rows"] = [{k: line[k] for k in kept if k in line} for line in read_lines(path)]
        entries.append(entry)
    return entries


def summary_text(out: Path) -> str:
    """What the self-check found, and the published rows as measured so far, for the terminal."""
    from ._records import read_folder
    from ._tables import Results, published_rows, source, verdict

    results = Results(read_folder(out))
    if not results.gpus:
        return "nothing was measured on a GPU"
    parts = []
    for gpu in results.gpus:
        parts.append("\n".join([gpu, verdict(results, gpu), *published_rows(results, gpu), source(results, gpu)]))
    return "\n\n".join(parts)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
