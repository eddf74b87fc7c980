"""Commands with an end: their output goes to a file as it comes, and what they started ends with them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 2.0
_MISSING = re.compile(
    r"^(?:E\s+)?(?:ModuleNotFoundError: No module named '([\w.]+)'"
    r"|capacitor_rt\.extras\.MissingExtraError: (\w+) is not installed)",
    re.M,
)
OWN = ("bench", "capacitor_kernels", "capacitor_rt", "tests")


class Command:
    """A running command, in a process group of its own.

    Args:
        environment: variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None):
        self.log = log
        self.began = time.monotonic()
        # the process has its own handle on the file
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """The exit code, None where `seconds` passed first."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """End it and all of its group: politely, so that it can end its own, and after a moment for good."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, sign)
            except ProcessLookupError:
                break
            self.wait(GRACE_SECONDS)
        self._process.wait()


@contextmanager
def running(*command: str, log: Path, environment: dict[str, str] | None = None) -> Iterator[Command]:
    """A command that has ended, with all that it started, when the block is left."""
    started = Command(command, log, environment)
    try:
        yield started
    finally:
        started.end()


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Within it, being asked to end raises SystemExit, so that what this process started is ended too."""

    def leave(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def missing_package(output: str) -> str | None:
    """The package that an import did not find, by the last such error in an output; None for a part of this project."""
    found = _MISSING.findall(output)
    name = "".join(found[-1]).partition(".")[0] if found else None
    if name is None or name in OWN or list((ROOT / "tests").rglob(f"{name}.py")):
        return None
    return name


def tail(path: Path) -> str:
    """The last line of a log."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
