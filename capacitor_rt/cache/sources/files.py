"""Sources of files: a folder with its subfolders, one file, or a list of paths."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CacheError, ImageError
from ...images.reasons import EMPTY, TOO_LARGE, UNREADABLE
from ...images.scan import Scan, path_to_id, scan
from ...strict_json import open_regular
from ..failures import CHANGED, IO_ERROR, OUT_OF_MEMORY, is_for_good
from .columns import Columns, ColumnsRequest, file_columns
from .listing import MISSING, Listing

MAX_FILE_BYTES = 2 << 30
"""A larger file is quarantined: it would be read into memory whole."""
MAX_LIST_BYTES = 8 << 30


@dataclass(frozen=True)
class FileSource:
    """Files below a folder.

    Attributes:
        root: the folder that locators are relative to.
        root_id: device and inode of it when it was listed.
    """

    kind: str
    root: bytes
    listing: Listing
    columns: Columns
    root_id: tuple[int, int] | None
    notes: list[str] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": len(self.listing), "sha256": self.listing.digest()}

    def open(self) -> FileReader:
        return FileReader(self.root, self.listing)

    def why_gone(self) -> str | None:
        if _identity(self.root) == self.root_id:
            return None
        return f"{path_to_id(self.root)} went away during the run"


class FileReader:
    """Reads files below a folder. Threads may share it."""

    def __init__(self, root: bytes, listing: Listing):
        self.root = root
        self.listing = listing

    def name(self, ordinal: int) -> str:
        return self.listing.id(ordinal)

    def read(self, ordinal: int) -> bytes:
        listing = self.listing
        if ordinal in listing.errors:
            raise ImageError(UNREADABLE, listing.errors[ordinal])
        return read_file(os.path.join(self.root, listing.locators[ordinal]), int(listing.sizes[ordinal]))

    def sample(self, ordinal: int, nbytes: int) -> bytes:
        listing = self.listing
        begin = max(0, (int(listing.sizes[ordinal]) - nbytes) // 2)
        return read_part(os.path.join(self.root, listing.locators[ordinal]), begin, nbytes)


def read_part(path: bytes, begin: int, nbytes: int) -> bytes:
    """At most `nbytes` of a regular file from byte `begin` on. Raises ImageError: it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ImageError(UNREADABLE, "not a regular file")
            return os.pread(fd, nbytes, begin)
        finally:
            os.close(fd)
    except OSError as e:
        raise ImageError(IO_ERROR, e.strerror or str(e)) from e


def read_file(path: bytes, size: int) -> bytes:
    """The bytes of a regular file of `size` bytes when it was listed. No path stands in messages.

    Raises:
        ImageError: it cannot be read, or has changed.
    """
    if size > MAX_FILE_BYTES:
        raise ImageError(TOO_LARGE, f"file of {size} bytes: the limit is {MAX_FILE_BYTES}")
    try:
        # O_NONBLOCK: opening a pipe waits for a writer otherwise
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ImageError(UNREADABLE, "not a regular file")
            data = _read_all(fd, size)
        finally:
            os.close(fd)
    except MemoryError as e:
        raise ImageError(OUT_OF_MEMORY, f"no memory for the {size} bytes of the file") from e
    except OSError as e:
        if e.errno == errno.ENOENT:
            raise ImageError(CHANGED, "the file was there when the cache was planned, and is gone") from e
        reason = UNREADABLE if is_for_good(e) else IO_ERROR
        raise ImageError(reason, os.strerror(e.errno) if e.errno else str(e)) from e
    if len(data) != size:
        more = "more than " if len(data) > size else ""
        raise ImageError(CHANGED, f"{more}{min(len(data), size)} bytes now, {size} when the cache was planned")
    if not data:
        raise ImageError(EMPTY, "file has no bytes")
    return data


def _read_all(fd: int, size: int) -> bytes:
    """At most `size` + 1 bytes: one too many tells that the file has grown."""
    data = os.read(fd, size + 1)
    if len(data) >= size or not data:
        return data + (os.read(fd, 1) if len(data) == size else b"")
    parts = [data]
    left = size + 1 - len(data)
    while left and (more := os.read(fd, left)):
        parts.append(more)
        left -= len(more)
    return b"".join(parts)


def folder_source(src: Path, out: Path, request: ColumnsRequest) -> FileSource:
    """The images of a folder and its subfolders, or one image.

    Args:
        out: the cache, which is left out where it lies below `src`.

    Raises:
        CacheError: `src` cannot be listed, or holds no image.
    """
    found = scan(src, skip=out)
    errors = (
        {i: found.errors[path] for i, path in enumerate(found.paths) if path in found.errors} if found.errors else {}
    )
    listing = Listing.of_files(found.paths, found.sizes, found.mtimes, errors)
    columns = file_columns(found.root, listing, request)
    return FileSource("folder", found.root, listing, columns, _identity(found.root), _scan_notes(found))


def list_source(path: Path, request: ColumnsRequest) -> FileSource:
    """The files that a text file names, one path in each line, relative to the folder of the text file.

    Raises:
        CacheError: it cannot be read, names nothing, or a file twice.
    """
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_LIST_BYTES:
                raise CacheError(f"{path} is no list of files: it has more than {MAX_LIST_BYTES} bytes")
            lines = file.read().split(b"\n")
    except OSError as e:
        raise CacheError(f"cannot read {path}: {e.strerror or 'it is no regular file'}") from e
    locators = [line.rstrip(b"\r") for line in lines if line.strip() and not line.startswith(b"#")]
    if not locators:
        raise CacheError(f"{path} names no file: give one path in each line")
    if b"\0" in b"".join(locators):
        raise CacheError(f"{path} is no list of files: it has NUL bytes")
    if len(set(locators)) < len(locators):
        seen: set[bytes] = set()
        twice = next(name for name in locators if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise CacheError(f"{path} names {path_to_id(twice)!r} twice: name each file once")
    root = os.fsencode(path.parent)
    sizes, mtimes = (np.full(len(locators), MISSING, np.int64) for _ in range(2))
    errors: dict[int, str] = {}
    for i, name in enumerate(locators):
        try:
            info = os.stat(os.path.join(root, name))
        except OSError as e:
            errors[i] = e.strerror or str(e)
            continue
        if stat.S_ISREG(info.st_mode):
            sizes[i], mtimes[i] = info.st_size, info.st_mtime_ns
        else:
            errors[i] = "not a regular file"
    listing = Listing.of_files(locators, sizes, mtimes, errors)
    return FileSource("list", root, listing, file_columns(root, listing, request), _identity(root))


def _scan_notes(found: Scan) -> list[str]:
    notes = []
    if found.loops:
        links = "1 link leads" if len(found.loops) == 1 else f"{len(found.loops)} links lead"
        notes.append(f"{links} back into a folder above and was not followed: {path_to_id(found.loops[0])!r}")
    if found.ignored:
        kinds = ", ".join(f"{ext or 'no extension'} {n}" for ext, n in found.ignored.most_common(5))
        notes.append(f"left out, as they have no image's extension: {kinds}")
    return notes


def _identity(path: bytes) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino
