"""The stages of a run: read and decode, encode, write.

Memory is bounded by two tasks and a window of pixels. Chunks of decoded inputs arrive in the order of the tasks. Each
image joins the open batch of its bucket, and a batch is encoded when it is full or the task ends: so the composition
of batches follows from the plan and the inputs alone. While the device works, the next batch is filled: a GPU's from
the ring itself. Where the CPU encodes, a batch whose images lie together in the ring is encoded there, and not copied.
A full task goes to a thread that hashes, writes and commits it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError, HungError
from ..images.geometry import Size
from .decoding import DecodedChunk, DecodePool, usable_cores
from .encoder import BatchEncoder, Encoded
from .failures import is_retryable
from .gpu_decoding import GpuDecoder
from .meters import GPU_DECODE, Meters
from .open_task import OpenTask, Waiting
from .plan import Task
from .resizing import Resizer, Uploader
from .reuse import Reuse
from .sources import Source
from .statuses import KNOWN
from .store import TaskStore

IN_FLIGHT = 2
AHEAD = 8192
"""Inputs that are decoded ahead, if the ring has room: half a second of them, and seldom of more than two tasks."""


Fill = Callable[[slice, Tensor, slice], None]
"""Puts some of a chunk's images into a part of a batch."""


def _copy(pixels: np.ndarray, chosen: slice, batch: Tensor, into: slice) -> None:
    np.copyto(batch.numpy()[into], pixels[chosen])


def _upload(uploader: Uploader, pixels: np.ndarray, chosen: slice, batch: Tensor, into: slice) -> None:
    uploader.upload(pixels[chosen], batch, into.start)


def _resize(resizer: Resizer, offsets: np.ndarray, chosen: slice, batch: Tensor, into: slice) -> None:
    resizer.put(offsets[chosen], batch, into.start)


