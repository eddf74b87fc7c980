"""The stages of a run: read, decode and resize, encode, write.

Memory is bounded by two shards and a window of pixels.

Read and decode share a pool of threads that works ahead in the order of the plan. The calling thread stacks a batch,
has it encoded, and while the device works stacks the next one. A full shard goes to a thread that hashes, writes and
commits it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError, ImageError
from ..images.decode import UNREADABLE, open_image, read_bytes
from ..images.geometry import Placement, Size, place
from ..images.load import PixelPolicy, frame
from ..images.scan import Scan, path_to_id
from .durable import xxh3
from .encoder import BatchEncoder, Encoded
from .inputs import Inputs, name_in_message
from .plan import Shard
from .shards import OK, QUARANTINED, IndexEntry, ShardStore

CHANGED = "changed"
"""Reason of an input that was replaced between planning and reading."""
NAN_LATENT = "nan_latent"
"""Reason of an input with a latent that is not finite in the stored dtype."""


@dataclass
class Meters:
    """Seconds of work per stage. Read and decode add up over their threads; the others have one worker each."""

    threads: int
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "decode", "encode", "write"), 0.0))
    wall: float = 0.0

    def occupancy(self) -> dict[str, float]:
        """Share of its workers' time that each stage has worked, 0 to 1."""
        wall = max(self.wall, 1e-9)
        return {k: s / wall / (self.threads if k in ("read", "decode") else 1) for k, s in self.seconds.items()}

    def limit(self) -> str:
        """The stage that is busiest; of read and decode, which share their threads, the larger part of the two."""
        busy = self.occupancy()
        pool = max(("read", "decode"), key=busy.__getitem__)
        shares = {pool: busy["read"] + busy["decode"], "encode": busy["encode"], "write": busy["write"]}
        return max(shares, key=shares.__getitem__)

    def __str__(self) -> str:
        share = {k: f"{k} {v:.0%}" for k, v in self.occupancy().items()}
        share["decode"] += f" of {self.threads} threads"
        return f"{', '.join(share.values())}; limited by {self.limit()}"


@dataclass
class Slot:
    """One input after reading and decoding: its index entry, and its pixels, uint8 `[H,W,3]`, unless it failed."""

    entry: IndexEntry
    pixels: np.ndarray | None = None
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


class Loader:
    """Reads, decodes and resizes one planned input. Called from several threads."""

    def __init__(self, scan: Scan, inputs: Inputs, background: tuple[int, int, int]):
        self.scan = scan
        self.inputs = inputs
        self.policy = PixelPolicy(background=background)
        self.root = _stat_id(scan.root)

    def __call__(self, i: int, bucket: Size) -> Slot:
        path = self.inputs.paths[i]
        where = os.fsdecode(self.scan.locate(path))
        placement = place(self.inputs.size(i), bucket)
        slot = Slot(self._describe(i, placement))
        begin = time.perf_counter()
        try:
            data = read_bytes(where)
            slot.entry["bytes_hash"] = xxh3(data).digest()
            if len(data) != self.inputs.sizes[i]:
                raise ImageError(CHANGED, f"{len(data)} bytes now, {self.inputs.sizes[i]} when the cache was planned")
            read = time.perf_counter()
            slot.read_seconds = read - begin
            slot.pixels = self._pixels(data, i, placement)
            slot.decode_seconds = time.perf_counter() - read
        except ImageError as e:
            if e.reason == UNREADABLE and self.root != _stat_id(self.scan.root):
                # an unmounted disk is no property of the images
                raise CacheError(
                    f"{os.fsdecode(self.scan.root)} went away during the run: "
                    "bring it back and run the same command again"
                ) from e
            quarantine(slot.entry, e.reason, name_in_message(str(e), where, path))
        return slot

    def _pixels(self, data: bytes, i: int, placement: Placement) -> np.ndarray:
        image = open_image(data, name=path_to_id(self.inputs.paths[i]))
        found, planned = Size(image.header.height, image.header.width), self.inputs.size(i)
        if found != planned:
            raise ImageError(CHANGED, f"{found} pixels (height x width) now, {planned} when the cache was planned")
        return frame(image, self.policy, placement)

    def describe_unplanned(self, i: int) -> IndexEntry:
        """Index entry of input `i`, which has no bucket."""
        path = self.inputs.paths[i]
        entry: IndexEntry = {"input": i, "id": path_to_id(path), "path": path, "status": OK}
        quarantine(entry, *self.inputs.failures[i])
        return entry

    def _describe(self, i: int, placement: Placement) -> IndexEntry:
        """Index entry of input `i`, as far as the plan determines it."""
        path, size = self.inputs.paths[i], self.inputs.size(i)
        return {
            "input": i,
            "id": path_to_id(path),
            "path": path,
            "status": OK,
            "width": size.width,
            "height": size.height,
            "orientation": int(self.inputs.orientation[i]),
            "bucket_height": placement.crop.height,
            "bucket_width": placement.crop.width,
            "resize_height": placement.resize.height,
            "resize_width": placement.resize.width,
            "crop_top": placement.top,
            "crop_left": placement.left,
        }


def quarantine(entry: IndexEntry, reason: str, message: str) -> None:
    """Mark an index entry as not cached."""
    entry["status"], entry["reason"], entry["message"] = QUARANTINED, reason, message


@dataclass
class Batch:
    """A slice of a shard's inputs. What of it can be decoded is encoded in one call.

    Attributes:
        inputs: ordinals, int64 `[N]`.
        last: whether the shard ends with it.
    """

    shard: Shard
    inputs: np.ndarray
    last: bool


