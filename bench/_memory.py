"""Memory of a command and of all that it started, looked at again and again while it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def descendants(pid: int) -> list[int]:
    """A process and all below it, the first first."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            parents.setdefault(parent, []).append(int(path.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def resident(pid: int) -> int:
    """Bytes of a process that are in memory, what it shares divided by those that share it (PSS); 0 once it is gone."""
    try:
        text = (Path("/proc") / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:")), 0)


def watched(
    arguments: Sequence[str], seconds: float = 1.0, told: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run a module of the bench in a process of its own, and sample the memory of it and of its children.

    Args:
        arguments: of Python, such as `["-m", "bench.scale", ...]`; the command may print lines, of which the last is
            JSON.
        seconds: between two looks.
        told: each line that it prints before.

    Returns:
        `seconds` it took, `peak` of all processes together in bytes, `samples`: of each look the seconds since the
        begin, the bytes of the first process and of all others together; `result`, the JSON.
    """
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    samples: list[tuple[float, int, int]] = []
    try:
        while process.poll() is None:
            first, *others = descendants(process.pid)
            samples.append((time.perf_counter() - begin, resident(first), sum(map(resident, others))))
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    assert process.stdout is not None
    *lines, last = process.stdout.read().splitlines() or [""]
    for line in lines:
        told(line)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return {
        "seconds": time.perf_counter() - begin,
        "peak": max((a + b for _, a, b in samples), default=0),
        "samples": samples,
        "result": json.loads(last) if last else None,
    }
