"""The beginning of a run: what is there is checked, what is to be done is said, and how many processes will decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import CacheError
from ..images.load import View
from .accounts import account, is_current
from .decoding import DecodePool, usable_cores
from .dtype_costs import DtypeCost, describe, measure_dtypes
from .folder import CacheFolder
from .leases import Leases
from .mutex import Mutex
from .options import RunOptions
from .parts import INT8
from .pipeline import Pipeline
from .plan import Task
from .prepare import PreparedRun, outlook
from .report import Report
from .resizing import RECORD_BYTES
from .retry import quarantined, reopen, try_again
from .reuse import Reuse
from .store import TaskStore
from .task_queue import remove_stale
from .update import reuse_for

MEASURED_IMAGES = 4
"""Of a cache in int8, on which is measured what storing costs, unless the caller says otherwise."""
BYTES_PER_WORKER = 16 << 20
"""Of inputs: with less than this for each, more workers take longer to start than they save."""
UNKNOWN_BYTES = 100_000
"""What an input is taken for whose size is not known beforehand."""


@dataclass
class Begun:
    """A run whose plan stands and whose cache is sound, before anything is encoded.

    Attributes:
        todo: the tasks that are not committed.
        costs: what storage types cost, where it was measured.
        reuse: of an update, rows that need not be encoded again.
    """

    prepared: PreparedRun
    store: TaskStore
    todo: list[Task]
    costs: list[DtypeCost]
    reuse: Reuse | None

    def account(self) -> Report:
        """Write the quarantine anew, and count what the cache holds."""
        return account(self.store, len(self.prepared.tasks))

    def report(self, pipeline: Pipeline | None) -> Report:
        """The outcome, where nothing is going to be added to it."""
        report = self.account()
        report.costs = self.costs
        if pipeline is not None:
            report.new_images, report.reused = pipeline.read, pipeline.reused
            report.meters = pipeline.measure() if pipeline.read + pipeline.reused else None
            id = self.prepared.source.listing.id
            report.failures = {id(row["input"]): (row["reason"], row["message"]) for row in pipeline.unfinished}
        report.unfinished = len(self.prepared.tasks) - report.tasks
        report.generation = self.prepared.plan.number
        return report


@contextmanager
def accounted(*runs: Begun) -> Iterator[None]:
    """On an exception, account for what is done so far: the reason why the run ends matters more than that."""
    try:
        yield
    except BaseException:
        for run in runs:
            with suppress(CacheError, OSError):
                run.account()
        raise


@contextmanager
def begun(
    prepared: PreparedRun,
    folder: CacheFolder,
    mutex: Mutex,
    workers: int | None,
    options: RunOptions,
    note: Callable[[str], None],
) -> Iterator[Begun]:
    """Check what the run builds on and say what it is going to do; leases can be taken until the end."""
    plan, tasks = prepared.plan, prepared.tasks
    leases = Leases(folder, mutex, plan.plan8, heartbeat=options.heartbeat, stale=options.stale)
    with leases:
        with mutex:
            remove_stale(folder, leases)
            if prepared.restore_listing:
                prepared.source.listing.save(folder, prepared.plan.source_name)
        store = TaskStore(folder, plan, mutex, leases, prepared.source.listing)
        store.is_draft = not is_current(folder, plan)
        for line in prepared.notes + store.settle(tasks):
            note(line)
        if options.retry_quarantined:
            note(_retry(prepared, store, workers, options))
        todo = [task for task in tasks if task.number not in store.commits]
        reuse = _reuse(prepared, folder, todo, note)
        for line in outlook(prepared, folder.path, todo, unknown_inputs(reuse, todo)):
            note(line)
        costs = _measure(prepared, options, note) if todo else []
        yield Begun(prepared, store, todo, costs, reuse)


def _measure(prepared: PreparedRun, options: RunOptions, note: Callable[[str], None]) -> list[DtypeCost]:
    """What storing costs, told where a new cache begins: the model is there then."""
    dtype = prepared.plan.dtype
    images = options.measure if options.measure is not None else MEASURED_IMAGES if dtype == INT8 else 0
    if prepared.model is None or not images:
        return []
    try:
        count, costs = measure_dtypes(prepared.plan, prepared.source, prepared.model, images)
    except torch.OutOfMemoryError:
        note("what storing costs is not measured: no memory to decode an image")
        return []
    for line in describe(count, costs, dtype):
        note(line)
    return costs


def _reuse(prepared: PreparedRun, folder: CacheFolder, todo: list[Task], note: Callable[[str], None]) -> Reuse | None:
    """What an update need not encode again; None where nothing can be known already."""
    if not todo or not prepared.plan.is_update:
        return None
    reuse, notes = reuse_for(folder, prepared)
    for line in notes:
        note(line)
    return reuse


def unknown_inputs(reuse: Reuse | None, todo: list[Task]) -> int | None:
    """Inputs that are to be read; None where that is all of them."""
    return None if reuse is None else sum(int((reuse.refs[task.first : task.stop] < 0).sum()) for task in todo)


def pool_of(
    prepared: PreparedRun,
    workers: int,
    options: RunOptions,
    reuse: Sequence[Reuse | None] = (),
    *,
    is_deferring: bool = False,
    also: Sequence[View] = (),
) -> DecodePool:
    """The pool that decodes for a run, not started.

    Args:
        reuse: rows that each view need not encode again.
        is_deferring: whether images are resized elsewhere.
        also: further views of the images.
    """
    budget = options.pixel_budget // 2 if is_deferring else options.pixel_budget
    ring: dict[str, Any] = {"ring_bytes": budget, "record_bytes": RECORD_BYTES} if is_deferring else {}
    # it serves one pool
    helper, prepared.helper = prepared.helper, None
    return DecodePool(
        prepared.source,
        prepared.plan.policy,
        prepared.plan.buckets,
        workers=workers,
        image_timeout=options.image_timeout,
        pixel_budget=budget,
        **ring,
        backoff=options.backoff,
        known=[one.known if one else None for one in reuse],
        helper=helper,
        also=also,
    )


def _retry(prepared: PreparedRun, store: TaskStore, workers: int | None, options: RunOptions) -> str:
    """Try quarantined inputs again, and have the tasks of those that can be decoded now redone; what came of it."""
    inputs = quarantined(store, prepared.tasks)
    if not inputs:
        return "nothing is quarantined"
    tasks = Counter(inputs.values())
    todo = [task for task in prepared.tasks if task.number in tasks]
    better = try_again(store, inputs, pool_of(prepared, workers_for(workers, prepared, todo), options))
    reopened = reopen(store, better)
    return (
        f"{better.total()} of {len(inputs)} quarantined inputs can be decoded now: {len(reopened)} tasks are done again"
    )


def workers_for(wanted: int | None, prepared: PreparedRun, todo: list[Task]) -> int:
    """Processes that decode: as many as are wanted, or one per core less one that drives a GPU, if there is enough."""
    if wanted == 0:
        return 0
    if wanted is None:
        wanted = usable_cores() - torch.cuda.is_available()
    sizes = prepared.source.listing.sizes
    nbytes = sum(
        int(np.where(part < 0, UNKNOWN_BYTES, part).sum()) for t in todo if (part := sizes[t.first : t.stop]).size
    )
    return max(1, min(wanted, nbytes // BYTES_PER_WORKER))
