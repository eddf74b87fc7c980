"""Generations: `cache --update` writes a new plan beside the current one, and makes it current once it is complete.

All that belongs to a generation has names that follow from its plan, and `plan.json` is the current one: so one rename
makes a finished update current, and until then, and for whoever has opened the old one, nothing has changed. The plans
of updates under way and of earlier generations lie in `generations/`.
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
    with suppress(FileNotFoundError):
        folder.unlink(record_name(plan))


def recorded(folder: CacheFolder) -> list[CachePlan]:
    """The plans in `generations/`, by their numbers.

    Raises:
        CacheError: one of them is damaged.
    """
    plans = []
    for base in folder.names(GENERATIONS):
        named = _RECORD.fullmatch(base)
        if not named:
            continue
        name = f"{GENERATIONS}/{base}"
        why = "it is damaged"
        try:
            plan = parse_plan(folder.read(name, PLAN_BYTES), folder)
        except CacheError as e:
            why, plan = str(e), None
        except FileNotFoundError:
            continue
        if plan is None or plan.plan8 != named[1]:
            raise CacheError(
                f"{folder.path / name}, the plan of another generation, cannot be used ({why}): move it away; what it "
                "alone knows of is then no longer reused"
            )
        plans.append(plan)
    return sorted(plans, key=lambda plan: (plan.number, plan.plan8))


def unfinished(folder: CacheFolder, current: CachePlan) -> list[CachePlan]:
    """The plans of updates that have not become current."""
    return [plan for plan in recorded(folder) if plan.number > current.number]


def superseded(folder: CacheFolder, current: CachePlan) -> list[CachePlan]:
    """The plans of earlier generations."""
    return [plan for plan in recorded(folder) if plan.number <= current.number and plan.id != current.id]


def make_current(folder: CacheFolder, old: CachePlan, new: CachePlan) -> None:
    """Put a finished update in the place of the current generation, whose plan is kept. Under the mutex."""
    record(folder, old)
    PendingFile(folder, PLAN, [new.text()]).replace()
    forget(folder, new)
