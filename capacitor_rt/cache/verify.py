"""Checking a cache against its own hashes: every damaged file is named, and the rows that are damaged with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CacheError
from ..extras import require_extra
from ..printable import counted, printable
from .commits import COMMITS, Commit, Log, read_log, read_log_named
from .folder import DAMAGED, GENERATIONS, INDEX, SUBFOLDERS, TASKS, TMP, CacheFolder
from .generations import record_name, recorded
from .index import cached_rows, is_own
from .latent_files import has_header, read_rows, row_hashes
from .mutex import HELD, LOCK
from .plan import PLAN, CachePlan, OtherFormat, Task, load_plan, plan_tasks
from .quarantine import QUARANTINE, is_quarantine, quarantine_bytes
from .rows import ROWS
from .shared_files import SharedFiles, own_file
from .soundness import Soundness
from .sources.listing import SOURCE, Listing, load_listing
from .stamps import STAMPS
from .store import known_plans, read_index, repair_hint, strange_plan
from .views import no_cache


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        inputs: number of inputs of the plan.
        rows, tasks, nbytes: what is committed, in numbers and in bytes of latents.
        unfinished: planned tasks that are not committed yet, which is no damage.
        files: names of the cache's own files, relative to it: what a copy of it needs.
        problems: damage, one line per problem.
        notes: files that do not belong to the cache, one line per file.
        damaged: numbers of the damaged tasks.
        damaged_files: of an update, damaged files of latents of earlier generations.
        bad_log, bad_plan: whether the log or the plan is damaged.
    """

    inputs: int = 0
    rows: int = 0
    tasks: int = 0
    nbytes: int = 0
    unfinished: int = 0
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    damaged_files: list[str] = field(default_factory=list)
    bad_log: bool = False
    bad_plan: bool = False


