"""`gc`: what no run and no reader needs: what was moved away, what killed runs have left, earlier generations."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

from ..errors import CacheError
from ..extras import require_extra
from .carried import load_carried
from .commits import read_log
from .compaction import FileUse, usage
from .folder import DAMAGED, GENERATIONS, INDEX, LEASES, TASKS, CacheFolder
from .generations import record_name, recorded
from .leases import Leases
from .mutex import Mutex
from .plan import CachePlan, load_plan
from .store import read_index
from .views import no_cache

_STEM = re.compile(r"[0-9a-f]{8}-\d{6,}")
OLD_SECONDS = 600.0
"""A temporary file of no task is of no one once it is so old."""


def litter(
    folder: CacheFolder, plan: CachePlan, living: set[str], *, drop_updates: bool = False, quick: bool = False
) -> list[tuple[str, int]]:
    """Names and bytes of files that no run and no reader needs.

    Args:
        living: stems of the files of tasks that processes are at work on.
        drop_updates: give up updates that are not finished.
        quick: take all files of latents of earlier generations for needed, and read no index.
    """
    others = [other for other in recorded(folder) if other.id != plan.id]
    kept = [o for o in others if _is_at_work(o, living) or (o.number > plan.number and not drop_updates)]
    dropped = [other for other in others if other not in kept]
    found = list(_moved(folder, [record_name(other) for other in others]))
    found += [name for name in folder.temporary() if _is_stale(folder, name, living)]
    needed = {stem for other in kept for stem in _carried(folder, other)}
    if dropped or plan.is_update:
        needed |= set(load_carried(folder, plan)) if quick else _stems_in_use(folder, plan)
    mine = {plan.plan8, *(other.plan8 for other in kept)}
    theirs = {other.plan8 for other in dropped} | {file.plan[:8] for file in load_carried(folder, plan).values()}
    theirs -= mine
    for sub in (INDEX, TASKS):
        for base in folder.names(sub):
            stem = base.partition(".")[0]
            is_needed = sub == TASKS and stem in needed
            if stem.partition("-")[0] in theirs and not is_needed:
                found.append(f"{sub}/{base}")
    for other in dropped:
        # the record last: with it the rest is known for what it is
        found += [other.log_name, other.source_name, *([other.carried_name] if other.is_update else [])]
        found.append(record_name(other))
    sizes = [(name, folder.stat(name)) for name in dict.fromkeys(found)]
    return [(name, info.st_size) for name, info in sizes if info is not None]


def _carried(folder: CacheFolder, plan: CachePlan) -> set[str]:
    """Stems of the files that an update under way may share; of all files if its list is damaged."""
    try:
        return set(load_carried(folder, plan))
    except CacheError:
        return {base.partition(".")[0] for base in folder.names(TASKS)}


def _is_at_work(plan: CachePlan, living: set[str]) -> bool:
    return any(stem.startswith(plan.plan8) for stem in living)


def _moved(folder: CacheFolder, records: list[str]) -> Iterator[str]:
    for sub in (DAMAGED, GENERATIONS):
        yield from (name for base in folder.names(sub) if (name := f"{sub}/{base}") not in records)


def _is_stale(folder: CacheFolder, name: str, living: set[str]) -> bool:
    sub, _, base = name.rpartition("/")
    info = folder.stat(name)
    is_old = info is not None and time.time() - info.st_mtime > OLD_SECONDS
    if not is_old or sub not in (TASKS, INDEX):
        return is_old
    # what is of no task is not ours
    stem = base.partition(".")[0]
    return bool(_STEM.fullmatch(stem)) and stem not in living


def _stems_in_use(folder: CacheFolder, plan: CachePlan) -> set[str]:
    """The files of latents, other than those of its tasks, that a plan's rows lie in or may come to lie in."""
    carried = load_carried(folder, plan)
    commits = read_log(folder, plan).commits
    if len(commits) < plan.task_count or not plan.is_update:
        return set(carried)
    stems: set[str] = set()
    for commit in commits.values():
        stems |= set(read_index(folder, plan, commit)["file"].unique().to_pylist())
    return stems - {None}


def collect(
    root: str | os.PathLike[str], *, dry_run: bool = False, drop_updates: bool = False
) -> list[tuple[str, int]]:
    """Remove what no run and no reader needs; names and bytes.

    Programs that still read an earlier generation need it: end them first.

    Args:
        dry_run: only name it.
        drop_updates: give up updates that are not finished, and remove what they have written.

    Raises:
        CacheError: there is no cache, or one that is damaged.
    """
    for extra in ("pyarrow", "xxhash"):
        require_extra(extra)
    with CacheFolder(root) as folder:
        plan = load_plan(folder)
        if plan is None:
            raise CacheError(no_cache(folder.path))
        if dry_run:
            return litter(folder, plan, living_stems(folder, plan), drop_updates=drop_updates)
        with Mutex(folder) as mutex:
            living = Leases(folder, mutex, plan.plan8).living_stems() if folder.names(LEASES) else set()
            found = litter(folder, plan, living, drop_updates=drop_updates)
            for name, _ in found:
                folder.discard(name)
            for sub in (DAMAGED, GENERATIONS):
                folder.remove_folder(sub)
            if not living:
                mutex.remove()
    return found


def used_in_part(root: str | os.PathLike[str]) -> list[FileUse]:
    """Files of earlier generations that inputs need some rows of, and not all, the least needed first.

    Raises:
        CacheError: there is no cache, or one that is damaged.
    """
    with CacheFolder(root) as folder:
        if (plan := load_plan(folder)) is None:
            raise CacheError(no_cache(folder.path))
        return [use for use in usage(folder, plan) if use.live < 1]


def living_stems(folder: CacheFolder, plan: CachePlan) -> set[str]:
    """The stems of the files of tasks that processes are at work on, by this machine's clock: nothing is written."""
    return Leases(folder, Mutex(folder), plan.plan8).living_stems(touch=False) if folder.names(LEASES) else set()
