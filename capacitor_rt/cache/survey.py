"""What the committed tasks of some generations hold: a row is known by the hash of its input's bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CacheError
from ..extras import require_extra
from .carried import Carried, CarriedFile
from .commits import Commit, read_log
from .failures import is_retryable
from .folder import CacheFolder
from .index import cached_rows, digests, is_ok, is_own
from .plan import CachePlan
from .shared_files import SharedFiles, own_file
from .soundness import Soundness
from .stamps import Stamps
from .store import read_index

TABLES = 16
"""Indexes that are kept at hand for their rows."""
UNKNOWN = -1
NO_FILE = 0
"""Among the files of a survey that of rows that cannot be taken, since theirs is damaged."""


@dataclass
class Part:
    """Rows of the index of one committed task.

    Attributes:
        first: ordinal of the input of its first row, in `plan`.
        base: number of that row in the survey; all others follow.
        chosen: of an index of which not all rows are in the survey, which are, int32; else None.
        stems: numbers of the files that its rows lie in.
    """

    plan: CachePlan
    commit: Commit
    first: int
    base: int
    count: int
    stems: list[int]
    chosen: np.ndarray | None = None


class Survey:
    """What the committed tasks of some generations hold.

    Attributes:
        files: of latents, those that are there and sound, by their stems.
        notes: what was left out, and why.
        parts: in the order of the numbers of their rows.
        stem: of each row the number of the file that it lies in, int32 `[N]`, `UNKNOWN` for inputs without latents.
        good: which rows are for good, bool `[N]`: what failed for now is not.
        high, low: halves of the hashes of the bytes, uint64 `[N]`; `bucket`, `row`: where it lies in the file, int32.

    Args:
        has_rows: whether anything is kept of single rows.
    """

    def __init__(self, folder: CacheFolder, has_rows: bool = True):
        self.folder, self.has_rows = folder, has_rows
        self.files: dict[str, CarriedFile] = {}
        self.notes: list[str] = []
        self.parts: list[Part] = []
        self.stem, self.bucket, self.row = (np.zeros(0, np.int32) for _ in range(3))
        self.high, self.low = (np.zeros(0, np.uint64) for _ in range(2))
        self.good = np.zeros(0, bool)
        self._count = 0
        self._stems = [""]
        self._numbers: dict[str, int] = {}
        self._parts_of: dict[int, list[Part]] = {}
        self._tables: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def add(self, plan: CachePlan, sound: Soundness) -> None:
        """Look at what of a plan is committed. What is damaged is left out, and noted."""
        shared = SharedFiles(self.folder, plan, sound)
        if shared.problem is not None:
            self.notes.append(f"nothing of plan {plan.plan8} can be reused: {shared.problem}")
            return
        commits = read_log(self.folder, plan).commits
        self._reserve(sum(commit.inputs for commit in commits.values()))
        for _, commit in sorted(commits.items()):
            if (table := self._checked(commit, shared)) is not None:
                self._append(shared, commit, table)

    def add_dead(self, plan: CachePlan, wanted: Carried, sound: Soundness) -> None:
        """Look at the rows of an earlier generation that lie in files of `wanted` and that none so far refers to.

        They lie in the files of its own tasks: each row of a file is in the index that it was written with.
        """
        files = {f.task: f for f in wanted.values() if f.plan == plan.id and self.files.get(f.stem) == f}
        alive = {task: found for task, file in files.items() if not (found := self.alive(file)).all()}
        if not alive:
            return
        shared, commits = SharedFiles(self.folder, plan, sound), read_log(self.folder, plan).commits
        for task in sorted(alive.keys() & commits.keys()):
            if (table := self._checked(commits[task], shared)) is None:
                continue
            at = np.flatnonzero(is_own(table))
            bucket, row = (
                table[name].to_numpy(zero_copy_only=False)[at].astype(np.int64) for name in ("bucket", "row")
            )
            dead = at[~alive[task][places_of(files[task], bucket, row)]]
            if len(dead):
                self._reserve(len(dead))
                self._append(shared, commits[task], table, dead.astype(np.int32))

    def _checked(self, commit: Commit, shared: SharedFiles) -> Any:
        """The index of a task; None, and a note, if it is damaged or not the one that was written with the task."""
        plan = shared.plan
        try:
            table = read_index(self.folder, plan, commit)
            why = self._lie(table, own_file(plan, commit, table), commit, shared)
        except CacheError as e:
            why = str(e)
        if why is None:
            return table
        self.notes.append(f"nothing of task {commit.task} of plan {plan.plan8} can be reused: {why}")
        return None

    def _lie(self, table: Any, own: CarriedFile, commit: Commit, shared: SharedFiles) -> str | None:
        """What shows that an index is not the one that was written with its task; None if nothing does."""
        name = self.folder.path / shared.plan.index_name(commit.task)
        if (table.num_rows, cached_rows(table)) != (commit.inputs, commit.rows):
            return f"its commit line does not agree with {name}"
        if shared.problem_of(own) is not None and shared.sound.disowns(own):
            return f"{name} is damaged: it is not the index that {own.name} names"
        if why := shared.look(table, own):
            return f"{name} is damaged: {why}"
        return None

    def alive(self, file: CarriedFile) -> np.ndarray:
        """Which rows of a file are in the survey, bool over the rows of all its buckets."""
        found = np.zeros(sum(file.counts.values()), bool)
        number = self._numbers.get(file.stem, UNKNOWN)
        for part in self._parts_of.get(number, []):
            rows = slice(part.base, part.base + part.count)
            here = self.stem[rows] == number
            places = places_of(file, self.bucket[rows][here], self.row[rows][here])
            found[places[places >= 0]] = True
        return found

    def _reserve(self, more: int) -> None:
        if self.has_rows:
            for name in ("stem", "bucket", "row", "high", "low", "good"):
                # in place: where there is much of it, its pages are moved and not copied
                getattr(self, name).resize(self._count + more, refcheck=False)

    def _append(self, shared: SharedFiles, commit: Commit, table: Any, chosen: np.ndarray | None = None) -> None:
        pa, pc = require_extra("pyarrow"), require_extra("pyarrow.compute")
        plan, own, first = shared.plan, own_file(shared.plan, commit, table), table["input"][0].as_py()
        if chosen is not None:
            table = table.take(pa.array(chosen))
        ok = is_ok(table)
        stems = pc.fill_null(table["file"], own.stem) if plan.is_update else pa.chunked_array([[own.stem] * len(table)])
        encoded = stems.combine_chunks().dictionary_encode()
        files = [own if stem == own.stem else shared.files[stem] for stem in encoded.dictionary.to_pylist()]
        number = np.array([self._number(file, shared) for file in files], np.int32)[encoded.indices.to_numpy()]
        number[~ok] = UNKNOWN
        used = np.unique(number[ok]).tolist()
        self.parts.append(Part(plan, commit, first, len(self), len(table), used, chosen))
        for used_number in used:
            self._parts_of.setdefault(used_number, []).append(self.parts[-1])
        if self.has_rows:
            hashes, valid = digests(table["bytes_hash"])
            rows = slice(self._count, self._count + len(table))
            reasons = [None] * len(table) if ok.all() else table["reason"].to_pylist()
            for_good = {reason: reason is not None and not is_retryable(reason) for reason in set(reasons)}
            self.good[rows] = (ok | np.array([for_good[reason] for reason in reasons], bool)) & valid
            self.stem[rows], self.high[rows], self.low[rows] = number, hashes[:, 0], hashes[:, 1]
            self.bucket[rows], self.row[rows] = (table[n].fill_null(UNKNOWN).to_numpy() for n in ("bucket", "row"))
        self._count += len(table)

    def _number(self, file: CarriedFile, shared: SharedFiles) -> int:
        """Of a file among `stems`, that of none if it is damaged."""
        if (why := shared.problem_of(file)) is not None:
            # that of a task without rows holds nothing that would be encoded anew
            if file.rows and (line := f"what lies in it is encoded anew: {why}") not in self.notes:
                self.notes.append(line)
            return NO_FILE
        shared.sound.note(file)
        self.files[file.stem] = file
        if file.stem not in self._numbers:
            self._numbers[file.stem] = len(self._stems)
            self._stems.append(file.stem)
        return self._numbers[file.stem]

    def carried(self, plans: Iterable[CachePlan]) -> Carried:
        """The files that rows of these plans lie in."""
        ids = {plan.id for plan in plans}
        used = {number for part in self.parts if part.plan.id in ids for number in part.stems}
        return Carried(file for stem, file in self.files.items() if self._numbers.get(stem, UNKNOWN) in used)

    def rows(self, chosen: np.ndarray) -> Any:
        """Index rows by their numbers, int `[N]`, as an Arrow table with all columns and `file` filled in."""
        pa = require_extra("pyarrow")
        bases = np.array([part.base for part in self.parts])
        parts = np.searchsorted(bases, chosen, "right") - 1
        tables, order = [], []
        for number in np.unique(parts).tolist():
            at = np.flatnonzero(parts == number)
            tables.append(self._table(number).take(pa.array(chosen[at] - bases[number])))
            order.append(at)
        return pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(order), kind="stable")))

    def _table(self, number: int) -> Any:
        if number in self._tables:
            self._tables.move_to_end(number)
            return self._tables[number]
        pa = require_extra("pyarrow")
        part = self.parts[number]
        table = read_index(self.folder, part.plan, part.commit)
        if part.chosen is not None:
            table = table.take(pa.array(part.chosen))
        numbers = self.stem[part.base : part.base + part.count].tolist()
        stems = pa.array([self._stems[s] if s >= 0 else None for s in numbers], pa.string())
        kept = [name for name in table.column_names if name != "file"]
        # without metadata: tables of several plans are put together
        table = table.select(kept[: len(kept) - len(part.plan.columns)]).replace_schema_metadata(None)
        self._tables[number] = table.append_column("file", stems)
        while len(self._tables) > TABLES:
            self._tables.popitem(last=False)
        return self._tables[number]

    def numbers(self, plan: CachePlan, ordinals: np.ndarray) -> np.ndarray:
        """Numbers of the rows of these inputs of a plan, int64, `UNKNOWN` where their task is not committed."""
        parts = sorted(
            (p for p in self.parts if p.plan.id == plan.id and p.chosen is None), key=lambda part: part.first
        )
        firsts, counts, bases = (np.array([getattr(p, n) for p in parts], np.int64) for n in ("first", "count", "base"))
        found = np.full(len(ordinals), UNKNOWN, np.int64)
        if parts:
            at = np.searchsorted(firsts, ordinals, "right") - 1
            within = ordinals - firsts[at]
            here = (at >= 0) & (within < counts[at])
            found[here] = (bases[at] + within)[here]
        return found

    def forget_hashes(self) -> None:
        """Let go of what only the first look needs."""
        self.high = self.low = np.zeros(0, np.uint64)
        self.bucket = self.row = np.zeros(0, np.int32)

    def stems(self) -> list[str]:
        return self._stems


def places_of(file: CarriedFile, bucket: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Where rows come among all rows of a file, bucket after bucket, int64; -1 for one that it has not."""
    counts = np.zeros(1 + max([*file.counts, int(bucket.max(initial=0))]), np.int64)
    counts[list(file.counts)] = list(file.counts.values())
    begins = np.cumsum(counts) - counts
    return np.where((row >= 0) & (row < counts[bucket]), begins[bucket] + row, -1)


def survey(
    folder: CacheFolder,
    plans: Sequence[CachePlan],
    stamps: Stamps | None = None,
    has_rows: bool = True,
    earlier: Iterable[CachePlan] = (),
    wanted: Carried | None = None,
) -> Survey:
    """Look at the committed tasks of `plans`.

    Args:
        earlier: plans of which only rows are of interest that lie in files of `wanted` and that `plans` do not have.
    """
    found, sound = Survey(folder, has_rows), Soundness(folder, stamps or Stamps(folder))
    for plan in plans:
        found.add(plan, sound)
    for plan in earlier:
        found.add_dead(plan, wanted or Carried(), sound)
    return found
