"""WebDataset tar files: the images of each, with what lies beside them under the same key."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CacheError, ImageError, InputError
from ...images.scan import EXTENSIONS, path_to_id
from .columns import CAPTION, LABEL, Column, Columns, ColumnsRequest, Table, caption_text, numbered, typed
from .containers import Containers, find_containers
from .listing import Listing, examples

SAMPLE = 1000
"""Inputs whose JSON is looked at to find the types of columns."""
MAX_BESIDE = 1 << 20


@dataclass(frozen=True)
class TarSource:
    """Members of tar files below a folder.

    Attributes:
        mtimes: of the tar files, by name.
    """

    root: bytes
    listing: Listing
    columns: Columns
    mtimes: dict[bytes, int]
    notes: list[str] = field(default_factory=list)
    kind: str = "tar"

    def fields(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": len(self.listing), "sha256": self.listing.digest()}

    def open(self) -> TarReader:
        return TarReader(self)

    def why_gone(self) -> str | None:
        return None if os.path.isdir(self.root) else f"{path_to_id(self.root)} went away during the run"


class TarReader:
    """Reads members of tar files. Threads may share it."""

    def __init__(self, source: TarSource):
        self.listing = source.listing
        self.files = Containers(source.root, source.mtimes)

    def name(self, ordinal: int) -> str:
        return self.listing.id(ordinal)

    def read(self, ordinal: int) -> bytes:
        listing = self.listing
        container = listing.container_names[listing.containers[ordinal]]
        return self.files.read(container, int(listing.offsets[ordinal]), int(listing.sizes[ordinal]))


@dataclass
class _Found:
    """What the tar files hold: the images, and the wanted members beside each, by extension."""

    locators: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    containers: list[int] = field(default_factory=list)
    beside: list[dict[str, tuple[int, int]]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def tar_source(src: Path, out: Path, request: ColumnsRequest) -> TarSource:
    """The images of tar files: a file, a folder of them, or a pattern.

    A member is an image if all of its name behind the first dot is an image's extension, as WebDataset has it.

    Raises:
        CacheError: there are none, or a tar file is damaged, cut short or compressed.
    """
    root, names = find_containers(src, ".tar", out)
    wanted = _extensions(request)
    found = _Found()
    mtimes: dict[bytes, int] = {}
    kept: list[bytes] = []
    for name in names:
        before = len(found.locators)
        mtimes[name] = _list(root, name, len(kept), wanted, found)
        if len(found.locators) > before:
            kept.append(name)
    if not found.locators:
        held = ", ".join(f"{n} .{ext}" for ext, n in found.ignored.most_common(5))
        raise CacheError(
            f"no images in the {len(names)} tar files of {os.fspath(src)!r}" + (f": they hold {held}" if held else "")
        )
    if len(set(found.locators)) < len(found.locators):
        (twice, _), *_ = Counter(found.locators).most_common(1)
        raise CacheError(f"{path_to_id(twice)!r} is there twice: give members of a tar file names of their own")
    numbers = np.array(found.containers, np.int32)
    times = np.array([mtimes[kept[c]] for c in found.containers], np.int64)
    sizes, offsets = (np.array(values, np.int64) for values in (found.sizes, found.offsets))
    listing = Listing(found.locators, sizes, times, offsets, numbers, kept)
    columns = _TarColumns(root, listing, mtimes, found.beside, request).columns() if request else Columns()
    notes = []
    if found.ignored:
        kinds = ", ".join(f".{ext} {n}" for ext, n in found.ignored.most_common(5))
        notes.append(f"left out, as they are no images: {kinds}")
    return TarSource(root, listing, columns, mtimes, notes)


def _extensions(request: ColumnsRequest) -> set[str]:
    """Extensions of the members beside images that are wanted."""
    wanted = {"json"} if request.keep else set()
    return wanted | {
        name for name in (request.labels, request.captions) if name and "." not in name and "/" not in name
    }


def _list(root: bytes, name: bytes, number: int, wanted: set[str], found: _Found) -> int:
    """Add the members of one tar file; its time in nanoseconds."""
    path = os.path.join(root, name)
    images: dict[str, list[int]] = {}
    beside: dict[str, dict[str, tuple[int, int]]] = {}
    where = path_to_id(path)
    try:
        info = os.stat(path)
        for member in _members(path, info.st_size):
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}{slash}{stem}"
            if base.startswith("._") or not member.isreg():
                continue
            if f".{extension.lower()}".encode("utf-8", "surrogateescape") in EXTENSIONS:
                images.setdefault(key, []).append(len(found.locators))
                found.locators.append(name + b"/" + member.name.encode("utf-8", "surrogateescape"))
                found.sizes.append(member.size)
                found.offsets.append(member.offset_data)
                found.containers.append(number)
                found.beside.append({})
            elif extension in wanted:
                beside.setdefault(key, {})[extension] = (member.offset_data, member.size)
            else:
                found.ignored[extension] += 1
    except OSError as e:
        raise CacheError(f"cannot read {where}: {e.strerror or e}") from e
    except (tarfile.TarError, ValueError, EOFError) as e:
        raise CacheError(f"{where} cannot be read as an uncompressed tar file ({e}): it is damaged or cut short") from e
    for key, ordinals in images.items():
        for ordinal in ordinals:
            found.beside[ordinal] = beside.get(key, {})
    return info.st_mtime_ns


def _members(path: bytes, size: int) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(os.fsdecode(path), "r:", encoding="utf-8", errors="surrogateescape") as file:
        end = 0
        while (member := file.next()) is not None:
            # the library would keep them all
            file.members = []  # type: ignore[attr-defined]
            end = member.offset_data + member.size
            if end > size or member.size < 0:
                raise tarfile.ReadError(f"{member.name[:80]!r} goes on behind the end of the file")
            yield member
        with open(path, "rb") as raw:
            raw.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            # what the library takes for the end may be a damaged header, or the place where the file was cut
            block = raw.read(tarfile.BLOCKSIZE)
            if block != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end mark at byte {raw.tell() - len(block)}")


class _TarColumns:
    def __init__(
        self,
        root: bytes,
        listing: Listing,
        mtimes: dict[bytes, int],
        beside: list[dict[str, tuple[int, int]]],
        request: ColumnsRequest,
    ):
        self.files = Containers(root, mtimes)
        self.listing, self.beside, self.request = listing, beside, request
        self.found: list[Column] = []
        self.fixed: dict[str, list[Any]] = {}
        self.names: list[str] | None = None

    def columns(self) -> Columns:
        labels, captions, keep = self.request.labels, self.request.captions, self.request.keep
        if labels == "folder":
            raise InputError(
                "labels 'folder' is for folders: give the extension of the members with labels, or a table"
            )
        if labels and "." not in labels:
            self._check_there(labels, "label")
            self.found.append(Column(LABEL, "int64", f"tar:{labels}"))
        elif labels:
            self._of_table(LABEL, labels)
        if captions and "." not in captions:
            self._check_there(captions, "caption")
            self.found.append(Column(CAPTION, "string", f"tar:{captions}"))
        elif captions:
            self._of_table(CAPTION, captions)
        samples = [self._json(i) for i in range(min(len(self.listing), SAMPLE))] if keep else []
        for name in keep:
            values = [row.get(name) for row in samples]
            if all(value is None for value in values):
                raise InputError(f"column {name!r} cannot be kept: no .json beside the first images has it")
            self.found.append(Column(name, typed(values)[0], "tar:json"))
        return Columns(tuple(self.found), self.names, self.read)

    def read(self, first: int, stop: int) -> dict[str, list[Any]]:
        rows: dict[int, dict[str, Any]] = {}
        values: dict[str, list[Any]] = {}
        for column in self.found:
            if column.name in self.fixed:
                values[column.name] = self.fixed[column.name][first:stop]
            elif column.name == LABEL:
                values[column.name] = [self._label(i) for i in range(first, stop)]
            elif column.name == CAPTION:
                values[column.name] = [self._caption(i) for i in range(first, stop)]
            else:
                rows = rows or {i: self._json(i) for i in range(first, stop)}
                values[column.name] = [
                    fitting(rows[i].get(column.name), column, partial(self.listing.id, i)) for i in rows
                ]
        return values

    def _of_table(self, name: str, path: str) -> None:
        table = Table(Path(path))
        ids = [self.listing.id(i) for i in range(len(self.listing))]
        values = table.value(ids, name)
        if name == LABEL:
            values, self.names = numbered(values)
            missing = [id for id, value in zip(ids, values, strict=True) if value is None]
            if missing:
                raise CacheError("; ".join(examples("inputs have no label", missing)) + ": label every image")
        self.fixed[name] = values
        self.found.append(Column(name, "int64" if name == LABEL else "string", table.origin))

    def _check_there(self, extension: str, what: str) -> None:
        missing = [self.listing.id(i) for i, found in enumerate(self.beside) if extension not in found]
        if len(missing) == len(self.beside) or (missing and what == "label"):
            lines = examples(f"inputs have no .{extension} beside them", missing)
            raise CacheError("; ".join(lines) + f": give a {what} to every image, or a table")

    def _bytes(self, i: int, extension: str) -> bytes | None:
        place = self.beside[i].get(extension)
        if place is None:
            return None
        where = f"the .{extension} of {self.listing.id(i)!r}"
        if not 0 < place[1] <= MAX_BESIDE:
            if not place[1]:
                return b""
            raise CacheError(f"{where} has {place[1]} bytes, more than {MAX_BESIDE}")
        try:
            return self.files.read(self.listing.container_names[self.listing.containers[i]], *place)
        except ImageError as e:
            raise CacheError(f"{where} cannot be read: {e}") from e

    def _label(self, i: int) -> int:
        extension = self.request.labels or ""
        data = self._bytes(i, extension) or b""
        try:
            value = json.loads(data) if extension == "json" else int(data)
            return int(value["label"] if isinstance(value, dict) else value)
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise CacheError(
                f"the .{extension} of {self.listing.id(i)!r} holds {data[:40]!r}, no whole number: give a table"
            ) from e

    def _caption(self, i: int) -> str | None:
        extension = self.request.captions or ""
        data = self._bytes(i, extension)
        where = f"{self.listing.id(i)} (.{extension})"
        return None if data is None else caption_text(data, "json" if extension == "json" else "txt", where)

    def _json(self, i: int) -> dict[str, Any]:
        data = self._bytes(i, "json")
        try:
            value = json.loads(data) if data else {}
        except (ValueError, RecursionError) as e:
            raise CacheError(f"the .json of {self.listing.id(i)!r} is no JSON: {e}") from e
        return value if isinstance(value, dict) else {}


def fitting(value: Any, column: Column, where: Any) -> Any:
    """A value of a column whose type is known.

    Raises:
        CacheError: it is of another type.
    """
    if value is None:
        return None
    kind, (found,) = typed([value])
    if kind == column.kind:
        return found
    if column.kind == "float64" and kind == "int64":
        return float(value)
    if column.kind == "string":
        return typed([value, "text"])[1][0]
    raise CacheError(f"column {column.name!r} of {where()!r} is {str(value)[:40]!r}, and {column.kind} before")
