"""The tests that need a GPU or use one where it is, each file in a process of its own.

    python -m bench._gpu_tests --out DIR --minutes 3        what `python -m bench gpu` runs as its first stages

First the tests that carry the marker `gpu`, the runtime's before all others, then those that run on either kind of
device. A file begins no later than three quarters into the time; one that hangs is ended and costs no other. What each
printed is in DIR/tests as it came, how each ended in DIR/tests.jsonl. A file that needs a package which is not
installed is skipped with its name. Exit code 1 when a file failed or was ended.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ._processes import ROOT, Command, ending_on_sigterm, tail
from ._records import append_line

TESTS = ROOT / "tests"
FIRST = TESTS / "runtime" / "test_runtime_gpu.py"
CHOICE = {"gpu": "gpu", "either": "not gpu and not slow and not aot"}
_GPU = re.compile(r"\bmark\.gpu\b|@needs_gpu\b")
_WHOLLY_GPU = re.compile(r"^pytestmark = pytest\.mark\.gpu$", re.M)
# these helpers put models and tensors on the GPU where there is one; others pretend that there is one
_EITHER = re.compile(r"^(?:from|import) (?:runtime_cases|kernel_cases)\b", re.M)
_FAKE = re.compile(r"\bfake_(?:cuda|gpu)\b")
FILE_SECONDS = 150.0
BEGIN_UNTIL = 0.75
# pytest: all passed, none was chosen
PASSED, NONE_CHOSEN = 0, 5


@dataclass(frozen=True)
class TestFile:
    """A file, and which of its tests to run: "gpu", those that need one, or "either", the others."""

    __test__ = False

    path: Path
    which: str

    @property
    def name(self) -> str:
        return os.path.relpath(self.path, ROOT)

    @property
    def log(self) -> str:
        return f"{'-'.join(Path(self.name).with_suffix('').parts[1:])}.{self.which}.log"

    def command(self) -> list[str]:
        """Verbose, so that the log of a hang ends with the test that hung; with no plugin that is not asked for."""
        options = ("-v", "-ra", "--tb=short", "-p", "no:cacheprovider", "-p", "bench._missing_packages")
        # where a test hangs, the stacks of its threads come into the log before it is ended
        options += ("-o", f"faulthandler_timeout={FILE_SECONDS / 3:.0f}")
        return [sys.executable, "-m", "pytest", *options, "-m", CHOICE[self.which], self.name]


@dataclass(frozen=True)
class FileResult:
    """How the tests of a file ended: ok, failed, timeout, or skipped with the reason."""

    file: str
    which: str
    status: str
    seconds: float
    detail: str
    failed: tuple[str, ...] = ()


def test_files() -> list[TestFile]:
    """In the order in which they run."""
    paths = [path for path in TESTS.rglob("test_*.py") if "on_fake_device" not in path.parts]
    paths.sort(key=lambda path: (path != FIRST, path.parent.name != "kernels", path))
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    need = [path for path, text in texts.items() if _GPU.search(text)]
    either = [
        path
        for path, text in texts.items()
        if _EITHER.search(text) and not _FAKE.search(text) and not _WHOLLY_GPU.search(text)
    ]
    # the runtime's before the kernels', which are many
    either.sort(key=lambda path: path.parent.name != "runtime")
    return [TestFile(path, "gpu") for path in need] + [TestFile(path, "either") for path in either]


test_files.__test__ = False


def result_of(file: TestFile, code: int | None, log: Path, seconds: float) -> FileResult:
    """From pytest's exit code, None where it was ended, and its output."""
    output = log.read_text(errors="replace")
    failed = tuple(re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M))
    reasons = re.findall(r"^SKIPPED \[\d+\] [^:]+:(?:\d+:)? (.*)$", output, re.M)
    detail = tail(log).strip("= ")[:200]
    if code is None:
        status, at = "timeout", re.findall(r"^(\S+::.*?) *(?:PASSED|SKIPPED|FAILED|ERROR|Timeout|$)", output, re.M)
        detail = f"ended after {seconds:.0f} s, in or after {at[-1]}" if at else f"ended after {seconds:.0f} s"
    elif code == NONE_CHOSEN:
        status, detail = "skipped", reasons[-1] if reasons else "no such tests in it"
    elif code == PASSED:
        status = "ok" if re.search(r"\b\d+ x?passed\b", detail) else "skipped"
        if status == "skipped" and reasons:
            detail = f"{detail}: {reasons[-1]}"
    else:
        status = "failed"
        if code < 0 or not re.search(r"\b(?:failed|error)", detail):
            detail = f"exit code {code}: {detail}"
    return FileResult(file.name, file.which, status, seconds, detail, failed)


def run_files(
    files: Sequence[TestFile], out: Path, seconds: float, jobs: int, environment: dict[str, str] | None = None
) -> list[FileResult]:
    """Run files, the first alone and then `jobs` at a time, and append each result to tests.jsonl when it is there."""
    (out / "tests").mkdir(parents=True, exist_ok=True)
    begin, waiting, results = time.monotonic(), list(files), []
    # plugins that happen to be installed would shuffle, spread or import more
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **(environment or {})}
    active: list[tuple[TestFile, Command]] = []

    def finish(result: FileResult) -> None:
        results.append(result)
        append_line(out / "tests.jsonl", {"bench": "tests", **asdict(result)})
        print(f"{result.status:8} {result.seconds:6.1f} s  {result.which:6} {result.file}  {result.detail}")
        for name in result.failed:
            print(f"         {name}", flush=True)

    try:
        while waiting or active:
            spent = time.monotonic() - begin
            room = 1 if len(results) == 0 and FIRST in (f.path for f in files) else jobs
            while waiting and len(active) < room:
                file = waiting.pop(0)
                if spent > BEGIN_UNTIL * seconds:
                    finish(FileResult(file.name, file.which, "skipped", 0.0, "no time left: give more --minutes"))
                else:
                    active.append((file, Command(file.command(), out / "tests" / file.log, environment)))
            time.sleep(0.02)
            for file, command in tuple(active):
                code = command.poll()
                late = command.seconds > FILE_SECONDS or time.monotonic() - begin > seconds
                if code is not None or late:
                    took = command.seconds
                    command.end()
                    active.remove((file, command))
                    finish(result_of(file, code, command.log, took))
    finally:
        for _, command in active:
            command.end()
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench._gpu_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="Put logs and results into this folder.")
    parser.add_argument("--minutes", type=float, default=60.0, help="Spend at most this long.")
    parser.add_argument("--which", choices=tuple(CHOICE), help="Run these tests instead of all.")
    parser.add_argument("--file", type=Path, action="append", default=[], help="Run the tests of this file only.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="Let tests see no GPU with cpu.")
    args = parser.parse_args(argv)
    only = {path.resolve() for path in args.file}
    files = [f for f in test_files() if args.which in (None, f.which) and (not only or f.path in only)]
    jobs = max(1, min(4, (os.cpu_count() or 1) // 4))
    environment = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    with ending_on_sigterm():
        results = run_files(files, args.out.resolve(), 60 * args.minutes, jobs, environment)
    bad = [result for result in results if result.status in ("failed", "timeout")]
    left = [result for result in results if result.status == "skipped"]
    counts = f"{len(results) - len(bad) - len(left)} of {len(results)} test files passed, {len(left)} skipped"
    print("; ".join([counts, *(f"{result.status}: {result.file}" for result in bad)]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
