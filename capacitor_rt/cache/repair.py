"""`verify --repair`: what is damaged is moved to `damaged/`, so that the next run makes it anew and nothing else."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress

from ..errors import CacheError
from .carried import load_carried
from .carried_repair import restore_carried
from .commits import COMMITS, Commit, read_log, read_log_named, rewrite_log
from .folder import INDEX, TASKS, CacheFolder
from .generations import damaged_records, record, recorded
from .index import plan_in_index
from .latent_files import index_hash_in_header
from .leases import Leases
from .mutex import Mutex
from .parquet_files import MOST_BYTES
from .plan import PLAN, CachePlan, load_plan, parse_plan, plan_tasks
from .quarantine import QUARANTINE, write_quarantine
from .sources import load_listing
from .store import TaskStore, strange_plan
from .verify import Verification, verify


def repair(root: str | os.PathLike[str], found: Verification) -> list[str]:
    """Make a cache that `verify` found damaged one that a run can go on with.

    The plan is restored from an index that holds it and that the log or its latents vouch for, the list of carried
    files of an update from these files. Damaged lines of the log are dropped. The files of damaged tasks, and of tasks
    without a line whose files do not fit each other, are moved to `damaged/`. Nothing is deleted.

    Args:
        found: what `verify` has just said of it.

    Returns:
        What was done, one line each.

    Raises:
        CacheError: another process is at work on it; no sound copy of the plan is left, or too little to tell what the
            list of carried files was.
    """
    with CacheFolder(root) as folder, Mutex(folder) as mutex, mutex.interruptible():
        done: list[str] = []
        _records(folder, done)
        with suppress(CacheError):
            # of the plan that is there, which may not be the right one
            _carried_list(folder, done)
        plan = _plan(folder, done)
        _carried_list(folder, done)
        leases = Leases(folder, mutex, plan.plan8)
        living = leases.living()
        if living:
            raise CacheError(
                f"{root} is being written by {next(iter(living.values()))}: wait for it to end, and run this again"
            )
        if found.bad_plan or done:
            # what depends on the plan could not be checked before
            found = verify(root)
        _set_aside(folder, plan, found.damaged, done)
        for name in found.damaged_files:
            if (moved := folder.set_aside(name)) is not None:
                done.append(f"{name}: moved to {moved}")
        log = read_log(folder, plan) if _is_readable(folder, plan.log_name, plan.task_count) else None
        commits = dict(log.commits) if log else {}
        sound = {n: c for n, c in commits.items() if n not in found.damaged and n < plan.task_count}
        if found.bad_log or sound.keys() != commits.keys():
            rewrite_log(folder, plan.log_name, sound)
            done.append(f"{plan.log_name}: {len(sound)} sound lines kept")
        _uncommitted(folder, plan, mutex, leases, done)
        with suppress(OSError):
            if (info := folder.stat(QUARANTINE)) is not None and not stat.S_ISREG(info.st_mode):
                folder.set_aside(QUARANTINE)
            write_quarantine(folder, plan, read_log(folder, plan).commits)
        mutex.remove()
    return done


def _plan(folder: CacheFolder, done: list[str]) -> CachePlan:
    try:
        plan = load_plan(folder)
    except CacheError:
        plan = None
    with suppress(CacheError):
        if plan is not None:
            # a log that cannot be read tells nothing of the plan
            _is_readable(folder, plan.log_name, plan.task_count)
            if strange_plan(folder, plan) is None:
                return plan
    plan = _plan_of_an_index(folder)
    folder.set_aside(PLAN)
    plan.save(folder)
    done.append(f"{PLAN}: restored from the index")
    return plan


def _carried_list(folder: CacheFolder, done: list[str]) -> None:
    """Restore the list of carried files of the current plan, which says what it was."""
    plan = load_plan(folder)
    if plan is not None and plan.is_update and restore_carried(folder, plan):
        done.append(f"{plan.carried_name}: restored from the files of latents")


def _records(folder: CacheFolder, done: list[str]) -> None:
    """Restore damaged plans of other generations from their indexes, or move away what belongs to them."""
    for name in damaged_records(folder):
        plan8 = name.rpartition("/")[2].partition(".")[0]
        moved = folder.set_aside(name)
        try:
            record(folder, _plan_of_an_index(folder, plan8))
            done.append(f"{name}: restored from an index")
        except CacheError:
            done.append(f"{name}: moved to {moved}")
            # without its plan nothing can be made of an index; of its latents those that are shared are needed
            for sub in (INDEX,) if plan8 in _carried(folder) else (INDEX, TASKS):
                for base in folder.names(sub):
                    if base.startswith(f"{plan8}-"):
                        done.append(f"{sub}/{base}: moved to {folder.set_aside(f'{sub}/{base}')}")


def _carried(folder: CacheFolder) -> set[str]:
    """First digits of the plans in whose files rows of the current one may lie; of all if that cannot be known."""
    try:
        plan = load_plan(folder)
        if plan is not None:
            return {file.plan[:8] for file in load_carried(folder, plan).values()}
    except CacheError:
        pass
    return {base[:8] for base in folder.names(TASKS)}


def _plan_of_an_index(folder: CacheFolder, plan8: str | None = None) -> CachePlan:
    """The plan that an index holds. Only an index whose hash its commit line or its latents have is opened.

    Plans that lie in `generations/` are of other generations, and taken only if no index holds another. `plan8`: the
    first digits of the wanted one.
    """
    others: set[str] = set()
    with suppress(CacheError):
        others = {plan.plan8 for plan in recorded(folder)}
    names = [m for base in folder.names(INDEX) if (m := re.fullmatch(r"([0-9a-f]{8})-(\d{6,12})\.parquet", base))]
    for named in sorted(names, key=lambda m: m[1] in others):
        if plan8 is not None and named[1] != plan8:
            continue
        base = named[0]
        commits: dict[int, Commit] = {}
        for log in (COMMITS, f"commits-{named[1]}.jsonl"):
            if _is_readable(folder, log, len(names)):
                commits |= read_log_named(folder, log, len(names)).commits
        with suppress(OSError, CacheError):
            commit = commits.get(int(named[2]))
            hashes = {commit.index_xxh3 if commit else None, _named_by_latents(folder, base)} - {None}
            # hashed first, piece by piece: how large it may be follows from the plan that is looked for
            if not hashes or folder.hash(f"{INDEX}/{base}") not in hashes:
                continue
            plan = parse_plan(plan_in_index(folder.read(f"{INDEX}/{base}", MOST_BYTES)) or b"", folder)
            if plan.plan8 == named[1]:
                return plan
    raise CacheError(
        f"{folder.path / PLAN} is damaged, and no index holds a sound copy of it: restore it from a copy, or cache "
        "into a new OUT"
    )


def _named_by_latents(folder: CacheFolder, base: str) -> str | None:
    with suppress(OSError, CacheError), folder.open(f"tasks/{base.removesuffix('.parquet')}.safetensors") as file:
        return index_hash_in_header(file.fileno())
    return None


def _is_readable(folder: CacheFolder, name: str, tasks: int) -> bool:
    """Whether the log can be read; something else under its name is moved away."""
    try:
        read_log_named(folder, name, tasks)
    except CacheError:
        folder.set_aside(name)
        return False
    return True


def _set_aside(folder: CacheFolder, plan: CachePlan, tasks: list[int], done: list[str]) -> None:
    for number in tasks:
        for name in (plan.index_name(number), plan.data_name(number)):
            moved = folder.set_aside(name)
            if moved:
                done.append(f"{name}: moved to {moved}")


def _uncommitted(folder: CacheFolder, plan: CachePlan, mutex: Mutex, leases: Leases, done: list[str]) -> None:
    """Commit what is whole, and move away what is not."""
    try:
        listing = load_listing(folder, plan.source_name, plan.fields["source"]["sha256"], plan.count)
    except CacheError:
        return
    store = TaskStore(folder, plan, mutex, leases, listing)
    for task in plan_tasks(plan, listing.tasks(plan.task_inputs)):
        if task.number in store.commits or store.is_gone(task):
            continue
        try:
            if store.recover(task):
                done.append(f"task {task.number}: its line of {plan.log_name} was lost and is written anew")
        except (CacheError, OSError):
            _set_aside(folder, plan, [task.number], done)