def verify(
    root: str | os.PathLike[str],
    *,
    workers: int = 4,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Read every byte of a cache and compare it with its hash. Nothing is changed.

    Checked: plan.json and source.parquet against their hashes; every line of the log; every index and every file of
    latents against its commit line, and the rows of a damaged one one by one against the index; that every task is one
    of the plan's and its index lists just the inputs that the plan gives it; quarantine.jsonl against the index.

    Args:
        workers: threads that read.
        advance: told (tasks checked, tasks in all).

    Raises:
        CacheError: there is no cache, or one of another version.
    """
    for extra in ("pyarrow", "xxhash"):
        require_extra(extra)
    root = Path(root)
    if not root.is_dir() or not any(os.path.lexists(root / name) for name in (PLAN, COMMITS, SOURCE)):
        raise CacheError(no_cache(root))
    with CacheFolder(root) as folder:
        return _Check(folder).run(workers, advance)


class _Check:
    def __init__(self, folder: CacheFolder):
        self.folder = folder
        self.found = Verification()
        self._names: list[str] = []

    def run(self, workers: int, advance: Callable[[int, int], None]) -> Verification:
        found, folder = self.found, self.folder
        plan = self._plan()
        listing = self._listing(plan) if plan else None
        log = self._log(plan)
        found.rows = sum(c.rows for c in log.commits.values())
        found.tasks = len(log.commits)
        found.nbytes = sum(c.data_bytes for c in log.commits.values())
        if plan is None:
            return found
        found.inputs = plan.count
        found.unfinished = sum(n not in log.commits for n in range(plan.task_count)) + plan.is_interim
        tasks = plan_tasks(plan, listing.tasks(plan.task_inputs)) if listing else None
        commits = []
        for number, commit in sorted(log.commits.items()):
            if number >= plan.task_count:
                self._problem(
                    f"{folder.path / plan.log_name} has task {number}, and the plan has "
                    f"{counted(plan.task_count, 'task')}"
                )
                found.bad_log = True
            else:
                commits.append(commit)
        shared = SharedFiles(folder, plan, Soundness(folder))
        with ThreadPoolExecutor(max(1, workers)) as pool:
            checks = pool.map(lambda c: _task_problems(folder, plan, c, tasks, listing, shared), commits)
            for done, (commit, problems) in enumerate(zip(commits, checks, strict=True), 1):
                if problems:
                    found.damaged.append(commit.task)
                    found.problems += problems
                advance(done, len(commits))
            self._shared(shared, pool)
        if log.torn and not found.unfinished:
            # no crash leaves it behind the last line
            self._problem(f"{folder.path / plan.log_name} has something behind its last line: the next run cuts it off")
            found.bad_log = True
        if not found.problems:
            self._quarantine(plan, log)
        self._strangers(plan, log)
        return found

    def _problem(self, line: str) -> None:
        self.found.problems.append(line)

    def _plan(self) -> CachePlan | None:
        path = self.folder.path / PLAN
        try:
            plan = load_plan(self.folder)
        except OtherFormat:
            raise
        except CacheError as e:
            self._problem(str(e))
            self.found.bad_plan = True
            return None
        if plan is None:
            hint = f"`capacitor-rt verify --repair {self.folder.path}` restores it from the index"
            self._problem(f"{path} is missing: {hint}")
            self.found.bad_plan = True
        return plan

    def _listing(self, plan: CachePlan) -> Listing | None:
        try:
            listing = load_listing(self.folder, plan.source_name, plan.fields["source"]["sha256"], plan.count)
            fits = len(listing) == plan.count and len(listing.tasks(plan.task_inputs)) == plan.task_count
            if not fits:
                raise CacheError(f"{self.folder.path / plan.source_name} does not fit plan.json")
            return listing
        except CacheError as e:
            self._problem(str(e))
            return None

    def _log(self, plan: CachePlan | None) -> Log:
        path = self.folder.path / (plan.log_name if plan else COMMITS)
        try:
            if plan:
                log = read_log(self.folder, plan)
            else:
                log = read_log_named(self.folder, COMMITS, len(self.folder.names(INDEX)))
        except CacheError as e:
            self._problem(str(e))
            self.found.bad_log = True
            return Log({}, [], False, False)
        if log.bad:
            numbers = ", ".join(map(str, log.bad[:5])) + (", ..." if len(log.bad) > 5 else "")
            self._problem(f"{path} is damaged in line {numbers}, which counts as lost: {repair_hint(self.folder)}")
            self.found.bad_log = True
        return log

    def _quarantine(self, plan: CachePlan, log: Log) -> None:
        if self.found.unfinished:
            return
        if not is_quarantine(self.folder, quarantine_bytes(self.folder, plan, log.commits)):
            path = self.folder.path / QUARANTINE
            self._problem(f"{path} is missing or does not match the index: the cache command writes it anew")

    def _shared(self, shared: SharedFiles, pool: ThreadPoolExecutor) -> None:
        """The files of earlier generations that rows lie in."""
        found = self.found
        if shared.problem is not None:
            self._problem(shared.problem)
        files = shared.used()
        for file, problem in zip(files, pool.map(shared.problem_of, files), strict=True):
            found.nbytes += file.data_bytes
            self._names.append(file.name)
            if problem:
                where = f"rows of {len(shared.tasks[file.stem])} tasks lie in it"
                self._problem(f"{problem}: {where}: {repair_hint(self.folder)}")
                found.damaged_files.append(file.name)
                found.damaged = sorted(shared.tasks[file.stem] | set(found.damaged))

    def _strangers(self, plan: CachePlan, log: Log) -> None:
        parts = {PLAN, plan.source_name, plan.log_name, QUARANTINE, *self._names}
        if plan.is_update:
            parts.add(plan.carried_name)
        for number in log.commits:
            parts |= {plan.index_name(number), plan.data_name(number)}
        self.found.files = sorted(name for name in parts if self.folder.stat(name) is not None)
        own = parts | {LOCK, HELD, STAMPS, ROWS, *SUBFOLDERS} | self._generations(plan)
        strangers = [name for name in self.folder.names() if name not in own]
        for sub in (TASKS, INDEX):
            try:
                names = [f"{sub}/{base}" for base in self.folder.names(sub)]
            except CacheError as e:
                self._problem(str(e))
                continue
            strangers += [name for name in names if name not in own]
        # a damaged list of carried files was named before
        with suppress(CacheError):
            if (why := strange_plan(self.folder, plan)) is not None:
                self._problem(f"{self.folder.path / PLAN} is not that of all files: {why}")
                self.found.bad_plan = True
        for name in strangers[:5]:
            kind = "left by a killed run, the next run removes it" if TMP in name else "not committed, or foreign"
            self.found.notes.append(f"{printable(name)}: {kind}")
        if len(strangers) > 5:
            self.found.notes.append(f"{len(strangers) - 5} more files that are not of the cache")
        for sub in (DAMAGED, GENERATIONS):
            names = [name for name in self.folder.names(sub) if f"{sub}/{name}" not in own]
            if names:
                self.found.notes.append(f"{sub}/ holds {counted(len(names), 'file')}, which `capacitor-rt gc` removes")

    def _done(self, update: CachePlan) -> str:
        """How far an update is. Nothing of the cache lies in it yet, so damage of its log is none of the cache's."""
        try:
            done = len(read_log(self.folder, update).commits)
        except CacheError as e:
            return f"how far is not known ({e}); `capacitor-rt gc --drop-updates {self.folder.path}` gives it up"
        return f"{done} of {counted(update.task_count, 'task')} done"

    def _generations(self, plan: CachePlan) -> set[str]:
        """Names of the files of updates under way and of earlier generations, whose being there is noted."""
        try:
            others = recorded(self.folder)
        except CacheError as e:
            self._problem(str(e))
            return set()
        names: set[str] = set()
        for other in others:
            names.add(record_name(other))
            if other.id == plan.id:
                continue
            if other.number > plan.number:
                what = f"an update to {counted(other.count, 'input')} is under way, {self._done(other)}"
            else:
                what = f"generation {other.number}, an earlier one, is kept until `capacitor-rt gc`"
            self.found.notes.append(what)
            names |= {other.log_name, other.source_name, other.carried_name}
        known = known_plans(self.folder, plan)
        for sub in (TASKS, INDEX):
            names |= {f"{sub}/{base}" for base in self.folder.names(sub) if base[:8] in known and TMP not in base}
        return names


def _task_problems(
    folder: CacheFolder,
    plan: CachePlan,
    commit: Commit,
    tasks: list[Task] | None,
    listing: Listing | None,
    shared: SharedFiles,
) -> list[str]:
    """What is wrong with a committed task: with its index, and with its latents."""
    index, data = plan.index_name(commit.task), plan.data_name(commit.task)
    hint = repair_hint(folder)
    try:
        table = read_index(folder, plan, commit)
    except CacheError as e:
        return [f"index {e}: {hint}"]
    own = own_file(plan, commit, table)
    placed = own.layout(plan)
    problems = []
    if (table.num_rows, cached_rows(table), placed.nbytes) != (commit.inputs, commit.rows, commit.data_bytes):
        problems.append(
            f"{plan.log_name} is damaged: its line of task {commit.task} does not agree with {index}: {hint}"
        )
    if why := shared.look(table, own):
        problems.append(f"index {folder.path / index} is damaged: {why}: {hint}")
    if tasks is not None and listing is not None:
        task = tasks[commit.task]
        ids = [listing.id(i) for i in range(task.first, task.stop)]
        if table["input"].to_pylist() != list(range(task.first, task.stop)) or table["id"].to_pylist() != ids:
            problems.append(
                f"index {folder.path / index} does not list the inputs that the plan gives its task: {hint}"
            )
    if (why := shared.problem_of(own)) is None:
        return problems
    try:
        with folder.open(data) as file:
            size, whole = os.fstat(file.fileno()).st_size, has_header(file.fileno(), placed)
        # a file may be said to have any size: it is not read to the end then
        if size == commit.data_bytes and folder.hash(data) == commit.data_xxh3:
            why = why if whole else f"{folder.path / data} is damaged: its header is not that of its index"
            return [*problems, f"{why}: {hint}"]
    except FileNotFoundError:
        return [*problems, f"{folder.path / data} cannot be read (No such file or directory): {hint}"]
    except CacheError as e:
        return [*problems, f"{e}: {hint}"]
    return [*problems, f"{folder.path / data} is damaged: {_damaged_rows(folder, plan, data, placed, table)}: {hint}"]


def _damaged_rows(folder: CacheFolder, plan: CachePlan, data: str, placed: Any, table: Any) -> str:
    """Which rows of a file whose hash is wrong are damaged, in words."""
    kept = table.filter(is_own(table)).select(["id", "bucket", "row", "row_hash"]).to_pylist()
    bad = []
    try:
        with folder.open(data) as file:
            for row in kept:
                tensors = [placed.tensors[row["bucket"], part.name] for part in plan.parts]
                what = folder.path / data
                values = [read_rows(file.fileno(), t, row["row"], 1, what) for t in tensors]
                if row_hashes(values)[0] != row["row_hash"]:
                    bad.append(f"{row['row']} of {plan.buckets[row['bucket']]} ({row['id']!r})")
    except CacheError as e:
        return str(e).partition("is damaged: ")[2] or str(e)
    if not bad:
        return "its header or its commit line; all rows match their hashes"
    shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
    return f"{len(bad)} of {counted(len(kept), 'row')} with another hash: {shown}"