def batches(shards: Iterable[Shard], size: int) -> Iterator[Batch]:
    """Every shard's inputs in order, `size` at a time; a batch never spans two shards."""
    for shard in shards:
        for start in range(0, len(shard.inputs), size):
            yield Batch(shard, shard.inputs[start : start + size], start + size >= len(shard.inputs))


@dataclass
class OpenShard:
    """The shard under way: its index entries, and the encoded rows of each tensor in pieces `[n,C,h,w]`."""

    entries: list[IndexEntry] = field(default_factory=list)
    pieces: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, slots: list[Slot], encoded: Encoded | None) -> None:
        """Add a batch; `encoded` holds what of it could be decoded, or is None if nothing could."""
        self.entries += [slot.entry for slot in slots]
        if encoded is None:
            return
        decoded = [slot.entry for slot in slots if slot.entry["status"] == OK]
        for entry, stats, finite in zip(decoded, encoded.stats.tolist(), encoded.finite.tolist(), strict=True):
            if finite:
                entry["min"], entry["max"], entry["mean"], entry["std"] = stats
            else:
                message = "a latent is not finite in the stored dtype: try another compute or storage dtype"
                quarantine(entry, NAN_LATENT, message)
        if not encoded.finite.any():
            return
        for name, t in encoded.tensors.items():
            self.pieces.setdefault(name, []).append(t if encoded.finite.all() else t[encoded.finite])


class Pipeline:
    """Encodes and writes shards.

    Args:
        workers: threads for reading and decoding.
        advance: told how many more inputs are done, and how many of these are quarantined.
    """

    def __init__(
        self,
        store: ShardStore,
        loader: Loader,
        encoder: BatchEncoder,
        workers: int,
        advance: Callable[[int, int], None] = lambda inputs, quarantined: None,
    ):
        self.store = store
        self.loader = loader
        self.encoder = encoder
        self.workers = workers
        self.advance = advance
        self.meters = Meters(workers)
        self._open = OpenShard()
        self._writing: Future[float] | None = None

    def run(self, shards: Iterable[Shard]) -> None:
        """Write all of `shards`.

        On an exception, KeyboardInterrupt included, the shard being written is finished and the open one is dropped.
        """
        begin = time.perf_counter()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        try:
            under_way: tuple[Batch, list[Slot], Encoded | None] | None = None
            for batch, slots in self._prefetch(pool, batches(shards, self.store.plan.batch)):
                submitted = batch, slots, self._submit(slots, batch.shard.bucket)
                if under_way:
                    self._collect(writer, *under_way)
                under_way = submitted
            if under_way:
                self._collect(writer, *under_way)
            self._wait_for_writer()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            writer.shutdown(wait=True)
            self.meters.seconds["encode"] = self.encoder.busy
            self.meters.wall = time.perf_counter() - begin

    def _prefetch(self, pool: ThreadPoolExecutor, todo: Iterator[Batch]) -> Iterator[tuple[Batch, list[Slot]]]:
        ahead = 2 * self.store.plan.batch + 2 * self.workers
        pending: deque[tuple[Batch, list[Future[Slot]]]] = deque()
        count = 0
        while True:
            while count < ahead and (batch := next(todo, None)) is not None:
                futures = [pool.submit(self.loader, int(i), batch.shard.bucket) for i in batch.inputs]
                pending.append((batch, futures))
                count += len(futures)
            if not pending:
                return
            batch, futures = pending.popleft()
            slots = [future.result() for future in futures]
            count -= len(slots)
            self.meters.seconds["read"] += sum(s.read_seconds for s in slots)
            self.meters.seconds["decode"] += sum(s.decode_seconds for s in slots)
            yield batch, slots

    def _submit(self, slots: list[Slot], bucket: Size) -> Encoded | None:
        images = [slot.pixels for slot in slots if slot.pixels is not None]
        if not images:
            return None
        pixels = self.encoder.buffer(len(images), bucket.height, bucket.width)
        np.stack(images, out=pixels.numpy())
        for slot in slots:
            slot.pixels = None
        try:
            return self.encoder.submit(pixels)
        except torch.OutOfMemoryError as e:
            raise CacheError(
                f"not enough GPU memory to encode {len(images)} images of {bucket}: use a smaller batch"
            ) from e

    def _collect(self, writer: ThreadPoolExecutor, batch: Batch, slots: list[Slot], encoded: Encoded | None) -> None:
        self._open.add(slots, self.encoder.fetch(encoded) if encoded else None)
        failed = [slot.entry["reason"] for slot in slots if slot.entry["status"] != OK]
        self.advance(len(slots), len(failed))
        if self._writing and self._writing.done():
            self._wait_for_writer()
        if batch.last:
            self._wait_for_writer()
            full, self._open = self._open, OpenShard()
            self._writing = writer.submit(self._write, batch.shard, full)

    def _write(self, shard: Shard, full: OpenShard) -> float:
        begin = time.perf_counter()
        self.store.write(shard, full.entries, full.pieces)
        return time.perf_counter() - begin

    def _wait_for_writer(self) -> None:
        if self._writing:
            # raises what the writer raised
            self.meters.seconds["write"] += self._writing.result()
            self._writing = None


def _stat_id(path: bytes) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino


def device_threads(device: str) -> int:
    """Threads for reading and decoding unless the caller says otherwise: every core, less one that drives a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - (torch.device(device).type == "cuda"))
