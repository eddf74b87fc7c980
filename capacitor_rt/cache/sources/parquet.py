"""Parquet files with a column of images, such as those of data sets on the Hugging Face hub."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CacheError, CapacitorError, ImageError, InputError
from ...extras import require_extra
from ...images.reasons import EMPTY, UNREADABLE
from ..failures import CHANGED, IO_ERROR, OUT_OF_MEMORY
from .columns import CAPTION, LABEL, MAX_LABEL_NAME, Column, Columns, ColumnsRequest, parse_json, text_of
from .containers import LocalFiles
from .listing import MISSING, Listing
from .names import Names
from .remote import Files, find_files

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "picture")
GROUPS = 2
"""Row groups that one reader streams at a time."""
BATCH_ROWS = 16
BATCH_BYTES = 16 << 20
"""Of the images of a batch, unless it is a single one."""
BUFFER_BYTES = 1 << 20


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
    is_streaming: bool = True

    def fields(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": len(self.listing), "sha256": self.listing.digest()}

    def open(self) -> ParquetReader:
        return ParquetReader(self)

    def why_gone(self) -> str | None:
        return self.files.why_gone()


class ParquetReader:
    """Reads images of Parquet rows. Threads may share it.

    A row group is streamed, a few rows at a time, from its first row to the last that is wanted: rows that are passed
    are kept if they are expected. So whoever reads in order reads a group once, whatever its size, and holds the rows
    that it expects, `BATCH_ROWS` more (fewer if they are large), and a page of the file. Workers share the groups out,
    not the rows of one, as far as their ring holds more groups than they are.
    """

    def __init__(self, source: ParquetSource):
        self.source = source
        self._expected: set[int] = set()
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        self._lock = threading.Lock()

    def name(self, ordinal: int) -> str:
        return self.source.listing.id(ordinal)

    def expect(self, ordinals: Iterable[int]) -> None:
        """These will be read soon."""
        with self._lock:
            self._expected.update(ordinals)

    def read(self, ordinal: int) -> bytes:
        source = self.source
        number = int(source.listing.containers[ordinal])
        row = int(source.listing.offsets[ordinal]) - source.groups[number][2]
        with self._lock:
            stream = self._streams.setdefault(number, _Stream(source, number, ordinal - row))
            self._streams.move_to_end(number)
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


class _Stream:
    """The images of a row group, from the first on.

    Args:
        first: ordinal of its first row.
    """

    def __init__(self, source: ParquetSource, number: int, first: int):
        self.source = source
        self.number = number
        self.first = first
        self.rows = int(np.searchsorted(source.listing.containers, number, "right")) - first
        self.lock = threading.Lock()
        self._batches: Iterator[Any] | None = None
        # the rows that were read last, and those before them that are expected
        self._begin = 0
        self._rows: Any = ()
        self._kept: dict[int, Any] = {}

    def take(self, row: int, expected: set[int]) -> Any:
        """What the group has in a row; what is passed and expected is kept. Under the lock."""
        if row in self._kept:
            return self._kept.pop(row)
        if row < self._begin:
            self._batches = None
        if self._batches is None:
            self._batches, self._begin, self._rows = self._open(), 0, ()
        while row >= self._begin + len(self._rows):
            for at in range(len(self._rows)):
                if self.first + self._begin + at in expected and self._begin + at not in self._kept:
                    self._kept[self._begin + at] = self._rows[at].as_py()
            self._begin += len(self._rows)
            self._rows = self._next(row)
        value = self._rows[row - self._begin].as_py()
        if row + 1 == self.rows:
            # the last: what lies before it and is expected still was kept
            for at in range(len(self._rows) - 1):
                if self.first + self._begin + at in expected:
                    self._kept[self._begin + at] = self._rows[at].as_py()
            self._batches, self._rows, self._begin = None, (), self.rows
        return value

    def _open(self) -> Iterator[Any]:
        name, group, _, mtime = self.source.groups[self.number]
        with self._failing():
            if self.source.files.has_changed(name, mtime):
                raise ImageError(CHANGED, "its file is another one than when it was listed")
            # not the whole column at once, which is what pyarrow prefers
            handle = self.source.files.open(name)
            file = _parquet_file(handle, pre_buffer=False, buffer_size=BUFFER_BYTES)
            columns = [self.source.column]
            rows = _batch_rows(file, handle, group, self.source.column)
            return file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)

    def _next(self, row: int) -> Any:
        assert self._batches is not None
        try:
            with self._failing():
                batch = next(self._batches, None)
            if batch is None:
                raise ImageError(UNREADABLE, f"its row group ends before row {row}, of which its file tells")
        except ImageError:
            self._batches, self._rows = None, ()
            raise
        return batch.column(0)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What a file system raises, as a failure of the image."""
        what = f"row group {self.source.groups[self.number][1]}"
        try:
            yield
        except ImageError:
            raise
        except FileNotFoundError as e:
            raise ImageError(CHANGED, "its file was there when it was listed, and is gone") from e
        except MemoryError as e:
            raise ImageError(OUT_OF_MEMORY, f"no memory for {what}") from e
        except Exception as e:
            # a network's libraries have errors of their own; on a disk, what is no error of the system's is damage
            damaged = isinstance(self.source.files, LocalFiles) and getattr(e, "errno", None) is None
            reason = UNREADABLE if damaged else IO_ERROR
            raise ImageError(reason, f"{what} cannot be read: {type(e).__name__}: {str(e)[:200]}") from e


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
        with _reading(path):
            size, mtime = files.info(name)
            with _open(files, name) as file:
                if schema is None:
                    schema = file.schema_arrow
                    column = column or _image_column(schema, path)
                _check_columns(file.schema_arrow, schema, column or "", _wanted(request), path)
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
    columns = _ParquetColumns(files, groups, listing, schema, request).columns() if request else Columns()
    return ParquetSource(files, listing, columns, column or "", groups)


