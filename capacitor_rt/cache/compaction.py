"""`gc --compact`: a generation of the same inputs, into whose files rows are copied that lie in hardly needed ones.

It is an update that encodes nothing: its plan lies in `generations/` until every task is committed, and becomes current
by one rename. Whenever it ends early the cache is what it was, and the same command goes on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..errors import CacheError, InputError
from ..extras import require_extra
from ..printable import counted
from .accounts import account
from .carried import Carried, CarriedFile, load_carried
from .commits import read_log
from .folder import LEASES, CacheFolder
from .generations import record, recorded, unfinished
from .index import is_ok, is_own
from .latent_files import read_rows, row_hashes
from .leases import Leases, clear
from .mutex import Mutex
from .plan import CachePlan, load_plan, new_plan, plan_tasks
from .sources import load_listing
from .store import SharedRows, TaskData, TaskStore, read_index, repair_hint
from .survey import Survey, survey
from .task_queue import TaskQueue, remove_stale
from .views import no_cache

MIN_LIVE = 0.5
"""Of the rows of a file, those that have to be needed for it to stay as it is."""
_MOVED = ("row", "row_hash", "file")


class FileUse(NamedTuple):
    """A file of latents that rows of the current generation lie in: its rows, and the inputs that need one of them."""

    name: str
    rows: int
    needed: int
    nbytes: int

    @property
    def live(self) -> float:
        """The share of the rows that is needed: more than 1 where inputs share one."""
        return self.needed / max(self.rows, 1)


def usage(folder: CacheFolder, plan: CachePlan) -> list[FileUse]:
    """How much of the files of earlier generations a plan needs, the least needed first.

    Raises:
        CacheError: an index or the list of these files is damaged.
    """
    needed: Counter[str] = Counter()
    if not plan.is_update:
        return []
    for commit in read_log(folder, plan).commits.values():
        table = read_index(folder, plan, commit)
        for count in table["file"].drop_null().value_counts().to_pylist():
            needed[count["values"]] += count["counts"]
    uses = [
        FileUse(file.name, sum(file.counts.values()), needed[stem], file.data_bytes)
        for stem, file in load_carried(folder, plan).items()
        if needed[stem]
    ]
    return sorted(uses, key=lambda use: (use.live, use.name))


def compact(
    root: str | os.PathLike[str], min_live: float = MIN_LIVE, note: Callable[[str], None] = lambda line: None
) -> int:
    """Copy the rows of files of which less than `min_live` is needed, and make that the current generation.

    The files stay until `garbage.collect` is called, and whoever reads the generation before goes on with it.

    Returns:
        How many files are no longer needed; 0 where there was nothing to do.

    Raises:
        InputError: `min_live` is no share.
        CacheError: a run or an update is under way, the cache is not finished, or something is damaged.
    """
    if not 0 < min_live <= 1:
        raise InputError(f"min_live {min_live} is no share: give more than 0, and 1 at most")
    for extra in ("pyarrow", "xxhash"):
        require_extra(extra)
    with CacheFolder(root) as folder:
        current = load_plan(folder)
        if current is None:
            raise CacheError(no_cache(folder.path))
        mutex = Mutex(folder, note)
        try:
            if all(use.live >= min_live for use in usage(folder, current)):
                _sweep(folder, mutex, current)
                return 0
            return _compact(folder, mutex, current, min_live, note)
        finally:
            clear(folder, mutex)


def _sweep(folder: CacheFolder, mutex: Mutex, current: CachePlan) -> None:
    """Remove what one has left that was killed when all was done."""
    if folder.names(LEASES) or any(folder.temporary()):
        with Leases(folder, mutex, current.plan8) as leases, mutex:
            remove_stale(folder, leases)


def _compact(
    folder: CacheFolder, mutex: Mutex, current: CachePlan, min_live: float, note: Callable[[str], None]
) -> int:
    _check(folder, mutex, current)
    looked = survey(folder, [current])
    if looked.notes:
        raise CacheError(f"{folder.path} is damaged: {repair_hint(folder)}", looked.notes[:5])
    kept, left = _kept(looked, min_live)
    plan = _planned(folder, mutex, current, kept)
    note(f"{counted(len(left), 'file')} of which less than {min_live:.0%} is needed: their rows are copied")
    with Leases(folder, mutex, plan.plan8) as leases:
        _write(folder, mutex, leases, current, plan, left, note)
    return len(left)


def _check(folder: CacheFolder, mutex: Mutex, current: CachePlan) -> None:
    """Refuse a cache that something else is at work on."""
    with mutex:
        living = Leases(folder, mutex, current.plan8).living_stems() if folder.names(LEASES) else set()
    if living:
        raise CacheError(f"{folder.path} is being written: wait for the run to end")
    if current.is_interim or len(read_log(folder, current).commits) < current.task_count:
        raise CacheError(f"{folder.path} is not finished: run the cache command again first")


def _kept(looked: Survey, min_live: float) -> tuple[Carried, Carried]:
    """The files that rows may go on to lie in, and those that they are copied from."""
    stems, ok = looked.stems(), looked.stem >= 0
    needed = dict(zip(stems, np.bincount(looked.stem[ok], minlength=len(stems)).tolist(), strict=True))
    used = [file for stem, file in looked.files.items() if needed[stem]]
    is_kept = {file.stem: needed[file.stem] >= min_live * sum(file.counts.values()) for file in used}
    return Carried(f for f in used if is_kept[f.stem]), Carried(f for f in used if not is_kept[f.stem])


def _planned(folder: CacheFolder, mutex: Mutex, current: CachePlan, kept: Carried) -> CachePlan:
    """The plan of the generation, written down unless it is there already."""
    others = unfinished(folder, current)
    with mutex:
        for number in {*(other.number for other in others), 1 + max([current.number, *_numbers(folder)])}:
            generation = {"number": number, "of": current.id, "carried": kept.digest()}
            plan = new_plan({**current.fields, "generation": generation})
            if any(other.id == plan.id for other in others):
                return plan
        if others:
            raise CacheError(
                f"an update of {folder.path} is under way: finish it by its command, or give it up by "
                f"`capacitor-rt gc --drop-updates {folder.path}`"
            )
        load_listing(folder, current.source_name, current.fields["source"]["sha256"], current.count).save(
            folder, plan.source_name
        )
        kept.save(folder, plan)
        # the plan comes last: without it none of the others counts
        record(folder, plan)
    return plan


def _numbers(folder: CacheFolder) -> list[int]:
    return [plan.number for plan in recorded(folder)]


def _write(
    folder: CacheFolder,
    mutex: Mutex,
    leases: Leases,
    current: CachePlan,
    plan: CachePlan,
    left: Carried,
    note: Callable[[str], None],
) -> None:
    listing = load_listing(folder, plan.source_name, plan.fields["source"]["sha256"], plan.count)
    store = TaskStore(folder, plan, mutex, leases, listing)
    store.is_draft = True
    with mutex:
        remove_stale(folder, leases)
    commits = read_log(folder, current).commits
    tasks = plan_tasks(plan, listing.tasks(plan.task_inputs))
    # what one that ended early has left
    for line in store.settle(tasks):
        note(line)
    for task in TaskQueue(store, tasks):
        table = read_index(folder, current, commits[task.number])
        store.write(task, _copied(folder, plan, table, current.stem(task.number), left))
        with mutex:
            leases.release(task.number)
    # what others may have written for this plan meanwhile, or damage: the old one stays then
    for number, commit in sorted(store.commits.items()):
        if (why := _difference(folder, current, plan, commits[number], commit)) is not None:
            raise CacheError(
                f"{folder.path / plan.index_name(number)} differs from that of the generation before ({why}): give "
                f"this one up by `capacitor-rt gc --drop-updates {folder.path}`"
            )
    if len(store.commits) < len(tasks):
        raise CacheError(f"{folder.path} is being written: wait for the run to end")
    account(store, len(tasks))


def _copied(folder: CacheFolder, plan: CachePlan, table: Any, own: str, left: Carried) -> TaskData:
    """What a task holds, by the index that it had: rows of files that are left are in it."""
    ok = is_ok(table)
    stems = np.full(len(table), None, object)
    stems[ok] = own
    if "file" in table.column_names:
        named = ok & ~is_own(table)
        stems[named] = np.array(table["file"].to_pylist(), object)[named]
    is_moved = np.array([stem in left for stem in stems.tolist()], bool)
    shared = {name: table[name].to_pylist() if name != "file" else stems.tolist() for name in _MOVED}
    for values in shared.values():
        for at in np.flatnonzero(is_moved).tolist():
            values[at] = None
    bucket, row = (table[name].fill_null(-1).to_numpy() for name in ("bucket", "row"))
    moved = np.flatnonzero(is_moved)
    pieces: dict[tuple[int, str], list[Tensor]] = {}
    for number in np.unique(bucket[moved]).tolist():
        at = moved[bucket[moved] == number]
        places = [(stems[i], int(row[i])) for i in at.tolist()]
        hashes: list[bytes] = []
        for stem, start, count in _runs(places):
            parts = _read(folder, left[stem], plan, number, start, count)
            hashes += row_hashes(parts)
            for part, tensor in zip(plan.parts, parts, strict=True):
                pieces.setdefault((number, part.name), []).append(tensor)
        if hashes != table.take(at)["row_hash"].to_pylist():
            raise CacheError(f"{folder.path} is damaged: rows do not match their hashes: {repair_hint(folder)}")
    columns = {name: table[name] for name in table.column_names if name not in _MOVED}
    return TaskData(columns, bucket[moved].astype(np.int64), moved, pieces, SharedRows(ok & ~is_moved, shared))


def _runs(places: Iterable[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Files, with the begin and the length of rows that follow each other."""
    numbered = enumerate(places)
    groups = [[place for _, place in group] for _, group in groupby(numbered, lambda n: (n[1][0], n[1][1] - n[0]))]
    return [(group[0][0], group[0][1], len(group)) for group in groups]


def _read(folder: CacheFolder, file: CarriedFile, plan: CachePlan, bucket: int, start: int, count: int) -> list[Tensor]:
    tensors = file.layout(plan).tensors
    with folder.open(file.name) as opened:
        what = folder.path / file.name
        return [read_rows(opened.fileno(), tensors[bucket, p.name], start, count, what) for p in plan.parts]


def _difference(folder: CacheFolder, old: CachePlan, new: CachePlan, before: Any, after: Any) -> str | None:
    """The first column in which the rows of a task are others than before; None if they are the same ones."""
    was, now = read_index(folder, old, before), read_index(folder, new, after)
    for name in was.column_names:
        if name not in ("row", "file") and not was[name].equals(now[name]):
            return name
    return None
