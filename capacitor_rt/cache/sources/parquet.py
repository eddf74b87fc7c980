"""Parquet files with a column of images, such as those of data sets on the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CacheError, ImageError, InputError
from ...extras import require_extra
from ...images.decode import EMPTY, UNREADABLE
from ..failures import CHANGED, IO_ERROR, OUT_OF_MEMORY
from .columns import CAPTION, LABEL, Column, Columns, ColumnsRequest, numbered, typed
from .containers import LocalFiles, find_containers
from .listing import MISSING, Listing
from .remote import RemoteContainers, is_url

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "picture")
Files = LocalFiles | RemoteContainers
GROUPS = 2
"""Row groups whose images one reader keeps."""


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

    def fields(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": len(self.listing), "sha256": self.listing.digest()}

    def open(self) -> ParquetReader:
        return ParquetReader(self)

    def why_gone(self) -> str | None:
        return self.files.why_gone()


class ParquetReader:
    """Reads images of Parquet rows. Threads may share it."""

    def __init__(self, source: ParquetSource):
        self.source = source
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._locks: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    def name(self, ordinal: int) -> str:
        return self.source.listing.id(ordinal)

    def read(self, ordinal: int) -> bytes:
        source = self.source
        number = int(source.listing.containers[ordinal])
        images = self._group(number)
        value = images[int(source.listing.offsets[ordinal]) - source.groups[number][2]].as_py()
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                raise ImageError(UNREADABLE, "the row has the path of an image and not its bytes")
            value = value.get("bytes")
        if not value:
            raise ImageError(EMPTY, "the row has no image")
        return value

    def _group(self, number: int) -> Any:
        with self._lock:
            if number in self._groups:
                self._groups.move_to_end(number)
                return self._groups[number]
            lock = self._locks.setdefault(number, threading.Lock())
        with lock:
            with self._lock:
                if number in self._groups:
                    return self._groups[number]
            images = self._load(number)
            with self._lock:
                self._groups[number] = images
                while len(self._groups) > GROUPS:
                    self._groups.popitem(last=False)
        return images

    def _load(self, number: int) -> Any:
        pa = require_extra("pyarrow")
        name, group, _, mtime = self.source.groups[number]
        try:
            if self.source.files.info(name)[1] != mtime:
                raise ImageError(CHANGED, "its file is another one than when it was listed")
            with _open(self.source.files, name) as file:
                return file.read_row_group(group, columns=[self.source.column])[self.source.column].combine_chunks()
        except MemoryError as e:
            raise ImageError(OUT_OF_MEMORY, f"no memory for row group {group}") from e
        except (OSError, pa.ArrowException, ValueError) as e:
            raise ImageError(IO_ERROR, f"row group {group} cannot be read: {str(e)[:200]}") from e


def parquet_source(src: Path | str, out: Path, request: ColumnsRequest, column: str | None = None) -> ParquetSource:
    """The images of Parquet files: a file, a folder of them, or a pattern. A task never spans two row groups.

    Args:
        column: of the images; None: the one that is named so or has the type of images.

    Raises:
        CacheError: there are none, a file is damaged, or the files have different columns.
    """
    pa = require_extra("pyarrow")
    files, names = _find(src, out)
    groups: list[tuple[bytes, int, int, int]] = []
    containers: list[bytes] = []
    counts: list[int] = []
    schema: Any = None
    for name in names:
        path = files.shown(name)
        try:
            size, mtime = files.info(name)
            with _open(files, name) as file:
                if schema is None:
                    schema = file.schema_arrow
                    column = column or _image_column(schema, path)
                if column not in file.schema_arrow.names:
                    raise CacheError(f"{path} has no column {column!r}")
                first = 0
                for number in range(file.num_row_groups):
                    count = file.metadata.row_group(number).num_rows
                    groups.append((name, number, first, mtime))
                    # the size belongs to the name: another file of that name is another container
                    containers.append(name + b"?size=%d&row_group=%d" % (size, number))
                    counts.append(count)
                    first += count
        except (OSError, pa.ArrowException, ValueError) as e:
            raise CacheError(f"{path} cannot be read as Parquet: {str(e)[:200]}") from e
    total = sum(counts)
    if not total:
        raise CacheError(f"the {len(names)} Parquet files of {os.fspath(src)!r} have no rows")
    offsets = np.concatenate([np.arange(g[2], g[2] + n) for g, n in zip(groups, counts, strict=True)]).astype(np.int64)
    numbers = np.repeat(np.arange(len(groups)), counts).astype(np.int32)
    locators = [groups[c][0] + b"/%07d" % row for c, row in zip(numbers.tolist(), offsets.tolist(), strict=True)]
    times = np.array([g[3] for g in groups], np.int64)[numbers]
    listing = Listing(locators, np.full(total, MISSING, np.int64), times, offsets, numbers, containers)
    columns = _ParquetColumns(files, groups, listing, schema, request).columns() if request else Columns()
    return ParquetSource(files, listing, columns, column or "", groups)


def _find(src: Path | str, out: Path) -> tuple[Files, list[bytes]]:
    text = os.fspath(src)
    if not is_url(text):
        root, names = find_containers(Path(src), ".parquet", out)
        return LocalFiles(root), names
    folder, _, last = text.rpartition("/")
    # a file, a pattern in the last part, or a folder
    named = last.endswith(".parquet")
    files = RemoteContainers(folder if named else text)
    pattern = last if named else "*.parquet"
    found = [name for name in files.found if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)]
    if not found:
        raise CacheError(f"no .parquet files in {text!r}")
    return files, sorted(os.fsencode(name) for name in found)


def _open(files: Files, name: bytes) -> Any:
    # by handle: pyarrow takes no path that is not UTF-8
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    return pq.ParquetFile(pa.PythonFile(files.open(name), mode="r"))


def _image_column(schema: Any, path: str) -> str:
    pa = require_extra("pyarrow")

    def is_image(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(f.name == "bytes" and _is_binary(f.type) for f in kind)
        return _is_binary(kind)

    candidates = [f.name for f in schema if is_image(f.type)]
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
        pairs = [(LABEL, self.request.labels), (CAPTION, self.request.captions), *((n, n) for n in self.request.keep)]
        for name, column in pairs:
            if column is None:
                continue
            if column not in self.schema.names:
                held = ", ".join(self.schema.names[:20])
                raise InputError(f"the Parquet files have no column {column!r} for {name}: they have {held}")
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
        with _open(self.files, name) as file:
            table = file.read_row_group(group, columns=sorted({*self.sources.values()})).slice(at, stop - first)
        values: dict[str, list[Any]] = {}
        for column in self.found:
            found = table[self.sources[column.name]].to_pylist()
            if column.name == LABEL:
                found = [self.numbers.get(v) if self.numbers else v for v in found]
                if any(v is None for v in found):
                    raise CacheError(f"{self.listing.id(first + found.index(None))!r} has no label: label every image")
            elif column.kind == "string":
                found = [None if v is None else typed([v, "text"])[1][0] for v in found]
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
            info = json.loads((self.schema.metadata or {})[b"huggingface"])
            names = info["info"]["features"][column]["names"]
            return [str(name) for name in names]
        except (KeyError, ValueError, TypeError, RecursionError):
            return None

    def _all_names(self, column: str) -> list[str]:
        found: set[str] = set()
        for name in dict.fromkeys(g[0] for g in self.groups):
            with _open(self.files, name) as file:
                found.update(v for v in file.read(columns=[column])[column].unique().to_pylist() if v is not None)
        return numbered(sorted(found))[1] or sorted(found)
