"""The list of a source's inputs, and `source.parquet`, where a cache keeps it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import CacheError
from ...extras import require_extra
from ...images.packed_names import Names
from ...images.scan import path_to_id
from ..folder import CacheFolder, PendingFile
from ..parquet_files import most_bytes, parquet_bytes, parse_columns

SOURCE = "source.parquet"
MISSING = -1
_NAMES = ("locator", "size", "mtime_ns", "offset", "container", "error")


@dataclass(frozen=True)
class Listing:
    """Columns over the N inputs in the order of the plan.

    Attributes:
        locators: where each lies, relative to the source: a path, or that of its container, a slash and its name there.
            No two are equal. Any sequence is taken, and kept as `Names`.
        sizes: bytes, int64, `MISSING` where they are not known beforehand.
        mtimes: nanoseconds, int64, `MISSING` where there are none. They differ between machines and are not hashed.
        offsets: where its bytes begin in its container, or its row there; int64.
        containers: number of its container, int32, -1 for a file of its own.
        container_names: of the containers, in their order.
        errors: why inputs cannot be read, by ordinal, as far as listing them has shown.
    """

    locators: Sequence[bytes]
    sizes: np.ndarray
    mtimes: np.ndarray
    offsets: np.ndarray
    containers: np.ndarray
    container_names: list[bytes] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.locators, Names):
            object.__setattr__(self, "locators", Names(self.locators))

    def __len__(self) -> int:
        return len(self.locators)

    @property
    def names(self) -> Names:
        """The locators."""
        assert isinstance(self.locators, Names)
        return self.locators

    @staticmethod
    def of_files(
        locators: Sequence[bytes], sizes: np.ndarray, mtimes: np.ndarray, errors: dict[int, str] | None = None
    ) -> Listing:
        """Files that are inputs themselves."""
        n = len(locators)
        return Listing(locators, sizes, mtimes, np.zeros(n, np.int64), np.full(n, -1, np.int32), [], errors or {})

    def id(self, i: int) -> str:
        """The locator as text."""
        return path_to_id(self.locators[i])

    def tasks(self, most: int) -> list[tuple[int, int]]:
        """First and stop of each task: at most `most` inputs, and never of two containers."""
        cuts = np.flatnonzero(np.diff(self.containers)) + 1
        starts = [0, *cuts.tolist()]
        stops = [*cuts.tolist(), len(self)]
        return [
            (at, min(at + most, stop))
            for start, stop in zip(starts, stops, strict=True)
            for at in range(start, stop, most)
        ]

    def digest(self) -> str:
        """SHA-256 (hex) of names, places and sizes, but not of times."""
        digest = hashlib.sha256()
        for names in (self.names, Names(self.container_names)):
            # lengths first: no name can be taken for two
            digest.update(np.ascontiguousarray(names.lengths, dtype="<i8").data)
            digest.update(names.joined())
        for column in (self.sizes, self.offsets, self.containers):
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
        return digest.hexdigest()

    def save(self, folder: CacheFolder, name: str = SOURCE) -> None:
        """Write the list, in place of what a run that was killed while planning may have left."""
        pa = require_extra("pyarrow")
        containers = pa.array(self.containers, pa.int32(), mask=self.containers < 0)
        columns = {
            "locator": self.names.arrow().cast(pa.binary()),
            "size": pa.array(self.sizes, pa.int64()),
            "mtime_ns": pa.array(self.mtimes, pa.int64()),
            "offset": pa.array(self.offsets, pa.int64()),
            "container": pa.array(self.container_names, pa.binary()).take(containers),
            "error": pa.array([self.errors.get(i) for i in range(len(self))], pa.string())
            if self.errors
            else pa.nulls(len(self), pa.string()),
        }
        PendingFile(folder, name, [parquet_bytes(pa.table(columns))]).replace()


def load_listing(folder: CacheFolder, name: str, sha256: str, count: int) -> Listing:
    """Read the list of `count` inputs back.

    Raises:
        CacheError: it is missing, damaged, or does not match `sha256`, the plan's hash of it.
    """
    path = folder.path / name
    way_out = "the cache command writes it anew from the same inputs"
    try:
        listing = _listing(parse_columns(folder.read(name, most_bytes(count)), path, _schema()))
    except (CacheError, OSError, ValueError) as e:
        why = "it is missing" if isinstance(e, FileNotFoundError) else str(e)
        raise CacheError(f"{path} is damaged ({why}): {way_out}") from e
    if listing.digest() != sha256:
        raise CacheError(f"{path} is damaged (it does not match the hash in plan.json): {way_out}")
    return listing


def _schema() -> Any:
    pa = require_extra("pyarrow")
    types = (pa.binary(), pa.int64(), pa.int64(), pa.int64(), pa.binary(), pa.string())
    return pa.schema([pa.field(name, kind) for name, kind in zip(_NAMES, types, strict=True)])


def _listing(columns: Iterable[Any]) -> Listing:
    """Of the columns of the file, in their order, none of which is kept longer than it takes."""
    made: dict[str, Any] = {}
    container_names: list[bytes] = []
    errors: dict[int, str] = {}
    for name, column in zip(_NAMES, columns, strict=True):
        if name not in ("container", "error") and column.null_count:
            raise ValueError("a value is missing")
        if name == "locator":
            made[name] = Names.of_arrow(column)
        elif name == "container":
            # in the order of their first use
            containers = column.dictionary_encode().unify_dictionaries().chunks
            numbers = [chunk.indices.fill_null(-1).to_numpy() for chunk in containers]
            made[name] = np.concatenate([np.zeros(0, np.int32), *numbers]).astype(np.int32)
            container_names = containers[0].dictionary.to_pylist() if containers else []
        elif name == "error":
            if column.null_count < len(column):
                errors = {i: text for i, text in enumerate(column.to_pylist()) if text is not None}
        else:
            made[name] = column.to_numpy()
    names, sizes, mtimes, offsets, numbers = (made[name] for name in _NAMES[:5])
    return Listing(names, sizes, mtimes, offsets, numbers, container_names, errors)


def examples(kind: str, names: Sequence[str]) -> list[str]:
    """A line that counts and shows a few of `names`; none if there are none."""
    if not names:
        return []
    shown = ", ".join(repr(name) for name in names[:3])
    return [f"{len(names)} {kind}: {shown}{', ...' if len(names) > 3 else ''}"]
