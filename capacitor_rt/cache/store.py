"""Writes the tasks of a cache, knows which are done, and checks what a run builds on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import CacheError
from .carried import load_carried
from .commits import Commit, LogFollower, append_commit, read_log, rewrite_log
from .folder import INDEX, TASKS, CacheFolder, PendingFile
from .generations import recorded_names
from .hashing import xxh3
from .index import bucket_counts, cached_counts, cached_rows, index_bytes, parse_index, plan_in_index
from .latent_files import file_chunks, has_header, index_hash_in_header, layout, row_hashes
from .leases import Leases
from .mutex import Mutex
from .parquet_files import most_bytes
from .plan import CachePlan, Task
from .shared_files import SharedFiles, own_file
from .soundness import Soundness
from .sources import Listing
from .stamps import Stamps


@dataclass
class SharedRows:
    """Inputs of a task whose rows lie in files of earlier generations.

    Attributes:
        is_here: which inputs, bool `[inputs]`.
        columns: `row`, `row_hash` and `file`, a list over all inputs each, None for the others.
    """

    is_here: np.ndarray
    columns: dict[str, list[Any]]


@dataclass
class TaskData:
    """All that a finished task holds.

    Attributes:
        columns: of the index without `row` and `row_hash`, over all inputs; an Arrow array or a list each.
        bucket: number of the bucket of each input with latents, in the order of the inputs, int `[R]`.
        cached: positions of these inputs in the task, int `[R]`.
        pieces: of each (bucket, name of a part) the rows in order, contiguous `[n,...]` on the CPU.
        shared: of an update, the inputs whose rows are not written again.
    """

    columns: dict[str, Any]
    bucket: np.ndarray
    cached: np.ndarray
    pieces: dict[tuple[int, str], list[Tensor]]
    shared: SharedRows | None = None


class TaskStore:
    """The tasks of a cache on disk, for a run that writes.

    Args:
        listing: the inputs of the plan, which indexes that this machine does not know have to name.

    Attributes:
        commits: of the tasks that are part of the cache, as far as this process knows.
        is_draft: whether it is of an update under way, on which nothing builds yet: what is damaged of it is done
            again.
    """

    is_draft = False

    def __init__(self, folder: CacheFolder, plan: CachePlan, mutex: Mutex, leases: Leases, listing: Listing):
        self.folder = folder
        self.plan = plan
        self.mutex = mutex
        self.leases = leases
        self.listing = listing
        self.stamps = Stamps(folder)
        self._log = LogFollower(folder, plan)

    @property
    def commits(self) -> dict[int, Commit]:
        return self._log.commits

    def refresh(self) -> None:
        """Read what other processes have committed meanwhile."""
        self._log.refresh()

    def forget(self, tasks: Sequence[int]) -> None:
        """Drop commit lines, and with them whatever is damaged in the log."""
        with self.mutex:
            self.refresh()
            kept = {n: commit for n, commit in self.commits.items() if n not in tasks}
            rewrite_log(self.folder, self.plan.log_name, kept)
            self.refresh()

    def settle(self, tasks: Sequence[Task]) -> list[str]:
        """Refuse to build on damage; forget what is committed and gone, and of a draft what is damaged.

        Args:
            tasks: all of the plan.

        Returns:
            Notes for the user.

        Raises:
            CacheError: something is damaged that something builds on, or the log has tasks that the plan has not.
        """
        log = read_log(self.folder, self.plan)
        notes = []
        if log.bad:
            lines = ", ".join(map(str, log.bad[:5]))
            notes.append(f"line {lines} of {self.folder.path / self.plan.log_name} is damaged and counts as lost")
        for number in [n for n in self.commits if n >= len(tasks)]:
            raise CacheError(
                f"{self.folder.path / self.plan.log_name} has task {number}, and the plan has {len(tasks)} tasks: "
                + repair_hint(self.folder)
            )
        damaged: dict[int, str] = {}
        gone = []
        shared = SharedFiles(self.folder, self.plan, Soundness(self.folder, self.stamps))
        if shared.problem is not None:
            raise CacheError(shared.problem)
        for task in [task for task in tasks if task.number in self.commits]:
            if self.is_gone(task):
                gone.append(task.number)
            elif problem := self.check(task, shared):
                damaged[task.number] = problem
        for file in shared.used():
            if problem := shared.problem_of(file):
                damaged |= dict.fromkeys(shared.tasks[file.stem], problem)
            else:
                shared.sound.note(file)
        # only now: rows that lie in a damaged file were not compared
        self.vouch(number for number in self.commits if number not in damaged and number not in gone)
        if damaged and self.is_draft:
            gone += sorted(damaged)
            with self.mutex:
                self.set_aside(sorted(damaged))
            notes += [f"{why}: moved to damaged/ and done again" for why in dict.fromkeys(damaged.values())]
        elif damaged:
            found = list(dict.fromkeys(damaged.values()))
            more = [f"and {len(found) - 5} more"] if len(found) > 5 else []
            raise CacheError(f"{self.folder.path} is damaged: {repair_hint(self.folder)}", [*found[:5], *more])
        if gone or log.bad:
            self.forget(gone)
        return notes

    def check(self, task: Task, shared: SharedFiles) -> str | None:
        """What is wrong with a committed task, None if it is sound.

        The index is hashed, and the task's file of latents is compared with it: by its header and its size, and by its
        hash and its rows unless it is, by inode, size and times, the file that this machine has compared or written
        before. Damage of the files of earlier generations is not looked for here.
        """
        commit, index = self.commits[task.number], self.plan.index_name(task.number)
        try:
            table = read_index(self.folder, self.plan, commit)
            own = own_file(self.plan, commit, table)
            if commit.inputs != len(task) or not self._lists(table, task, shared.sound.is_known(own)):
                return f"{self.folder.path / index} does not list the inputs of its task"
            if cached_rows(table) != commit.rows or commit.data_bytes != own.layout(self.plan).nbytes:
                return f"the commit line of task {task.number} does not agree with {self.folder.path / index}"
        except CacheError as e:
            return str(e)
        if (why := shared.problem_of(own)) is not None:
            return why
        why = shared.look(table, own)
        return f"{self.folder.path / index} is damaged: {why}" if why else None

    def _lists(self, table: Any, task: Task, is_known: bool = False) -> bool:
        """Whether an index lists the inputs of its task. `is_known`: their names were compared before."""
        if (table.num_rows, table["input"][0].as_py()) != (len(task), task.first):
            return False
        return is_known or table["id"].to_pylist() == [self.listing.id(i) for i in range(task.first, task.stop)]

    def vouch(self, tasks: Iterable[int]) -> None:
        """Take note that committed tasks are sound."""
        for number in tasks:
            self.stamps.add(self.plan.data_name(number), self.commits[number].data_xxh3)

    def set_aside(self, tasks: Sequence[int]) -> None:
        """Move the files of tasks to `damaged/`. Under the mutex."""
        for number in tasks:
            for name in (self.plan.index_name(number), self.plan.data_name(number)):
                self.folder.set_aside(name)

    def is_gone(self, task: Task) -> bool:
        """Whether both files of a task are missing, so that it is simply to be done again."""
        names = self.plan.index_name(task.number), self.plan.data_name(task.number)
        return all(self.folder.stat(name) is None for name in names)

    def recover(self, task: Task) -> bool:
        """Commit a task whose files are whole but have no commit line: a crash came between, or the log was lost.

        An index without latents was published for latents that never were, and is removed. Under the task's lease.

        Raises:
            CacheError: both are there and do not vouch for each other, or there are latents alone.
        """
        index, data = self.plan.index_name(task.number), self.plan.data_name(task.number)
        has_index, has_data = (self.folder.stat(name) is not None for name in (index, data))
        if not has_data:
            if has_index:
                self.folder.discard(index)
            return False
        problem = f"{self.folder.path / data} is not committed, and "
        if not has_index:
            raise CacheError(problem + f"its index {index} is missing: {repair_hint(self.folder)}")
        with self.folder.open(data) as file:
            named = index_hash_in_header(file.fileno())
        body = self.folder.read(index, most_bytes(len(task)))
        if named is None or xxh3(body).hexdigest() != named:
            raise CacheError(problem + f"its index {index} is not the one that it names: {repair_hint(self.folder)}")
        table = parse_index(body, self.folder.path / index, self.plan, task.number)
        placed = layout(self.plan, task.number, cached_counts(table), named)
        with self.folder.open(data) as file:
            whole = has_header(file.fileno(), placed)
        if not whole or not self._lists(table, task):
            raise CacheError(problem + f"does not match its index: {repair_hint(self.folder)}")
        sizes = (len(body), named, placed.nbytes, self.folder.hash(data))
        commit = Commit(task.number, len(task), cached_rows(table), *sizes)
        shared = SharedFiles(self.folder, self.plan, Soundness(self.folder, self.stamps))
        own = own_file(self.plan, commit, table)
        if why := shared.problem or shared.problem_of(own) or shared.look(table, own):
            raise CacheError(problem + f"does not match its index ({why}): {repair_hint(self.folder)}")
        if why := next((why for file in shared.used() if (why := shared.problem_of(file))), None):
            raise CacheError(problem + f"rows of its index lie elsewhere: {why}: {repair_hint(self.folder)}")
        with self.mutex:
            self._commit(commit)
        return True

    def write(self, task: Task, found: TaskData) -> None:
        """Write, publish and commit a task. A task that another process has committed meanwhile is left to it.

        Raises:
            DiskFull: no space left; nothing of this task remains.
            CacheError: a file of that name and other contents is there.
        """
        counts = bucket_counts(found.bucket)
        n = len(task)
        shared = found.shared or SharedRows(np.zeros(n, bool), {k: [None] * n for k in ("row", "row_hash", "file")})
        rows, hashes = shared.columns["row"], shared.columns["row_hash"]
        seen: dict[int, int] = {}
        digests = {number: self._hashes(number, found) for number in counts}
        for at, number in zip(found.cached.tolist(), found.bucket.tolist(), strict=True):
            rows[at] = seen.get(number, 0)
            hashes[at] = digests[number][seen.get(number, 0)]
            seen[number] = seen.get(number, 0) + 1
        body = index_bytes(self.plan, task, {**found.columns, **shared.columns})
        index_name, data_name = self.plan.index_name(task.number), self.plan.data_name(task.number)
        placed = layout(self.plan, task.number, counts, xxh3(body).hexdigest())
        data = PendingFile(self.folder, data_name, file_chunks(placed, found.pieces))
        try:
            index = PendingFile(self.folder, index_name, [body])
        except BaseException:
            data.discard()
            raise
        try:
            with self.mutex:
                self.refresh()
                if task.number in self.commits or not self.leases.holds(task.number):
                    return
                # the index first: latents without one would be rows without names
                index.publish()
                data.publish()
                sizes = (index.size, index.digest, data.size, data.digest)
                rows_in_all = len(found.cached) + int(shared.is_here.sum())
                self._commit(Commit(task.number, n, rows_in_all, *sizes))
        finally:
            index.discard()
            data.discard()

    def _commit(self, commit: Commit) -> None:
        append_commit(self.folder, self.plan.log_name, commit)
        self.refresh()
        self.stamps.add(self.plan.data_name(commit.task), commit.data_xxh3)

    def _hashes(self, number: int, found: TaskData) -> list[bytes]:
        """Row hashes of a bucket, piece by piece."""
        parts: list[Sequence[Tensor]] = [found.pieces[number, part.name] for part in self.plan.parts]
        return [digest for pieces in zip(*parts, strict=True) for digest in row_hashes(pieces)]


def read_index(folder: CacheFolder, plan: CachePlan, commit: Commit) -> Any:
    """The index of a committed task, compared with its commit line and checked.

    Raises:
        CacheError: it is missing or damaged.
    """
    name = plan.index_name(commit.task)
    try:
        with folder.open(name) as file:
            # before anything is read: a file may be said to have any size
            whole = os.fstat(file.fileno()).st_size == commit.index_bytes
        body = folder.read(name, most_bytes(min(commit.inputs, plan.count))) if whole else b""
    except FileNotFoundError:
        raise CacheError(f"{folder.path / name} is missing") from None
    if not whole or xxh3(body).hexdigest() != commit.index_xxh3:
        raise CacheError(f"{folder.path / name} is damaged: its hash is not that of its commit line")
    return parse_index(body, folder.path / name, plan, commit.task)


def is_forged(folder: CacheFolder, plan: CachePlan) -> bool:
    """Whether an index that the log vouches for holds another plan of the same identity, with another model's name."""
    for commit in read_log(folder, plan).commits.values():
        with suppress(OSError, CacheError):
            body = folder.read(plan.index_name(commit.task), most_bytes(min(commit.inputs, plan.count)))
            if xxh3(body).hexdigest() == commit.index_xxh3:
                return plan_in_index(body) not in (None, plan.text())
    return False


