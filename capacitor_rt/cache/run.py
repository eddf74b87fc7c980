"""A run of the cache: make a plan or find what is left of one, do that, and account for every input."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CacheError
from ..images.load import View
from ..model import FullCapacitor
from ..reference import Autoencoder
from .carried import carried_nbytes
from .commits import read_log, rewrite_log
from .decoding import DecodePool, Helper, usable_cores
from .dtype_costs import DtypeCost, as_json, describe, measure_dtypes
from .encoder import BatchEncoder, IdleEncoder
from .folder import CacheFolder, make_dir
from .generations import make_current
from .kept_configs import kept
from .leases import Leases
from .meters import Meters
from .model_source import Loaded, ModelSource
from .mutex import Mutex
from .options import RunOptions
from .parts import INT8
from .pipeline import Pipeline
from .plan import PLAN, CachePlan, CacheRequest, Task, load_plan
from .prepare import PreparedRun, as_source, check_folder, outlook, prepare
from .quarantine import quarantine_bytes, write_quarantine
from .report import Report, after
from .resizing import RECORD_BYTES, Resizer, by_device
from .retry import quarantined, reopen, try_again
from .reuse import Reuse, check_file
from .shared_files import SharedFiles
from .sources import Source
from .store import TaskStore, repair_hint
from .task_queue import TaskQueue, remove_stale
from .update import prepare_update, reuse_for
from .watch import Bar, Watch

_log = logging.getLogger("capacitor_rt")
POLL_SECONDS = 0.5
MEASURED_IMAGES = 4
"""Of a cache in int8, on which is measured what storing costs, unless the caller says otherwise."""
BYTES_PER_WORKER = 16 << 20
"""Of inputs: with less than this for each, more workers take longer to start than they save."""
UNKNOWN_BYTES = 100_000
"""What an input is taken for whose size is not known beforehand."""


def cache_images(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: FullCapacitor | ModelSource | str | os.PathLike[str],
    request: CacheRequest,
    *,
    workers: int | None = None,
    progress: bool = True,
    note: Callable[[str], None] = _log.info,
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> Report:
    """Encode every image of `src` into the latent cache `out`, or go on with it. Originals are only read.

    Any number of processes may do so at once, on any number of machines that share `out`: they share the tasks, and the
    files are the same whoever writes them.

    Args:
        src: folder (with its subfolders), file, or list of files.
        out: folder of the cache; new, empty, or an unfinished or finished cache of the same plan.
        model: a model, the name of a checkpoint, or a `ModelSource`. It is not loaded when nothing is left to do.
        workers, progress: as in `RunOptions`, whose values they replace.
        note: told, line by line, what a user may want to know before the work starts; default the logger
            `capacitor_rt`.
        watch: told how far the work is; default a bar on stderr, as `options` has it.

    Raises:
        CacheError: `out` belongs to another plan or to other inputs; a file is damaged; the disk is full.
        KeyboardInterrupt: all but the open task are safe, and the same call goes on from there.
    """
    begin = time.perf_counter()
    chosen = options or RunOptions(progress=progress)
    threads = chosen.workers if workers is None else workers
    watch = watch or Bar(chosen.progress, chosen.metrics)
    source, out = as_source(model), Path(out)
    check_folder(out)
    with opened(out) as folder:
        mutex = Mutex(folder, note)
        # what is there already needs no long planning, and perhaps no workers
        helper = Helper() if threads != 0 and folder.stat(PLAN) is None else None
        try:
            prepared = planned(os.fspath(src), folder, mutex, source, request, chosen)
            prepared.helper = helper
            with kept(prepared.plan, prepared.cc, source.model if isinstance(source, Loaded) else prepared.model):
                report = _run(prepared, folder, mutex, source, threads, chosen, note, watch)
                if prepared.plan.is_interim and not report.unfinished:
                    prepared = prepare_update(os.fspath(src), folder, mutex, source, request, chosen, prepared)
                    prepared.notes.clear()
                    report = after(report, _run(prepared, folder, mutex, source, threads, chosen, note, watch))
        finally:
            if helper is not None:
                helper.end()
            clear(folder, mutex)
    report.seconds = time.perf_counter() - begin
    return report


@contextmanager
def opened(out: Path) -> Iterator[CacheFolder]:
    """The folder of a cache, made if it is new, and removed again if nothing has come into it."""
    new = not out.exists()
    try:
        make_dir(out)
    except OSError as e:
        raise CacheError(f"cannot create {out}: {e.strerror}: give an OUT that you may write to") from e
    try:
        with CacheFolder(out) as folder:
            yield folder
    finally:
        if new:
            # a run that was refused leaves nothing behind
            with suppress(OSError):
                out.rmdir()


def planned(
    src: str,
    folder: CacheFolder,
    mutex: Mutex,
    source: ModelSource,
    request: CacheRequest,
    options: RunOptions,
    inputs: Source | None = None,
) -> PreparedRun:
    """The plan that is there, or a new one: whoever comes first makes it, and the others wait for it.

    Args:
        inputs: the source, where it was opened already.
    """
    with mutex:
        first = folder.stat("plan.json") is None
        if first:
            remove_stale(folder, None)
            prepared = prepare(src, folder.path, folder, source, request, options, load=True, source=inputs)
            # the plan comes last: with it the cache exists, without it nothing that lies here counts
            prepared.source.listing.save(folder, prepared.plan.source_name)
            prepared.plan.save(folder)
            return prepared
    if options.update:
        return prepare_update(src, folder, mutex, source, request, options)
    return prepare(src, folder.path, folder, source, request, options, load=True, source=inputs)


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
        return _account(self.store, len(self.prepared.tasks))

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


def _run(
    prepared: PreparedRun,
    folder: CacheFolder,
    mutex: Mutex,
    source: ModelSource,
    workers: int | None,
    options: RunOptions,
    note: Callable[[str], None],
    watch: Watch,
) -> Report:
    with begun(prepared, folder, mutex, workers, options, note) as run:
        pipeline = None
        with accounted(run):
            if run.todo:
                pipeline = _write_tasks(run, source, workers, options, note, watch)
        return run.report(pipeline)


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
        store = TaskStore(folder, plan, mutex, leases)
        store.is_draft = not is_current(folder, plan)
        for line in prepared.notes + _check(store, tasks):
            note(line)
        if options.retry_quarantined:
            note(_retry(prepared, store, workers, options))
        todo = [task for task in tasks if task.number not in store.commits]
        reuse = _reuse(prepared, folder, todo, note)
        for line in outlook(prepared, folder.path, todo, _unknown(reuse, todo)):
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


def _check(store: TaskStore, tasks: list[Task]) -> list[str]:
    """Refuse to build on damage; forget what is committed and gone. Notes for the user."""
    log = read_log(store.folder, store.plan.log_name)
    notes = []
    if log.bad:
        lines = ", ".join(map(str, log.bad[:5]))
        notes.append(f"line {lines} of {store.folder.path / store.plan.log_name} is damaged and counts as lost")
    for number in [n for n in store.commits if n >= len(tasks)]:
        raise CacheError(
            f"{store.folder.path / store.plan.log_name} has task {number}, and the plan has {len(tasks)} tasks: "
            + repair_hint(store.folder)
        )
    damaged: dict[int, str] = {}
    gone = []
    shared = SharedFiles(store.folder, store.plan)
    if shared.problem is not None:
        raise CacheError(shared.problem)
    for task in [task for task in tasks if task.number in store.commits]:
        if store.is_gone(task):
            gone.append(task.number)
        elif problem := store.check(task, shared.add):
            damaged[task.number] = problem
    for file in shared.used():
        if problem := check_file(store.folder, file, store.plan, store.stamps):
            damaged |= dict.fromkeys(shared.tasks[file.stem], problem)
    if damaged and store.is_draft:
        gone += sorted(damaged)
        with store.mutex:
            store.set_aside(sorted(damaged))
        notes += [f"{why}: moved to damaged/ and done again" for why in dict.fromkeys(damaged.values())]
    elif damaged:
        found = list(dict.fromkeys(damaged.values()))
        more = [f"and {len(found) - 5} more"] if len(found) > 5 else []
        raise CacheError(f"{store.folder.path} is damaged: {repair_hint(store.folder)}", [*found[:5], *more])
    if gone or log.bad:
        store.forget(gone)
    return notes


def _write_tasks(
    run: Begun,
    source: ModelSource,
    workers: int | None,
    options: RunOptions,
    note: Callable[[str], None],
    watch: Watch,
) -> Pipeline | None:
    """Write what is to be done, together with whoever else is at it. None if there was nothing to encode."""
    prepared, store, todo = run.prepared, run.store, run.todo
    plan = prepared.plan
    rank, size = options.place()
    queue = TaskQueue(store, todo, rank * len(todo) // size)
    first = next(iter(queue), None)
    if first is None and not queue.left():
        return None
    meters: Meters | None = None
    is_idle = _unknown(run.reuse, todo) == 0
    watch.begin(plan.count, plan.count - sum(len(task) for task in todo))
    try:
        is_deferring = not is_idle and by_device(options.resize, prepared.cc)
        count = 0 if is_idle else workers_for(workers, prepared, todo)
        decoder = pool_of(prepared, count, options, run.reuse, is_deferring=is_deferring)
        # the workers get ready while the model does
        with decoder:
            encoder = IdleEncoder() if is_idle else encoder_of(prepared, source, note, is_deferring)
            if encoder.on_gpu:
                decoder.pin()
            pipeline = Pipeline(
                store,
                prepared.source,
                decoder,
                encoder,
                give_up=options.give_up,
                reuse=run.reuse,
                advance=lambda inputs, quarantined: watch.advance(inputs, quarantined, pipeline.measure),
            )
            pipeline.meters.costs = as_json(run.costs)
            _until_done(pipeline, queue, first)
            meters = pipeline.measure()
    finally:
        watch.end(meters)
    return pipeline


def _reuse(prepared: PreparedRun, folder: CacheFolder, todo: list[Task], note: Callable[[str], None]) -> Reuse | None:
    """What an update need not encode again; None where nothing can be known already."""
    if not todo or not prepared.plan.is_update:
        return None
    reuse, notes = reuse_for(folder, prepared)
    for line in notes:
        note(line)
    return reuse


def _unknown(reuse: Reuse | None, todo: list[Task]) -> int | None:
    """Inputs that are to be read; None where that is all of them."""
    return None if reuse is None else sum(int((reuse.refs[task.first : task.stop] < 0).sum()) for task in todo)


def pool_of(
    prepared: PreparedRun,
    workers: int,
    options: RunOptions,
    reuse: Reuse | None = None,
    *,
    is_deferring: bool = False,
    also: Sequence[View] = (),
) -> DecodePool:
    """The pool that decodes for a run, not started.

    Args:
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
        known=reuse.known if reuse else None,
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


