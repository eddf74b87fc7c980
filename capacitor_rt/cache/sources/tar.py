"""WebDataset tar files: the images of each, with what lies beside them under the same key."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CacheError, ImageError, InputError
from ...images.scan import path_to_id
from . import tar_list
from .columns import (
    CAPTION,
    LABEL,
    Column,
    Columns,
    ColumnsRequest,
    Table,
    caption_text,
    numbered,
    parse_json,
    text_of,
    typed,
    whole_number,
)
from .containers import Containers, LocalFiles
from .listing import MISSING, Listing, examples
from .remote import Files, find_files
from .spans import RemoteSpans

SAMPLE = 1000
"""Inputs whose JSON is looked at to find the types of columns."""
LISTERS = 16
"""Remote tar files that are listed side by side."""


@dataclass(frozen=True)
class TarSource:
    """Members of tar files below a folder or a URL.

    Attributes:
        mtimes: of the tar files, by name.
    """

    files: Files
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
        return self.files.why_gone()


class TarReader:
    """Reads members of tar files. Threads may share it."""

    def __init__(self, source: TarSource):
        self.listing = source.listing
        self.members = _members_of(source.files, source.mtimes)

    def name(self, ordinal: int) -> str:
        return self.listing.id(ordinal)

    def expect(self, ordinals: Iterable[int]) -> None:
        """These will be read soon."""
        if isinstance(self.members, RemoteSpans):
            self.members.expect(map(self._place, ordinals))

    def fetch_at_most(self, nbytes: int) -> None:
        """Begin no more while it holds so much."""
        if isinstance(self.members, RemoteSpans):
            self.members.most = min(self.members.most, nbytes)

    def read(self, ordinal: int) -> bytes:
        return self.members.read(*self._place(ordinal))

    def _place(self, ordinal: int) -> tuple[bytes, int, int]:
        listing = self.listing
        container = listing.container_names[listing.containers[ordinal]]
        return container, int(listing.offsets[ordinal]), int(listing.sizes[ordinal])

    def sample(self, ordinal: int, nbytes: int) -> bytes | None:
        if not isinstance(self.members, Containers):
            return None
        name, offset, size = self._place(ordinal)
        return self.members.read(name, offset + max(0, (size - nbytes) // 2), min(size, nbytes))


def _members_of(files: Files, mtimes: dict[bytes, int]) -> Containers | RemoteSpans:
    """What reads members of tar files."""
    return Containers(files.root, mtimes) if isinstance(files, LocalFiles) else RemoteSpans(files, mtimes)


def tar_source(
    src: Path | str, out: Path, request: ColumnsRequest, planned: Callable[[], Listing | None] = lambda: None
) -> TarSource:
    """The images of tar files: a file, a folder of them, or a pattern, of a URL too.

    A member is an image if all of its name behind the first dot is an image's extension, as WebDataset has it.

    Args:
        planned: the list of the plan that is there. A remote tar file of the same time is not read again to be listed.

    Raises:
        CacheError: there are none, or a tar file is damaged, cut short or compressed.
    """
    files, names = find_files(src, ".tar", out)
    wanted = tar_list.extensions(request)
    remote = not isinstance(files, LocalFiles)
    before = _planned_members(files, planned() if remote else None)

    def one(name: bytes) -> tar_list.Members:
        if name in before:
            return before[name]
        return tar_list.members(files, name, wanted, keep=remote)

    with ThreadPoolExecutor(LISTERS if remote else 1, thread_name_prefix="list") as pool:
        found = list(pool.map(one, names))
    if not any(members.names for members in found):
        ignored = sum((members.ignored for members in found), Counter[str]())
        held = ", ".join(f"{n} .{ext}" for ext, n in ignored.most_common(5))
        raise CacheError(
            f"no images in the {len(names)} tar files of {os.fspath(src)!r}" + (f": they hold {held}" if held else "")
        )
    mtimes = {name: members.mtime for name, members in zip(names, found, strict=True)}
    kept = [(name, members) for name, members in zip(names, found, strict=True) if members.names]
    listing = _listing(kept)
    columns = Columns()
    if request:
        beside = [members.beside for _, members in kept]
        columns = _TarColumns(files, listing, mtimes, beside, request).columns()
    notes = []
    ignored = sum((members.ignored for members in found), Counter[str]())
    if ignored:
        kinds = ", ".join(f".{ext} {n}" for ext, n in ignored.most_common(5))
        notes.append(f"left out, as they are no images: {kinds}")
    return TarSource(files, listing, columns, mtimes, notes)


def _listing(kept: list[tuple[bytes, tar_list.Members]]) -> Listing:
    locators = [name + b"/" + member for name, members in kept for member in members.names]
    if len(set(locators)) < len(locators):
        (twice, _), *_ = Counter(locators).most_common(1)
        raise CacheError(f"{path_to_id(twice)!r} is there twice: give members of a tar file names of their own")
    counts = [len(members.names) for _, members in kept]
    return Listing(
        locators,
        np.array([size for _, members in kept for size in members.sizes], np.int64),
        np.repeat(np.array([members.mtime for _, members in kept], np.int64), counts),
        np.array([offset for _, members in kept for offset in members.offsets], np.int64),
        np.repeat(np.arange(len(kept), dtype=np.int32), counts),
        [name for name, _ in kept],
    )


def _planned_members(files: Files, planned: Listing | None) -> dict[bytes, tar_list.Members]:
    """The members of those remote tar files that are, by their time, what they were when a cache was planned."""
    found: dict[bytes, tar_list.Members] = {}
    if planned is None:
        return found
    cuts = np.flatnonzero(np.diff(planned.containers)) + 1
    for first, stop in itertools.pairwise([0, *cuts.tolist(), len(planned)]):
        if planned.containers[first] < 0:
            continue
        name, mtime = planned.container_names[planned.containers[first]], int(planned.mtimes[first])
        try:
            size, now = files.info(name)
        except KeyError:
            continue
        begin, sizes = planned.offsets[first:stop], planned.sizes[first:stop]
        names = [locator.removeprefix(name + b"/") for locator in planned.locators[first:stop]]
        if now == mtime != MISSING and int((begin + sizes).max()) <= size:
            found[name] = tar_list.Members(mtime, names, sizes.tolist(), begin.tolist())
    return found


class _TarColumns:
    """Args: beside: of each container, what lies beside each image; None where it is listed when it is needed."""

    def __init__(
        self,
        files: Files,
        listing: Listing,
        mtimes: dict[bytes, int],
        beside: list[list[tar_list.Beside] | None],
        request: ColumnsRequest,
    ):
        self.source, self.members = files, _members_of(files, mtimes)
        self.listing, self.beside, self.request = listing, beside, request
        self.firsts = np.searchsorted(listing.containers, np.arange(len(beside)))
        self.found: list[Column] = []
        self.fixed: dict[str, list[Any]] = {}
        self.names: list[str] | None = None
        self.late: tuple[int, list[tar_list.Beside]] = (-1, [])

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
        pairs = [(c, k, row) for c, rows in enumerate(self.beside) if rows is not None for k, row in enumerate(rows)]
        missing = [self.listing.id(int(self.firsts[c]) + k) for c, k, row in pairs if extension not in row]
        if not pairs:
            # all of it was there when the cache was planned
            return
        if len(missing) == len(pairs) or (missing and what == "label"):
            lines = examples(f"inputs have no .{extension} beside them", missing)
            raise CacheError("; ".join(lines) + f": give a {what} to every image, or a table")

    def _bytes(self, i: int, extension: str) -> bytes | None:
        place = self._beside(i).get(extension)
        if place is None or isinstance(place, bytes):
            return place
        where = f"the .{extension} of {self.listing.id(i)!r}"
        if not 0 < place[1] <= tar_list.MAX_BESIDE:
            if not place[1]:
                return b""
            raise CacheError(f"{where} has {place[1]} bytes, more than {tar_list.MAX_BESIDE}")
        try:
            return self.members.read(self.listing.container_names[self.listing.containers[i]], *place)
        except ImageError as e:
            raise CacheError(f"{where} cannot be read: {e}") from e

    def _beside(self, i: int) -> tar_list.Beside:
        number = int(self.listing.containers[i])
        rows = self.beside[number]
        if rows is None:
            if self.late[0] != number:
                name = self.listing.container_names[number]
                again = tar_list.members(self.source, name, tar_list.extensions(self.request), keep=True)
                self.late = number, again.beside or []
            rows = self.late[1]
        at = i - int(self.firsts[number])
        if at >= len(rows):
            raise CacheError(f"{self.listing.id(i)!r} is not where it was when the cache was planned")
        return rows[at]

    def _label(self, i: int) -> int:
        extension = self.request.labels or ""
        data = self._bytes(i, extension) or b""
        try:
            value = parse_json(data) if extension == "json" else data.decode()
        except ValueError:
            value = None
        number = whole_number(value.get("label") if isinstance(value, dict) else value)
        if number is None:
            raise CacheError(
                f"the .{extension} of {self.listing.id(i)!r} holds {data[:40]!r}, no whole number: give a table"
            )
        return number

    def _caption(self, i: int) -> str | None:
        extension = self.request.captions or ""
        data = self._bytes(i, extension)
        where = f"{self.listing.id(i)} (.{extension})"
        return None if data is None else caption_text(data, "json" if extension == "json" else "txt", where)

    def _json(self, i: int) -> dict[str, Any]:
        data = self._bytes(i, "json")
        try:
            value = parse_json(data) if data else {}
        except ValueError as e:
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
        return text_of(value)
    raise CacheError(f"column {column.name!r} of {where()!r} is {str(value)[:40]!r}, and {column.kind} before")
