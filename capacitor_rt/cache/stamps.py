"""`.stamps`: which files of latents this machine has hashed or written, so that a resumed run need not read them again.

A file is the one that was hashed if its inode, size and times of content and of status are those of then; the latter
no program can set. The file is this machine's own: a copy of the cache elsewhere is hashed once.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from ..errors import CacheError
from .folder import TASKS, CacheFolder, write_all

STAMPS = ".stamps"
_LEAST_BYTES, _FILE_BYTES = 1 << 20, 4096
"""The most of the file: in any case, and for each file of latents. A stamp takes 200 bytes, and is of one copy."""


class Stamps:
    """The stamps of a cache. Whatever is wrong with the file only means that latents are hashed again.

    Args:
        is_kept: whether what is added is written down.
    """

    def __init__(self, folder: CacheFolder, is_kept: bool = True):
        self.folder = folder
        self.is_kept = is_kept
        self._known: set[bytes] = set()
        self._outgrown = False
        with suppress(OSError, CacheError):
            most = _LEAST_BYTES + _FILE_BYTES * len(folder.names(TASKS))
            info = folder.stat(STAMPS)
            self._outgrown = info is not None and stat.S_ISREG(info.st_mode) and info.st_size > most
            self._known = set(folder.read(STAMPS, most).split(b"\n"))

    def vouch(self, name: str, digest: str) -> bool:
        """Whether the file of this name is one that had this hash."""
        line = self._line(name, digest)
        return line is not None and line in self._known

    def add(self, name: str, digest: str) -> None:
        """Take note that the file of this name has this hash."""
        line = self._line(name, digest)
        if line is None or line in self._known:
            return
        self._known.add(line)
        if not self.is_kept:
            return
        with suppress(OSError, CacheError):
            if self._outgrown:
                # it is begun again
                self.folder.discard(STAMPS)
                self._outgrown = False
            with self.folder.open(STAMPS, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
                write_all(file.fileno(), line + b"\n")

    def _line(self, name: str, digest: str) -> bytes | None:
        info = self.folder.stat(name)
        if info is None or not stat.S_ISREG(info.st_mode):
            return None
        return (
            f"{name} {digest} {info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}".encode()
        )