class Pipeline:
    """Encodes and writes tasks.

    Attributes:
        read: inputs that this run has read.
        reused: inputs whose rows were taken over from an earlier generation, read or not.
        unfinished: inputs that failed for now, with reason and message; they keep their tasks from being finished.
        abandoned: numbers of these tasks.

    Args:
        give_up: finish a task in spite of inputs that failed for now: they are quarantined.
        reuse: rows that need not be encoded again.
        advance: told how many more inputs are done, and how many of these are quarantined.
    """

    def __init__(
        self,
        store: TaskStore,
        source: Source,
        decoder: DecodePool,
        encoder: BatchEncoder,
        *,
        give_up: bool = False,
        reuse: Reuse | None = None,
        advance: Callable[[int, int], None] = lambda inputs, quarantined: None,
    ):
        self.store = store
        self.reuse = reuse
        self.source = source
        self.decoder = decoder
        self.encoder = encoder
        self.give_up = give_up
        self.advance = advance
        device = "gpu" if encoder.on_gpu else "cpu"
        self.meters = Meters(decoder.workers, usable_cores(), device, decoded=store.plan.policy.decode)
        self.read = self.reused = 0
        self.unfinished: list[dict[str, Any]] = []
        self.sizes: Counter[Size] = Counter()
        self._under_way: deque[tuple[OpenTask, int, Waiting, Encoded]] = deque()
        self.abandoned: set[int] = set()
        self._open: OpenTask | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[float] | None = None
        self._begin: float | None = None
        self._before = 0.0

    def run(self, tasks: Iterable[Task]) -> None:
        """Write all of `tasks`.

        On an exception, KeyboardInterrupt included, the task being written is finished and the open one is dropped.
        """
        order: deque[tuple[Task, Sequence[int], bool]] = deque()
        with self.at_work():
            chunks = self.decoder.decode(self._ranges(tasks, order), AHEAD)
            resizer = self.encoder.resizer
            for chunk in chunks if resizer is None else resizer.ahead(chunks):
                self.upload(chunk)
                self.accept(*order.popleft(), chunk)
                chunk.release()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While chunks are accepted; at its end what is to be written is on disk."""
        self._begin = begin = time.perf_counter()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        try:
            yield
            self._wait_for_writer()
        except HungError:
            # the driver would wait for what hangs
            self.decoder.leave_pinned()
            raise
        finally:
            if self.encoder.uploader is not None:
                self.encoder.uploader.finish()
            self._writer.shutdown(wait=True)
            self._open = None
            self._before += time.perf_counter() - begin
            self._begin = None

    def upload(self, chunk: DecodedChunk) -> None:
        """Where the device resizes, have the chunk copied there. It comes before `accept`, once for all views."""
        if self.encoder.resizer is not None:
            begin = time.perf_counter()
            self.encoder.resizer.take(chunk)
            self.meters.seconds["fill"] += time.perf_counter() - begin

    def accept(self, task: Task, chosen: Sequence[int], is_last: bool, chunk: DecodedChunk | None) -> None:
        """The next inputs of a task, decoded, in order. What is in use for longer is held.

        Args:
            is_last: whether nothing comes after them: the task is finished.
            chunk: None of a task that was abandoned.
        """
        if self._open is None or self._open.task != task:
            self._open = self._begin_task(task)
        if task.number not in self.abandoned and chunk is not None:
            self._take(self._open, chunk, chosen)
        if is_last:
            self._finish(self._open)
            self._open = None

    def measure(self) -> Meters:
        """The meters as of now."""
        meters, pool = self.meters, self.decoder
        running = 0.0 if self._begin is None else time.perf_counter() - self._begin
        meters.wall, meters.images = self._before + running, self.read
        meters.seconds |= {"read": pool.meter.read, "decode": pool.meter.decode, "encode": self.encoder.busy}
        meters.waits |= {name: getattr(pool.meter, name) for name in ("starved", "queued", "idle")}
        meters.waits |= {"start": pool.started, "decode": pool.waited, "encode": self.encoder.waited}
        if isinstance(self.encoder.resizer, GpuDecoder):
            meters.seconds[GPU_DECODE], meters.waits[GPU_DECODE] = self.encoder.resizer.spent()
        meters.ahead = pool.ready_count / max(pool.chunks, 1)
        return meters

    def _ranges(self, tasks: Iterable[Task], order: deque[tuple[Task, Sequence[int], bool]]) -> Iterator[Sequence[int]]:
        nothing = range(0)
        for task in tasks:
            inputs: Sequence[int] = range(task.first, task.stop)
            if self.reuse is not None:
                inputs = (task.first + np.flatnonzero(self.reuse.refs[task.first : task.stop] < 0)).tolist()
            # a task of which nothing is to be read still has its turn
            for start in range(0, len(inputs), self.decoder.chunk) or (0,):
                # an abandoned task is taken to its end, but its inputs are not decoded
                is_abandoned = task.number in self.abandoned
                chosen = nothing if is_abandoned else inputs[start : start + self.decoder.chunk]
                is_last = is_abandoned or start + self.decoder.chunk >= len(inputs)
                order.append((task, chosen, is_last))
                yield chosen
                if is_last:
                    break

    def _begin_task(self, task: Task) -> OpenTask:
        open_task = OpenTask(task, self.store.plan, self.reuse)
        known = int((open_task.refs >= 0).sum())
        if known and task.number not in self.abandoned:
            self.reused += known
            self.advance(known, 0)
        return open_task

    def _take(self, open_task: OpenTask, chunk: DecodedChunk, chosen: Sequence[int]) -> None:
        """Put the images of a chunk into the open batches of their buckets."""
        columns = chunk.columns
        # those that failed have a reason, and no others
        failed = columns.num_rows - columns["reason"].null_count
        if failed:
            self._look_at_failures(open_task, columns)
            if open_task.task.number in self.abandoned:
                return
        open_task.chunks.append(columns)
        positions = np.asarray(chosen) - open_task.task.first
        if self.reuse is not None:
            self._recognise(self.reuse, open_task, positions, columns)
        begin, encoding = time.perf_counter(), self.encoder.seconds
        uploader, resizer = self.encoder.uploader, self.encoder.resizer
        if resizer is not None:
            for rows, bucket in chunk.groups():
                self._put(open_task, bucket, positions[rows], partial(_resize, resizer, chunk.offsets(rows)))
        elif uploader is not None:
            for run, bucket in chunk.runs():
                self._put(open_task, bucket, positions[run], partial(_upload, uploader, chunk.block(run)))
            uploader.hold(chunk)
        else:
            for run, bucket in chunk.runs():
                block = chunk.block(run)
                self._put(open_task, bucket, positions[run], partial(_copy, block), block)
        self.meters.seconds["fill"] += time.perf_counter() - begin - (self.encoder.seconds - encoding)
        self.read += len(chosen)
        self.advance(len(chosen), failed)
        if self._writing and self._writing.done():
            self._wait_for_writer()

    def _recognise(self, reuse: Reuse, open_task: OpenTask, positions: np.ndarray, columns: Any) -> None:
        """Take note of inputs that were read and found to have the bytes of a row that is there."""
        for row, status in enumerate(columns["status"].to_pylist()):
            if status == KNOWN:
                open_task.refs[positions[row]] = reuse.find(columns["bytes_hash"][row].as_py())
                self.reused += 1

    def _look_at_failures(self, open_task: OpenTask, columns: Any) -> None:
        names = ["input", "reason", "message"]
        found = [row for row in columns.select(names).to_pylist() if is_retryable(row["reason"] or "")]
        if not found:
            return
        gone = self.source.why_gone()
        if gone:
            # an unmounted disk is no property of the images
            raise CacheError(f"{gone}: bring it back and run the same command again")
        if not self.give_up:
            self.unfinished += found
            self.abandoned.add(open_task.task.number)

    def _put(
        self, open_task: OpenTask, bucket: int, positions: np.ndarray, fill: Fill, block: np.ndarray | None = None
    ) -> None:
        """Put images at these positions into the open batch of their bucket, and into the next ones.

        Args:
            block: their pixels, where the encoder is done with a batch as soon as it has it: whole ones are not copied.
        """
        batch, size = self.store.plan.batch, self.store.plan.buckets[bucket]
        done = 0
        while done < len(positions):
            waiting = open_task.waiting.get(bucket)
            if waiting is None and block is not None and len(positions) - done >= batch:
                chosen = slice(done, done + batch)
                pixels = torch.from_numpy(block[chosen])
                self._submit(open_task, bucket, Waiting(pixels, positions[chosen], batch, is_own=False))
                done = chosen.stop
                continue
            if waiting is None:
                buffer = self.encoder.buffer(batch, size.height, size.width)
                waiting = open_task.waiting[bucket] = Waiting(buffer, np.empty(batch, np.int64))
            count = min(batch - waiting.count, len(positions) - done)
            chosen, into = slice(done, done + count), slice(waiting.count, waiting.count + count)
            fill(chosen, waiting.pixels, into)
            waiting.positions[into] = positions[chosen]
            waiting.count, done = into.stop, chosen.stop
            if waiting.count == batch:
                self._submit(open_task, bucket, open_task.waiting.pop(bucket))

    def _submit(self, open_task: OpenTask, bucket: int, waiting: Waiting) -> None:
        count = waiting.count
        try:
            encoded = self.encoder.submit(waiting.pixels[:count])
        except torch.OutOfMemoryError as e:
            size = self.store.plan.buckets[bucket]
            raise CacheError(f"not enough GPU memory to encode {count} images of {size}: use a smaller batch") from e
        self._under_way.append((open_task, bucket, waiting, encoded))
        while len(self._under_way) >= IN_FLIGHT:
            self._collect()

    def _collect(self) -> None:
        open_task, bucket, waiting, encoded = self._under_way.popleft()
        open_task.add(bucket, waiting.positions[: waiting.count], self.encoder.fetch(encoded))
        if waiting.is_own:
            self.encoder.give_back(waiting.pixels)

    def _finish(self, open_task: OpenTask) -> None:
        if open_task.task.number in self.abandoned:
            with self.store.mutex:
                self.store.leases.release(open_task.task.number)
            return
        for bucket in sorted(open_task.waiting):
            self._submit(open_task, bucket, open_task.waiting.pop(bucket))
        while self._under_way:
            self._collect()
        if open_task.overflowed:
            self.advance(0, len(open_task.overflowed))
        self._wait_for_writer()
        assert self._writer is not None, "it is at work"
        self._writing = self._writer.submit(self._write, open_task)

    def _write(self, open_task: OpenTask) -> float:
        begin = time.perf_counter()
        self.store.write(open_task.task, open_task.data(self.source))
        with self.store.mutex:
            self.store.leases.release(open_task.task.number)
        return time.perf_counter() - begin

    def _wait_for_writer(self) -> None:
        if self._writing:
            begin = time.perf_counter()
            # raises what the writer raised
            self.meters.seconds["write"] += self._writing.result()
            self.meters.waits["write"] += time.perf_counter() - begin
            self._writing = None
