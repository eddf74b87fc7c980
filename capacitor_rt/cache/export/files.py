"""Files of an export: many written at once, whole or not at all, never over another; and one writer per folder."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import CacheError
from ..hashing import xxh3

TMP = ".tmp-"
LOCK = ".lock"
_TMP_NAME = re.compile(r".+\.tmp-[0-9a-f]{32}", re.DOTALL)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_BLOCK = 1 << 22
_LIBC = ctypes.CDLL(None)
MANY = 16
"""Files above which the file system is synced rather than each of them."""


@dataclass(frozen=True)
class OutFile:
    """A file to be written: its name relative to the export, and its bytes."""

    name: str
    chunks: Iterable[bytes | memoryview]


def tensor_bytes(t: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, uint8 `[nbytes]`, without a copy."""
    return t.flatten().view(torch.uint8).numpy()


class Published(NamedTuple):
    """Files that were written: their bytes in all, and the XXH3-128 (hex) of these, one file after the other."""

    nbytes: int
    xxh3: str


def publish(out: Path, files: Iterable[OutFile]) -> Published:
    """Write files under temporary names, then give them their own, all durably.

    A file that is there with the same contents is as good.

    Raises:
        CacheError: no space is left, or a file of other contents has such a name; nothing of this call remains under a
            temporary name.
    """
    pending: list[tuple[Path, Path]] = []
    total, digest = 0, xxh3()
    try:
        for file in files:
            final = out / file.name
            tmp = final.with_name(f"{final.name}{TMP}{uuid.uuid4().hex}")
            pending.append((tmp, final))
            try:
                final.parent.mkdir(parents=True, exist_ok=True)
                with open(tmp, "xb", buffering=0) as f:
                    for chunk in file.chunks:
                        total += _write(f.fileno(), chunk)
                        digest.update(chunk)
            except OSError as e:
                raise _write_error(final, e) from e
        _sync([tmp for tmp, _ in pending])
        for tmp, final in pending:
            _link_if_absent(tmp, final)
    finally:
        for tmp, _ in pending:
            with suppress(OSError):
                tmp.unlink()
    for folder in sorted({folder for _, final in pending for folder in _folders(out, final)}):
        _fsync(folder)
    return Published(total, digest.hexdigest())


def _folders(out: Path, final: Path) -> Iterator[Path]:
    """Those between the export and a file of it."""
    for parent in final.parents:
        yield parent
        if parent == out:
            return


def _write(fd: int, chunk: bytes | memoryview) -> int:
    view = memoryview(chunk).cast("B")
    size = view.nbytes
    while view:
        view = view[os.write(fd, view) :]
    return size


def _sync(paths: list[Path]) -> None:
    """Wait until files of one folder tree are on disk."""
    syncfs = getattr(_LIBC, "syncfs", None)
    if len(paths) > MANY and syncfs is not None:
        # one call for the file system: an fsync of each costs milliseconds, and a block of rows has 1,024 files
        fd = os.open(paths[0].parent, os.O_RDONLY)
        try:
            if syncfs(fd) == 0:
                return
        finally:
            os.close(fd)
    for path in paths:
        _fsync(path)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _link_if_absent(tmp: Path, final: Path) -> None:
    try:
        try:
            os.link(tmp, final)
        except OSError as e:
            if e.errno not in _NO_LINKS or final.exists():
                raise
            # no hard links on this file system: the lock makes check and rename one step
            os.rename(tmp, final)
    except FileExistsError:
        if not _same(tmp, final):
            raise CacheError(
                f"{final} exists and differs from what this run computed: move it away and run the command again, or "
                "give another OUT"
            ) from None
    except OSError as e:
        raise _write_error(final, e) from e


def _same(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with open(a, "rb") as f, open(b, "rb") as g:
        while chunk := f.read(_BLOCK):
            if chunk != g.read(_BLOCK):
                return False
    return True


def _write_error(path: Path, e: OSError) -> CacheError:
    if e.errno in _FULL:
        return CacheError(
            f"no space left for {path} ({e.strerror}): free some and run the command again; finished files are safe"
        )
    return CacheError(f"cannot write {path}: {e.strerror or e}")


def files_hash(paths: Iterable[Path]) -> str:
    """What `publish` returned for these files, if they still have the same bytes."""
    digest = xxh3()
    for path in paths:
        with open(path, "rb", buffering=0) as f:
            while chunk := f.read(_BLOCK):
                digest.update(chunk)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(_BLOCK):
            digest.update(chunk)
    return digest.hexdigest()


def append_line(fd: int, size: int, line: bytes, path: Path) -> None:
    """Add a line at `size` to a log and wait until it is on disk, or leave the log as it was."""
    try:
        _write(fd, line)
        os.fsync(fd)
    except OSError as e:
        with suppress(OSError):
            os.ftruncate(fd, size)
        raise _write_error(path, e) from e


def remove_stale(out: Path) -> None:
    """Remove temporary files of a killed run. Only the holder of the lock may call this."""
    for folder, _, names in os.walk(out):
        for name in names:
            if _TMP_NAME.fullmatch(name):
                os.unlink(os.path.join(folder, name))


def open_own(path: Path, flags: int) -> int:
    """Descriptor of a regular file of the export itself: a link may lead anywhere, and a pipe is waited for.

    Raises:
        FileNotFoundError; OSError; CacheError: it is a link or no regular file.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _irregular(path) from e
        raise
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or (flags & os.O_ACCMODE != os.O_RDONLY and info.st_nlink > 1):
        os.close(fd)
        raise _irregular(path)
    return fd


def _irregular(path: Path) -> CacheError:
    return CacheError(f"{path} is a link or no regular file: move it away, or give another OUT")


def read_own(path: Path, limit: int) -> bytes:
    """The contents of a file of the export itself, of at most `limit` bytes. Errors as of `open_own`."""
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CacheError(f"{path} is damaged: it has {size} bytes, and {limit} is the most: give a new OUT")
        return file.read(limit + 1)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One writer per export: a lock that the kernel drops when its holder dies.

    Raises:
        CacheError: another process holds it, or `out` cannot be written.
    """
    path = out / LOCK
    try:
        out.mkdir(parents=True, exist_ok=True)
        fd = open_own(path, os.O_RDWR | os.O_CREAT)
    except OSError as e:
        raise CacheError(f"cannot write to {out}: {e.strerror}: give an OUT that you may write to") from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the holder before may have removed the file between our two calls
            held = path.exists() and os.path.samestat(os.fstat(fd), path.stat())
            if not held:
                raise BlockingIOError
        except BlockingIOError:
            raise CacheError(f"{out} is being written by another export: wait for it to end") from None
        except OSError as e:
            # without locks two exports write the same bytes, and neither over the other's
            if e.errno not in _NO_LOCKS:
                raise _write_error(path, e) from e
        yield
        # while it is held, so that no other process's is removed
        with suppress(OSError):
            path.unlink()
    finally:
        os.close(fd)
