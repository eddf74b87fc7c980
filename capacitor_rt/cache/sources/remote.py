"""Files of object stores and of the hub by their URL, `s3://`, `hf://` and whatever else fsspec knows."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from ...errors import CacheError, ImageError
from ...extras import require_extra
from ...images.decode import EMPTY, TOO_LARGE, UNREADABLE
from ...images.scan import EXTENSIONS
from ..failures import CHANGED, IO_ERROR
from .columns import Columns, ColumnsRequest, file_columns
from .files import MAX_FILE_BYTES
from .listing import MISSING, Listing


def is_url(src: str) -> bool:
    """Whether this is a URL rather than a path."""
    return "://" in src


class RemoteFiles:
    """Files below a URL, opened again in every process.

    Attributes:
        url: of the folder, or of the part of a pattern before its first `*`, cut at a slash.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._fs: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_fs": None}

    @property
    def fs(self) -> Any:
        """The file system.

        Raises:
            CacheError: no package for the URL's protocol is installed, or it cannot be reached.
        """
        if self._fs is None:
            core = require_extra("fsspec.core")
            try:
                self._fs, _ = core.url_to_fs(self.url)
            except (ImportError, ValueError) as e:
                raise CacheError(f"{self.url} cannot be read: {e}") from e
            except Exception as e:
                raise CacheError(f"{self.url} cannot be reached ({type(e).__name__}: {e})") from e
        return self._fs

    def path(self, name: str) -> str:
        """Where the file system has a file."""
        return self.fs._strip_protocol(f"{self.url}/{name}")

    def names(self) -> dict[str, tuple[int, int]]:
        """Size and time in nanoseconds of every file below, by relative name.

        Raises:
            CacheError: the URL cannot be listed.
        """
        root = self.fs._strip_protocol(self.url).rstrip("/")
        try:
            found = self.fs.find(root, detail=True)
        except Exception as e:
            # each file system raises errors of its own
            raise CacheError(f"{self.url} cannot be listed ({type(e).__name__}: {e})") from e
        entries = found.items() if isinstance(found, dict) else ()
        return {
            path.rstrip("/").removeprefix(root).lstrip("/"): (int(info.get("size") or 0), _time(info))
            for path, info in entries
            if info.get("type", "file") == "file"
        }

    def open(self, name: str) -> Any:
        """A file to seek in."""
        return self.fs.open(self.path(name), "rb")


class RemoteContainers(RemoteFiles):
    """Files that hold many inputs below a URL, as `LocalFiles` has those of a folder.

    Attributes:
        found: size and time of each by its relative name, as of when they were listed.
    """

    def __init__(self, url: str):
        super().__init__(url)
        self.found = self.names()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "found": self.found}

    def info(self, name: bytes) -> tuple[int, int]:
        """Size and time when they were listed."""
        return self.found[os.fsdecode(name)]

    def open(self, name: bytes | str) -> Any:
        return super().open(os.fsdecode(name))

    def shown(self, name: bytes) -> str:
        """What messages call it."""
        return f"{self.url}/{os.fsdecode(name)}"

    def why_gone(self) -> str | None:
        return None


def _time(info: dict[str, Any]) -> int:
    for key in ("mtime", "LastModified", "last_modified", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return int(value.timestamp() * 1e9)
        if isinstance(value, (int, float)):
            return int(value * 1e9)
    return MISSING


@dataclass(frozen=True)
class RemoteSource:
    """Images below a URL."""

    files: RemoteFiles
    listing: Listing
    columns: Columns
    notes: list[str] = field(default_factory=list)
    kind: str = "folder"

    def fields(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": len(self.listing), "sha256": self.listing.digest()}

    def open(self) -> RemoteReader:
        return RemoteReader(self)

    def why_gone(self) -> str | None:
        # one failure more or less tells nothing of a network
        return None


class RemoteReader:
    """Reads files below a URL. Threads may share it."""

    def __init__(self, source: RemoteSource):
        self.listing = source.listing
        self.files = source.files

    def name(self, ordinal: int) -> str:
        return self.listing.id(ordinal)

    def read(self, ordinal: int) -> bytes:
        size = int(self.listing.sizes[ordinal])
        if size > MAX_FILE_BYTES:
            raise ImageError(TOO_LARGE, f"file of {size} bytes: the limit is {MAX_FILE_BYTES}")
        try:
            data = bytes(self.files.fs.cat_file(self.files.path(os.fsdecode(self.listing.locators[ordinal]))))
        except FileNotFoundError as e:
            raise ImageError(CHANGED, "the file was there when it was listed, and is gone") from e
        except PermissionError as e:
            raise ImageError(UNREADABLE, "Permission denied") from e
        except Exception as e:
            # networks and their libraries fail in many ways, nearly all of which pass
            raise ImageError(IO_ERROR, f"{type(e).__name__}: {str(e)[:200]}") from e
        if len(data) != size:
            raise ImageError(CHANGED, f"{len(data)} bytes now, {size} when it was listed")
        if not data:
            raise ImageError(EMPTY, "file has no bytes")
        return data


def remote_folder(url: str, request: ColumnsRequest) -> RemoteSource:
    """The images below a URL.

    Raises:
        CacheError: it cannot be listed, or holds no image.
    """
    files = RemoteFiles(url)
    found = files.names()
    ignored: Counter[str] = Counter()
    images: dict[bytes, tuple[int, int]] = {}
    for name, info in found.items():
        extension = os.path.splitext(name)[1].lower()
        if os.fsencode(extension) in EXTENSIONS and not name.rpartition("/")[2].startswith("._"):
            images[os.fsencode(name)] = info
        else:
            ignored[extension] += 1
    kinds = ", ".join(f"{ext or 'no extension'} {n}" for ext, n in ignored.most_common(5))
    if not images:
        raise CacheError(f"no images below {url}" + (f" (other files: {kinds})" if kinds else ""))
    locators = sorted(images)
    sizes, mtimes = (np.array([images[name][k] for name in locators], np.int64) for k in range(2))
    listing = Listing.of_files(locators, sizes, mtimes)
    if request.captions in ("txt", "json"):
        raise CacheError(f"captions {request.captions!r} beside the images are not read over a network: give a table")
    notes = [f"left out, as they have no image's extension: {kinds}"] if kinds else []
    return RemoteSource(files, listing, file_columns(b"", listing, request), notes)
