"""Long commands that write: Ctrl-C and SIGTERM end them cleanly, with a line and an exit code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .terminal import note

INTERRUPTED = 130
TERMINATED = 143


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn interruptions into a line on stderr and an exit code. Other failures are the entry point's to print."""
    try:
        with _sigterm():
            yield
    except _Terminated as e:
        note("terminated: finished parts are safe, and the same command goes on from there")
        raise typer.Exit(TERMINATED) from e
    except KeyboardInterrupt as e:
        note("interrupted: finished parts are safe, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from e


class _Terminated(KeyboardInterrupt):
    pass


@contextmanager
def _sigterm() -> Iterator[None]:
    """Make SIGTERM, which schedulers send before they kill, as clean a stop as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def bytes_text(n: float) -> str:
    """A number of bytes with a unit, e.g. 1.234 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:.4g} TB"