def _batch_rows(file: Any, handle: Any, group: int, column: str) -> int:
    """How many rows of a group are read at a time: as many as `BATCH_BYTES` may be expected to hold.

    Args:
        handle: of the file, which nobody reads meanwhile.
    """
    found = file.metadata.row_group(group)
    chunks = [found.column(number) for number in range(found.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column]
    mean = sum(max(chunk.total_uncompressed_size, 0) for chunk in chunks) / max(found.num_rows, 1)
    # what all rows repeat is stored once, so that a small file becomes a large batch
    most = max([mean, 1, *(_dictionary_bytes(handle, chunk) for chunk in chunks)])
    return int(min(max(BATCH_BYTES // most, 1), BATCH_ROWS))


def _dictionary_bytes(handle: Any, chunk: Any) -> int:
    """Bytes of the dictionary of a column chunk, as the header of its page says; 0 where it has none."""
    if not chunk.has_dictionary_page or chunk.dictionary_page_offset is None:
        return 0
    handle.seek(chunk.dictionary_page_offset)
    head = handle.read(16)
    # Thrift's compact form: kind and size of the page come first, a byte that says so before either
    at, number = 0, 0
    try:
        for _ in range(2):
            if head[at] != 0x15:
                return BATCH_BYTES
            at, number, shift = at + 1, 0, 0
            while True:
                number |= (head[at] & 0x7F) << shift
                at, shift = at + 1, shift + 7
                if head[at - 1] < 0x80:
                    break
    except IndexError:
        return BATCH_BYTES
    return number >> 1


def _open(files: Files, name: bytes, **options: Any) -> Any:
    return _parquet_file(files.open(name), **options)


def _parquet_file(handle: Any, **options: Any) -> Any:
    # by handle: pyarrow takes no path that is not UTF-8
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    return pq.ParquetFile(pa.PythonFile(handle, mode="r"), **{"pre_buffer": False} | options)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Whatever is wrong with a file, or with what its columns hold, as CacheError."""
    pa = require_extra("pyarrow")
    try:
        yield
    except CapacitorError:
        raise
    except (OSError, pa.ArrowException, ValueError, LookupError, OverflowError, MemoryError) as e:
        raise CacheError(f"{path} cannot be read as Parquet: {str(e)[:200] or type(e).__name__}") from e


def _wanted(request: ColumnsRequest) -> list[tuple[str, str]]:
    """Names of the columns that are kept, each with the column of the files that it is made of."""
    pairs = [(LABEL, request.labels), (CAPTION, request.captions), *((name, name) for name in request.keep)]
    return [(name, column) for name, column in pairs if column is not None]


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


class _ParquetColumns:
    def __init__(
        self,
        files: Files,
        groups: list[tuple[bytes, int, int, int]],
        listing: Listing,
        schema: Any,
        request: ColumnsRequest,
    ):
        self.files, self.groups, self.listing, self.schema, self.request = files, groups, listing, schema, request
        self.sources: dict[str, str] = {}
        self.found: list[Column] = []
        self.names: list[str] | None = None
        self.numbers: dict[str, int] = {}

    def columns(self) -> Columns:
        for name, column in _wanted(self.request):
            self.sources[name] = column
            kind = "string" if name == CAPTION else self._kind(column)
            if name == LABEL:
                self.names = self._label_names(column)
                if kind == "string":
                    self.names = self._all_names(column)
                    self.numbers = {text: i for i, text in enumerate(self.names)}
                elif kind != "int64":
                    raise InputError(
                        f"column {column!r} holds no labels: it is of type {self.schema.field(column).type}"
                    )
                kind = "int64"
            self.found.append(Column(name, kind, f"parquet:{column}"))
        return Columns(tuple(self.found), self.names, self.read)

    def read(self, first: int, stop: int) -> dict[str, list[Any]]:
        number = int(self.listing.containers[first])
        name, group, start, _ = self.groups[number]
        at = int(self.listing.offsets[first]) - start
        with _reading(self.files.shown(name)):
            with _open(self.files, name) as file:
                # in this thread, as of a table of the cache
                columns = sorted({*self.sources.values()})
                table = file.read_row_group(group, columns=columns, use_threads=False).slice(at, stop - first)
            if len(table) != stop - first:
                raise ValueError(f"row group {group} has not as many rows as it says")
            lists = {name: table[name].to_pylist() for name in self.sources.values()}
        values: dict[str, list[Any]] = {}
        for column in self.found:
            found = lists[self.sources[column.name]]
            if column.name == LABEL:
                if self.numbers:
                    found = [None if v is None else self.numbers.get(text_of(v)) for v in found]
                if any(v is None for v in found):
                    raise CacheError(f"{self.listing.id(first + found.index(None))!r} has no label: label every image")
            elif column.kind == "string":
                found = [None if v is None else text_of(v) for v in found]
            elif column.kind == "float64":
                found = [None if v is None else float(v) for v in found]
            values[column.name] = found
        return values

    def _kind(self, column: str) -> str:
        types, kind = require_extra("pyarrow").types, self.schema.field(column).type
        if types.is_boolean(kind):
            return "bool"
        if types.is_integer(kind) and not types.is_uint64(kind):
            return "int64"
        return "float64" if types.is_floating(kind) else "string"

    def _label_names(self, column: str) -> list[str] | None:
        """Names of the classes, where the file's metadata of the hub has them."""
        try:
            info = parse_json((self.schema.metadata or {})[b"huggingface"])
            names = info["info"]["features"][column]["names"]
        except (KeyError, ValueError, TypeError):
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return None
        return [text_of(name, MAX_LABEL_NAME) for name in names]

    def _all_names(self, column: str) -> list[str]:
        found: set[str] = set()
        for name in dict.fromkeys(g[0] for g in self.groups):
            with _reading(self.files.shown(name)), _open(self.files, name) as file:
                values = file.read(columns=[column], use_threads=False)[column].unique().to_pylist()
            found.update(text_of(v, MAX_LABEL_NAME) for v in values if v is not None)
        return sorted(found)
