"""Files are read ahead of their turn by threads, as far as there is memory for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ...errors import ImageError
from ..failures import CRASHED, OUT_OF_MEMORY, is_retryable
from ..hashing import xxh3
from ..sources import Expecting, Fetching, Source
from .allowance import Allowance

# small files that a thread reads in one go: to wake it takes longer than to read one from memory
_GROUP, _SMALL_BYTES = 4, 64 << 10
# what a file is taken for whose size is not known: the largest of late, each counting for less than the one after it
_FADING = 0.9


@dataclass
class FileRead:
    """What reading an input has given: its bytes with their hash, or an error, and the seconds that it took."""

    data: bytes | None = None
    error: ImageError | None = None
    digest: bytes | None = None
    seconds: float = 0.0


class Ahead:
    """Reads inputs in the order in which they are pushed. For one thread, which takes them.

    Args:
        readers: threads that read.
        backoff: seconds to wait before each further attempt at an input that failed for now.
        allowance: what files may take that are read, or being read, and not let go.
    """

    def __init__(self, source: Source, readers: int, backoff: Sequence[float], allowance: Allowance):
        self._source, self._readers, self._backoff, self._allowance = source, readers, backoff, allowance
        self._reader = source.open()
        if isinstance(self._reader, Fetching):
            self._reader.fetch_at_most(allowance.share)
        self._threads = ThreadPoolExecutor(readers, thread_name_prefix="read")
        self._waiting: deque[int] = deque()
        self._ahead: deque[tuple[int, Future[FileRead]]] = deque()
        # by the sizes that were expected, and what threads have found to be more or less
        self._held = 0
        self._corrections: deque[int] = deque()
        self._guess = 0

    def close(self) -> None:
        """Stop reading."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def push(self, ordinals: Sequence[int]) -> None:
        """More inputs."""
        if isinstance(self._reader, Expecting):
            self._reader.expect(ordinals)
        self._waiting.extend(ordinals)
        self._begin()

    def next(self) -> tuple[int, Future[FileRead]]:
        """The next of those that were pushed. Those before it are to be let go first."""
        self._begin(is_next=True)
        ordinal, future = self._ahead.popleft()
        self._begin()
        return ordinal, future

    def alone(self, ordinal: int) -> Future[FileRead]:
        """One that was not pushed, while none that was is left."""
        nbytes = self._size(ordinal)
        self._hold(nbytes, wait=True)
        return self._threads.submit(self._patiently, ordinal, nbytes)

    def let_go(self, read: FileRead) -> None:
        """Its bytes are no longer needed."""
        nbytes, read.data = len(read.data or b""), None
        self._correct()
        self._held -= nbytes
        self._allowance.have(max(0, self._held - self._allowance.share))

    def _begin(self, is_next: bool = False) -> None:
        """Have as many read as there is memory for. `is_next`: one at least, whose turn has come."""
        while self._waiting:
            count = self._group()
            if len(self._ahead) + count > 4 * self._readers and self._ahead:
                return
            sizes = [self._size(self._waiting[i]) for i in range(count)]
            # a worker that waits holds nothing, so that those that hold something can go on
            if not self._hold(sum(sizes), wait=is_next and not self._ahead):
                return
            group = [(self._waiting.popleft(), nbytes, Future[FileRead]()) for nbytes in sizes]
            self._ahead.extend((ordinal, future) for ordinal, _, future in group)
            self._threads.submit(self._read_group, group)

    def _group(self) -> int:
        """How many of the inputs that wait are read in one go."""
        sizes, count = self._source.listing.sizes, 0
        while count < min(_GROUP, len(self._waiting)) and 0 <= sizes[self._waiting[count]] <= _SMALL_BYTES:
            count += 1
        return max(count, 1)

    def _size(self, ordinal: int) -> int:
        """Bytes of a file, a guess where they are not known."""
        nbytes = int(self._source.listing.sizes[ordinal])
        return nbytes if nbytes >= 0 else self._guess

    def _hold(self, nbytes: int, wait: bool) -> bool:
        """Count what is to be read, if there is memory for it."""
        self._correct()
        if not self._allowance.take(max(0, self._held + nbytes - self._allowance.share), wait=wait):
            return False
        self._held += nbytes
        return True

    def _correct(self) -> None:
        while self._corrections:
            self._held += self._corrections.popleft()

    def _read_group(self, group: Sequence[tuple[int, int, Future[FileRead]]]) -> None:
        for ordinal, nbytes, future in group:
            # one by one: who waits for the first does not wait for the others
            try:
                future.set_result(self._patiently(ordinal, nbytes))
            except BaseException as e:
                future.set_exception(e)

    def _patiently(self, ordinal: int, expected: int) -> FileRead:
        """Read an input, again if it fails for now. `expected`: the bytes that are counted for it."""
        begin = time.perf_counter()
        read = FileRead()
        for pause in (*self._backoff, None):
            read = self._attempt(ordinal)
            if pause is None or read.error is None or not self._is_for_now(read.error):
                break
            time.sleep(pause)
        read.seconds = time.perf_counter() - begin
        nbytes = len(read.data or b"")
        self._guess = max(nbytes, int(_FADING * self._guess))
        if nbytes != expected:
            self._corrections.append(nbytes - expected)
        return read

    def _is_for_now(self, error: ImageError) -> bool:
        return is_retryable(error.reason) and not self._source.why_gone()

    def _attempt(self, ordinal: int) -> FileRead:
        try:
            data = self._reader.read(ordinal)
            return FileRead(data, digest=xxh3(data).digest())
        except ImageError as e:
            return FileRead(error=e)
        except MemoryError:
            return FileRead(error=ImageError(OUT_OF_MEMORY, f"input {ordinal}: no memory to read it"))
        except Exception as e:
            return FileRead(error=ImageError(CRASHED, f"input {ordinal}: reading ended in {type(e).__name__}: {e}"))
