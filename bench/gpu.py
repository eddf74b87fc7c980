"""Everything that needs a GPU, in one command.

    python -m bench.gpu --out DIR                       all steps
    python -m bench.gpu --out DIR --only tests,kernels  some of them

Steps run as processes of their own, in order, each under a time limit, and leave their files in DIR as they go, so an
interrupted run keeps what it has: `tests.log`, `ceilings.jsonl`, `kernels.jsonl`, `sanitizer.log`, and `summary.json`,
which is rewritten after each step. Exit code 1 when a GPU test, a launch's check or a step failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """A process to run: arguments after the interpreter, where its output goes, its time limit in seconds."""

    name: str
    arguments: tuple[str, ...]
    log: str
    limit: int
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ok, failed, timeout, or skipped with the reason."""

    step: str
    status: str
    seconds: float
    detail: str = ""


def steps(out: Path, device: str) -> tuple[Step, ...]:
    """Every step, in the order in which a short lease should spend its time."""
    kernels = ("-m", "bench.kernels", "--device", device)
    tiny = (*kernels, "--tiny", "--check-only")
    return (
        Step("tests", ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"), "tests.log", 240),
        Step("ceilings", ("-m", "bench.gpu", "--measure-ceilings", device, "--out", str(out)), "ceilings.log", 60),
        Step("kernels", (*kernels, "--out", str(out / "kernels.jsonl")), "kernels.log", 330),
        Step("sanitizer", tiny, "sanitizer.log", 180, ("compute-sanitizer", "--error-exitcode", "9")),
    )


def run_step(step: Step, out: Path) -> Outcome:
    """Run one step, its output to the log and a short account as the result."""
    if step.before and shutil.which(step.before[0]) is None:
        return Outcome(step.name, "skipped", 0.0, f"{step.before[0]} is not installed")
    command = [*step.before, sys.executable, *step.arguments]
    start = time.monotonic()
    with (out / step.log).open("w") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=step.limit, env=_environment()
            ).returncode
        except subprocess.TimeoutExpired:
            return Outcome(step.name, "timeout", time.monotonic() - start, f"over {step.limit} s")
    lines = (out / step.log).read_text().strip().splitlines()
    last = lines[-1] if lines else ""
    # pytest says 5 when it collected nothing to run
    status = "ok" if code == 0 or (step.name == "tests" and code == 5) else "failed"
    return Outcome(step.name, status, time.monotonic() - start, last[-200:])


def _environment() -> dict[str, str]:
    return {"PYTHONUNBUFFERED": "1", **os.environ}


def write_ceilings(out: Path, device: str) -> None:
    """Measure the ceilings and append them to ceilings.jsonl."""
    import torch

    from .timing import append_line, ceilings_line, environment, measure_ceilings

    where = torch.device(device)
    line = ceilings_line(measure_ceilings(where), environment(where))
    append_line(out / "ceilings.jsonl", line)
    print(f"{line['tflops']:.1f} TFLOP/s, {line['gbs']:.0f} GB/s")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    names = [step.name for step in steps(Path(), "cuda")]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument("--only", help=f"comma-separated steps of {','.join(names)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the command itself out")
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
    outcomes: list[Outcome] = []
    for step in steps(args.out, args.device):
        if step.name in only:
            outcomes.append(run_step(step, args.out))
            (args.out / "summary.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
            done = outcomes[-1]
            print(f"{done.step:10} {done.status:8} {done.seconds:6.1f} s  {done.detail}", flush=True)
    return 1 if any(o.status in ("failed", "timeout") for o in outcomes) else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
