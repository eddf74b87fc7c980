"""A run that fills the caches of several views from one decode of each image."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path

from ..errors import CacheError, CapacitorError, InputError
from ..images.load import View
from ..model import FullCapacitor
from ..reference import Autoencoder
from .begin import Begun, accounted, begun, pool_of, workers_for
from .dtype_costs import as_json
from .encoder import BatchEncoder
from .folder import CacheFolder
from .kept_configs import kept_together
from .meters import Meters
from .model_source import ModelIdentity, ModelSource
from .mutex import Mutex
from .options import RunOptions
from .outlook import dry_run
from .pipeline import Pipeline
from .plan import PLAN, CacheRequest
from .prepare import PreparedRun, as_source, check_folder, prepare
from .report import DryRun, Report, of_views
from .resizing import by_device
from .run import POLL_SECONDS, clear, encoder_of, opened, planned
from .sources import Source
from .sources.open import open_source
from .span_queue import SpanQueue
from .task_queue import TaskQueue
from .views import check_views
from .views_pipeline import ViewsPipeline
from .watch import Bar, Watch

Model = FullCapacitor | ModelSource | str | os.PathLike[str]


def cache_views(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: Model,
    views: Mapping[str, CacheRequest],
    *,
    note: Callable[[str], None],
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> Report:
    """Encode every image of `src` into a cache per view, each image read and decoded once, or go on with that.

    The caches are `out/NAME`. Each is what `cache_images` with its request would write, to the bit, and is gone on with
    by either; an input that one of them has already is not encoded for it again. Several processes may do so at once.

    Args:
        views: requests by the names of their folders, as `views.parse_views` makes them.
        src, model, note, options, watch: as those of `cache_images`.

    Returns:
        A report of all, whose `views` are those of each.

    Raises:
        As `cache_images`, and InputError for an update; before anything is written if one of the views is refused.
    """
    begin = time.perf_counter()
    chosen, out = options or RunOptions(), Path(out)
    if chosen.update:
        raise InputError("an update is of one cache: update each view by itself, its folder as OUT")
    if any(request.dedupe for request in views.values()):
        raise InputError("copies are found in one cache: give dedupe for each view by itself, its folder as OUT")
    source = _Once(as_source(model))
    for name in views:
        check_folder(out / name)
    check_views(out, views)
    inputs, known = _checked(src, out, source, views, chosen)
    with ExitStack() as stack:
        stack.enter_context(_parent(out))
        prepared: list[PreparedRun] = []
        places: list[tuple[CacheFolder, Mutex]] = []
        for name, request in views.items():
            folder = stack.enter_context(opened(out / name))
            mutex = Mutex(folder, note)
            stack.callback(clear, folder, mutex)
            places.append((folder, mutex))
            is_planned = known[name] or planned(os.fspath(src), folder, mutex, source, request, chosen, inputs)
            prepared.append(is_planned)
        _tell_common(prepared, note)
        models = [*source.loaded, model if isinstance(model, FullCapacitor) else None]
        stack.enter_context(kept_together([p.plan for p in prepared], prepared[0].cc, models))
        runs = [
            stack.enter_context(begun(p, *place, chosen.workers, chosen, _named(name, note)))
            for name, p, place in zip(views, prepared, places, strict=True)
        ]
        _check_reuse(dict(zip(views, runs, strict=True)))
        together: ViewsPipeline | None = None
        with accounted(*runs):
            if any(run.todo for run in runs):
                bar = watch or Bar(chosen.progress, chosen.metrics)
                together = _write(runs, source, chosen, note, bar)
        pipelines: Sequence[Pipeline | None] = together.pipelines if together else [None] * len(runs)
        reports = {name: run.report(p) for name, run, p in zip(views, runs, pipelines, strict=True)}
    for report in reports.values():
        report.seconds = time.perf_counter() - begin
        report.meters = None
    total = of_views(reports)
    total.meters = together.measure() if together and together.read else None
    return total


def dry_run_views(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: Model,
    views: Mapping[str, CacheRequest],
    *,
    options: RunOptions | None = None,
) -> dict[str, DryRun]:
    """What `cache_views` with these arguments would do in every view."""
    check_views(Path(out), views)
    source = _Once(as_source(model))
    return {name: dry_run(src, Path(out) / name, source, request, options=options) for name, request in views.items()}


class _Once:
    """A model that is identified and loaded once for all views: the source of it that each is given."""

    def __init__(self, model: ModelSource):
        self._model = model
        self._identities: dict[str | None, ModelIdentity] = {}
        self._loaded: dict[str, Autoencoder] = {}

    @property
    def loaded(self) -> list[Autoencoder]:
        return list(self._loaded.values())

    def identity(self, compute_dtype: str | None = None) -> ModelIdentity:
        if compute_dtype not in self._identities:
            self._identities[compute_dtype] = self._model.identity(compute_dtype)
        return self._identities[compute_dtype]

    def load(self, identity: ModelIdentity) -> Autoencoder:
        if identity.compute_dtype not in self._loaded:
            self._loaded[identity.compute_dtype] = self._model.load(identity)
        return self._loaded[identity.compute_dtype]


def _checked(
    src: str | os.PathLike[str], out: Path, source: ModelSource, views: Mapping[str, CacheRequest], options: RunOptions
) -> tuple[Source, dict[str, PreparedRun | None]]:
    """The inputs, and what has a plan already, after each view was asked whether it can be begun or gone on with.

    Nothing is written yet.
    """
    found: dict[str, PreparedRun | None] = {}
    inputs = open_source(os.fspath(src), out, options.source, options.columns, options.image_column)
    for name, request in views.items():
        with ExitStack() as stack:
            folder = stack.enter_context(CacheFolder(out / name)) if (out / name).exists() else None
            try:
                p = prepare(os.fspath(src), out / name, folder, source, request, options, load=False, source=inputs)
                found[name] = p if folder is not None and folder.stat(PLAN) is not None else None
            except CapacitorError as e:
                e.args = (f"view {name}: {e}",)
                raise
    return inputs, found


@contextmanager
def _parent(out: Path) -> Iterator[None]:
    """A folder that did not exist before is removed again, if nothing has come into it."""
    new = not out.exists()
    try:
        yield
    finally:
        if new:
            with suppress(OSError):
                out.rmdir()


def _named(name: str, note: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: note(f"{name}: {line}")


def _check_reuse(runs: Mapping[str, Begun]) -> None:
    """Refuse what is a matter of one view alone."""
    for name, run in runs.items():
        if run.reuse is not None and run.todo:
            raise CacheError(
                f"view {name} is an update that is to be gone on with: do that alone, by `capacitor-rt cache SRC "
                f"{run.store.folder.path} --update` with its settings, then the views together"
            )


def _tell_common(prepared: Sequence[PreparedRun], note: Callable[[str], None]) -> None:
    """What is to be said of every view is said once."""
    common = [line for line in prepared[0].notes if all(line in p.notes for p in prepared)]
    for line in common:
        note(line)
    for p in prepared:
        p.notes = [line for line in p.notes if line not in common]


def _write(
    runs: Sequence[Begun], source: ModelSource, options: RunOptions, note: Callable[[str], None], watch: Watch
) -> ViewsPipeline | None:
    """Write what is to be done, together with whoever else is at it. None if there was nothing to encode."""
    queues = [TaskQueue(run.store, run.todo) for run in runs]
    queue = SpanQueue(queues, [run.prepared.tasks for run in runs], *options.place())
    spans = iter(queue)
    first = next(spans, None)
    if first is None and not queue.left():
        return None
    total, left = sum(run.prepared.plan.count for run in runs), sum(len(task) for run in runs for task in run.todo)
    workers = max(workers_for(options.workers, run.prepared, run.todo) for run in runs)
    also = [View(run.prepared.plan.policy, run.prepared.plan.buckets) for run in runs[1:]]
    is_deferring = by_device(options.resize, runs[0].prepared.cc)
    meters: Meters | None = None
    watch.begin(total, total - left)
    try:
        # the workers get ready while the model does
        with pool_of(runs[0].prepared, workers, options, is_deferring=is_deferring, also=also) as decoder:
            encoders: list[BatchEncoder] = []
            for run in runs:
                # one resizer, as pictures go up once for all views
                resizer = encoders[0].resizer if encoders else None
                encoders.append(encoder_of(run.prepared, source, note, is_deferring, resizer))
            if encoders[0].on_gpu:
                decoder.pin()
            pipelines = [
                Pipeline(
                    run.store,
                    run.prepared.source,
                    decoder,
                    encoder,
                    give_up=options.give_up,
                    advance=lambda inputs, quarantined: watch.advance(inputs, quarantined, together.measure),
                )
                for run, encoder in zip(runs, encoders, strict=True)
            ]
            together = ViewsPipeline(pipelines, decoder)
            together.costs = next((as_json(run.costs) for run in runs if run.costs), {})
            while True:
                together.run(chain([] if first is None else [first], spans))
                for q, pipeline in zip(queues, pipelines, strict=True):
                    q.given_up |= pipeline.abandoned
                first = None
                while first is None and queue.left():
                    spans = iter(queue)
                    first = next(spans, None)
                    if first is None:
                        time.sleep(POLL_SECONDS)
                if first is None:
                    break
            meters = together.measure()
    finally:
        watch.end(meters)
    return together
