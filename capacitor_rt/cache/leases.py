"""Leases: which process works on which task. A file per task that its holder touches; a dead holder's is taken over."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from contextlib import suppress
from io import FileIO

from ..errors import CacheError
from .folder import LEASES, TMP, CacheFolder, write_error
from .hashing import canonical_json
from .mutex import Mutex, Owner, me, parse_owner

HEARTBEAT_SECONDS = 10.0
CLOCK = ".clock"
STALE_SECONDS = 90.0
"""A lease that has not been touched for so long is dead: nine heartbeats, by the file server's clock."""
_mine: set[str] = set()
"""Tokens of the leases that this process has, in whichever run: one of its own that is none of them was given back, on
a disk that could not remove it."""


class Leases:
    """The leases that this process holds. While it is open a thread touches them.

    Args:
        plan8: first digits of the plan's identity.
    """

    def __init__(
        self,
        folder: CacheFolder,
        mutex: Mutex,
        plan8: str,
        *,
        heartbeat: float = HEARTBEAT_SECONDS,
        stale: float = STALE_SECONDS,
    ):
        self.folder = folder
        self.mutex = mutex
        self.plan8 = plan8
        self.heartbeat = heartbeat
        self.stale = stale
        self._held: dict[int, FileIO] = {}
        self._tokens: dict[int, str] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Leases:
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(CacheError, OSError), self.mutex:
            for task in list(self._held):
                self.release(task)
            for base in self.folder.names(LEASES):
                # drafts get their names under the mutex, so one that is seen here is of a process that was killed; so
                # may be the clock, and who is asking it does so by its descriptor
                if base == CLOCK or TMP in base or self._is_dead(f"{LEASES}/{base}"):
                    with suppress(FileNotFoundError):
                        self.folder.unlink(f"{LEASES}/{base}")
            self.folder.remove_folder(LEASES)
        # of those that could not be given back
        for file in self._held.values():
            file.close()
        self._held.clear()
        _mine.difference_update(self._tokens.values())

    def name(self, task: int) -> str:
        return f"{LEASES}/{self.plan8}-{task:06d}"

    def take(self, task: int) -> bool:
        """Take the lease of a task, unless a living process has it. Under the mutex.

        Raises:
            CacheError: it cannot be written.
        """
        name = self.name(task)
        if self.folder.stat(name) is not None:
            if not self._is_dead(name):
                return False
            self.folder.unlink(name)
        token = uuid.uuid4().hex
        _mine.add(token)
        try:
            file = self._write(name, token)
        except BaseException:
            _mine.discard(token)
            raise
        with self._lock:
            self._held[task], self._tokens[task] = file, token
        return True

    def _write(self, name: str, token: str) -> FileIO:
        """A lease gets its name with its holder's in it: one that names nobody is waited for until it is stale."""
        draft = f"{name}{TMP}{token}"
        file = self.folder.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with suppress(OSError):
                # on a full disk there is none such in it
                os.pwrite(file.fileno(), canonical_json({**me()._asdict(), "token": token}) + b"\n", 0)
            self.folder.rename(draft, name, sync=False)
        except BaseException as e:
            file.close()
            with suppress(OSError):
                self.folder.unlink(draft)
            if isinstance(e, OSError):
                raise write_error(self.folder.path / name, e) from e
            raise
        return file

    def holds(self, task: int) -> bool:
        """Whether the lease is still this process's: another may have thought it dead and taken it over."""
        file = self._held.get(task)
        now = self.folder.stat(self.name(task))
        return file is not None and now is not None and os.path.samestat(now, os.fstat(file.fileno()))

    def release(self, task: int) -> None:
        """Give a lease back. Under the mutex."""
        mine = self.holds(task)
        with self._lock:
            file = self._held.pop(task, None)
            _mine.discard(self._tokens.pop(task, ""))
        if file is not None:
            file.close()
        if mine:
            with suppress(OSError):
                self.folder.unlink(self.name(task))

    def living(self, touch: bool = True) -> dict[int, str]:
        """The tasks that living processes, this one included, have, and who has them.

        Args:
            touch: ask the file server's clock, for which a file is made; else this machine's is taken.
        """
        found = {}
        prefix = f"{self.plan8}-"
        for base in self.folder.names(LEASES):
            if (
                base.startswith(prefix)
                and base[len(prefix) :].isdecimal()
                and not self._is_dead(f"{LEASES}/{base}", touch)
            ):
                owner = self._owner(f"{LEASES}/{base}")
                found[int(base[len(prefix) :])] = f"process {owner.pid} on {owner.host}" if owner else "?"
        return found

    def living_stems(self, touch: bool = True) -> set[str]:
        """The stems of the files of all tasks, of whatever generation, that living processes have."""
        bases = [base for base in self.folder.names(LEASES) if base != CLOCK and TMP not in base]
        return {base for base in bases if not self._is_dead(f"{LEASES}/{base}", touch)}

    def _read(self, name: str) -> bytes:
        try:
            return self.folder.read(name, 4096)
        except OSError:
            return b""

    def _owner(self, name: str) -> Owner | None:
        return parse_owner(self._read(name))

    def _is_dead(self, name: str, touch: bool = True) -> bool:
        info = self.folder.stat(name)
        if info is None:
            return True
        data = self._read(name)
        owner = parse_owner(data)
        if owner is not None and (owner.is_dead() or (owner == me() and _token(data) not in (None, *_mine))):
            return True
        # of the same clock: no living process has touched one in the future either
        return abs((self._now() if touch else time.time()) - info.st_mtime) > self.stale

    def _now(self) -> float:
        """The file server's clock: the clocks of two machines differ."""
        name = f"{LEASES}/{CLOCK}"
        with self.folder.open(name, os.O_WRONLY | os.O_CREAT) as file:
            os.utime(file.fileno())
            now = os.fstat(file.fileno()).st_mtime
        with suppress(OSError):
            self.folder.unlink(name)
        return now

    def _beat(self) -> None:
        while not self._closing.wait(self.heartbeat):
            with self._lock:
                for file in self._held.values():
                    # by descriptor: a lease that was taken over is another file
                    with suppress(OSError):
                        os.utime(file.fileno())


def _token(data: bytes) -> str | None:
    """Of the lease of a process that is known, which of its leases it is."""
    token = json.loads(data).get("token")
    return token if isinstance(token, str) else None


def clear(folder: CacheFolder, mutex: Mutex) -> None:
    """Remove the lock's file, unless other processes are at work, as one that has the lock is."""
    with suppress(CacheError, OSError):
        if mutex.acquire(blocking=False):
            try:
                if not folder.names(LEASES):
                    mutex.remove()
            finally:
                mutex.release()
