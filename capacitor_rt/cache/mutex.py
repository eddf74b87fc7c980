"""The lock that the processes of one cache share: held while a plan is made and while a task is published."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from io import FileIO
from typing import NamedTuple

from ..errors import CacheError
from .folder import CacheFolder, write_error
from .hashing import canonical_json
from .interrupts import Interrupts

LOCK, HELD = ".lock", ".lock.held"
PATIENCE = 2.0
"""Seconds after which a process that waits is told which one it waits for."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class Owner(NamedTuple):
    """A process. `start` tells it from a later one of the same number."""

    host: str
    pid: int
    start: int

    def is_dead(self) -> bool:
        """Whether it ran on this host and is gone; of other hosts nothing is known."""
        return self.host == socket.gethostname() and _start(self.pid) not in (self.start, None)


def me() -> Owner:
    """This process."""
    return Owner(socket.gethostname(), os.getpid(), _start(os.getpid()) or 0)


def owner_bytes(owner: Owner) -> bytes:
    return canonical_json(owner._asdict()) + b"\n"


def parse_owner(data: bytes) -> Owner | None:
    """The process that a lock file names, None where it is damaged."""
    try:
        fields = json.loads(data)
        return Owner(str(fields["host"]), int(fields["pid"]), int(fields["start"]))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _start(pid: int) -> int | None:
    """When a process was started, in ticks since boot; -1 where there is none, None where that cannot be known."""
    if pid <= 0:
        # to the kernel that would be a group of processes
        return -1
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return -1
    except PermissionError:
        pass
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    # a process that has ended and was not waited for
    return -1 if fields[0] == b"Z" else int(fields[19])


class Mutex:
    """One holder at a time among all threads and processes: a lock on OUT/.lock that the kernel drops with its process.

    A second lock on the same file by one process would wait for the first for ever. So no interrupt may leave one
    behind: those of the main thread are held back from `acquire` to `release`, except while it waits for the lock.

    The file is gone when no run is going on. On a file system without locks a file `.lock.held` that names its holder
    takes the lock's place: it is taken over if its holder ran on this host and is dead.

    Args:
        note: told, after a while, which process holds the lock.
    """

    def __init__(self, folder: CacheFolder, note: Callable[[str], None] = lambda line: None):
        self.folder = folder
        self.note = note
        self._threads = threading.RLock()
        self._depth = 0
        self._file: FileIO | None = None
        self._by_file = False
        self._told = False
        self._interrupts = Interrupts()

    def __enter__(self) -> Mutex:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock, again where this thread has it. Until it is released, interrupts of the main thread wait.

        Args:
            blocking: wait until it is free; an interrupt ends the wait.

        Returns:
            Whether it is held now.
        """
        held = False
        self._interrupts.hold()
        try:
            held = self._acquire(blocking)
        finally:
            if not held:
                self._interrupts.release()
        return held

    def _acquire(self, blocking: bool) -> bool:
        while not self._threads.acquire(blocking, 0.1 if blocking else -1):
            if not blocking:
                return False
            self._interrupts.check()
        try:
            if not self._depth:
                self._file = self._wait() if blocking else self._try()
            if self._file is None:
                self._threads.release()
                return False
        except BaseException:
            self._threads.release()
            raise
        self._depth += 1
        return True

    def release(self) -> None:
        """Drop what `acquire` took; here an interrupt that came meanwhile is raised."""
        self._depth -= 1
        try:
            if not self._depth and self._file is not None:
                if self._by_file:
                    with suppress(OSError):
                        self.folder.unlink(HELD)
                self._file.close()
                self._file = None
        finally:
            self._threads.release()
            self._interrupts.release()

    def interruptible(self) -> AbstractContextManager[None]:
        """A block under the lock that an interrupt may end: for work that takes more than a moment."""
        return self._interrupts.allowed()

    def remove(self) -> None:
        """Remove the file, while it is held: a process that waits for it sees that the name is gone and starts over."""
        assert self._depth
        with suppress(OSError):
            self.folder.unlink(LOCK)

    def _wait(self) -> FileIO:
        file = self._try()
        if file is not None:
            return file
        pause = 0.001
        patience = threading.Timer(PATIENCE, self._say)
        patience.daemon = True
        patience.start()
        try:
            while True:
                # in the kernel's queue: by asking again and again one might wait for ever beside a busy holder
                file = self._try(wait=True)
                if file is not None:
                    return file
                self._interrupts.check()
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
        finally:
            patience.cancel()

    def _try(self, wait: bool = False) -> FileIO | None:
        """The lock, or None where another has it (with `wait`, where the file was removed meanwhile)."""
        try:
            file = self.folder.open(LOCK, os.O_RDWR | os.O_CREAT)
        except CacheError as e:
            if isinstance(e.__cause__, OSError) and e.__cause__.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                why = e.__cause__.strerror
                raise CacheError(f"cannot write to {self.folder.path}: {why}: give an OUT that you may write to") from e
            raise
        try:
            if wait:
                with self._interrupts.allowed():
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            else:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as e:
            file.close()
            if e.errno not in _NO_LOCKS:
                raise write_error(self.folder.path / LOCK, e) from e
            return self._take_file()
        except BaseException:
            file.close()
            raise
        now = self.folder.stat(LOCK)
        if now is None or not os.path.samestat(now, os.fstat(file.fileno())):
            file.close()
            return None
        # on a full disk the lock still holds; its holder's name is only for messages
        with suppress(OSError):
            os.ftruncate(file.fileno(), 0)
            os.pwrite(file.fileno(), owner_bytes(me()), 0)
        return file

    def _take_file(self) -> FileIO | None:
        self._by_file = True
        try:
            file = self.folder.open(HELD, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            owner = self._owner(HELD)
            if owner is not None and owner.is_dead():
                with suppress(OSError):
                    self.folder.unlink(HELD)
            return None
        os.pwrite(file.fileno(), owner_bytes(me()), 0)
        return file

    def _owner(self, name: str) -> Owner | None:
        try:
            return parse_owner(self.folder.read(name, 4096))
        except (OSError, CacheError):
            return None

    def _say(self) -> None:
        if self._told:
            return
        self._told = True
        owner = self._owner(HELD if self._by_file else LOCK)
        who = f"process {owner.pid} on {owner.host}" if owner else "another process"
        way_out = f"; if that process is gone, delete {self.folder.path / HELD}" if self._by_file else ""
        self.note(f"waiting for {who}, which is writing to {self.folder.path}{way_out}")
