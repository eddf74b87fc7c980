"""Processes that each hold one object and answer calls of its methods.

After an illegal access no CUDA call of a process works any more, and a crash takes the process itself: with an object
in a process of its own, either costs the answer to one question. The next question finds a fresh process.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# how a process is started: a forked one cannot use CUDA
START = "spawn"
START_SECONDS = 180.0
MEMORY, REFUSED, FAULT, LOST = "memory", "refused", "fault", "lost"


class Failure(Exception):
    """A question without an answer.

    Attributes:
        reason: one line.
        kind: MEMORY: it did not fit; REFUSED: an error of this project that says what to do instead; FAULT: any other
            exception; LOST: the process ended, or gave no answer in time.
    """

    def __init__(self, reason: str, kind: str):
        super().__init__(reason)
        self.reason, self.kind = reason, kind


class Worker:
    """A process that makes `make(*arguments)` and answers for it; started when first needed, and again after a loss.

    What is passed to it or comes back is pickled: functions have to be importable.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any):
        self._made_of = make, arguments
        self._process: Any = None
        self._pipe: Connection | None = None

    def start(self) -> None:
        """Begin to start the process where there is none, without waiting for it."""
        if self._process is None:
            context = multiprocessing.get_context(START)
            ours, theirs = context.Pipe()
            process: Any = context.Process(target=_serve, args=(theirs, *self._made_of), daemon=True)
            process.start()
            theirs.close()
            self._process, self._pipe = process, ours

    def ask(self, method: str, *arguments: Any, seconds: float = START_SECONDS) -> Any:
        """What the object's method returns.

        Raises:
            Failure: it raised, the process ended, or `seconds` passed. A process that may be unusable is ended.
        """
        self.start()
        assert self._pipe is not None
        try:
            self._pipe.send((method, arguments))
            if not self._pipe.poll(seconds):
                self.stop(0.0)
                raise Failure(f"no answer within {seconds:.0f} s", LOST)
            value, failed = self._pipe.recv()
        except (EOFError, OSError):
            raise Failure(self._end(), LOST) from None
        if failed:
            reason, kind = failed
            if kind == FAULT:
                self.stop()
            raise Failure(reason, kind)
        return value

    def dismiss(self) -> None:
        """Let the process end when it has answered, without waiting for that."""
        if self._pipe is not None:
            self._pipe.close()

    def stop(self, seconds: float = 3.0) -> None:
        """End the process, by force after `seconds`; what it held on the device is free then."""
        if self._process is not None:
            self._end(seconds)

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        return None if self._process is None else self._process.pid

    def _end(self, seconds: float = 10.0) -> str:
        """Wait for the process to be gone, and end it after `seconds`; how it ended."""
        process, self._process = self._process, None
        self.dismiss()
        if seconds:
            process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        return f"its process was {ended(process.exitcode)}"


def ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answer until nothing is asked any more."""
    # the parent ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    held = None
    while True:
        try:
            method, given = pipe.recv()
        except (EOFError, OSError):
            return
        value, failed = None, None
        try:
            if held is None:
                held = make(*arguments)
            value = getattr(held, method)(*given)
        # whatever a compiler, a driver or a library raises is the reason in a row
        except Exception as error:
            failed = _account(error)
        if failed:
            # outside of the handler, whose traceback holds the tensors that did not fit
            gc.collect()
        pipe.send((value, failed))


def _account(error: Exception) -> tuple[str, str]:
    import torch

    from capacitor_rt.errors import CapacitorError

    from ._device import why

    if isinstance(error, torch.OutOfMemoryError):
        return why(error), MEMORY
    return why(error), REFUSED if isinstance(error, CapacitorError) else FAULT
