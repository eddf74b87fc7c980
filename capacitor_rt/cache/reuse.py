"""Rows that an update need not encode again: what is known of them, and which input is which of them.

A row is known by the hash of its input's bytes. An input whose name, size and time are those of an earlier list has the
bytes that it had then, and is not even read; any other is read, and decoded only if no row has the hash of its bytes.
Of several rows of the same bytes the first in the order of the carried files is taken, however an input came to it: so
the index of an update does not depend on what was known by its time and what by its hash.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import CacheError
from ..extras import require_extra
from .carried import Carried, CarriedFile
from .commits import Commit, read_log
from .failures import is_retryable
from .folder import CacheFolder
from .index import cached_rows, digests, is_ok
from .plan import CachePlan
from .shared_files import SharedFiles, own_file
from .soundness import Soundness
from .sources import Listing
from .stamps import Stamps
from .store import read_index

RACY_NS = 2_000_000_000
"""A file written so shortly before it was listed may have been written again within one tick of its clock."""
TABLES = 64
"""Indexes that are kept at hand for their rows."""
UNKNOWN = -1
NO_FILE = 0
"""Among the files of a survey that of rows that cannot be taken, since theirs is damaged."""


@dataclass(frozen=True)
class KnownContents:
    """Hashes of 128 bits, which processes that read inputs look theirs up in.

    Attributes:
        high, low: halves of the hashes, uint64 `[N]`, sorted by both.
    """

    high: np.ndarray
    low: np.ndarray

    def find(self, digest: bytes) -> int:
        """Position of a hash, `UNKNOWN` if it is none of them."""
        high, low = np.frombuffer(digest, np.uint64)
        first, stop = (int(np.searchsorted(self.high, high, side)) for side in ("left", "right"))
        at = first + int(np.searchsorted(self.low[first:stop], low))
        return at if at < stop and self.low[at] == low else UNKNOWN

    def find_all(self, wanted: np.ndarray) -> np.ndarray:
        """Positions of hashes, uint64 `[N,2]`, as int64 `[N]`."""
        found = np.full(len(wanted), UNKNOWN, np.int64)
        if not len(self.high):
            return found
        at = np.searchsorted(self.high, wanted[:, 0])
        # equal first halves are next to each other, and there is hardly ever more than one
        open_ = np.flatnonzero(at < len(self.high))
        while len(open_):
            open_ = open_[self.high[at[open_]] == wanted[open_, 0]]
            hit = self.low[at[open_]] == wanted[open_, 1]
            found[open_[hit]] = at[open_[hit]]
            open_ = open_[~hit]
            at[open_] += 1
            open_ = open_[at[open_] < len(self.high)]
        return found


@dataclass
class _Part:
    """The index of one committed task, as far as it tells what may be reused; arrays over its inputs."""

    plan: CachePlan
    commit: Commit
    first: int
    base: int
    hashes: np.ndarray
    valid: np.ndarray
    stem: np.ndarray
    bucket: np.ndarray
    row: np.ndarray
    good: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


@dataclass
class Survey:
    """What the committed tasks of some generations hold.

    Attributes:
        files: of latents, those that are there and sound, by their stems.
        notes: what was left out, and why.
    """

    folder: CacheFolder
    files: dict[str, CarriedFile] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _parts: list[_Part] = field(default_factory=list)
    _stems: list[str] = field(default_factory=lambda: [""])
    _numbers: dict[str, int] = field(default_factory=dict)
    _tables: OrderedDict[int, Any] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return self._parts[-1].base + len(self._parts[-1]) if self._parts else 0

    def add(self, plan: CachePlan, sound: Soundness) -> None:
        """Look at what of a plan is committed. What is damaged is left out, and noted."""
        shared = SharedFiles(self.folder, plan, sound)
        if shared.problem is not None:
            self.notes.append(f"nothing of plan {plan.plan8} can be reused: {shared.problem}")
            return
        for _, commit in sorted(read_log(self.folder, plan.log_name).commits.items()):
            try:
                table = read_index(self.folder, plan, commit)
                own = own_file(plan, commit, table)
                why = self._lie(table, own, commit, shared)
            except CacheError as e:
                why = str(e)
            if why is not None:
                self.notes.append(f"nothing of task {commit.task} of plan {plan.plan8} can be reused: {why}")
                continue
            ok = is_ok(table)
            stems = table["file"].to_pylist() if plan.is_update else [None] * len(table)
            numbers = {stem: self._number(shared.files[stem] if stem else own, plan, sound) for stem in {*stems, None}}
            hashes, valid = digests(table["bytes_hash"])
            number = np.array([numbers[stem] for stem in stems], np.int32)
            number[~ok] = UNKNOWN
            good = ok | np.array([r is not None and not is_retryable(r) for r in table["reason"].to_pylist()], bool)
            bucket, row = (table[n].fill_null(UNKNOWN).to_numpy().astype(np.int32) for n in ("bucket", "row"))
            first = table["input"][0].as_py()
            self._parts.append(
                _Part(plan, commit, first, len(self), hashes.copy(), valid, number, bucket, row, good & valid)
            )

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

    def _number(self, file: CarriedFile, plan: CachePlan, sound: Soundness) -> int:
        """Of a file among `stems`, that of none if it is damaged."""
        if (why := sound.problem(file, plan)) is not None:
            # that of a task without rows holds nothing that would be encoded anew
            if file.rows and (line := f"what lies in it is encoded anew: {why}") not in self.notes:
                self.notes.append(line)
            return NO_FILE
        sound.note(file)
        self.files[file.stem] = file
        if file.stem not in self._numbers:
            self._numbers[file.stem] = len(self._stems)
            self._stems.append(file.stem)
        return self._numbers[file.stem]

    def carried(self, plans: Iterable[CachePlan]) -> Carried:
        """The files that rows of these plans lie in."""
        ids = {plan.id for plan in plans}
        used: set[str] = set()
        for part in self._parts:
            if part.plan.id in ids:
                used |= {self._stems[number] for number in np.unique(part.stem) if number >= 0}
        return Carried(file for stem, file in self.files.items() if stem in used)

    def rows(self, chosen: np.ndarray) -> Any:
        """Index rows by their numbers, int64 `[N]`, as an Arrow table with all columns and `file` filled in."""
        pa = require_extra("pyarrow")
        bases = np.array([part.base for part in self._parts])
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
        part = self._parts[number]
        table = read_index(self.folder, part.plan, part.commit)
        stems = pa.array([self._stems[s] if s >= 0 else None for s in part.stem.tolist()], pa.string())
        kept = [name for name in table.column_names if name != "file"]
        # without metadata: tables of several plans are put together
        table = table.select(kept[: len(kept) - len(part.plan.columns)]).replace_schema_metadata(None)
        self._tables[number] = table.append_column("file", stems)
        while len(self._tables) > TABLES:
            self._tables.popitem(last=False)
        return self._tables[number]

    def column(self, name: str) -> np.ndarray:
        """An array over all rows."""
        return np.concatenate([getattr(part, name) for part in self._parts]) if self._parts else np.zeros(0, np.int64)

    def numbers(self, plan: CachePlan) -> np.ndarray:
        """The number of the row of each input of a plan, int64, `UNKNOWN` where its task is not committed."""
        found = np.full(plan.count, UNKNOWN, np.int64)
        for part in self._parts:
            if part.plan.id == plan.id:
                found[part.first : part.first + len(part)] = part.base + np.arange(len(part))
        return found

    def stems(self) -> list[str]:
        return self._stems


class Reuse:
    """Which rows of a survey the inputs of a plan are, as far as that is known before they are read.

    Attributes:
        known: hashes of the bytes of all rows that have latents.
        refs: number of the row in the survey of each input of the plan, int64, `UNKNOWN` for those to be read.

    Args:
        carried: the files that rows of the plan may lie in.
    """

    def __init__(self, survey: Survey, carried: Carried, count: int):
        self.survey = survey
        rank = {stem: i for i, stem in enumerate(carried)}
        # one that was replaced since by another, however sound that is, is not the one that rows may lie in
        known = [rank[s] if s in rank and survey.files.get(s) == carried[s] else UNKNOWN for s in survey.stems()]
        places = np.array([*known, UNKNOWN])
        place = places[survey.column("stem").astype(np.int64)]
        usable = np.flatnonzero(place >= 0)
        self._hashes = survey.column("hashes").reshape(-1, 2).astype(np.uint64, copy=False)
        high, low = self._hashes[usable, 0], self._hashes[usable, 1]
        keys = (survey.column("row")[usable], survey.column("bucket")[usable], place[usable], low, high)
        order = np.lexsort(keys)
        high, low, usable = high[order], low[order], usable[order]
        first = np.ones(len(high), bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        self.known = KnownContents(high[first], low[first])
        self._rows = usable[first]
        self.refs = np.full(count, UNKNOWN, np.int64)

    def find(self, digest: bytes) -> int:
        """Number of the row of an input with this hash, `UNKNOWN` if there is none."""
        at = self.known.find(digest)
        return int(self._rows[at]) if at >= 0 else UNKNOWN

    def by_time(self, plan: CachePlan, planned: Listing, listed_ns: int | None, now: Listing) -> None:
        """Find the rows of inputs that a list of an earlier plan has with the same name, place, size and time.

        Args:
            planned: the list of `plan`.
            listed_ns: when it was written; None if both lists are of one moment, and no time need be compared.
        """
        numbers = self.survey.numbers(plan)
        old = unchanged(planned, listed_ns, now)
        at = np.flatnonzero((old >= 0) & (self.refs < 0))
        rows = numbers[old[at]]
        at, rows = at[rows >= 0], rows[rows >= 0]
        good, stem = self.survey.column("good"), self.survey.column("stem")
        at, rows = at[good[rows]], rows[good[rows]]
        # one that cannot be decoded is the same only under the same name, which its message may tell
        failed = stem[rows] < 0
        self.refs[at[failed]] = rows[failed]
        at, rows = at[~failed], rows[~failed]
        found = self.known.find_all(self._hashes[rows])
        self.refs[at[found >= 0]] = self._rows[found[found >= 0]]


def unchanged(planned: Listing, listed_ns: int | None, now: Listing) -> np.ndarray:
    """Ordinal in the planned list of each input that is listed now and has not changed since, int64, `UNKNOWN` else."""
    pc = require_extra("pyarrow.compute")
    if planned.locators == now.locators:
        old = np.arange(len(now), dtype=np.int64)
    else:
        names = [x.names.arrow() for x in (now, planned)]
        old = pc.index_in(names[0], value_set=names[1]).fill_null(UNKNOWN).to_numpy().astype(np.int64)
    at = np.flatnonzero(old >= 0)
    before = old[at]
    same = (planned.sizes[before] == now.sizes[at]) & (planned.offsets[before] == now.offsets[at])
    if listed_ns is not None:
        same &= (planned.mtimes[before] == now.mtimes[at]) & (now.mtimes[at] >= 0)
        same &= now.mtimes[at] < listed_ns - RACY_NS
    # another container of that name has another size in its own, or other places
    numbers = {name: i for i, name in enumerate(planned.container_names)}
    container = np.array([numbers.get(name, -2) for name in now.container_names] + [-1])
    same &= container[now.containers[at]] == planned.containers[before]
    old[at[~same]] = UNKNOWN
    return old


def survey(
    folder: CacheFolder,
    plans: Sequence[CachePlan],
    told: Callable[[int], None] = lambda n: None,
    stamps: Stamps | None = None,
) -> Survey:
    """Look at the committed tasks of `plans`."""
    found, sound = Survey(folder), Soundness(folder, stamps or Stamps(folder))
    for number, plan in enumerate(plans):
        found.add(plan, sound)
        told(number)
    return found
