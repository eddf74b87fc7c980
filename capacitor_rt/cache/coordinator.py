"""One of several coordinators that a command starts: a run in a process of its own, which tells what it does.

Messages are pairs of a word and what belongs to it. A coordinator makes its plan, or waits to be told to go on while
another does, and ends when the process that started it is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CacheError, CapacitorError, HungError
from .decoding.helper import Helper
from .meters import Meters
from .model_source import ModelSource
from .options import RunOptions
from .plan import PLAN
from .request import CacheRequest

NOTE, BEGIN, ADVANCE, REPORT, ERROR, STOPPED = "note", "begin", "advance", "report", "error", "stopped"
GO = "go"
STOP_SECONDS = 60.0
"""What coordinators have to write the tasks that are complete, when they are told to stop."""
# between two messages of progress
_TELL_SECONDS = 0.2

Tell = Callable[[str, Any], None]
Message = tuple[str, Any]


class Setup(NamedTuple):
    """What a coordinator has to know: the arguments of `cache_images`, or with a request of each of `cache_views`."""

    src: str
    out: str
    model: ModelSource
    request: CacheRequest | Mapping[str, CacheRequest]
    options: RunOptions


class Progress(NamedTuple):
    """Inputs that were done since the last message, those of them that were quarantined, and the meters as of now."""

    inputs: int
    quarantined: int
    meters: Meters


class Teller:
    """The watch of a run that tells another process.

    Args:
        stopping: once it is set, the run is interrupted where it next would tell something.
    """

    def __init__(self, tell: Tell, stopping: threading.Event | None = None):
        self.tell = tell
        self.stopping = stopping
        self._inputs = self._quarantined = 0
        self._told = 0.0

    def begin(self, total: int, done: int) -> None:
        self.tell(BEGIN, (total, done))

    def advance(self, inputs: int, quarantined: int, measure: Callable[[], Meters]) -> None:
        if self.stopping is not None and self.stopping.is_set():
            raise KeyboardInterrupt
        self._inputs += inputs
        self._quarantined += quarantined
        if time.monotonic() - self._told > _TELL_SECONDS:
            self._send(measure())

    def end(self, meters: Meters | None) -> None:
        if meters is not None:
            self._send(meters)

    def _send(self, meters: Meters) -> None:
        self.tell(ADVANCE, Progress(self._inputs, self._quarantined, meters))
        self._inputs = self._quarantined = 0
        self._told = time.monotonic()


def coordinate(setup: Setup, tell: Tell, teller: Teller | None = None, helper: Helper | None = None) -> None:
    """Do a run and tell how it goes and ends. Raises nothing but KeyboardInterrupt.

    Args:
        helper: what its decoding workers are forked from, where it was started before.
    """
    from .run import cache_images
    from .views_run import cache_views

    request, watch = setup.request, teller or Teller(tell)

    def note(line: str) -> None:
        # from any thread; that the command is gone is noticed elsewhere
        with suppress(OSError):
            tell(NOTE, line)

    try:
        where, options = (setup.src, setup.out, setup.model), setup.options
        if isinstance(request, CacheRequest):
            report = cache_images(*where, request, note=note, options=options, watch=watch, helper=helper)
        else:
            report = cache_views(*where, request, note=note, options=options, watch=watch, helper=helper)
        tell(REPORT, report)
    except CapacitorError as e:
        tell(ERROR, e)
    except Exception:
        trace = traceback.format_exc().strip().splitlines()
        tell(ERROR, CacheError(f"a coordinator failed: {trace[-1]}", trace))


def main(fd: int) -> None:
    """Serve the process at the other end of a socket."""
    lock = threading.Lock()
    connection = Connection(fd)

    def tell(word: str, what: Any) -> None:
        with lock:
            connection.send((word, what))
        if word == ERROR and isinstance(what, HungError):
            # nothing more is to be waited for
            os._exit(1)

    signal.signal(signal.SIGTERM, _stop)
    helper: Helper | None = None
    try:
        setup: Setup = connection.recv()
        if setup.options.workers != 0 and is_new(setup.out, setup.request):
            # it imports while this process does, and while another makes the plan
            helper = Helper()
        # what takes seconds comes before the word to go on
        from . import run  # noqa: F401

        if connection.recv() != GO:
            return
        threading.Thread(target=_end_with, args=(connection,), name="parent", daemon=True).start()
        coordinate(setup, tell, helper=helper)
    except KeyboardInterrupt:
        # the command may be gone by now
        with suppress(OSError):
            tell(STOPPED, None)
        sys.exit(128 + signal.SIGTERM)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(1)
    finally:
        if helper is not None:
            helper.end()


def is_new(out: str | os.PathLike[str], request: CacheRequest | Mapping[str, CacheRequest]) -> bool:
    """Whether nothing is planned yet, so that there is much to be planned and decoded."""
    folders = [Path(out)] if isinstance(request, CacheRequest) else [Path(out, name) for name in request]
    return not any((folder / PLAN).exists() for folder in folders)


def _stop(*_: object) -> None:
    # once is enough: what is being put in order now is not to be interrupted
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with(connection: Connection) -> None:
    """Stop this process once the other end is closed: no coordinator outlives the command by more than a minute."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)
