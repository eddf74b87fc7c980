"""Members of remote files: what will be read soon is fetched in spans of neighbours, each once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from ...errors import ImageError
from ...images.reasons import EMPTY, TOO_LARGE
from ..failures import CHANGED, IO_ERROR
from .containers import MAX_BYTES
from .remote import RemoteContainers

SPAN_BYTES = 8 << 20
"""Of a span of several members."""
GAP_BYTES = 128 << 10
"""Between two members of a span: what is fetched in vain rather than asked for separately."""

HELD_BYTES = 64 << 20
"""Of spans that are fetched before they are asked for."""
FETCHERS = 4

Member = tuple[bytes, int, int]
"""Name of the file, where the member begins, and its bytes."""


@dataclass
class _Span:
    name: bytes
    start: int
    stop: int
    left: set[tuple[int, int]] = field(default_factory=set)
    data: memoryview | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class RemoteSpans:
    """Reads members of files below a URL. Threads may share it.

    Spans are fetched when they are announced, a few at a time, so that the latency of a network is not waited for; it
    holds those of which some members are still to be read, and begins no more while these have `most` bytes.

    Attributes:
        most: `HELD_BYTES`, unless it is set to less.

    Args:
        mtimes: of the files by name, in nanoseconds, as they were listed.
    """

    def __init__(self, files: RemoteContainers, mtimes: dict[bytes, int]):
        self.files = files
        self.mtimes = mtimes
        self.most = HELD_BYTES
        self._spans: dict[Member, _Span] = {}
        self._compared: set[bytes] = set()
        self._lock = threading.Lock()
        self._fetchers: ThreadPoolExecutor | None = None
        self._held = 0

    def expect(self, members: Iterable[Member]) -> None:
        """These will be read soon, all of them, in this order."""
        span: _Span | None = None
        made: list[_Span] = []
        with self._lock:
            for member in members:
                name, start, size = member
                if not 0 < size <= MAX_BYTES or member in self._spans:
                    continue
                fits = (
                    span is not None
                    and span.name == name
                    and 0 <= start - span.stop <= GAP_BYTES
                    and start + size - span.start <= SPAN_BYTES
                )
                if span is None or not fits:
                    span = _Span(name, start, start)
                    made.append(span)
                span.stop = start + size
                span.left.add((start, size))
                self._spans[member] = span
            if self._fetchers is None:
                # a thread for each, once there is something to do, in the process that reads
                self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
        for span in made:
            self._fetchers.submit(self._early, span)

    def read(self, name: bytes, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        Raises:
            ImageError: they cannot be had, or the file is another one than was listed.
        """
        if size > MAX_BYTES:
            raise ImageError(TOO_LARGE, f"{size} bytes: the limit is {MAX_BYTES}")
        if size == 0:
            raise ImageError(EMPTY, "no bytes")
        with self._lock:
            span = self._spans.get((name, offset, size))
        if span is None:
            return self._fetch(name, offset, offset + size)
        with span.lock:
            self._fill(span)
            assert span.data is not None
            data = bytes(span.data[offset - span.start : offset - span.start + size])
            span.left.discard((offset, size))
            if not span.left:
                span.data = None
                with self._lock:
                    self._held -= span.stop - span.start
        with self._lock:
            self._spans.pop((name, offset, size), None)
        return data

    def _early(self, span: _Span) -> None:
        """Fetch a span before it is asked for; if that fails, it is tried again when it is asked for."""
        with self._lock:
            if self._held >= self.most:
                return
        with suppress(ImageError), span.lock:
            if span.left:
                self._fill(span)

    def _fill(self, span: _Span) -> None:
        """Under the span's lock."""
        if span.data is None:
            span.data = memoryview(self._fetch(span.name, span.start, span.stop))
            with self._lock:
                self._held += span.stop - span.start

    def _fetch(self, name: bytes, start: int, stop: int) -> bytes:
        self._compare(name)
        data = self.files.fetch(os.fsdecode(name), start, stop)
        if len(data) != stop - start:
            raise ImageError(CHANGED, f"its file ends after {len(data)} of {stop - start} bytes")
        return data

    def _compare(self, name: bytes) -> None:
        """See once whether the file is the one that was listed."""
        with self._lock:
            if name in self._compared:
                return
        try:
            changed = self.files.has_changed(name, self.mtimes[name])
        except FileNotFoundError as e:
            raise ImageError(CHANGED, "its file was there when it was listed, and is gone") from e
        except Exception as e:
            raise ImageError(IO_ERROR, f"{type(e).__name__}: {str(e)[:200]}") from e
        if changed:
            raise ImageError(CHANGED, "its file is another one than when it was listed")
        with self._lock:
            self._compared.add(name)
