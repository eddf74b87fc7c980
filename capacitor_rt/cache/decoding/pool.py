"""Workers that decode chunks of inputs side by side; the chunks are read in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import CacheError, InputError
from ...images.deferred import UNIT
from ...images.geometry import Size
from ...images.load import PixelPolicy, View
from ..sources import Source
from ..statuses import DECODED
from .coordinator import Coordinator, Order
from .helper import Helper
from .work import BACKOFF_SECONDS, Contents, Job, Meter, Row, Worker, fail, to_batch

if TYPE_CHECKING:
    import torch

CHUNK = 32
"""Inputs of a chunk, if their pixels are few."""
_SMALL_BYTES = 32 << 10


class Wanted(NamedTuple):
    """Inputs, and the numbers of the views that are wanted of them."""

    ordinals: Sequence[int]
    views: tuple[int, ...]


@dataclass
class _Lease:
    """A chunk's part of the ring, and how many have not released it."""

    owner: Coordinator
    order: Order
    holders: int = 1


@dataclass
class DecodedChunk:
    """A few inputs after decoding.

    Attributes:
        columns: Arrow record batch of `chunk_schema`, a row for each input: of the first view that was wanted.
        meter: what it took.
    """

    columns: Any
    meter: Meter
    _pixels: np.ndarray
    _offsets: np.ndarray
    _buckets: Sequence[Size]
    _others: dict[int, DecodedChunk] = field(default_factory=dict)
    _lease: _Lease | None = None
    _bucket_of: np.ndarray | None = None

    def runs(self) -> list[tuple[slice, int]]:
        """Neighbouring rows with pixels of one bucket, and the bucket's number, in order."""
        buckets = self._numbers()
        ends = [*(np.flatnonzero(np.diff(buckets)) + 1).tolist(), len(buckets)]
        begins = [0, *ends[:-1]]
        return [(slice(b, e), int(buckets[b])) for b, e in zip(begins, ends, strict=True) if e > b and buckets[b] >= 0]

    def block(self, rows: slice) -> np.ndarray:
        """uint8 `[N,H,W,3]` of rows with pixels of one bucket: a view, to be used before `release`."""
        number, begin = self._numbers()[rows.start], int(self._offsets[rows.start])
        if number < 0:
            raise InputError(f"row {rows.start} has no pixels: it was not decoded")
        bucket, count = self._buckets[number], rows.stop - rows.start
        pixels = self._pixels[begin : begin + 3 * count * bucket.area]
        return pixels.reshape(count, bucket.height, bucket.width, 3)

    def groups(self) -> list[tuple[np.ndarray, int]]:
        """Rows with pixels by bucket, in order, and the bucket's number."""
        buckets = self._numbers()
        return [(np.flatnonzero(buckets == number), int(number)) for number in np.unique(buckets) if number >= 0]

    def offsets(self, rows: np.ndarray) -> np.ndarray:
        """Of a chunk whose images are to be resized: where these rows' records begin, int64 `[N]`, -1 for none."""
        return self._offsets[rows]

    def records(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a chunk whose images are to be resized: where the records of all rows begin, in all views that were
        wanted, int64 `[M]`, and all of them, uint8, to be used before `release`."""
        offsets = np.concatenate([self._offsets, *(other._offsets for other in self._others.values())])
        return offsets[offsets >= 0], self._pixels

    def pixels(self, row: int) -> np.ndarray:
        """uint8 `[H,W,3]` of a row with pixels: a view, to be used before `release`."""
        return self.block(slice(row, row + 1))[0]

    def _numbers(self) -> np.ndarray:
        """Number of the bucket of each row, -1 without pixels."""
        if self._bucket_of is None:
            bucket = self.columns["bucket"]
            self._bucket_of = (bucket.fill_null(-1) if bucket.null_count else bucket).to_numpy()
        return self._bucket_of

    def of(self, view: int) -> DecodedChunk:
        """The rows and pixels of a view that was wanted, to be used before this chunk is released."""
        # not among them itself: a circle would outlive the ring
        return self._others.get(view, self)

    def hold(self) -> None:
        """One more has to release the pixels."""
        if self._lease is not None:
            self._lease.holders += 1

    def parts(self) -> list[DecodedChunk]:
        """The rows of all views that were wanted, this one's first."""
        return [self, *self._others.values()]

    def size(self, bucket: int) -> Size:
        """A bucket by its number."""
        return self._buckets[bucket]

    def fail(self, failed: Mapping[int, tuple[str, str]]) -> None:
        """Rows, by number, that have no pixels after all: reason and message of each."""
        if failed:
            rows = [Row(values) for values in self.columns.to_pylist()]
            for number, why in failed.items():
                rows[number].values |= dict.fromkeys(DECODED[1:])
                fail([rows[number]], *why)
            self.columns, self._bucket_of = to_batch(rows), None

    def release(self) -> None:
        """The pixels are no longer needed: others may take their place, once all who hold them have said so."""
        if self._lease is None or not self._lease.holders:
            return
        self._lease.holders -= 1
        if not self._lease.holders:
            self._lease.owner.release(self._lease.order)


class DecodePool:
    """Decodes inputs in worker processes. A context manager; the workers start with it and end with it.

    An image is `crashed` if three workers died of it, one after the other, and `timeout` if it took too long; in both
    cases the other images of its chunk are decoded as if nothing had been. So a worker that is killed costs nothing.

    Attributes:
        chunk: how long ranges are best.
        meter: what all chunks took so far.
        started: seconds that the first chunk was waited for, while the workers started.
        waited: seconds that `decode` waited for the others.
        chunks, ready_count: chunks that were wanted, and those that were decoded then, summed up.

    Args:
        source: of the inputs.
        policy: of the pixels.
        buckets: an image comes to the nearest of them.
        workers: processes; 0 decodes in this one, without a limit of time and without its safety.
        image_timeout: seconds that reading and decoding one image may take.
        pixel_budget: bytes that all workers together may take: an eighth for files that they have read, the rest to
            decode them. Half of either is shared out; the other half is for workers that need more than their share. A
            file or an image that needs more than all of that half has it alone.
        ring_bytes: of shared memory for pixels; more where `workers` could not be kept busy otherwise.
        readers: threads per worker that read ahead.
        record_bytes: set aside for the record of each image that is resized elsewhere (see `images.deferred`); 0: the
            workers resize.
        backoff: seconds to wait before each further attempt to read an input that failed for now.
        known: for each view, if there are any, hashes of inputs that are read and not decoded for it: their rows have
            the status "known".
        helper: where the workers are forked, if it was started before; it ends with the pool.
        also: further views of every image, numbered from 1; the one of `policy` and `buckets` is 0.

    Raises:
        InputError: an argument out of range.
        CacheError: no shared memory, or the workers cannot be started.
    """

    def __init__(
        self,
        source: Source,
        policy: PixelPolicy,
        buckets: Sequence[Size],
        *,
        workers: int,
        image_timeout: float = 60.0,
        pixel_budget: int = 2 << 30,
        ring_bytes: int = 512 << 20,
        readers: int = 4,
        record_bytes: int = 0,
        backoff: Sequence[float] = BACKOFF_SECONDS,
        known: Sequence[Contents | None] = (),
        helper: Helper | None = None,
        also: Sequence[View] = (),
    ):
        checks: dict[str, bool] = {"workers": workers >= 0, "image_timeout": image_timeout > 0, "readers": readers >= 1}
        checks |= {"pixel_budget": pixel_budget > 0, "ring_bytes": ring_bytes > 0, "buckets": len(buckets) > 0}
        values: dict[str, Any] = {"workers": workers, "image_timeout": image_timeout, "readers": readers}
        values |= {"pixel_budget": pixel_budget, "ring_bytes": ring_bytes, "buckets": list(buckets)}
        for name, fine in checks.items():
            if not fine:
                raise InputError(f"{name} {values[name]} is too small")
        self.workers = workers
        self.meter = Meter()
        self.waited = self.started = 0.0
        self.chunks = self.ready_count = 0
        if record_bytes % UNIT:
            raise InputError(f"record_bytes {record_bytes} is not a multiple of {UNIT}")
        self._job = Job(
            source,
            policy,
            tuple(buckets),
            readers,
            tuple(backoff),
            pixel_budget,
            record_bytes,
            tuple(known),
            tuple(also),
        )
        # of a ring as asked for, everyone has two chunks at least
        most = CHUNK * (2 if _are_small(source) else 1)
        self.chunk = max(1, min(most, ring_bytes // (self._job.slot * (2 * workers + 2))))
        self._ring_bytes = max(ring_bytes, self._job.slot * self.chunk * (2 * workers + 2))
        self._image_timeout = image_timeout
        self._helper = helper
        self._coordinator: Coordinator | None = None
        self._here: Worker | None = None

    def __enter__(self) -> DecodePool:
        if self.workers == 0:
            self._here = Worker(self._job)
        else:
            helper, self._helper = self._helper, None
            self._coordinator = Coordinator(self._job, self.workers, self._ring_bytes, self._image_timeout, helper)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._here is not None:
            self._here.close()
        if self._coordinator is not None:
            self._coordinator.close()
        self._here = self._coordinator = None

    def pin(self, device: torch.device) -> None:
        """Page-lock the ring, so that a GPU reads pixels from it directly; a warning is logged where that fails."""
        if self._coordinator is not None:
            self._coordinator.pin(device)

    def leave_pinned(self) -> None:
        """The memory goes with the process, which a driver that hangs does not keep from ending."""
        if self._coordinator is not None:
            self._coordinator.leave_pinned()

    def decode(self, ordinals: Iterable[Sequence[int] | Wanted], ahead: int | None = None) -> Iterator[DecodedChunk]:
        """A chunk for each range or list of inputs, in the order given, whichever worker is done first. Where
        one does not say which views are wanted, it is the first.

        They are taken, in the calling thread, as far ahead as the ring has room, or `ahead` inputs. Chunks are to be
        released, or the ring fills up.

        Raises:
            InputError: one longer than the ring.
            CacheError: no worker lives long enough to decode anything; all of the ring is held by the caller.
        """
        if self._here is not None:
            yield from self._decode_here(self._here, ordinals)
            return
        if self._coordinator is None:
            raise InputError("the pool is closed: use it in a with statement")
        coordinator = self._coordinator
        orders: deque[Order] = deque()
        todo = map(_wanted, ordinals)
        held: Wanted | None = None
        under_way = 0
        try:
            while True:
                while (ahead is None or not orders or under_way < ahead) and (
                    held is not None or (held := next(todo, None)) is not None
                ):
                    order = coordinator.place(*held)
                    if order is None:
                        break
                    orders.append(order)
                    under_way += len(order.ordinals)
                    held = None
                if not orders:
                    if held is None:
                        return
                    count = len(held.ordinals)
                    raise CacheError(
                        f"no room for {count} inputs in a ring of {self._ring_bytes} bytes, all of which is held: "
                        "release chunks, or use a larger ring"
                    )
                result, waited = coordinator.wait(orders[0])
                self.ready_count += 1 + coordinator.ready
                self.chunks += 1
                order = orders.popleft()
                under_way -= len(order.ordinals)
                if self.chunks == 1:
                    self.started = waited
                else:
                    self.waited += waited
                self.meter = self.meter.plus(result.meter)
                chunk = self._chunk(order.views, *result)
                lease = _Lease(coordinator, order)
                for part in (chunk, *chunk._others.values()):
                    part._lease = lease
                yield chunk
        finally:
            for order in orders:
                coordinator.abandon(order)

    def _decode_here(self, worker: Worker, ordinals: Iterable[Sequence[int] | Wanted]) -> Iterator[DecodedChunk]:
        for chosen, views in map(_wanted, ordinals):
            pixels = np.empty(len(chosen) * self._job.slot, np.uint8)
            worker.push(chosen)
            rows, meter = worker.chunk(len(chosen), pixels, views)
            self.meter = self.meter.plus(meter)
            self.chunks += 1
            offsets = np.array([row.offset for row in rows], np.int64)
            yield self._chunk(views, to_batch(rows), pixels, offsets, meter)

    def _chunk(
        self, views: Sequence[int], columns: Any, pixels: np.ndarray, offsets: np.ndarray, meter: Meter
    ) -> DecodedChunk:
        """Of rows that lie view after view."""
        count = columns.num_rows // max(len(views), 1)
        parts = {
            view: DecodedChunk(
                columns.slice(k * count, count),
                meter,
                pixels,
                offsets[k * count : (k + 1) * count],
                self._job.views[view].buckets,
            )
            for k, view in enumerate(views)
        }
        if not parts:
            return DecodedChunk(columns, meter, pixels, offsets, self._job.buckets)
        first = parts.pop(views[0])
        first._others = parts
        return first


def _are_small(source: Source) -> bool:
    """Whether inputs take so little time to decode that handing chunks over takes a part of it."""
    known = source.listing.sizes[source.listing.sizes >= 0]
    return bool(len(known)) and float(known.mean()) < _SMALL_BYTES


def _wanted(ordinals: Sequence[int] | Wanted) -> Wanted:
    return ordinals if isinstance(ordinals, Wanted) else Wanted(ordinals, (0,))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
