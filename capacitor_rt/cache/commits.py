"""`commits.jsonl`: a line for each task that is part of the cache. It holds no names; they follow from the plan."""

from __future__ import annotations

import itertools
import os
from contextlib import suppress
from typing import Any, NamedTuple

from ..errors import CacheError
from ..extras import require_extra
from ..schema import HEX16, HEX32, Invalid, Number, Record
from ..strict_json import StrictJSONError, parse
from .folder import CacheFolder, PendingFile, write_all, write_error
from .hashing import canonical_json

COMMITS = "commits.jsonl"
MAX_LINE = 1024
MAX_BYTES = 1 << 30


class Commit(NamedTuple):
    """One task is written, and this is what its two files hold. Hashes are XXH3-128 in hex.

    `rows` counts the inputs with latents among all `inputs` of the task.
    """

    task: int
    inputs: int
    rows: int
    index_bytes: int
    index_xxh3: str
    data_bytes: int
    data_xxh3: str

    def line(self) -> bytes:
        """With a hash of its own: a damaged line is known by itself."""
        fields: dict[str, Any] = self._asdict()
        return canonical_json({**fields, "sum": _sum(fields)}) + b"\n"


_COUNT = Number(0, 2**48)
_LINE = Record(
    {
        "task": _COUNT,
        "inputs": _COUNT,
        "rows": _COUNT,
        "index_bytes": _COUNT,
        "index_xxh3": HEX32,
        "data_bytes": _COUNT,
        "data_xxh3": HEX32,
        "sum": HEX16,
    }
)


class Log(NamedTuple):
    """What `commits.jsonl` says: of several lines of one task the last one counts.

    Attributes:
        bad: numbers, from 1, of damaged lines. They count as lost.
        torn: whether something without a newline follows, which a crash leaves.
        sorted: whether it is as a finished run leaves it: one line for each task, in order, and nothing else.
    """

    commits: dict[int, Commit]
    bad: list[int]
    torn: bool
    sorted: bool


def _sum(fields: dict[str, Any]) -> str:
    return require_extra("xxhash").xxh3_64_hexdigest(canonical_json(fields))


def parse_line(line: bytes) -> Commit | None:
    """A line without its newline; None if it is damaged."""
    if len(line) > MAX_LINE:
        return None
    try:
        fields = parse(line)
        _LINE.check("", fields)
    except (StrictJSONError, Invalid):
        return None
    if fields.pop("sum") != _sum(fields) or fields["rows"] > fields["inputs"]:
        return None
    commit = Commit(**fields)
    # a number may be written in two ways
    return commit if commit.line() == line + b"\n" else None


def read_log(folder: CacheFolder, name: str) -> Log:
    """The log of this name, empty where there is none.

    Raises:
        CacheError: it is no regular file, or cannot be read.
    """
    try:
        data = folder.read(name, MAX_BYTES)
    except FileNotFoundError:
        data = b""
    whole = data.rfind(b"\n") + 1
    commits: dict[int, Commit] = {}
    bad = []
    numbers = []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
        commit = parse_line(line)
        if commit is None:
            bad.append(number)
            continue
        commits[commit.task] = commit
        numbers.append(commit.task)
    in_order = all(a < b for a, b in itertools.pairwise(numbers))
    torn = whole < len(data)
    return Log(commits, bad, torn, in_order and not bad and not torn)


class LogFollower:
    """The log as it grows: only what was added since is read again.

    Attributes:
        commits: by task, as of the last `refresh`.
    """

    def __init__(self, folder: CacheFolder, name: str):
        self.folder = folder
        self.name = name
        self.commits: dict[int, Commit] = {}
        self._file: tuple[int, int] | None = None
        self._read = 0
        self.refresh()

    def refresh(self) -> None:
        """Read on.

        Raises:
            CacheError: the log is no regular file, or cannot be read.
        """
        info = self.folder.stat(self.name)
        if info is None:
            self.commits, self._file, self._read = {}, None, 0
            return
        if (info.st_dev, info.st_ino) == self._file and info.st_size == self._read:
            return
        if info.st_size > MAX_BYTES:
            raise CacheError(f"{self.folder.path / self.name} is damaged: it has {info.st_size} bytes")
        try:
            with self.folder.open(self.name) as file:
                now = os.fstat(file.fileno())
                if (now.st_dev, now.st_ino) != self._file or now.st_size < self._read:
                    self.commits, self._read = {}, 0
                    self._file = now.st_dev, now.st_ino
                data = os.pread(file.fileno(), now.st_size - self._read, self._read)
        except OSError as e:
            raise CacheError(f"{self.folder.path / self.name} cannot be read: {e.strerror}") from e
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].split(b"\n")[:-1]:
            commit = parse_line(line)
            if commit is not None:
                self.commits[commit.task] = commit
        self._read += whole


def append_commit(folder: CacheFolder, name: str, commit: Commit) -> None:
    """Add one line and wait until it is on disk; a torn last line is cut off. Under the mutex."""
    line = commit.line()
    new = folder.stat(name) is None
    with folder.open(name, os.O_RDWR | os.O_CREAT) as file:
        fd = file.fileno()
        size = _whole(fd)
        try:
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, size)
            os.lseek(fd, size, os.SEEK_SET)
            write_all(fd, line)
            os.fsync(fd)
        except OSError as e:
            with suppress(OSError):
                os.ftruncate(fd, size)
            raise write_error(folder.path / name, e) from e
    if new:
        folder.sync(name)


def _whole(fd: int) -> int:
    """Bytes of a file up to its last newline."""
    end = os.fstat(fd).st_size
    while end:
        begin = max(0, end - MAX_LINE)
        at = os.pread(fd, end - begin, begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0


def rewrite_log(folder: CacheFolder, name: str, commits: dict[int, Commit]) -> None:
    """Make the log anew: one line for each task, in order. Under the mutex."""
    PendingFile(folder, name, [commit.line() for _, commit in sorted(commits.items())]).replace()
