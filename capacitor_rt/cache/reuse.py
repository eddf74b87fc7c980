"""Rows that an update need not encode again: what is known of them, and which input is which of them.

A row is known by the hash of its input's bytes. An input whose name, size and time are those of an earlier list has the
bytes that it had then, and is not even read; any other is read, and decoded only if no row has the hash of its bytes.
Of several rows of the same bytes the first in the order of the carried files is taken, however an input came to it: so
the index of an update does not depend on what was known by its time and what by its hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..extras import require_extra
from .carried import Carried
from .plan import CachePlan
from .sources import Listing
from .survey import UNKNOWN as UNKNOWN
from .survey import Survey

RACY_NS = 2_000_000_000
"""A file written so shortly before it was listed may have been written again within one tick of its clock."""
# what is done part by part, so that what it takes besides its result does not grow with the inputs
_MOST_PARTS, _PART = 256, 1 << 18


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


class Reuse:
    """Which rows of a survey the inputs of a plan are, as far as that is known before they are read.

    Attributes:
        known: hashes of the bytes of all rows that have latents.
        refs: number of the row in the survey of each input of the plan, `UNKNOWN` for those to be read; int32 or int64.

    Args:
        survey: of which the hashes are let go: 16 bytes for each row.
        carried: the files that rows of the plan may lie in.
    """

    def __init__(self, survey: Survey, carried: Carried, count: int):
        self.survey = survey
        rank = {stem: i for i, stem in enumerate(carried)}
        # one that was replaced since by another, however sound that is, is not the one that rows may lie in
        known = [rank[s] if s in rank and survey.files.get(s) == carried[s] else UNKNOWN for s in survey.stems()]
        places = np.array([*known, UNKNOWN])
        n = len(survey)
        kind = _kind(n)
        high, low, rows = np.empty(n, np.uint64), np.empty(n, np.uint64), np.empty(n, kind)
        # of each row the first one of the same bytes
        self._first = np.full(n, UNKNOWN, kind)
        parts, end = _parts(n), 0
        for part in range(parts):
            # by the first bits of the hash, so that parts are sorted as the whole would be
            chosen = _of_part(survey.high, part, parts)
            chosen = chosen[places[survey.stem[chosen]] >= 0]
            columns = (survey.row[chosen], survey.bucket[chosen], places[survey.stem[chosen]])
            order = np.lexsort((*columns, survey.low[chosen], survey.high[chosen]))
            chosen = chosen[order]
            new = np.ones(len(chosen), bool)
            for half in (survey.high, survey.low):
                new[1:] &= half[chosen[1:]] == half[chosen[:-1]]
            new[1:] = ~new[1:]
            firsts = chosen[new]
            self._first[chosen] = firsts[np.cumsum(new) - 1]
            into = slice(end, end + len(firsts))
            high[into], low[into], rows[into] = survey.high[firsts], survey.low[firsts], firsts
            end = into.stop
        # what was not written to was never taken
        self.known, self._rows = KnownContents(high[:end], low[:end]), rows[:end]
        survey.forget_hashes()
        self.refs: np.ndarray = np.full(count, UNKNOWN, kind)

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
        old = unchanged(planned, listed_ns, now)
        for begin in range(0, len(old), _PART):
            at = begin + np.flatnonzero((old[begin : begin + _PART] >= 0) & (self.refs[begin : begin + _PART] < 0))
            rows = self.survey.numbers(plan, old[at])
            at, rows = at[rows >= 0], rows[rows >= 0]
            good, stem = self.survey.good[rows], self.survey.stem[rows]
            # one that cannot be decoded is the same only under the same name, which its message may tell
            self.refs[at] = np.where(good, np.where(stem < 0, rows, self._first[rows]), UNKNOWN)


def unchanged(planned: Listing, listed_ns: int | None, now: Listing) -> np.ndarray:
    """Ordinal in the planned list of each input that is listed now and has not changed since, `UNKNOWN` else."""
    old = _found(planned, now)
    # another container of that name has another size in its own, or other places
    numbers = {name: i for i, name in enumerate(planned.container_names)}
    container = np.array([numbers.get(name, -2) for name in now.container_names] + [-1])
    for begin in range(0, len(now), _PART):
        at = begin + np.flatnonzero(old[begin : begin + _PART] >= 0)
        before = old[at]
        same = (planned.sizes[before] == now.sizes[at]) & (planned.offsets[before] == now.offsets[at])
        if listed_ns is not None:
            same &= (planned.mtimes[before] == now.mtimes[at]) & (now.mtimes[at] >= 0)
            same &= now.mtimes[at] < listed_ns - RACY_NS
        same &= container[now.containers[at]] == planned.containers[before]
        old[at[~same]] = UNKNOWN
    return old


def _found(planned: Listing, now: Listing) -> np.ndarray:
    """Ordinal in the planned list of each name that is listed now, `UNKNOWN` where there is none."""
    pa, pc = require_extra("pyarrow"), require_extra("pyarrow.compute")
    kind = _kind(len(planned))
    if planned.locators == now.locators:
        return np.arange(len(now), dtype=kind)
    parts = _parts(max(len(now), len(planned)))
    names = [x.names.arrow() for x in (now, planned)]
    mixed = [x.names.mixed() if parts > 1 else np.zeros(len(x), np.uint8) for x in (now, planned)]
    old = np.full(len(now), UNKNOWN, kind)
    for part in range(parts):
        here, there = (_of_part(keys, part, parts) for keys in mixed)
        found = pc.index_in(names[0].take(pa.array(here)), value_set=names[1].take(pa.array(there)))
        found = found.fill_null(UNKNOWN).to_numpy()
        old[here[found >= 0]] = there[found[found >= 0]]
    return old


def _kind(count: int) -> Any:
    """The type of numbers below `count`."""
    return np.int32 if count < 1 << 31 else np.int64


def _parts(count: int) -> int:
    """In how many parts so many rows are worked on, a power of two."""
    parts = 1
    while parts < min(_MOST_PARTS, count // _PART):
        parts *= 2
    return parts


def _of_part(keys: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Which of these unsigned keys are of a part, by their first bits; in order, as are the parts."""
    if parts == 1:
        return np.arange(len(keys))
    shift = keys.dtype.type(8 * keys.itemsize - (parts.bit_length() - 1))
    # block by block: shifted keys would be a copy of them all
    return np.concatenate(
        [b + np.flatnonzero(keys[b : b + _PART] >> shift == part) for b in range(0, max(len(keys), 1), _PART)]
    )
