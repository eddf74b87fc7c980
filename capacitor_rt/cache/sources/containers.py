"""Files that hold many inputs: found, opened a few at a time, and read at a place."""

from __future__ import annotations

import glob
import os
import stat
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from ...errors import CacheError, ImageError
from ...images.reasons import EMPTY, TOO_LARGE, UNREADABLE
from ...images.scan import path_to_id
from ...strict_json import open_regular
from ..failures import CHANGED, IO_ERROR, OUT_OF_MEMORY, is_for_good

OPEN_FILES = 64
MAX_BYTES = 2 << 30


def find_containers(src: Path, suffix: str, out: Path) -> tuple[bytes, list[bytes]]:
    """The files with a suffix that a path, a pattern or a folder with its subfolders names, sorted by their bytes.

    Returns:
        The folder that they are relative to, and their relative paths.

    Raises:
        CacheError: there are none.
    """
    text = os.fspath(src)
    if src.is_dir():
        root = os.fsencode(src)
        found = []
        skip = os.path.realpath(os.fsencode(out))
        for folder, folders, names in os.walk(root):
            folders[:] = [f for f in folders if os.path.realpath(os.path.join(folder, f)) != skip]
            found += [os.path.join(folder, n) for n in names if n.endswith(suffix.encode()) and not n.startswith(b"._")]
        relative = sorted(os.path.relpath(path, root) for path in found)
    elif src.is_file():
        root, relative = os.fsencode(src.parent), [os.fsencode(src.name)]
    else:
        paths = sorted(os.fsencode(path) for path in glob.glob(text))
        root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else b""
        relative = [os.path.relpath(path, root or b".") for path in paths]
    if not relative:
        raise CacheError(
            f"no {suffix} files in {text!r}: give such a file, a folder of them, or a pattern like 'x-*{suffix}'"
        )
    return root or b".", relative


class LocalFiles:
    """Files below a folder, as `RemoteFiles` has those below a URL."""

    def __init__(self, root: bytes):
        self.root = root

    def info(self, name: bytes) -> tuple[int, int]:
        """Size, and time in nanoseconds."""
        info = os.stat(os.path.join(self.root, name))
        return info.st_size, info.st_mtime_ns

    def has_changed(self, name: bytes, mtime: int) -> bool:
        """Whether the file is another one now. Raises OSError."""
        return self.info(name)[1] != mtime

    def open(self, name: bytes) -> Any:
        """A file to seek in."""
        return open_regular(os.path.join(self.root, name))

    def shown(self, name: bytes) -> str:
        """What messages call it."""
        return path_to_id(os.path.join(self.root, name))

    def why_gone(self) -> str | None:
        return None if os.path.isdir(self.root) else f"{path_to_id(self.root)} went away during the run"


class Containers:
    """Files below a folder, of which a few are open. Threads may share it.

    Args:
        mtimes: of the files by name, in nanoseconds, as they were listed.
    """

    def __init__(self, root: bytes, mtimes: dict[bytes, int]):
        self.root = root
        self.mtimes = mtimes
        self._open: OrderedDict[bytes, int] = OrderedDict()
        self._users: dict[int, int] = {}
        self._lock = threading.Lock()

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        Raises:
            ImageError: they cannot be read, or the file is another one than was listed.
        """
        if size > MAX_BYTES:
            raise ImageError(TOO_LARGE, f"{size} bytes: the limit is {MAX_BYTES}")
        if size == 0:
            raise ImageError(EMPTY, "no bytes")
        try:
            fd = self._take(name)
            try:
                data = _read(fd, offset, size)
            finally:
                self._give(fd)
        except MemoryError as e:
            raise ImageError(OUT_OF_MEMORY, f"no memory for {size} bytes") from e
        except OSError as e:
            reason = UNREADABLE if is_for_good(e) else IO_ERROR
            raise ImageError(reason, os.strerror(e.errno) if e.errno else str(e)) from e
        if len(data) != size:
            raise ImageError(CHANGED, f"its file ends after {len(data)} of {size} bytes")
        return data

    def _take(self, name: bytes) -> int:
        with self._lock:
            fd = self._open.get(name)
            if fd is None:
                fd = self._open_file(name)
                self._open[name] = fd
            self._open.move_to_end(name)
            self._users[fd] = self._users.get(fd, 0) + 1
            for other, old in list(self._open.items()):
                if len(self._open) <= OPEN_FILES:
                    break
                if not self._users.get(old):
                    del self._open[other]
                    os.close(old)
        return fd

    def _give(self, fd: int) -> None:
        with self._lock:
            self._users[fd] -= 1

    def _open_file(self, name: bytes) -> int:
        fd = os.open(os.path.join(self.root, name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_mtime_ns != self.mtimes[name]:
            os.close(fd)
            raise ImageError(CHANGED, "its file is another one than when it was listed")
        return fd


def _read(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]
    while (left := size - sum(map(len, parts))) and (more := os.pread(fd, left, offset + size - left)):
        parts.append(more)
    return b"".join(parts)
