"""Parquet files with a column of images, such as those of data sets on the Hugging Face hub."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...errors import CacheError, ImageError, InputError
from ...extras import require_extra
from ...images.packed_names import Names
from ...images.reasons import EMPTY, UNREADABLE
from .columns import Columns, ColumnsRequest
from .listing import MISSING, Listing
from .parquet_columns import ParquetColumns, wanted_columns
from .parquet_groups import RowGroup
from .parquet_opening import open_parquet, reading
from .remote import Files, find_files

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "picture")
GROUPS = 2
"""Row groups that one reader streams at a time."""


@dataclass(frozen=True)
class ParquetSource:
    """Rows of Parquet files below a folder.

    Attributes:
        column: of the images: binary, or a struct with `bytes`.
        groups: of each container (a row group): the file, the group's number, its first row, and the file's time.
    """

    files: Files
    listing: Listing
    columns: Columns
    column: str
    groups: list[tuple[bytes, int, int, int]]
    notes: list[str] = field(default_factory=list)
    kind: str = "parquet"
    is_streaming: ClassVar[bool] = True

    def fields(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": len(self.listing), "sha256": self.listing.digest()}

    def open(self) -> ParquetReader:
        return ParquetReader(self)

    def why_gone(self) -> str | None:
        return self.files.why_gone()


class ParquetReader:
    """Reads images of Parquet rows. Threads may share it.

    A row group is streamed, a few rows at a time, from its first row to the last that is wanted: rows that are passed
    are kept if they are expected. So reading in order reads a group once, whatever its size, and holds the rows that it
    expects, `BATCH_ROWS` more (fewer if they are large), and a page of the file. Workers share the groups out, not the
    rows of one, as far as their ring holds more groups than they are.
    """

    def __init__(self, source: ParquetSource):
        self.source = source
        self._expected: set[int] = set()
        self._streams: OrderedDict[int, RowGroup] = OrderedDict()
        self._lock = threading.Lock()

    def name(self, ordinal: int) -> str:
        return self.source.listing.id(ordinal)

    def expect(self, ordinals: Iterable[int]) -> None:
        """These will be read soon."""
        with self._lock:
            self._expected.update(ordinals)

    def read(self, ordinal: int) -> bytes:
        listing = self.source.listing
        container = int(listing.containers[ordinal])
        row = int(listing.offsets[ordinal]) - self.source.groups[container][2]
        with self._lock:
            stream = self._streams.get(container) or self._row_group(container, ordinal - row)
            self._streams[container] = stream
            self._streams.move_to_end(container)
            while len(self._streams) > GROUPS:
                self._streams.popitem(last=False)
        with stream.lock:
            value = stream.take(row, self._expected)
            self._expected.discard(ordinal)
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                raise ImageError(UNREADABLE, "the row has the path of an image and not its bytes")
            value = value.get("bytes")
        if not value:
            raise ImageError(EMPTY, "the row has no image")
        return value

    def sample(self, ordinal: int, nbytes: int) -> None:
        return None

    def _row_group(self, container: int, first: int) -> RowGroup:
        source = self.source
        name, number, _, mtime = source.groups[container]
        rows = int(np.searchsorted(source.listing.containers, container, "right")) - first
        return RowGroup(source.files, name, number, mtime, source.column, first, rows)


def parquet_source(src: Path | str, out: Path, request: ColumnsRequest, column: str | None = None) -> ParquetSource:
    """The images of Parquet files: a file, a folder of them, or a pattern. A task never spans two row groups.

    Args:
        column: of the images; None: the one that is named so or has the type of images.

    Raises:
        CacheError: there are none, a file is damaged, or the files have different columns.
    """
    files, names = find_files(src, ".parquet", out)
    groups: list[tuple[bytes, int, int, int]] = []
    containers: list[bytes] = []
    counts: list[int] = []
    schema: Any = None
    for name in names:
        path = files.shown(name)
        with reading(path):
            size, mtime = files.info(name)
            with open_parquet(files, name) as file:
                if schema is None:
                    schema = file.schema_arrow
                    column = column or _image_column(schema, path)
                _check_columns(file.schema_arrow, schema, column or "", wanted_columns(request), path)
                first = 0
                for number in range(file.num_row_groups):
                    count = file.metadata.row_group(number).num_rows
                    if not 0 <= count <= size:
                        raise CacheError(f"{path} is damaged: it has {size} bytes, and a row group of {count} rows")
                    groups.append((name, number, first, mtime))
                    # the size belongs to the name: another file of that name is another container
                    containers.append(name + b"?size=%d&row_group=%d" % (size, number))
                    counts.append(count)
                    first += count
    total = sum(counts)
    if not total:
        raise CacheError(f"the {len(names)} Parquet files of {os.fspath(src)!r} have no rows")
    offsets = np.concatenate([np.arange(g[2], g[2] + n) for g, n in zip(groups, counts, strict=True)]).astype(np.int64)
    numbers = np.repeat(np.arange(len(groups)), counts).astype(np.int32)
    spans = [(name, first, first + n) for (name, _, first, _), n in zip(groups, counts, strict=True)]
    locators = Names(name + b"/%07d" % row for name, first, stop in spans for row in range(first, stop))
    times = np.array([g[3] for g in groups], np.int64)[numbers]
    listing = Listing(locators, np.full(total, MISSING, np.int64), times, offsets, numbers, containers)
    columns = ParquetColumns(files, groups, listing, schema, request).columns() if request else Columns()
    return ParquetSource(files, listing, columns, column or "", groups)


def _check_columns(schema: Any, first: Any, image: str, wanted: list[tuple[str, str]], path: str) -> None:
    """Refuse a file whose columns are not those of the first."""
    if schema.names.count(image) != 1:
        raise CacheError(f"{path} has no column {image!r}, or two")
    kind = schema.field(image).type
    if not _is_image(kind):
        raise CacheError(f"{path}: column {image!r} holds no images: it is of type {str(kind)[:80]}")
    for name, column in wanted:
        if column not in first.names:
            held = ", ".join(first.names[:20])
            raise InputError(f"the Parquet files have no column {column!r} for {name}: they have {held}")
        if schema.names.count(column) != 1 or schema.field(column).type != first.field(column).type:
            raise CacheError(f"{path}: its column {column!r} is not the one of the files before it, or is there twice")


def _is_image(kind: Any) -> bool:
    if require_extra("pyarrow").types.is_struct(kind):
        return any(f.name == "bytes" and _is_binary(f.type) for f in kind)
    return _is_binary(kind)


def _image_column(schema: Any, path: str) -> str:
    candidates = [f.name for f in schema if _is_image(f.type)]
    named = [name for name in IMAGE_NAMES if name in candidates]
    if named or len(candidates) == 1:
        return (named or candidates)[0]
    held = ", ".join(schema.names[:20])
    raise CacheError(f"{path} has no column of images that is named so: its columns are {held}")


def _is_binary(kind: Any) -> bool:
    pa = require_extra("pyarrow")
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
