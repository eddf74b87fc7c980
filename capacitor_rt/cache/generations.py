"""Generations: `cache --update` writes a new plan beside the current one, and makes it current once it is complete.

All that belongs to a generation has names that follow from its plan, and `plan.json` is the current one: so one rename
makes a finished update current, and until then, and for readers of the old one, nothing changes. The plans of updates
under way and of earlier generations lie in `generations/`.
"""

from __future__ import annotations

import re
from contextlib import suppress

from ..errors import CacheError
from .folder import GENERATIONS, CacheFolder, PendingFile
from .plan import PLAN, PLAN_BYTES, CachePlan, parse_plan

_RECORD = re.compile(r"([0-9a-f]{8})\.json")


def record_name(plan: CachePlan) -> str:
    """Where a plan lies that is not the current one."""
    return f"{GENERATIONS}/{plan.plan8}.json"


def record(folder: CacheFolder, plan: CachePlan) -> None:
    """Keep a plan beside the current one."""
    PendingFile(folder, record_name(plan), [plan.text()]).publish()


def forget(folder: CacheFolder, plan: CachePlan) -> None:
    """Remove the plan of another generation."""
    folder.discard(record_name(plan))


def record_names(folder: CacheFolder) -> list[str]:
    """Names of the plans in `generations/`."""
    return [f"{GENERATIONS}/{base}" for base in folder.names(GENERATIONS) if _RECORD.fullmatch(base)]


def recorded_names(folder: CacheFolder) -> set[str]:
    """First digits of the plans in `generations/`, sound or not."""
    return {name.rpartition("/")[2][:8] for name in record_names(folder)}


def damaged_records(folder: CacheFolder) -> list[str]:
    """Names of those that cannot be used."""
    return [name for name in record_names(folder) if _read(folder, name) is None]


def _read(folder: CacheFolder, name: str) -> CachePlan | None:
    with suppress(CacheError, FileNotFoundError):
        plan = parse_plan(folder.read(name, PLAN_BYTES), folder)
        if record_name(plan) == name:
            return plan
    return None


def recorded(folder: CacheFolder) -> list[CachePlan]:
    """The plans in `generations/`, by their numbers.

    Raises:
        CacheError: one of them is damaged.
    """
    plans = []
    for name in record_names(folder):
        plan = _read(folder, name)
        if plan is None:
            if folder.stat(name) is None:
                # another process has made it current, or forgotten it
                continue
            raise CacheError(
                f"{folder.path / name}, the plan of another generation, is damaged: run `capacitor-rt verify --repair "
                f"{folder.path}`, then the same command again"
            )
        plans.append(plan)
    return sorted(plans, key=lambda plan: (plan.number, plan.plan8))


def unfinished(folder: CacheFolder, current: CachePlan) -> list[CachePlan]:
    """The plans of updates that have not become current."""
    return [plan for plan in recorded(folder) if plan.number > current.number]


def make_current(folder: CacheFolder, old: CachePlan, new: CachePlan) -> None:
    """Put a finished update in the place of the current generation, whose plan is kept. Under the mutex."""
    record(folder, old)
    PendingFile(folder, PLAN, [new.text()]).replace()
    forget(folder, new)
