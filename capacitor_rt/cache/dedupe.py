"""`cache --dedupe`: inputs of the same bytes are encoded once.

Before the work the source is searched for equal files: by their sizes, then by 4 KiB of those that share one, then by
the hash of what still agrees. The plan that is worked on first has one input for each content, and is interim: an
update then adds the others, whose rows are found by the hash of their bytes like those of any update. So no task
depends on another, and the search, whose result may be outdated a moment later, decides only what is encoded first,
never what a row holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..errors import CacheError, ImageError
from ..extras import require_extra
from .folder import CacheFolder
from .hashing import xxh3
from .plan import CachePlan
from .sources import Columns, Expecting, Listing, Reader, Source, Streaming, load_listing

SAMPLE = 4096
"""Bytes from the middle of a file by which files of one size are told apart first."""
THREADS = 16
_BLOCK = 512


class Distinct(NamedTuple):
    """Inputs of which no two are known to have the same bytes, and what was left out.

    Attributes:
        kept: their ordinals, int64.
        nbytes: bytes of the files that were left out, as far as their sizes are known.
    """

    kept: np.ndarray
    nbytes: int


def distinct(source: Source, candidates: np.ndarray) -> Distinct:
    """The first input of each content.

    Args:
        candidates: ordinals of the inputs that are looked at, int64; the others are kept.
    """
    listing, reader = source.listing, source.open()
    readable = np.array([i not in listing.errors for i in candidates.tolist()], bool)
    left = candidates[readable & (listing.sizes[candidates] != 0)]
    sizes = listing.sizes[left]
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    groups = inverse.reshape(-1)
    shared = (counts[groups] > 1) | (sizes < 0)
    left, groups = left[shared], groups[shared]
    for look in (_sample, _hash):
        digests, known = _each(reader, look, left)
        groups, counts = _split(groups, digests)
        shared = known & (counts[groups] > 1)
        left, groups = left[shared], groups[shared]
    # in the order of the inputs, so that the first of each group is the first of the source
    _, first = np.unique(groups, return_index=True)
    dropped = np.delete(left, first)
    kept = np.ones(len(listing), bool)
    kept[dropped] = False
    return Distinct(np.flatnonzero(kept), int(np.maximum(listing.sizes[dropped], 0).sum()))


Search = Callable[[Source, np.ndarray], Distinct]


def searched_once() -> Search:
    """`distinct`, each search made once: so the same inputs are left out of several views."""
    found: dict[tuple[str, bytes], Distinct] = {}

    def search(source: Source, candidates: np.ndarray) -> Distinct:
        key = source.listing.digest(), xxh3(candidates.tobytes()).digest()
        if key not in found:
            found[key] = distinct(source, candidates)
        return found[key]

    return search


def _each(
    reader: Reader, look: Callable[[Reader, int], bytes | None], ordinals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What `look` says of inputs, 16 bytes as uint64 `[N,2]`, and of which it says anything, bool `[N]`."""
    found, known = np.zeros((len(ordinals), 2), np.uint64), np.zeros(len(ordinals), bool)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(ordinals), _BLOCK):
            block = ordinals[start : start + _BLOCK].tolist()
            if look is _hash and isinstance(reader, Expecting):
                reader.expect(block)
            for at, digest in enumerate(pool.map(lambda i: look(reader, i), block), start):
                if digest is not None:
                    found[at], known[at] = np.frombuffer(digest, np.uint64), True
    return found, known


def _split(groups: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups by their number and a digest: the new number of each member, and how many each group has."""
    order = np.lexsort((digests[:, 1], digests[:, 0], groups))
    keys = np.column_stack((groups.astype(np.uint64), digests))[order]
    numbers = np.empty(len(groups), np.int64)
    numbers[order] = np.cumsum(np.r_[False, (keys[1:] != keys[:-1]).any(1)][: len(keys)])
    return numbers, np.bincount(numbers, minlength=1)


def _sample(reader: Reader, ordinal: int) -> bytes | None:
    try:
        data = reader.sample(ordinal, SAMPLE)
        # where a part is no cheaper than the whole, the whole tells
        return bytes(16) if data is None else xxh3(data).digest()
    except ImageError:
        return None


def _hash(reader: Reader, ordinal: int) -> bytes | None:
    try:
        return xxh3(reader.read(ordinal)).digest()
    except ImageError:
        return None


@dataclass(frozen=True)
class PartialSource:
    """Some of the inputs of a source, without columns.

    Attributes:
        whole: the source.
        kept: ordinals in it, int64, ascending.
    """

    whole: Source
    kept: np.ndarray
    listing: Listing
    columns: Columns = field(default_factory=Columns)

    @property
    def notes(self) -> list[str]:
        return self.whole.notes

    @property
    def is_streaming(self) -> bool:
        return isinstance(self.whole, Streaming) and self.whole.is_streaming

    def fields(self) -> dict[str, Any]:
        return {**self.whole.fields(), "count": len(self.listing), "sha256": self.listing.digest()}

    def open(self) -> PartialReader:
        return PartialReader(self.whole.open(), self.kept)

    def why_gone(self) -> str | None:
        return self.whole.why_gone()


class PartialReader:
    """Reads a `PartialSource`."""

    def __init__(self, reader: Reader, kept: np.ndarray):
        self.reader, self.kept = reader, kept

    def read(self, ordinal: int) -> bytes:
        return self.reader.read(int(self.kept[ordinal]))

    def sample(self, ordinal: int, nbytes: int) -> bytes | None:
        return self.reader.sample(int(self.kept[ordinal]), nbytes)

    def name(self, ordinal: int) -> str:
        return self.reader.name(int(self.kept[ordinal]))

    def expect(self, ordinals: Iterable[int]) -> None:
        if isinstance(self.reader, Expecting):
            self.reader.expect(int(self.kept[i]) for i in ordinals)


def subset(source: Source, kept: np.ndarray) -> PartialSource:
    """The source of these inputs alone, int64 in ascending order."""
    listing = source.listing
    used, numbers = np.unique(listing.containers[kept], return_inverse=True)
    owned = used >= 0
    part = Listing(
        [listing.locators[i] for i in kept.tolist()],
        listing.sizes[kept],
        listing.mtimes[kept],
        listing.offsets[kept],
        (numbers.reshape(-1) - int((~owned).sum())).astype(np.int32),
        [listing.container_names[n] for n in used[owned].tolist()],
        {at: listing.errors[i] for at, i in enumerate(kept.tolist()) if i in listing.errors},
    )
    return PartialSource(source, kept, part)


def restricted(folder: CacheFolder, plan: CachePlan, source: Source) -> Source | None:
    """Of a source, the inputs of an interim plan; None if that was not made for this source."""
    fields = {"count": len(source.listing), "sha256": source.listing.digest()}
    if plan.fields["source"].get("distinct_of") != fields:
        return None
    try:
        planned = load_listing(folder, plan.source_name, plan.fields["source"]["sha256"], plan.count)
    except CacheError:
        return None
    pc = require_extra("pyarrow.compute")
    names = [x.names.arrow() for x in (planned, source.listing)]
    found = pc.index_in(names[0], value_set=names[1]).fill_null(-1).to_numpy().astype(np.int64)
    return None if (found < 0).any() else subset(source, found)
