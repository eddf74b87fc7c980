"""`cache --update`: the plan of a new generation, where the inputs are no longer those of the current one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CacheError
from .carried import Carried, load_carried
from .commits import read_log
from .dedupe import Search, distinct, restricted
from .folder import CacheFolder
from .generations import record, recorded, unfinished
from .model_source import ModelIdentity, ModelSource
from .mutex import Mutex
from .options import RunOptions
from .plan import PLAN, CachePlan, Task, code_versions, load_plan, new_plan
from .plan_changes import check_plan, version_notes
from .prepare import (
    PreparedRun,
    check_decoder,
    committed_hashes,
    planned_listing,
    prepare,
    tasks_of,
    without_copies,
)
from .request import CacheRequest
from .resizing import by_device
from .reuse import Reuse, unchanged
from .sources import Listing, Source, load_listing
from .sources.changes import changed_inputs
from .sources.open import open_source
from .sources.stable_labels import with_stable_labels
from .stamps import Stamps
from .store import repair_hint, strange_plan
from .survey import Survey, survey


def prepare_update(
    src: str,
    folder: CacheFolder,
    mutex: Mutex,
    model_source: ModelSource,
    request: CacheRequest,
    options: RunOptions,
    after: PreparedRun | None = None,
    inputs: Source | None = None,
    search: Search = distinct,
) -> PreparedRun:
    """The plan of an update, a new one or that of one under way; the current one if the inputs are still its own.

    Args:
        after: the interim run that was just finished.
        inputs: the source, where it was opened already.
        search: finds inputs of equal bytes.

    Raises:
        CacheError: other settings, or another model, than those of the current plan.
    """
    current, identity, source = _found(src, folder, model_source, request, options, after.whole if after else inputs)
    rehash, notes = options.rehash, source.notes + version_notes(current)
    if is_of(folder, current, source, rehash):
        return prepare(
            src, folder.path, folder, model_source, request, options, load=False, source=source, is_checked=True
        )
    part = _interim(folder, current, source)
    if part is not None and not _is_complete(folder, current):
        prepared = prepare(
            src, folder.path, folder, model_source, request, options, load=False, source=part, is_checked=True
        )
        prepared.whole = source
        return prepared
    if why := strange_plan(folder, current):
        raise CacheError(f"{folder.path / PLAN} is not that of the cache ({why}): {repair_hint(folder)}")
    found = _under_way(folder, current, source, rehash)
    if found is None:
        looked = survey(folder, [current, *unfinished(folder, current)], has_rows=False)
        part, distinct_of = source, None
        if request.dedupe and after is None and part is not None:
            part, distinct_of = without_copies(source, _unseen(folder, current, source), notes, search)
        with mutex:
            if (now := load_plan(folder)) is None or now.id != current.id:
                raise CacheError(f"{folder.path} was updated by another process meanwhile: run the same command again")
            # another may have planned it meanwhile
            found = _under_way(folder, current, source, rehash)
            if found is None:
                with mutex.interruptible():
                    found = (_planned(folder, current, part, looked, distinct_of), part)
    plan, part = found
    restore = not _is_listed(folder, plan)
    prepared = PreparedRun(plan, tasks_of(plan, part), part, None, notes, restore, identity.cc, rehash=rehash)
    prepared.whole, prepared.just_listed = source, after.plan if after else None
    return prepared


def _found(
    src: str,
    folder: CacheFolder,
    model_source: ModelSource,
    request: CacheRequest,
    options: RunOptions,
    source: Source | None,
) -> tuple[CachePlan, ModelIdentity, Source]:
    """The current plan, which the settings have to be those of, the model, and the inputs as they are now."""
    current = load_plan(folder)
    assert current is not None
    identity = model_source.identity(current.fields["model"]["compute_dtype"])
    by_device(options.resize, identity.cc, request.decode)
    check_plan(current, request, identity, folder)
    check_decoder(current, identity)
    if source is None:
        source = open_source(
            src,
            folder.path,
            options.source,
            options.columns,
            options.image_column,
            lambda: planned_listing(folder, current),
        )
    return current, identity, with_stable_labels(source, current.fields["label_names"])


@dataclass
class Preview:
    """An update as it would be planned now.

    Attributes:
        todo: tasks of it that no run has done yet.
        reuse: the rows that need not be encoded again.
        before: inputs of the current plan, None where their list is damaged.
    """

    plan: CachePlan
    source: Source
    todo: list[Task]
    reuse: Reuse
    before: Listing | None
    notes: list[str]


def preview_update(
    src: str, folder: CacheFolder, model_source: ModelSource, request: CacheRequest, options: RunOptions
) -> Preview | None:
    """What `prepare_update` would plan, of which nothing is written; None if the inputs are those of the current plan.

    Raises:
        As `prepare_update`.
    """
    current, _, source = _found(src, folder, model_source, request, options, None)
    if is_of(folder, current, source, options.rehash):
        return None
    if why := strange_plan(folder, current):
        raise CacheError(f"{folder.path / PLAN} is not that of the cache ({why}): {repair_hint(folder)}")
    looked = survey(folder, [current, *unfinished(folder, current)], stamps=Stamps(folder, is_kept=False))
    plan, carried = _made(folder, current, source, looked, None)
    reuse = Reuse(looked, carried, len(source.listing))
    if not options.rehash:
        _by_time(reuse, folder, [current, *reversed(unfinished(folder, current))], source.listing, None)
    todo, found = tasks_of(plan, source), _under_way(folder, current, source, options.rehash)
    if found is not None and not found[0].is_interim:
        done = read_log(folder, found[0]).commits
        plan, todo = found[0], [task for task in todo if task.number not in done]
    before = planned_listing(folder, current)
    return Preview(plan, source, todo, reuse, before, source.notes + version_notes(current) + looked.notes)


def _interim(folder: CacheFolder, plan: CachePlan, source: Source) -> Source | None:
    """Of a source, the inputs of an interim plan for it, none of which has changed; else None."""
    part = restricted(folder, plan, source) if plan.is_interim else None
    return part if part is not None and is_of(folder, plan, part, False) else None


def _is_listed(folder: CacheFolder, plan: CachePlan) -> bool:
    """Whether the list of a plan's inputs is there and sound; it follows from the inputs, whose hash is the plan's."""
    try:
        load_listing(folder, plan.source_name, plan.fields["source"]["sha256"], plan.count)
    except CacheError:
        return False
    return True


def _is_complete(folder: CacheFolder, plan: CachePlan) -> bool:
    return len(read_log(folder, plan).commits) >= plan.task_count


def _unseen(folder: CacheFolder, current: CachePlan, source: Source) -> np.ndarray:
    """Ordinals of the inputs that are not known to be in the current plan already."""
    try:
        planned = load_listing(folder, current.source_name, current.fields["source"]["sha256"], current.count)
    except CacheError:
        return np.arange(len(source.listing))
    info = folder.stat(current.source_name)
    return np.flatnonzero(unchanged(planned, info.st_mtime_ns if info else 0, source.listing) < 0)


def is_of(folder: CacheFolder, plan: CachePlan, source: Source, rehash: bool) -> bool:
    """Whether the inputs, their bytes and what is kept beside them are those of a plan, as far as it is committed."""
    fields = {k: v for k, v in plan.fields["source"].items() if k not in ("tasks", "distinct_of")}
    if fields != source.fields() or plan.columns != source.columns.fields():
        return False
    if plan.fields["label_names"] != source.columns.label_names:
        return False
    try:
        listing = load_listing(folder, plan.source_name, fields["sha256"], fields["count"])
    except CacheError:
        return True

    def known(ordinals: list[int]) -> dict[int, bytes]:
        return committed_hashes(folder, plan, ordinals)

    return not changed_inputs(listing, source, known, rehash=rehash)


def _under_way(
    folder: CacheFolder, current: CachePlan, source: Source, rehash: bool
) -> tuple[CachePlan, Source] | None:
    """The latest update of the current plan to these inputs that was begun, and its inputs."""
    plans = [p for p in reversed(unfinished(folder, current)) if p.fields["generation"]["of"] == current.id]
    plans = [plan for plan in plans if _has_carried(folder, plan) and _settings(plan) == _settings(current)]
    for plan in plans:
        if not plan.is_interim and is_of(folder, plan, source, rehash):
            return plan, source
    for plan in plans:
        if not _is_complete(folder, plan) and (part := _interim(folder, plan, source)) is not None:
            return plan, part
    return None


def _settings(plan: CachePlan) -> dict[str, Any]:
    """What an update has of the plan that it is of, also outside the identity: names that files are written under."""
    own = ("source", "columns", "label_names", "code", "generation")
    return {name: value for name, value in plan.fields.items() if name not in own}


def _has_carried(folder: CacheFolder, plan: CachePlan) -> bool:
    """Whether the list of its carried files is sound."""
    try:
        load_carried(folder, plan)
    except CacheError:
        return False
    return True


def _planned(
    folder: CacheFolder, current: CachePlan, source: Source, looked: Survey, distinct_of: dict[str, Any] | None
) -> CachePlan:
    """Write down what the update is to be. Under the mutex."""
    plan, carried = _made(folder, current, source, looked, distinct_of)
    # the plan comes last: without it none of the others counts
    source.listing.save(folder, plan.source_name)
    carried.save(folder, plan)
    record(folder, plan)
    return plan


def _made(
    folder: CacheFolder, current: CachePlan, source: Source, looked: Survey, distinct_of: dict[str, Any] | None
) -> tuple[CachePlan, Carried]:
    """The plan of an update, and the files that its rows may lie in."""
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
    if distinct_of:
        fields["source"]["distinct_of"] = distinct_of
    return new_plan(fields), carried


def reuse_for(folder: CacheFolder, prepared: PreparedRun) -> tuple[Reuse, list[str]]:
    """The rows that a generation need not encode again, and what is to be said of those that it must."""
    plan, now = prepared.plan, prepared.source.listing
    current = load_plan(folder)
    others = [*([current] if current else []), *reversed(recorded(folder))]
    first = next((p.number for p in others if p.id == plan.fields["generation"]["of"]), plan.number)
    plans = {p.id: p for p in others if p.number >= first}
    carried = load_carried(folder, plan)
    # of earlier ones what they alone know
    earlier = [other for other in others if other.id not in plans]
    looked = survey(folder, list(plans.values()), earlier=earlier, wanted=carried)
    reuse = Reuse(looked, carried, len(now))
    if not prepared.rehash:
        _by_time(reuse, folder, plans.values(), now, prepared.just_listed)
    return reuse, looked.notes


def _by_time(
    reuse: Reuse, folder: CacheFolder, plans: Iterable[CachePlan], now: Listing, just_listed: CachePlan | None
) -> None:
    """Find the rows of inputs that the lists of these plans have as they are now."""
    for other in plans:
        try:
            planned = load_listing(folder, other.source_name, other.fields["source"]["sha256"], other.count)
        except CacheError:
            continue
        info = folder.stat(other.source_name)
        if info is not None:
            is_same = just_listed is not None and just_listed.id == other.id
            reuse.by_time(other, planned, None if is_same else info.st_mtime_ns, now)