def _until_done(pipeline: Pipeline, queue: TaskQueue, first: Task | None) -> None:
    """Go through the queue until every task is committed, given up, or by turns taken over from the dead."""
    tasks = iter(queue)
    while True:
        pipeline.run(_with(first, tasks))
        queue.given_up |= pipeline.abandoned
        first = None
        if not queue.left():
            return
        while first is None and queue.left():
            tasks = iter(queue)
            first = next(tasks, None)
            if first is None:
                time.sleep(POLL_SECONDS)
        if first is None:
            return


def _with(first: Task | None, tasks: Iterator[Task]) -> Iterator[Task]:
    if first is not None:
        yield first
    yield from tasks


def encoder_of(
    prepared: PreparedRun, source: ModelSource, note: Callable[[str], None], is_deferring: bool = False
) -> BatchEncoder:
    """What encodes for a run, its kernels made ready."""
    plan = prepared.plan
    model: Autoencoder = prepared.model or source.load(source.identity(plan.fields["model"]["compute_dtype"]))
    encoder = BatchEncoder(model, plan.tensors, plan.dtype, Resizer(model.device) if is_deferring else None)
    sizes = {(bucket.height, bucket.width, min(plan.batch, plan.count)) for bucket in plan.buckets}
    seconds = encoder.warmup(sorted(sizes))
    if seconds > 1:
        note(f"kernels for {len(sizes)} sizes of batches were made ready in {seconds:.1f} s")
    return encoder


def _account(store: TaskStore, tasks: int) -> Report:
    """Put the log in order if all is done, make an update current, write the quarantine anew, and count."""
    folder, plan = store.folder, store.plan
    with store.mutex:
        log = read_log(folder, plan.log_name)
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


def clear(folder: CacheFolder, mutex: Mutex) -> None:
    """Remove the lock's file, unless others are at work."""
    with suppress(CacheError, OSError), mutex:
        if not folder.names("leases"):
            mutex.remove()
