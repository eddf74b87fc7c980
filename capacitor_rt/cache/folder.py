"""The folder of a cache: every file is opened relative to it, no link is followed, and only regular files are opened.

A file of a cache appears whole or not at all: it is written under a temporary name, fsynced, and linked to its own name
if nothing has that name yet.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType

from ..errors import CacheError
from .hashing import xxh3

# at opening a file in a subfolder that others remove
_TRIES = 100
TASKS, INDEX, LEASES, GENERATIONS, DAMAGED = "tasks", "index", "leases", "generations", "damaged"
SUBFOLDERS = (TASKS, INDEX, LEASES, GENERATIONS, DAMAGED)
TMP = ".tmp-"
_TMP_NAME = re.compile(r"[^/]+\.tmp-[0-9a-f]{32}")
# snapshots/COMMIT/tasks/x is a link to ../../../blobs/HASH: the only links that are followed, for reading
_BLOB = re.compile(r"(\.\./){2,3}blobs/([0-9a-f]{40}|[0-9a-f]{64})")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class DiskFull(CacheError):
    """No space (or quota) left for a file of the cache; what was published before is whole."""


def make_dir(folder: Path) -> None:
    """Create `folder` and its parents so that they survive a power failure."""
    if folder.is_dir():
        return
    make_dir(folder.parent)
    folder.mkdir(exist_ok=True)
    fd = os.open(folder.parent, _FOLDER)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`, however many calls that takes."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


class CacheFolder:
    """The files of a cache by name: `plan.json`, or `index/x` in one of its subfolders.

    Names are made from the plan and never read from a file. Every method that opens a file raises FileNotFoundError
    where it is missing, and CacheError where it is a link or no regular file, or cannot be opened.

    Args:
        path: the folder, which may itself be a link.

    Raises:
        CacheError: it cannot be opened as a folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._fds: dict[str, int] = {}
        try:
            self._fds[""] = os.open(self.path, _FOLDER)
        except OSError as e:
            raise CacheError(f"cannot open {self.path}: {e.strerror}: give the folder of a cache") from e

    def __enter__(self) -> CacheFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def at(self, name: str, *, make: bool = False, sync: bool = True) -> tuple[int, str]:
        """Descriptor of the folder that holds `name`, and the name in it. `make` creates a missing subfolder and, with
        `sync`, waits until that is on disk."""
        folder, _, base = name.rpartition("/")
        assert base not in ("", ".", "..") and folder in ("", *SUBFOLDERS), name
        return self._folder(folder, make, sync), base

    def _folder(self, name: str, make: bool, sync: bool = True) -> int:
        if name in self._fds:
            # one that another process has removed meanwhile is empty for ever, whatever has its name now
            if not name or os.fstat(self._fds[name]).st_nlink:
                return self._fds[name]
            os.close(self._fds.pop(name))
        root = self._fds[""]
        try:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o777, dir_fd=root)
                    if sync:
                        os.fsync(root)
            self._fds[name] = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=root)
        except FileNotFoundError:
            raise
        except OSError as e:
            if make and e.errno in _FULL:
                raise write_error(self.path / name, e) from e
            why = "it is a link, or no folder" if e.errno in (errno.ELOOP, errno.ENOTDIR) else e.strerror
            raise CacheError(f"{self.path / name} cannot be used ({why}): move it away, or give another OUT") from e
        return self._fds[name]

    def stat(self, name: str) -> os.stat_result | None:
        """What lies under this name, links not followed; None where there is nothing."""
        try:
            folder, base = self.at(name)
            return os.stat(base, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, name: str, flags: int = _READ, mode: int = 0o644) -> FileIO:
        """An unbuffered regular file."""
        if flags & os.O_CREAT:
            for attempt in range(_TRIES):
                # whoever finds a subfolder empty may remove it before there is a file in it, most of all while
                # the disk is waited for: at a later try that comes last
                with suppress(FileNotFoundError):
                    file = self._open(name, flags, mode, sync=not attempt)
                    if attempt:
                        self._sync_root(name, file)
                    return file
        return self._open(name, flags, mode)

    def _sync_root(self, name: str, file: FileIO) -> None:
        try:
            os.fsync(self._fds[""])
        except OSError as e:
            file.close()
            raise write_error(self.path / name, e) from e

    def _open(self, name: str, flags: int, mode: int, sync: bool = True) -> FileIO:
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        folder, base = self.at(name, make=bool(flags & os.O_CREAT), sync=sync)
        try:
            fd = os.open(base, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=folder)
        except FileNotFoundError:
            raise
        except FileExistsError:
            raise
        except OSError as e:
            if e.errno == errno.ELOOP and not writing and (blob := _hub_blob(base, folder)):
                return os.fdopen(self._blob(name, blob, folder), "rb", buffering=0)  # type: ignore[return-value]
            if e.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise self._irregular(name) from e
            raise write_error(self.path / name, e) if writing else self._unreadable(name, e) from e
        info = os.fstat(fd)
        # another name elsewhere would be written to as well
        if not stat.S_ISREG(info.st_mode) or (writing and info.st_nlink > 1):
            os.close(fd)
            raise self._irregular(name)
        return os.fdopen(fd, "r+b" if writing else "rb", buffering=0)  # type: ignore[return-value]

    def _blob(self, name: str, blob: str, folder: int) -> int:
        """The file in the hub's own cache that a name of a downloaded snapshot links to."""
        try:
            fd = os.open(blob, _READ, dir_fd=folder)
        except OSError as e:
            raise self._unreadable(name, e) from e
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._irregular(name)
        return fd

    def read(self, name: str, limit: int) -> bytes:
        """The contents of a file of at most `limit` bytes."""
        with self.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CacheError(f"{self.path / name} is damaged: it has {size} bytes, and {limit} is the most")
            try:
                return b"".join(_chunks(file.fileno(), limit + 1))
            except OSError as e:
                raise self._unreadable(name, e) from e

    def hash(self, name: str) -> str:
        """XXH3-128 (hex) of a file's bytes."""
        digest = xxh3()
        with self.open(name) as file:
            try:
                for chunk in _chunks(file.fileno()):
                    digest.update(chunk)
            except OSError as e:
                raise self._unreadable(name, e) from e
        return digest.hexdigest()

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of what lies in the folder or in a subfolder, which need not be there."""
        try:
            return sorted(os.listdir(self._folder(folder, False)))
        except FileNotFoundError:
            return []

    def unlink(self, name: str) -> None:
        folder, base = self.at(name)
        os.unlink(base, dir_fd=folder)

    def discard(self, name: str) -> None:
        """Remove a file, which may be missing.

        Raises:
            CacheError: it cannot be removed, or is no file.
        """
        try:
            self.unlink(name)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            raise self._irregular(name) from None
        except OSError as e:
            raise CacheError(f"{self.path / name} cannot be removed: {e.strerror or e}") from e

    def rename(self, name: str, other: str, *, sync: bool = True) -> None:
        """Give a file another name, in place of what has it. `sync` waits until the names are on disk."""
        (a, old), (b, new) = self.at(name), self.at(other, make=True)
        os.rename(old, new, src_dir_fd=a, dst_dir_fd=b)
        if sync:
            self.sync(name)
            self.sync(other)

    def sync(self, name: str) -> None:
        """Wait until the names in the folder of `name` are on disk."""
        os.fsync(self.at(name)[0])

    def remove_folder(self, folder: str) -> None:
        """Remove an empty subfolder; one with something in it stays."""
        if folder in self._fds:
            os.close(self._fds.pop(folder))
        with suppress(OSError):
            os.rmdir(folder, dir_fd=self._fds[""])

    def temporary(self) -> Iterator[str]:
        """Names of temporary files."""
        for folder in ("", *SUBFOLDERS):
            for base in self.names(folder):
                if _TMP_NAME.fullmatch(base):
                    yield f"{folder}/{base}" if folder else base

    def set_aside(self, name: str, where: str = DAMAGED) -> str | None:
        """Move a file to a subfolder, under a name that is free there; that name, or None where it is missing."""
        if self.stat(name) is None:
            return None
        base = name.rpartition("/")[2]
        number = 0
        while self.stat(f"{where}/{base}.{number}") is not None:
            number += 1
        self.rename(name, f"{where}/{base}.{number}")
        return f"{where}/{base}.{number}"

    def _irregular(self, name: str) -> CacheError:
        return CacheError(f"{self.path / name} is a link or no regular file: move it away, or give another OUT")

    def _unreadable(self, name: str, e: OSError) -> CacheError:
        return CacheError(f"{self.path / name} cannot be read: {e.strerror or e}")


def _hub_blob(base: str, folder: int) -> str | None:
    """Where a link leads, if it is one of those that huggingface_hub makes in a downloaded snapshot."""
    target = os.readlink(base, dir_fd=folder)
    return target if _BLOB.fullmatch(target) else None


def _chunks(fd: int, limit: int | None = None) -> Iterator[bytes]:
    left = limit
    while chunk := os.read(fd, (1 << 22) if left is None else min(left, 1 << 22)):
        yield chunk
        if left is not None:
            left -= len(chunk)


class PendingFile:
    """A complete, fsynced file under a temporary name beside its own.

    Attributes:
        size: bytes.
        digest: XXH3-128 of the contents, hex.

    Raises:
        DiskFull: no space is left; nothing remains of the file.
        CacheError: it cannot be written.
    """

    def __init__(self, folder: CacheFolder, name: str, chunks: Iterable[bytes | memoryview]):
        self.folder = folder
        self.name = name
        self.tmp = f"{name}{TMP}{uuid.uuid4().hex}"
        self.size = 0
        digest = xxh3()
        try:
            with folder.open(self.tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
                for chunk in chunks:
                    write_all(file.fileno(), chunk)
                    digest.update(chunk)
                    self.size += memoryview(chunk).nbytes
                os.fsync(file.fileno())
        except OSError as e:
            self.discard()
            raise write_error(folder.path / name, e) from e
        except BaseException:
            self.discard()
            raise
        self.digest: str = digest.hexdigest()

    def discard(self) -> None:
        """Remove the temporary file."""
        with suppress(OSError):
            self.folder.unlink(self.tmp)

    def publish(self) -> None:
        """Give the file its own name, if nothing has that name yet. An identical file there is as good.

        Raises:
            CacheError: something else is there; it is left as it is.
        """
        try:
            self._link()
        except FileExistsError:
            info = self.folder.stat(self.name)
            same = info is not None and info.st_size == self.size and self.folder.hash(self.name) == self.digest
            self.discard()
            if not same:
                raise CacheError(
                    f"{self.folder.path / self.name} exists and differs from what this run computed: "
                    f"`capacitor-rt verify --repair {self.folder.path}` moves it away"
                ) from None
        except OSError as e:
            self.discard()
            raise write_error(self.folder.path / self.name, e) from e
        self.discard()
        try:
            # also of one that was there: the process that linked it may have died before it did so
            self.folder.sync(self.name)
        except OSError as e:
            raise write_error(self.folder.path / self.name, e) from e

    def replace(self) -> None:
        """Give the file its own name, in place of what is there."""
        try:
            self.folder.rename(self.tmp, self.name)
        except OSError as e:
            self.discard()
            raise write_error(self.folder.path / self.name, e) from e

    def _link(self) -> None:
        (a, tmp), (b, base) = self.folder.at(self.tmp), self.folder.at(self.name)
        try:
            os.link(tmp, base, src_dir_fd=a, dst_dir_fd=b, follow_symlinks=False)
        except OSError as e:
            if e.errno not in _NO_LINKS:
                raise
            # no hard links on this file system: the writers' lock makes check and rename one step
            if self.folder.stat(self.name) is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.name) from e
            os.rename(tmp, base, src_dir_fd=a, dst_dir_fd=b)


def write_error(path: Path, e: OSError) -> CacheError:
    """The error for a file that cannot be written."""
    if e.errno in _FULL:
        return DiskFull(
            f"no space left for {path} ({e.strerror}): free some and run the same command again; "
            "finished tasks are safe"
        )
    return CacheError(f"cannot write {path}: {e.strerror or e}")
