"""How far a cache is: what is done, who is at work, how fast, and whether the disk will do."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import CacheError
from ..extras import require_extra
from .carried import carried_nbytes
from .commits import read_log
from .folder import LEASES, CacheFolder
from .garbage import litter, living_stems
from .generations import unfinished
from .leases import Leases
from .mutex import Mutex
from .plan import CachePlan, load_plan
from .quarantine import quarantine_bytes
from .views import no_cache

WINDOW_SECONDS = 600.0
"""Tasks that were finished within so long before the latest one tell the rate."""


class Update(NamedTuple):
    """An update that is not finished: inputs and tasks of its plan, and those of them that are committed."""

    inputs: int
    tasks: int
    done_inputs: int
    done_tasks: int


@dataclass
class Status:
    """What there is of a cache.

    Attributes:
        inputs, tasks: numbers that the plan has.
        done_inputs, done_tasks, rows, nbytes: what is committed: inputs, tasks, rows with latents, bytes of latents.
        quarantined: number of inputs by reason, of what is committed.
        workers: who is at work on which task.
        rate: inputs per second, lately; None where too little was done to tell.
        left_seconds: until all is done, at that rate, if someone is at work.
        left_nbytes: bytes of latents still to be written, at what inputs have taken so far.
        free_nbytes: free on the disk.
        litter_nbytes: of what `gc` would remove.
        generation: number of the generation; 0 for a cache that was never updated.
        is_interim: whether inputs of the same bytes as others are still to be added, with `--dedupe`.
        updates: those that are not finished.
    """

    inputs: int
    tasks: int
    done_inputs: int = 0
    done_tasks: int = 0
    rows: int = 0
    nbytes: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    workers: dict[int, str] = field(default_factory=dict)
    rate: float | None = None
    left_seconds: float | None = None
    left_nbytes: int = 0
    free_nbytes: int = 0
    litter_nbytes: int = 0
    generation: int = 0
    is_interim: bool = False
    updates: list[Update] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        updates = [update._asdict() for update in self.updates]
        counts = {"quarantined": dict(self.quarantined), "workers": list(self.workers.values())}
        return {**self.__dict__, **counts, "updates": updates}


def status(root: str | os.PathLike[str]) -> Status:
    """How far a cache is. Nothing is changed, and only small files are read.

    Raises:
        CacheError: there is no cache, or its plan or a needed index is damaged.
    """
    for extra in ("pyarrow", "xxhash"):
        require_extra(extra)
    with CacheFolder(root) as folder:
        plan = load_plan(folder)
        if plan is None:
            raise CacheError(no_cache(folder.path))
        found = Status(plan.count, plan.task_count, free_nbytes=shutil.disk_usage(folder.path).free)
        found.generation, found.is_interim = plan.number, plan.is_interim
        found.updates = _updates(folder, plan)
        commits = {n: c for n, c in read_log(folder, plan).commits.items() if n < plan.task_count}
        found.done_inputs = sum(c.inputs for c in commits.values())
        found.done_tasks, found.rows = len(commits), sum(c.rows for c in commits.values())
        found.nbytes = sum(c.data_bytes for c in commits.values())
        lines = quarantine_bytes(folder, plan, commits).splitlines()
        found.quarantined = Counter(json.loads(line)["reason"] for line in lines)
        if folder.names(LEASES):
            found.workers = Leases(folder, Mutex(folder), plan.plan8).living(touch=False)
        found.rate = _rate({n: c.inputs for n, c in commits.items()}, folder, plan.index_name)
        left = found.inputs - found.done_inputs
        if found.rate and found.workers:
            found.left_seconds = left / found.rate
        if found.done_inputs:
            found.left_nbytes = round(left * found.nbytes / found.done_inputs)
        found.nbytes += carried_nbytes(folder, plan)
        found.litter_nbytes = sum(size for _, size in litter(folder, plan, living_stems(folder, plan), quick=True))
    return found


def _updates(folder: CacheFolder, plan: CachePlan) -> list[Update]:
    found = []
    for other in unfinished(folder, plan):
        commits = read_log(folder, other).commits.values()
        found.append(Update(other.count, other.task_count, sum(c.inputs for c in commits), len(commits)))
    return found


def _rate(inputs: dict[int, int], folder: CacheFolder, name: Any) -> float | None:
    times = sorted((info.st_mtime, inputs[n]) for n in inputs if (info := folder.stat(name(n))) is not None)
    recent = [(at, count) for at, count in times if at > times[-1][0] - WINDOW_SECONDS]
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return None
    # what the first of them has taken is not known
    return sum(count for _, count in recent[1:]) / (recent[-1][0] - recent[0][0])
