"""Files that appear whole or not at all: temporary names, fsync, publishing if absent; the lock; the commit log."""

from __future__ import annotations

import errno
import json
import os
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError
from ..extras import require_extra as require_extra

if TYPE_CHECKING:
    from xxhash import xxh3_128

TMP = ".tmp-"
LOCK = ".lock"
COMMITS = "commits.jsonl"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class DiskFull(CacheError):
    """No space (or quota) left for a file of the cache; what was published before is whole."""


def xxh3(data: bytes = b"") -> xxh3_128:
    """A streaming XXH3 hash of 128 bits that has taken in `data`."""
    return require_extra("xxhash").xxh3_128(data)


def byte_view(t: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU, uint8 `[nbytes]`, without a copy."""
    return t.flatten().view(torch.uint8).numpy()


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, ASCII only: equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def fsync_dir(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dir(folder: Path) -> None:
    """Create `folder` and its parents so that they survive a power failure."""
    if folder.is_dir():
        return
    make_dir(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_dir(folder.parent)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`, however many calls that takes."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


class PendingFile:
    """A complete, fsynced file under a temporary name beside `final`.

    Attributes:
        size: bytes.
        digest: XXH3-128 of the contents, hex.

    Raises:
        DiskFull: no space is left; nothing remains of the file.
        CacheError: it cannot be written.
    """

    def __init__(self, final: Path, chunks: Iterable[bytes | memoryview]):
        self.final = final
        self.tmp = final.with_name(f"{final.name}{TMP}{uuid.uuid4().hex}")
        self.size = 0
        digest = xxh3()
        try:
            make_dir(final.parent)
            fd = os.open(self.tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                for chunk in chunks:
                    write_all(fd, chunk)
                    digest.update(chunk)
                    self.size += memoryview(chunk).nbytes
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as e:
            self.discard()
            raise _write_error(final, e) from e
        except BaseException:
            self.discard()
            raise
        self.digest: str = digest.hexdigest()

    def discard(self) -> None:
        """Remove the temporary file."""
        with suppress(OSError):
            self.tmp.unlink()

    def publish(self) -> None:
        """Give the file its final name, if nothing has that name yet. An identical file there is as good.

        Raises:
            CacheError: a file of other content is there; it is left as it is.
        """
        try:
            _link_if_absent(self.tmp, self.final)
        except FileExistsError:
            same = self.final.stat().st_size == self.size and hash_file(self.final) == self.digest
            self.discard()
            if not same:
                raise CacheError(
                    f"{self.final} exists and differs from what this run computed: "
                    "move it away and run the command again, or give another OUT"
                ) from None
            return
        except OSError as e:
            self.discard()
            raise _write_error(self.final, e) from e
        self.discard()
        fsync_dir(self.final.parent)

    def replace(self) -> None:
        """Give the file its final name, in place of what is there."""
        os.replace(self.tmp, self.final)
        fsync_dir(self.final.parent)


def _link_if_absent(tmp: Path, final: Path) -> None:
    try:
        os.link(tmp, final)
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
        # no hard links on this file system: the writer's lock makes check and rename one step
        if final.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from e
        os.rename(tmp, final)


def _write_error(path: Path, e: OSError) -> CacheError:
    if e.errno in _FULL:
        return DiskFull(
            f"no space left for {path} ({e.strerror}): free some and run the same command again; "
            "finished shards are safe"
        )
    return CacheError(f"cannot write {path}: {e.strerror or e}")


def hash_file(path: Path) -> str:
    """XXH3-128 (hex) of a file's bytes."""
    digest = xxh3()
    with open(path, "rb", buffering=0) as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def remove_stale(out: Path) -> int:
    """Remove temporary files that a killed run has left. Only the holder of the lock may call this."""
    count = 0
    for folder in (out, out / "index", *sorted((out / "shards").glob("*"))):
        if folder.is_dir():
            for path in folder.glob(f"*{TMP}*"):
                path.unlink()
                count += 1
    return count


class Lock:
    """One writer per cache: a lock on OUT/.lock that the kernel drops when its holder dies, however it dies.

    The file names the holder (host, process id). It is gone when no run is going on, and a killed run's is taken
    over. On a file system without locks the file itself is the lock: it is taken over if its holder ran on this host
    and is dead.
    """

    def __init__(self, out: Path):
        self.out = out
        self.path = out / LOCK
        self.fd = -1

    def __enter__(self) -> Lock:
        while self.fd < 0:
            self._try()
        return self

    def __exit__(self, *exc: object) -> None:
        # unlinked while it is held: whoever waits on the old file sees that the name is gone and starts over
        with suppress(OSError):
            os.unlink(self.path)
        os.close(self.fd)
        self.fd = -1

    def _try(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise CacheError(f"cannot write to {self.out}: {e.strerror}: give an OUT that you may write to") from e
        try:
            self._take(fd)
            if not _is_file(fd, self.path):
                os.close(fd)
                return
            os.ftruncate(fd, 0)
            me = {"host": socket.gethostname(), "pid": os.getpid()}
            os.pwrite(fd, canonical_json(me) + b"\n", 0)
        except OSError as e:
            os.close(fd)
            raise _write_error(self.path, e) from e
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd

    def _take(self, fd: int) -> None:
        import fcntl

        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held(fd, "wait for it to end, or give another OUT") from None
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            owner = _owner(fd)
            if owner and not (owner.host == socket.gethostname() and not _alive(owner.pid)):
                raise self._held(fd, f"if that process is gone, delete {self.path}") from None

    def _held(self, fd: int, way_out: str) -> CacheError:
        owner = _owner(fd)
        who = f"process {owner.pid} on {owner.host}" if owner else "another process"
        return CacheError(f"{self.out} is being written by {who}: {way_out}")


def _is_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


class _Owner(NamedTuple):
    host: str
    pid: int


def _owner(fd: int) -> _Owner | None:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
        return _Owner(str(owner["host"]), int(owner["pid"]))
    except (ValueError, KeyError, TypeError):
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Commit(TypedDict):
    """A line of `commits.jsonl`: one part of the cache is written, and this is what its files hold.

    File names are relative to the cache, hashes XXH3-128 in hex. A part without a cached input has no shard: None, 0
    and None.
    """

    index: str
    index_bytes: int
    index_xxh3: str
    inputs: int
    rows: int
    shard: str | None
    shard_bytes: int
    shard_xxh3: str | None


def committed_files(commit: Commit) -> Iterator[tuple[str, int]]:
    """Name and size in bytes of the files of a commit: the index, and the shard if it has one."""
    yield commit["index"], commit["index_bytes"]
    if commit["shard"] is not None:
        yield commit["shard"], commit["shard_bytes"]


def read_commits(out: Path) -> dict[str, Commit]:
    """Commits by index file, of which the last line counts; empty where there is no log.

    A last line without its newline is the trace of a crash and does not count.

    Raises:
        CacheError: any other line is damaged.
    """
    return _read_log(out)[0]


def _read_log(out: Path) -> tuple[dict[str, Commit], int]:
    """Commits by index file, and the number of bytes that hold whole lines."""
    path = out / COMMITS
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    commits: dict[str, Commit] = {}
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            commit = json.loads(line)
            if {k: type(v) for k, v in commit.items()} not in _COMMIT_TYPES:
                raise ValueError
            commits[commit["index"]] = commit
        except (ValueError, AttributeError):
            raise CacheError(
                f"{path} line {number} is damaged: delete that line, and the same cache command "
                "checks its shard and commits it again"
            ) from None
    return commits, whole


_ALWAYS = {"index": str, "index_bytes": int, "index_xxh3": str, "inputs": int, "rows": int, "shard_bytes": int}
_COMMIT_TYPES = tuple({**_ALWAYS, "shard": kind, "shard_xxh3": kind} for kind in (str, type(None)))


class CommitLog:
    """`commits.jsonl` open for appending. A torn last line is cut off when it is opened.

    Only the holder of the lock may open it.
    """

    def __init__(self, out: Path):
        self.path = out / COMMITS
        self.commits, whole = _read_log(out)
        try:
            self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            if os.fstat(self.fd).st_size != whole:
                os.ftruncate(self.fd, whole)
                os.fsync(self.fd)
            os.lseek(self.fd, whole, os.SEEK_SET)
        except OSError as e:
            raise _write_error(self.path, e) from e
        fsync_dir(out)
        self.size = whole

    def append(self, commit: Commit) -> None:
        """Add one line and wait until it is on disk. A line that is there already is not repeated."""
        if self.commits.get(commit["index"]) == commit:
            return
        line = canonical_json(commit) + b"\n"
        try:
            write_all(self.fd, line)
            os.fsync(self.fd)
        except OSError as e:
            with suppress(OSError):
                os.ftruncate(self.fd, self.size)
            raise _write_error(self.path, e) from e
        self.size += len(line)
        self.commits[commit["index"]] = commit

    def close(self) -> None:
        os.close(self.fd)
