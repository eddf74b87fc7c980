"""The process from which a pool's workers are forked, as its coordinator holds it: started, told what to do, ended."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from contextlib import suppress

from ...errors import CacheError
from .server import SETUP, Setup

_CLOSE_SECONDS = 5.0
# the path comes first, and from the coordinator: no file beside the user's is taken for a module. Nothing that is
# imported is garbage, which takes an eighth of the time to find out
_COMMAND = (
    "import gc; gc.disable(); import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from capacitor_rt.cache.decoding.server import main; main(int(sys.argv[2]))"
)
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
# Arrow's allocator has a thread of its own, and a process that forks should have no other
_ONE_THREAD |= {"ARROW_DEFAULT_MEMORY_POOL": "system", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


class Helper:
    """It imports what decoding takes as soon as it is made, and forks workers once it is set up.

    So one that is made before the plan is ready by the time that the plan is. A context manager: it ends with it.

    Attributes:
        control: the socket to it; it ends when that is closed.

    Raises:
        CacheError: it cannot be started.
    """

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-I", "-c", _COMMAND, json.dumps(sys.path), str(theirs.fileno())]
        self._is_set_up = False
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=os.environ | _ONE_THREAD
            )
        except OSError as e:
            self.control.close()
            raise CacheError(f"decoding workers cannot be started: {e}: use workers=0") from e
        finally:
            theirs.close()

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int:
        """Of one that was ended."""
        return self._process.returncode

    def set_up(self, setup: Setup, ring_fd: int) -> None:
        """Tell it what its workers are to do; it answers when it is ready.

        Raises:
            CacheError: the source cannot be sent.
        """
        self._is_set_up = True
        fd = os.memfd_create("capacitor-setup") if hasattr(os, "memfd_create") else _temporary_fd()
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                try:
                    pickle.dump(setup, file)
                except (pickle.PicklingError, AttributeError, TypeError) as e:
                    raise CacheError(f"the source cannot be sent to the workers: {e}: define it in a module") from e
            os.lseek(fd, 0, os.SEEK_SET)
            # that it is gone is noticed when it is listened to
            with suppress(OSError):
                socket.send_fds(self.control, [pickle.dumps((SETUP, 0))], [fd, ring_fd])
        finally:
            os.close(fd)

    def end(self) -> None:
        """End it, and its workers with it."""
        if not self._is_set_up:
            # it has no workers, and may be importing yet
            self._process.kill()
        self.control.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _temporary_fd() -> int:
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
