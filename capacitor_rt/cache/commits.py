"""`commits.jsonl`: a line for each task that is part of the cache. It holds no names; they follow from the plan."""

from __future__ import annotations

import itertools
import os
import re
from contextlib import suppress
from typing import NamedTuple

from ..errors import CacheError
from ..extras import require_extra
from .folder import CacheFolder, PendingFile, write_all, write_error
from .hashing import canonical_json
from .plan import CachePlan

COMMITS = "commits.jsonl"
MAX_LINE = 1024


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
        fields = self._asdict()
        return canonical_json({**fields, "sum": _sum(canonical_json(fields))}) + b"\n"


_COUNT = rb"(0|[1-9]\d{0,14})"
_HASH = rb'"([0-9a-f]{32})"'
# as `canonical_json` writes it: a million of them are parsed in seconds
_LINE = re.compile(
    rb'(\{"data_bytes":%b,"data_xxh3":%b,"index_bytes":%b,"index_xxh3":%b,"inputs":%b,"rows":%b),'
    rb'"sum":"([0-9a-f]{16})"(,"task":%b\})' % (_COUNT, _HASH, _COUNT, _HASH, _COUNT, _COUNT, _COUNT)
)
_MOST = 2**48


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


def _sum(text: bytes) -> str:
    return require_extra("xxhash").xxh3_64_hexdigest(text)


def parse_line(line: bytes) -> Commit | None:
    """A line without its newline; None if it is damaged."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    head, data_bytes, data_xxh3, index_bytes, index_xxh3, inputs, rows, own, tail, task = found.groups()
    if own.decode() != _sum(head + tail):
        return None
    commit = Commit(
        int(task), int(inputs), int(rows), int(index_bytes), index_xxh3.decode(), int(data_bytes), data_xxh3.decode()
    )
    counts = (commit.task, commit.inputs, commit.index_bytes, commit.data_bytes)
    return commit if max(counts) <= _MOST and commit.rows <= commit.inputs else None


def read_log(folder: CacheFolder, plan: CachePlan) -> Log:
    """The log of a plan, empty where there is none.

    Raises:
        CacheError: it is no regular file, cannot be read, or is far too long for the plan's tasks.
    """
    return read_log_named(folder, plan.log_name, plan.task_count)


def read_log_named(folder: CacheFolder, name: str, tasks: int) -> Log:
    """As `read_log`, where there is no plan: of this name, and for that many tasks."""
    try:
        data = folder.read(name, _most_bytes(tasks))
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


def _most_bytes(tasks: int) -> int:
    """Of a log: a task that is done again adds a line, of 300 bytes at most, and who finishes leaves one of each."""
    return (1 << 20) + 4 * MAX_LINE * tasks


class LogFollower:
    """The log as it grows: only what was added since is read again.

    Attributes:
        commits: by task, as of the last `refresh`.
    """

    def __init__(self, folder: CacheFolder, plan: CachePlan):
        self.folder = folder
        self.name = plan.log_name
        self.commits: dict[int, Commit] = {}
        self._file: tuple[int, int] | None = None
        self._read = 0
        self._most = _most_bytes(plan.task_count)
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
        if info.st_size > self._most:
            raise CacheError(
                f"{self.folder.path / self.name} is damaged: it has {info.st_size} bytes, and {self._most} is the most"
            )
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
