"""Ctrl-C and SIGTERM, held back where an exception between two lines would leave a lock held that no code would
drop.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_Handler = Callable[[int, FrameType | None], object]


class Interrupts:
    """The handlers of SIGINT and SIGTERM that are written in Python, called later than the signals come.

    Python calls them in the main thread, between any two of its lines, so that only there anything is to be held back.
    Calls of `hold` nest; to each belongs one of `release`.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, _Handler] = {}
        self._pending: list[int] = []
        # of the holds around: whether handlers are called at once, `allowed` being open
        self._outer: list[bool] = []
        self._open = False

    def hold(self) -> None:
        """From here on handlers wait. In other threads than the main one nothing is done."""
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._outer:
            self._pending.clear()
            try:
                for number in _NUMBERS:
                    handler = signal.getsignal(number)
                    if callable(handler):
                        self._handlers[number] = handler
                        signal.signal(number, self._note)
            except BaseException:
                # one came before it could be held back
                self._restore()
                raise
        self._outer.append(self._open)
        self._open = False

    def release(self) -> None:
        """End what `hold` began, and call the handlers of what has come since: they may raise."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._open = self._outer.pop()
        if not self._outer:
            handlers = dict(self._handlers)
            try:
                self._restore()
            except BaseException:
                # one came between the two
                self._restore()
                raise
            while self._pending:
                number = self._pending.pop(0)
                handlers[number](number, None)
        elif self._open:
            self.check()

    def check(self) -> None:
        """Call the handlers of what has come so far: they may raise."""
        if threading.current_thread() is threading.main_thread():
            while self._pending:
                number = self._pending.pop(0)
                self._handlers[number](number, None)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Within `hold`, a block in which handlers are called at once; after one that raises they wait again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.check()
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._open:
            self._pending.append(number)
            return
        self._open = False
        self._handlers[number](number, frame)
        self._open = True

    def _restore(self) -> None:
        while self._handlers:
            number, handler = next(iter(self._handlers.items()))
            signal.signal(number, handler)
            del self._handlers[number]
