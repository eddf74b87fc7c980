"""Files of object stores and of the hub by their URL, `s3://`, `hf://` and whatever else fsspec knows."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CacheError, ImageError
from ...extras import require_extra
from ...images.reasons import EMPTY, TOO_LARGE
from ...images.scan import EXTENSIONS
from ..failures import CHANGED, IO_ERROR, OUT_OF_MEMORY
from ..hashing import xxh3
from .columns import Columns, ColumnsRequest, file_columns
from .containers import LocalFiles, find_containers
from .files import MAX_FILE_BYTES
from .listing import MISSING, Listing

BLOCK_BYTES = 1 << 20
"""That a remote file is read ahead by, while it is listed or streamed."""
ASKERS = 32
"""Files that are asked for side by side how large they are."""
MOST_NAMES = 1_000_000
_TIMES = ("mtime", "LastModified", "last_modified", "created")
_TAGS = ("ETag", "etag", "blob_id")


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

    def info_of(self, name: str) -> tuple[int, int]:
        """Size and time in nanoseconds of one file.

        Raises:
            CacheError: it is not there, or cannot be reached.
        """
        try:
            info = self.fs.info(self.path(name))
        except FileNotFoundError:
            raise CacheError(f"{self.url}/{name} does not exist") from None
        except Exception as e:
            raise CacheError(f"{self.url}/{name} cannot be reached ({type(e).__name__}: {str(e)[:200]})") from e
        return int(info.get("size") or 0), _time(info)

    def names(self, depth: int | None = None) -> dict[str, tuple[int, int]]:
        """Size and time in nanoseconds of every file below, by relative name; `depth`: 1 leaves out what lies deeper.

        Raises:
            CacheError: the URL cannot be listed.
        """
        root = self.fs._strip_protocol(self.url).rstrip("/")
        try:
            found = self.fs.find(root, maxdepth=depth, detail=True)
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
        """A file to seek in, which is read ahead."""
        return self.fs.open(self.path(name), "rb", block_size=BLOCK_BYTES, cache_type="readahead")

    def fetch(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The bytes of a file, or those from `start` to `stop`.

        Raises:
            ImageError: they cannot be had; all that a network does may pass.
        """
        try:
            return bytes(self.fs.cat_file(self.path(name), start=start, end=stop))
        except FileNotFoundError as e:
            raise ImageError(CHANGED, "the file was there when it was listed, and is gone") from e
        except MemoryError as e:
            raise ImageError(OUT_OF_MEMORY, "no memory for its bytes") from e
        except Exception as e:
            # networks and their libraries fail in many ways, nearly all of which pass: also credentials that expire
            raise ImageError(IO_ERROR, f"{type(e).__name__}: {str(e)[:200]}") from e


class RemoteContainers(RemoteFiles):
    """Files that hold many inputs below a URL, as `LocalFiles` has those of a folder.

    Attributes:
        found: size and time of each by its relative name, as of when they were listed.
    """

    def __init__(self, url: str, found: dict[str, tuple[int, int]]):
        super().__init__(url)
        self.found = found

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "found": self.found}

    def info(self, name: bytes) -> tuple[int, int]:
        """Size and time when they were listed."""
        return self.found[os.fsdecode(name)]

    def has_changed(self, name: bytes, mtime: int) -> bool:
        """Whether the file is another one now. Raises what the file system raises."""
        path = self.path(os.fsdecode(name))
        # what was listed is remembered otherwise
        self.fs.invalidate_cache(self.fs._parent(path))
        info = self.fs.info(path)
        return (int(info.get("size") or 0), _time(info)) != (self.info(name)[0], mtime)

    def open(self, name: bytes | str) -> Any:
        return super().open(os.fsdecode(name))

    def shown(self, name: bytes) -> str:
        """What messages call it."""
        return f"{self.url}/{os.fsdecode(name)}"

    def why_gone(self) -> str | None:
        return None


Files = LocalFiles | RemoteContainers


def find_files(src: Path | str, suffix: str, out: Path) -> tuple[Files, list[bytes]]:
    """The files with a suffix that a path, a URL, a folder or a pattern (of a URL: in its last part) names.

    A pattern of a URL may also be `{00000..00099}`, as WebDataset has it, which nothing has to be listed for.

    Returns:
        Where they are, and their names there, sorted.

    Raises:
        CacheError: there are none, or the URL cannot be listed.
    """
    text = os.fspath(src)
    if not is_url(text):
        root, names = find_containers(Path(src), suffix, out)
        return LocalFiles(root), names
    folder, _, last = text.rpartition("/")
    numbered = expand(last)
    if len(numbered) > 1:
        files = RemoteFiles(folder)
        with ThreadPoolExecutor(ASKERS, thread_name_prefix="list") as pool:
            found = dict(zip(numbered, pool.map(files.info_of, numbered), strict=True))
    elif not last.endswith(suffix):
        files = RemoteFiles(text)
        found = {n: info for n, info in files.names().items() if _is_wanted(n, suffix)}
    elif _is_pattern(last):
        files = RemoteFiles(folder)
        found = {n: info for n, info in files.names(1).items() if fnmatch.fnmatchcase(n, last)}
    else:
        files = RemoteFiles(folder)
        found = {last: files.info_of(last)}
    if not found:
        raise CacheError(f"no {suffix} files in {text!r}")
    return RemoteContainers(files.url, found), sorted(os.fsencode(name) for name in found)


def expand(name: str) -> list[str]:
    """The names that `{first..last}` in a name stands for, with as many digits as the first number has.

    Raises:
        CacheError: there are more than a million of them.
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if found is None:
        return [name]
    first, last = int(found[1]), int(found[2])
    if last - first >= MOST_NAMES:
        raise CacheError(f"{name!r} stands for {last - first + 1} files: {MOST_NAMES} are the most")
    heads = [f"{name[: found.start()]}{i:0{len(found[1])}d}" for i in range(first, last + 1)]
    return [head + tail for head in heads for tail in expand(name[found.end() :])]


def _is_wanted(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and not name.rpartition("/")[2].startswith("._")


def _is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[")


def _time(info: dict[str, Any]) -> int:
    """Time in nanoseconds; below the second digits of the hash of the file's tag, where it has one.

    Object stores know the second alone, and their tag tells contents apart.
    """
    found = next((info[key] for key in _TIMES if isinstance(info.get(key), (datetime, int, float))), None)
    tag = next((info[key] for key in _TAGS if isinstance(info.get(key), str)), None)
    seconds = found.timestamp() if isinstance(found, datetime) else found
    if tag is not None:
        return int(seconds or 0) * 10**9 + xxh3(tag.encode()).intdigest() % 10**9
    return MISSING if seconds is None else int(seconds * 1e9)


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

    def sample(self, ordinal: int, nbytes: int) -> None:
        # a request costs more than its bytes
        return None

    def name(self, ordinal: int) -> str:
        return self.listing.id(ordinal)

    def read(self, ordinal: int) -> bytes:
        size = int(self.listing.sizes[ordinal])
        if size > MAX_FILE_BYTES:
            raise ImageError(TOO_LARGE, f"file of {size} bytes: the limit is {MAX_FILE_BYTES}")
        data = self.files.fetch(os.fsdecode(self.listing.locators[ordinal]))
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
