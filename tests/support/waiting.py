"""Waiting for what must come about: events decide, and the one deadline is there to end hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

HANG_SECONDS = 600.0
"""No machine that is at work, however slow or busy, takes so long: whatever does hangs."""


def until(condition: Callable[[], object], seconds: float = HANG_SECONDS, pause: float = 0.002) -> None:
    """Ask again and again until `condition` holds.

    Raises:
        AssertionError: it does not within `seconds`.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(pause)


def runs(pid: int) -> bool:
    """Whether there is such a process; a zombie, which waits for whoever inherited it, is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
