"""What a cache holds when a run ends: the log in order, a finished update made current, quarantine and counts."""

from __future__ import annotations

import json
from collections import Counter

from ..errors import CacheError
from .carried import carried_nbytes
from .commits import read_log, rewrite_log
from .folder import CacheFolder
from .generations import make_current
from .plan import CachePlan, load_plan
from .quarantine import quarantine_bytes, write_quarantine
from .report import Report
from .store import TaskStore
from .task_queue import remove_stale


def account(store: TaskStore, tasks: int) -> Report:
    """Put the log in order if all is done, make an update current, write the quarantine anew, and count."""
    folder, plan = store.folder, store.plan
    with store.mutex:
        log = read_log(folder, plan)
        commits = log.commits
        if len(commits) == tasks:
            # of those that were killed while others went on
            remove_stale(folder, store.leases)
            if not log.sorted:
                rewrite_log(folder, plan.log_name, commits)
            _make_current(folder, plan)
        if is_current(folder, plan):
            write_quarantine(folder, plan, commits)
    text = quarantine_bytes(folder, plan, commits)
    return Report(
        inputs=plan.count,
        cached=sum(c.rows for c in commits.values()),
        quarantined=Counter(json.loads(line)["reason"] for line in text.splitlines()),
        tasks=len(commits),
        nbytes=sum(c.data_bytes for c in commits.values()) + carried_nbytes(folder, plan),
    )


def _make_current(folder: CacheFolder, plan: CachePlan) -> None:
    """Put a finished update in the place of the generation that it was made from."""
    current = load_plan(folder)
    if current is None or current.id == plan.id or not plan.is_update or plan.is_interim:
        return
    if current.id != plan.fields["generation"]["of"]:
        raise CacheError(
            f"{folder.path} was updated to other inputs by another process meanwhile: run the same command again, "
            "which keeps what this one has done"
        )
    make_current(folder, current, plan)


def is_current(folder: CacheFolder, plan: CachePlan) -> bool:
    """Whether a plan is that of the cache, and not of an update under way or of an earlier generation."""
    current = load_plan(folder)
    return current is not None and current.id == plan.id