def strange_plan(folder: CacheFolder, plan: CachePlan) -> str | None:
    """What shows that files of tasks belong to an unknown plan; None if nothing does.

    Raises:
        CacheError: the list of carried files, which knows of some, is damaged.
    """
    if is_forged(folder, plan):
        return "its index holds another one of the same identity"
    known: set[str] | None = None
    for sub in (TASKS, INDEX):
        for base in folder.names(sub):
            named = re.fullmatch(r"([0-9a-f]{8})-\d{6,}\.(safetensors|parquet)", base)
            if not named or named[1] == plan.plan8:
                continue
            if known is None:
                known = known_plans(folder, plan)
            if named[1] not in known:
                load_carried(folder, plan)
                return f"{sub}/{base} is of plan {named[1]}, and this one is {plan.plan8}"
    return None


def known_plans(folder: CacheFolder, plan: CachePlan) -> set[str]:
    """First digits of the plans, beside this one, whose files may lie in the folder; as far as they can be read."""
    # by their names: a damaged one is reported when it is read
    known = recorded_names(folder)
    with suppress(CacheError):
        known |= {file.plan[:8] for file in load_carried(folder, plan).values()}
    return known


def repair_hint(folder: CacheFolder) -> str:
    """How to have damaged tasks made anew."""
    return f"run `capacitor-rt verify --repair {folder.path}`, then the cache command again"
