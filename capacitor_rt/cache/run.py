"""A run of the cache: make a plan or find what is left of one, do that, and account for every input."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CacheError
from ..model import FullCapacitor
from ..reference import Autoencoder
from .begin import Begun, accounted, begun, pool_of, unknown_inputs, workers_for
from .decoding import Helper
from .dedupe import Search, distinct
from .dtype_costs import as_json
from .encoder import BatchEncoder, IdleEncoder
from .folder import CacheFolder, make_dir
from .gpu_decoding import resizer_of
from .kept_configs import kept
from .leases import clear
from .meters import Meters
from .model_source import Loaded, ModelSource
from .mutex import Mutex
from .options import RunOptions
from .pipeline import Pipeline
from .plan import PLAN, Task
from .prepare import PreparedRun, as_source, check_folder, prepare
from .report import Report, after
from .request import CacheRequest
from .resizing import Resizer, by_device
from .sources import Source
from .task_queue import TaskQueue, remove_stale
from .update import prepare_update
from .watch import Bar, Watch

_log = logging.getLogger("capacitor_rt")
POLL_SECONDS = 0.5


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
    helper: Helper | None = None,
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
        helper: what decoding workers are forked from, where it was started before, as by a command that was still
            importing torch itself. It ends with the call.

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
        if helper is None and threads != 0 and folder.stat(PLAN) is None:
            # what is there already needs no long planning, and perhaps no workers
            helper = Helper()
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
    search: Search = distinct,
) -> PreparedRun:
    """The plan that is there, or a new one: the first process makes it, and the others wait for it.

    Args:
        inputs: the source, where it was opened already.
        search: finds inputs of equal bytes.
    """
    with mutex:
        first = folder.stat("plan.json") is None
        if first:
            remove_stale(folder, None)
            with mutex.interruptible():
                prepared = prepare(
                    src, folder.path, folder, source, request, options, load=True, source=inputs, search=search
                )
            # the plan comes last: with it the cache exists, without it nothing that lies here counts
            prepared.source.listing.save(folder, prepared.plan.source_name)
            prepared.plan.save(folder)
            return prepared
    if options.update:
        return prepare_update(src, folder, mutex, source, request, options, inputs=inputs, search=search)
    return prepare(src, folder.path, folder, source, request, options, load=True, source=inputs)


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


def _write_tasks(
    run: Begun,
    source: ModelSource,
    workers: int | None,
    options: RunOptions,
    note: Callable[[str], None],
    watch: Watch,
) -> Pipeline | None:
    """Write what is to be done, together with other processes at work on it. None if there was nothing to encode."""
    prepared, store, todo = run.prepared, run.store, run.todo
    plan = prepared.plan
    rank, size = options.place()
    queue = TaskQueue(store, todo, rank * len(todo) // size)
    first = next(iter(queue), None)
    if first is None and not queue.left():
        return None
    meters: Meters | None = None
    is_idle = unknown_inputs(run.reuse, todo) == 0
    watch.begin(plan.count, plan.count - sum(len(task) for task in todo))
    try:
        is_deferring = not is_idle and by_device(options.resize, prepared.cc, prepared.plan.policy.decode)
        count = 0 if is_idle else workers_for(workers, prepared, todo)
        decoder = pool_of(prepared, count, options, [run.reuse], is_deferring=is_deferring)
        # the workers get ready while the model does
        with decoder:
            budget = options.pixel_budget
            encoder = (
                IdleEncoder()
                if is_idle
                else encoder_of(
                    prepared, source, note, is_deferring, pixel_budget=budget, image_timeout=options.image_timeout
                )
            )
            if encoder.on_gpu:
                decoder.pin(encoder.model.device)
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
    prepared: PreparedRun,
    source: ModelSource,
    note: Callable[[str], None],
    is_deferring: bool = False,
    resizer: Resizer | None = None,
    pixel_budget: int = 2 << 30,
    image_timeout: float = 60.0,
) -> BatchEncoder:
    """What encodes for a run, its kernels made ready.

    Args:
        is_deferring: whether the device resizes: by `resizer`, or one of its own that keeps to `pixel_budget` and to
            `image_timeout`.
    """
    plan = prepared.plan
    model: Autoencoder = prepared.model or source.load(source.identity(plan.fields["model"]["compute_dtype"]))
    if not is_deferring:
        resizer = None
    elif resizer is None:
        resizer = resizer_of(plan.policy.decode, model.device, pixel_budget, image_timeout, prepared.source.listing.id)
    encoder = BatchEncoder(model, plan.tensors, plan.dtype, resizer)
    sizes = {(bucket.height, bucket.width, min(plan.batch, plan.count)) for bucket in plan.buckets}
    seconds = encoder.warmup(sorted(sizes))
    if seconds > 1:
        note(f"kernels for {len(sizes)} sizes of batches were made ready in {seconds:.1f} s")
    return encoder
