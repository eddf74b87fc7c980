"""A run that fills the caches of several views from one decode of each image."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ..errors import CapacitorError
from ..images.load import View
from ..model import FullCapacitor
from ..reference import Autoencoder
from .begin import Begun, accounted, begun, pool_of, unknown_inputs, workers_for
from .decoding import Helper
from .dedupe import searched_once
from .dtype_costs import as_json
from .encoder import BatchEncoder, IdleEncoder
from .folder import CacheFolder
from .kept_configs import kept_together
from .leases import clear
from .meters import Meters
from .model_source import ModelIdentity, ModelSource
from .mutex import Mutex
from .options import RunOptions
from .outlook import dry_run
from .pipeline import Pipeline
from .plan import PLAN, load_plan
from .plan_changes import check_plan
from .prepare import PreparedRun, as_source, check_folder, planned_listing, prepare
from .report import DryRun, Report, after, of_views
from .request import CacheRequest
from .resizing import Resizer, by_device
from .run import POLL_SECONDS, encoder_of, opened, planned
from .sources import Listing, Source
from .sources.open import open_source
from .span_queue import SpanQueue
from .task_queue import TaskQueue
from .update import prepare_update
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
    helper: Helper | None = None,
) -> Report:
    """Encode every image of `src` into a cache per view, each image read and decoded once, or go on with that.

    The caches are `out/NAME`. Each is what `cache_images` with its request would write, to the bit, and is gone on with
    by either; an input that one of them has already is not encoded for it again. Several processes may do so at once.

    Args:
        views: requests by the names of their folders, as `views.parse_views` makes them.
        src, model, note, options, watch, helper: as those of `cache_images`.

    Returns:
        A report of all, whose `views` are those of each.

    With `options.update` every view gets a generation of its own, which is made current when it is done, one view after
    the other: each is whole at every moment, and after an interruption the same call brings all to the same inputs.

    Raises:
        As `cache_images`; before anything is written if one of the views is refused.
    """
    begin = time.perf_counter()
    chosen, out = options or RunOptions(), Path(out)
    source = _Once(as_source(model))
    for name in views:
        check_folder(out / name)
    check_views(out, views)
    inputs, known = _checked(src, out, source, views, chosen)
    with ExitStack() as stack:
        if helper is not None:
            stack.callback(helper.end)
        stack.enter_context(_parent(out))
        search = searched_once()
        every: list[_One] = []
        for name, request in views.items():
            folder = stack.enter_context(opened(out / name))
            mutex = Mutex(folder, note)
            stack.callback(clear, folder, mutex)
            is_planned = known[name] or planned(os.fspath(src), folder, mutex, source, request, chosen, inputs, search)
            every.append(_One(name, request, folder, mutex, is_planned))
        _tell_common([one.prepared for one in every], note)
        first = next((one for one in every if one.prepared.plan.is_interim), every[0])
        # of those that run first the first: theirs is the pool
        first.prepared.helper = helper
        models = [*source.loaded, model if isinstance(model, FullCapacitor) else None]
        plans = [one.prepared.plan for one in every]
        stack.enter_context(kept_together(plans, every[0].prepared.cc, models))
        meters: list[Meters] = []
        bar = watch or Bar(chosen.progress, chosen.metrics)
        firsts = _run_all([one for one in every if one.prepared.plan.is_interim], source, chosen, note, bar, meters)
        for one in every:
            if one.name in firsts and not firsts[one.name].unfinished:
                one.prepared = prepare_update(
                    os.fspath(src), one.folder, one.mutex, source, one.request, chosen, one.prepared
                )
                one.prepared.notes.clear()
        left = [one for one in every if one.name not in firsts or not firsts[one.name].unfinished]
        last = _run_all(left, source, chosen, note, bar, meters)
    reports = {}
    for name in views:
        parts = [found[name] for found in (firsts, last) if name in found]
        reports[name] = after(*parts) if len(parts) > 1 else parts[0]
        reports[name].seconds = time.perf_counter() - begin
        reports[name].meters = None
    total = of_views(reports)
    total.meters = Meters.joined(meters) if meters else None
    return total


@dataclass
class _One:
    """A view and its cache."""

    name: str
    request: CacheRequest
    folder: CacheFolder
    mutex: Mutex
    prepared: PreparedRun


def _run_all(
    every: Sequence[_One],
    source: ModelSource,
    options: RunOptions,
    note: Callable[[str], None],
    watch: Watch,
    meters: list[Meters],
) -> dict[str, Report]:
    """Do what is planned of every view, those of the same inputs together; the reports by name."""
    groups: dict[str, list[_One]] = {}
    for one in every:
        groups.setdefault(one.prepared.plan.fields["source"]["sha256"], []).append(one)
    reports: dict[str, Report] = {}
    for group in groups.values():
        reports |= _run(group, source, options, note, watch, meters)
    return reports


def _run(
    group: Sequence[_One],
    source: ModelSource,
    options: RunOptions,
    note: Callable[[str], None],
    watch: Watch,
    meters: list[Meters],
) -> dict[str, Report]:
    with ExitStack() as stack:
        runs = [
            stack.enter_context(
                begun(one.prepared, one.folder, one.mutex, options.workers, options, _named(one.name, note))
            )
            for one in group
        ]
        together: ViewsPipeline | None = None
        with accounted(*runs):
            if any(run.todo for run in runs):
                together = _write(runs, source, options, note, watch)
        pipelines: Sequence[Pipeline | None] = together.pipelines if together else [None] * len(runs)
        found = [run.report(pipeline) for run, pipeline in zip(runs, pipelines, strict=True)]
    if together and any(report.meters for report in found):
        meters.append(together.measure())
    return {one.name: report for one, report in zip(group, found, strict=True)}


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

    Nothing is written yet. Of an update no view is prepared, as that is to be written.
    """
    found: dict[str, PreparedRun | None] = {}
    known = lambda: _listed(out, views)  # noqa: E731
    inputs = open_source(os.fspath(src), out, options.source, options.columns, options.image_column, known)
    for name, request in views.items():
        with ExitStack() as stack:
            folder = stack.enter_context(CacheFolder(out / name)) if (out / name).exists() else None
            try:
                plan = load_plan(folder) if folder is not None else None
                found[name] = None
                if folder is not None and plan is not None and options.update:
                    check_plan(plan, request, source.identity(plan.fields["model"]["compute_dtype"]), folder)
                    continue
                p = prepare(os.fspath(src), out / name, folder, source, request, options, load=False, source=inputs)
                found[name] = p if plan is not None else None
            except CapacitorError as e:
                e.args = (f"view {name}: {e}",)
                raise
    return inputs, found


