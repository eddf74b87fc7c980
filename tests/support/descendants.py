"""Processes below a process: the workers of a decode pool are its helper's."""

from __future__ import annotations

import os
from pathlib import Path

from capacitor_rt.cache.decoding import DecodePool


def processes(parent: int) -> dict[int, str]:
    """State by pid of a process's descendants."""
    found: dict[int, str] = {}
    pending = [parent]
    everyone = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            everyone[int(entry)] = (int(fields[1]), fields[0])
    while pending:
        above = pending.pop()
        below = [pid for pid, (ppid, _) in everyone.items() if ppid == above]
        found |= {pid: everyone[pid][1] for pid in below}
        pending += below
    return found


def workers_of(decoder: DecodePool) -> list[int]:
    helper = decoder._coordinator._helper.pid
    return [pid for pid, state in processes(helper).items() if state != "Z"]
