"""What a worker does with a chunk of inputs: read ahead, decode, and describe each in a row of an Arrow batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...errors import CapacitorError, ImageError, InputError
from ...extras import require_extra
from ...images.deferred import ready_bytes
from ...images.encoded import MOST_SIDES, RECORD_BYTES, load_encoded
from ...images.geometry import Size
from ...images.load import Admit, LoadedImage, PixelPolicy, View, load_views
from ...images.together import TOGETHER_BYTES, Together
from ..failures import CRASHED, OUT_OF_MEMORY, is_retryable
from ..sources import Source
from ..statuses import DECODED, KNOWN, OK, QUARANTINED
from .allowance import Allowance
from .reading import Ahead, FileRead

BACKOFF_SECONDS = (0.2, 1.0, 3.0)
"""How long to wait before an input that failed for now is tried again."""
_SCRATCH_BYTES = 64 << 20
# of the pixel budget, what files that are not decoded yet may take
_FILES_PART = 8


class Contents(Protocol):
    """Hashes of inputs that need not be decoded. It is sent to every worker."""

    def find(self, digest: bytes) -> int:
        """Negative if the hash is none of them."""


@dataclass(frozen=True)
class Job:
    """What a pool does with every input.

    Attributes:
        source: of the inputs.
        policy: of the pixels.
        buckets: an image comes to the nearest of them.
        readers: threads per worker that read ahead.
        backoff: seconds to wait before each further attempt at an input that failed for now.
        pixel_budget: bytes that all workers together may take for images, unless one image needs more alone: an eighth
            for files that were read, the rest to decode them.
        record_bytes: where images are resized elsewhere, what is set aside for the records of each; 0 where they are
            resized by the workers.
        known: for each view, if there are any, hashes of inputs that are read and not decoded for it: their status is
            "known".
        also: further views of every image, beside that of `policy` and `buckets`.
    """

    source: Source
    policy: PixelPolicy
    buckets: tuple[Size, ...]
    readers: int = 4
    backoff: tuple[float, ...] = BACKOFF_SECONDS
    pixel_budget: int = 2 << 30
    record_bytes: int = 0
    known: tuple[Contents | None, ...] = ()
    also: tuple[View, ...] = ()

    def __post_init__(self) -> None:
        if not self.is_encoded:
            return
        largest = max(bucket.height + bucket.width for view in self.views for bucket in view.buckets)
        if self.record_bytes < RECORD_BYTES or len({view.policy for view in self.views}) > 1 or largest > MOST_SIDES:
            raise InputError(
                f"decode gpu takes record_bytes {RECORD_BYTES} or more, one policy for all views, and buckets whose "
                f"height and width are {MOST_SIDES} together at most"
            )

    @property
    def is_encoded(self) -> bool:
        """Whether the images that a GPU decodes are handed on as they are."""
        return self.policy.decode == "gpu" and self.record_bytes > 0

    @property
    def file_bytes(self) -> int:
        """What all workers together may hold of files, unless one alone is larger."""
        return self.pixel_budget // _FILES_PART

    @property
    def pixel_bytes(self) -> int:
        """What all workers together may take to decode images, unless one alone needs more."""
        return self.pixel_budget - self.file_bytes

    @property
    def views(self) -> tuple[View, ...]:
        """What is made of every image."""
        return View(self.policy, self.buckets), *self.also

    @property
    def slot(self) -> int:
        """Bytes that are set aside for an image in all views."""
        return self.room(range(len(self.views)))

    def room(self, views: Sequence[int]) -> int:
        """Bytes that are set aside for an image in these views: its pixels in the largest buckets, or its records."""
        least = sum(self.least[number] for number in views)
        return max(least, self.record_bytes) if views else least

    @property
    def least(self) -> tuple[int, ...]:
        """Bytes that every image finds room in, in each view."""
        if self.is_encoded:
            # who decodes an image must not depend on its neighbours
            return (self.record_bytes,) * len(self.views)
        if self.record_bytes:
            return tuple(max(ready_bytes(b.height, b.width) for b in view.buckets) for view in self.views)
        return tuple(view.slot for view in self.views)


class Meter(NamedTuple):
    """Seconds of one or more chunks.

    Attributes:
        read: waiting for storage and copying, in the reading threads.
        decode: CPU time of the decoding thread.
        starved: of the decoding thread, waiting for bytes.
        queued: of the decoding thread, waiting for its turn at the pixel budget.
        idle: of the decoding thread, waiting for work.
    """

    read: float = 0.0
    decode: float = 0.0
    starved: float = 0.0
    queued: float = 0.0
    idle: float = 0.0

    def plus(self, other: Meter) -> Meter:
        return Meter(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass
class Row:
    """One input: its columns, and where its pixels begin among those of its chunk."""

    values: dict[str, Any]
    offset: int = -1


def chunk_schema() -> Any:
    """Columns of a decoded chunk, one row per input."""
    pa = require_extra("pyarrow")
    kinds = {"bytes_hash": pa.binary(16)}
    fields = [
        pa.field("input", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("retryable", pa.bool_()),
    ]
    return pa.schema([*fields, *(pa.field(name, kinds.get(name, pa.int32())) for name in DECODED)])


def to_batch(rows: Sequence[Row]) -> Any:
    """Arrow record batch of `chunk_schema`."""
    pa = require_extra("pyarrow")
    schema = chunk_schema()
    arrays = [pa.array([row.values.get(f.name) for row in rows], f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


@dataclass
class Worker:
    """Decodes inputs in the order in which they are pushed.

    Args:
        mark: told the input that is being decoded, or None between two.
        admit: entered while an image of so many bytes is decoded.
        share: bytes that it may keep.
        files: what it may hold of files; None: it is the only one.
    """

    job: Job
    mark: Callable[[int | None], None] = lambda ordinal: None
    admit: Admit = nullcontext
    share: int = _SCRATCH_BYTES
    files: Allowance | None = None

    def __post_init__(self) -> None:
        require_extra("pyarrow")
        job = self.job
        self._reading = Ahead(job.source, job.readers, job.backoff, self.files or Allowance(job.file_bytes))
        self._scratch, self._together = bytearray(), Together(min(self.share // 4, TOGETHER_BYTES))
        self._starved = self._read = 0.0

    def close(self) -> None:
        """Stop reading ahead."""
        self._reading.close()

    def push(self, ordinals: Sequence[int]) -> None:
        """More inputs, to be read ahead."""
        self._reading.push(ordinals)

    def chunk(self, count: int, out: np.ndarray, views: Sequence[int] = (0,)) -> tuple[list[Row], Meter]:
        """Decode the next `count` inputs into `out`, uint8 `[N]`, one behind the other.

        Args:
            views: numbers of those that are wanted. Rows of the first come first, then those of the second, and so do
                pixels: those of each begin where those of the ones before would end if all were the largest. Records
                of an image lie together, those of the first image first.
        """
        return self._rows((self._reading.next() for _ in range(count)), count, out, views, self._together)

    def carefully(
        self,
        ordinals: Sequence[int],
        out: np.ndarray,
        failed: Mapping[int, tuple[str, str]],
        views: Sequence[int] = (0,),
    ) -> tuple[list[Row], Meter]:
        """Decode inputs that were not pushed, nothing of them read before its turn.

        Args:
            failed: reason and message of those that are not to be tried.
        """

        def reads() -> Iterator[tuple[int, Future[FileRead]]]:
            for ordinal in ordinals:
                self.mark(ordinal)
                if ordinal in failed:
                    known: Future[FileRead] = Future()
                    known.set_result(FileRead(error=ImageError(*failed[ordinal])))
                    yield ordinal, known
                else:
                    yield ordinal, self._reading.alone(ordinal)

        return self._rows(reads(), len(ordinals), out, views, None)

    def _rows(
        self,
        reads: Iterable[tuple[int, Future[FileRead]]],
        count: int,
        out: np.ndarray,
        views: Sequence[int],
        together: Together | None,
    ) -> tuple[list[Row], Meter]:
        cpu, self._starved, self._read = time.thread_time(), 0.0, 0.0
        rows: list[list[Row]] = [[] for _ in views]
        least = [self.job.least[number] for number in views]
        ends = [*accumulate(count * n for n in least)]
        are_records = self.job.record_bytes > 0
        if are_records:
            least, ends = [sum(least)], [count * self.job.room(views)]
        offsets = [0, *ends[:-1]]
        for left, (ordinal, future) in zip(range(count - 1, -1, -1), reads, strict=True):
            self.mark(ordinal)
            made = [Row({"input": ordinal, "status": OK}) for _ in views]
            # those that follow keep the least that they need
            outs = [out[offset : end - left * n] for offset, end, n in zip(offsets, ends, least, strict=True)]
            found = self._one(made, future, views, outs, together)
            self._reading.let_go(future.result())
            self.mark(None)
            begins = offsets * len(views) if are_records else offsets
            for row, loaded, begin in zip(made, found, begins, strict=True):
                row.offset = -1 if loaded is None else begin + loaded.offset
            stops = [0 if loaded is None else loaded.offset + loaded.pixels.size for loaded in found]
            used = [max(stops)] if are_records else stops
            offsets = [offset + nbytes for offset, nbytes in zip(offsets, used, strict=True)]
            for of_view, row in zip(rows, made, strict=True):
                of_view.append(row)
        for row, error in () if together is None else together.finish():
            self._unmade(row, error)
        return [*chain.from_iterable(rows)], Meter(self._read, time.thread_time() - cpu, self._starved)

    def _one(
        self,
        rows: Sequence[Row],
        future: Future[FileRead],
        views: Sequence[int],
        outs: Sequence[np.ndarray],
        together: Together | None,
    ) -> list[LoadedImage | None]:
        """Decode one input, a row for each view; what has come of it in each, None where it has no pixels."""
        begin = time.perf_counter()
        read = future.result()
        self._starved += time.perf_counter() - begin
        self._read += read.seconds
        ordinal = rows[0].values["input"]
        for row in rows:
            row.values["bytes_hash"] = read.digest
        made: list[LoadedImage | None] = [None] * len(rows)
        if read.error is not None or read.data is None:
            error = read.error or ImageError(CRASHED, "nothing was read")
            fail(rows, error.reason, str(error))
            return made
        todo = [at for at, number in enumerate(views) if not self._is_known(number, read.digest)]
        for at in {*range(len(rows))} - {*todo}:
            rows[at].values["status"] = KNOWN
        if not todo:
            return made
        wanted = [self.job.views[views[at]] for at in todo]
        failing = [rows[at] for at in todo]
        into: dict[str, Any] = {"records": outs[0]}
        if not self.job.record_bytes:
            into = {"outs": [outs[at] for at in todo], "together": together, "token": failing[0]}
        name = f"input {ordinal}"
        try:
            name = self.job.source.listing.id(ordinal)
            found = self._loaded(read.data, wanted, into, name)
        except ImageError as e:
            fail(failing, e.reason, str(e))
            return made
        except MemoryError:
            fail(failing, OUT_OF_MEMORY, f"{name}: no memory to decode it")
            return made
        except CapacitorError:
            raise
        except Exception as e:
            fail(failing, CRASHED, f"{name}: decoding ended in {type(e).__name__}: {e}")
            return made
        for at, loaded in zip(todo, found, strict=True):
            if isinstance(loaded, ImageError):
                fail([rows[at]], loaded.reason, str(loaded))
            else:
                rows[at].values |= _described(loaded)
                made[at] = loaded
        return made

    def _unmade(self, row: Row, error: Exception) -> None:
        """An image was decoded and could not be resized."""
        row.offset = -1
        row.values |= {name: None for name in DECODED if name != "bytes_hash"}
        name = self.job.source.listing.id(row.values["input"])
        if isinstance(error, MemoryError):
            fail([row], OUT_OF_MEMORY, f"{name}: no memory to resize it")
        else:
            fail([row], CRASHED, f"{name}: resizing ended in {type(error).__name__}: {error}")

    def _is_known(self, view: int, digest: bytes | None) -> bool:
        known = self.job.known[view] if self.job.known else None
        return known is not None and digest is not None and known.find(digest) >= 0

    def _loaded(
        self, data: bytes, views: Sequence[View], into: dict[str, Any], name: str
    ) -> Sequence[LoadedImage | ImageError]:
        if self.job.is_encoded and (loaded := load_encoded(data, views, into["records"], name=name)) is not None:
            return loaded
        return load_views(data, views, name=name, admit=self.admit, buffer=self._buffer, **into)

    def _buffer(self, nbytes: int) -> bytearray:
        """Memory for a decoded picture, the same again and again unless it is a large one."""
        if nbytes > min(self.share, _SCRATCH_BYTES) - self._together.nbytes:
            return bytearray(nbytes)
        if len(self._scratch) < nbytes:
            self._scratch = bytearray(nbytes)
        return self._scratch


def _described(loaded: LoadedImage) -> dict[str, int]:
    """What the index says of an image that was decoded."""
    header, placement = loaded.header, loaded.placement
    return {
        "width": header.width,
        "height": header.height,
        "orientation": header.orientation,
        "bucket": loaded.bucket,
        "resize_height": placement.resize.height,
        "resize_width": placement.resize.width,
        "crop_top": placement.top,
        "crop_left": placement.left,
    }


def fail(rows: Sequence[Row], reason: str, message: str) -> None:
    """None of these rows has pixels."""
    for row in rows:
        row.values |= {"status": QUARANTINED, "reason": reason, "message": message, "retryable": is_retryable(reason)}
