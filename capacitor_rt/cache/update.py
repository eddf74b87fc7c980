"""`cache --update`: the plan of a new generation, where the inputs are no longer those of the current one."""

from __future__ import annotations

from typing import Any

from ..errors import CacheError
from .carried import load_carried
from .folder import CacheFolder
from .generations import record, recorded, unfinished
from .model_source import ModelSource
from .mutex import Mutex
from .options import RunOptions
from .plan import PLAN, CachePlan, CacheRequest, code_versions, load_plan
from .plan_changes import check_plan, version_notes
from .prepare import PreparedRun, committed_hashes, planned_listing, prepare, tasks_of
from .reuse import Reuse, Survey, survey
from .sources import Source, load_listing
from .sources.changes import changed_inputs
from .sources.open import open_source
from .sources.stable_labels import with_stable_labels
from .store import repair_hint, strange_plan


def prepare_update(
    src: str,
    folder: CacheFolder,
    mutex: Mutex,
    model_source: ModelSource,
    request: CacheRequest,
    options: RunOptions,
) -> PreparedRun:
    """The plan of an update, a new one or that of one under way; the current one if the inputs are still its own.

    Raises:
        CacheError: other settings, or another model, than those of the current plan.
    """
    current = load_plan(folder)
    assert current is not None
    identity = model_source.identity(current.fields["model"]["compute_dtype"])
    check_plan(current, request, identity, folder)
    source = open_source(
        src,
        folder.path,
        options.source,
        options.columns,
        options.image_column,
        lambda: planned_listing(folder, current),
    )
    source = with_stable_labels(source, current.fields["label_names"])
    rehash = options.rehash
    if is_of(folder, current, source, rehash):
        return prepare(src, folder.path, folder, model_source, request, options, load=False, source=source)
    if why := strange_plan(folder, current):
        raise CacheError(f"{folder.path / PLAN} is not that of the cache ({why}): {repair_hint(folder)}")
    found = _under_way(folder, current, source, rehash)
    if found is None:
        looked = survey(folder, [current, *unfinished(folder, current)])
        with mutex:
            if (now := load_plan(folder)) is None or now.id != current.id:
                raise CacheError(f"{folder.path} was updated by another process meanwhile: run the same command again")
            # another may have planned it meanwhile
            found = _under_way(folder, current, source, rehash)
            if found is None:
                found = _planned(folder, current, source, looked)
    prepared = PreparedRun(found, tasks_of(found, source), source, cc=identity.cc, rehash=rehash)
    prepared.notes += source.notes + version_notes(current)
    return prepared


def is_of(folder: CacheFolder, plan: CachePlan, source: Source, rehash: bool) -> bool:
    """Whether the inputs, their bytes and what is kept beside them are those of a plan, as far as it is committed."""
    fields = {k: v for k, v in plan.fields["source"].items() if k != "tasks"}
    if fields != source.fields() or plan.columns != source.columns.fields():
        return False
    if plan.fields["label_names"] != source.columns.label_names:
        return False
    try:
        listing = load_listing(folder, plan.source_name, fields["sha256"])
    except CacheError:
        return True

    def known(ordinals: list[int]) -> dict[int, bytes]:
        return committed_hashes(folder, plan, ordinals)

    return not changed_inputs(listing, source, known, rehash=rehash)


def _under_way(folder: CacheFolder, current: CachePlan, source: Source, rehash: bool) -> CachePlan | None:
    """The latest update of the current plan to these inputs that was begun."""
    plans = [p for p in unfinished(folder, current) if p.fields["generation"]["of"] == current.id]
    return next((plan for plan in reversed(plans) if is_of(folder, plan, source, rehash)), None)


def _planned(folder: CacheFolder, current: CachePlan, source: Source, looked: Survey) -> CachePlan:
    """Write down what the update is to be. Under the mutex."""
    carried = looked.carried([current, *unfinished(folder, current)])
    number = 1 + max([current.number, *(plan.number for plan in recorded(folder))])
    fields: dict[str, Any] = {
        **current.fields,
        "source": {**source.fields(), "tasks": len(source.listing.tasks(current.task_inputs))},
        "columns": source.columns.fields(),
        "label_names": source.columns.label_names,
        "code": code_versions(),
        "generation": {"number": number, "of": current.id, "carried": carried.digest()},
    }
    plan = CachePlan(fields)
    # the plan comes last: without it none of the others counts
    source.listing.save(folder, plan.source_name)
    carried.save(folder, plan)
    record(folder, plan)
    return plan


def reuse_for(folder: CacheFolder, plan: CachePlan, source: Source, rehash: bool) -> tuple[Reuse, list[str]]:
    """The rows that a generation need not encode again, and what is to be said of those that it must.

    Args:
        rehash: trust no time: read every input.
    """
    current = load_plan(folder)
    plans = {p.id: p for p in ([current] if current else []) + list(reversed(recorded(folder)))}
    looked = survey(folder, list(plans.values()))
    reuse = Reuse(looked, load_carried(folder, plan), len(source.listing))
    if not rehash:
        for other in plans.values():
            try:
                planned = load_listing(folder, other.source_name, other.fields["source"]["sha256"])
            except CacheError:
                continue
            info = folder.stat(other.source_name)
            if info is not None:
                reuse.by_time(other, planned, info.st_mtime_ns, source.listing)
    return reuse, looked.notes