def _listed(out: Path, views: Iterable[str]) -> Listing | None:
    """The list of inputs of one of the views, if there is a sound one."""
    for name in views:
        if (out / name / PLAN).is_file():
            with suppress(CapacitorError), CacheFolder(out / name) as folder:
                if (listing := planned_listing(folder, load_plan(folder))) is not None:
                    return listing
    return None


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
    """Write what is to be done, together with other processes at work on it. None if there was nothing to encode."""
    queues = [TaskQueue(run.store, run.todo) for run in runs]
    queue = SpanQueue(queues, [run.prepared.tasks for run in runs], *options.place())
    spans = iter(queue)
    first = next(spans, None)
    if first is None and not queue.left():
        return None
    total, left = sum(run.prepared.plan.count for run in runs), sum(len(task) for run in runs for task in run.todo)
    are_idle = [not run.todo or unknown_inputs(run.reuse, run.todo) == 0 for run in runs]
    of_work = [run for run, is_idle in zip(runs, are_idle, strict=True) if not is_idle]
    workers = max((workers_for(options.workers, run.prepared, run.todo) for run in of_work), default=0)
    also = [View(run.prepared.plan.policy, run.prepared.plan.buckets) for run in runs[1:]]
    reuse = [run.reuse for run in runs]
    is_deferring = bool(of_work) and by_device(options.resize, runs[0].prepared.cc, runs[0].prepared.plan.policy.decode)
    meters: Meters | None = None
    watch.begin(total, total - left)
    try:
        # the workers get ready while the model does
        with pool_of(runs[0].prepared, workers, options, reuse, is_deferring=is_deferring, also=also) as decoder:
            encoders = _encoders(runs, are_idle, source, note, is_deferring, options)
            if on_gpu := [encoder.model.device for encoder in encoders if encoder.on_gpu]:
                decoder.pin(on_gpu[0])
            pipelines = [
                Pipeline(
                    run.store,
                    run.prepared.source,
                    decoder,
                    encoder,
                    give_up=options.give_up,
                    reuse=run.reuse,
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


def _encoders(
    runs: Sequence[Begun],
    are_idle: Sequence[bool],
    source: ModelSource,
    note: Callable[[str], None],
    is_deferring: bool,
    options: RunOptions,
) -> list[BatchEncoder]:
    encoders: list[BatchEncoder] = []
    resizer: Resizer | None = None
    for run, is_idle in zip(runs, are_idle, strict=True):
        encoder = (
            IdleEncoder()
            if is_idle
            else encoder_of(
                run.prepared, source, note, is_deferring, resizer, options.pixel_budget, options.image_timeout
            )
        )
        # one for all, as pictures go up once
        resizer = resizer or encoder.resizer
        encoders.append(encoder)
    return encoders
