"""One stream of decoded images for several views: each is read and decoded once, and goes to every view's pipeline.

What a view's pipeline is given are its own tasks, in order, and its own pixels: it does what it would do alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .decoding import DecodePool, usable_cores
from .decoding.pool import Wanted
from .gpu_decoding import GpuDecoder
from .meters import GPU_DECODE, Meters
from .pipeline import AHEAD, Pipeline
from .plan import Task
from .span_queue import Span


class _Step(NamedTuple):
    """What a view is given: inputs of a task, or its end, or both."""

    view: int
    task: Task
    is_last: bool


class _Piece(NamedTuple):
    """Inputs that are decoded together, for the same views."""

    ordinals: Sequence[int]
    views: tuple[int, ...]
    steps: list[_Step]


class ViewsPipeline:
    """Encodes and writes the tasks of several views.

    Attributes:
        read: inputs that were read, for whichever views.
        costs: what storage types cost, for the meters.

    Args:
        pipelines: of every view, by the numbers that the pool has for them.
    """

    def __init__(self, pipelines: Sequence[Pipeline], decoder: DecodePool):
        self.pipelines = pipelines
        self.decoder = decoder
        self.read = 0
        self.costs: dict[str, dict[str, float | None]] = {}
        # what resizes is the same for all that have it
        self._uploading = next((p for p in pipelines if p.encoder.resizer is not None), pipelines[0])

    def run(self, spans: Iterable[Span]) -> None:
        """Write the tasks of all spans.

        On an exception, KeyboardInterrupt included, what is being written is finished and open tasks are dropped.
        """
        order: deque[_Piece] = deque()
        with ExitStack() as stack:
            for pipeline in self.pipelines:
                stack.enter_context(pipeline.at_work())
            chunks = self.decoder.decode(self._wanted(spans, order), AHEAD)
            resizer = self._uploading.encoder.resizer
            for chunk in chunks if resizer is None else resizer.ahead(chunks):
                piece = order.popleft()
                self._uploading.upload(chunk)
                for view, task, is_last in piece.steps:
                    pixels = (piece.ordinals, is_last, chunk.of(view)) if view in piece.views else ((), is_last, None)
                    self.pipelines[view].accept(task, *pixels)
                chunk.release()
                self.read += len(piece.ordinals)

    def _wanted(self, spans: Iterable[Span], order: deque[_Piece]) -> Iterator[Wanted]:
        for span in spans:
            for stretch, tasks in span.stretches():
                chunks = [*self._chunks(stretch, tasks)]
                # a stretch of which nothing is to be read still has its turn
                for left, (ordinals, wanting) in zip(range(len(chunks) - 1, -1, -1), chunks, strict=True):
                    is_end = left == 0
                    # an abandoned task is taken to its end, but its inputs are not decoded
                    views = tuple(v for v, task in wanting if task.number not in self.pipelines[v].abandoned)
                    ending = [v for v, task in tasks if is_end and task.stop == stretch.stop]
                    steps = [_Step(v, task, v in ending) for v, task in tasks if v in views or v in ending]
                    piece = _Piece(ordinals if views else (), views, steps)
                    order.append(piece)
                    yield Wanted(piece.ordinals, views)

    def _chunks(
        self, stretch: range, tasks: Sequence[tuple[int, Task]]
    ) -> Iterator[tuple[Sequence[int], list[tuple[int, Task]]]]:
        """Inputs to be read, in order, and the views that they are read for; one without inputs if there are none."""
        need = np.ones((len(tasks), len(stretch)), bool)
        for row, (view, _) in zip(need, tasks, strict=True):
            reuse = self.pipelines[view].reuse
            if reuse is not None:
                row[:] = reuse.refs[stretch.start : stretch.stop] < 0
        read = np.flatnonzero(need.any(0))
        need = need[:, read]
        bounds = [0, *(np.flatnonzero((need[:, 1:] != need[:, :-1]).any(0)) + 1).tolist(), len(read)]
        if not len(read):
            yield (), []
        for begin, end in pairwise(bounds):
            wanting = [task for task, row in zip(tasks, need, strict=True) if end > begin and row[begin]]
            for start in range(begin, end, self.decoder.chunk):
                yield (stretch.start + read[start : min(start + self.decoder.chunk, end)]).tolist(), wanting

    def measure(self) -> Meters:
        """The meters as of now: those of all views added up, reading and decoding counted once."""
        parts = [pipeline.measure() for pipeline in self.pipelines]
        first = parts[0]
        total = Meters(first.workers, usable_cores(), first.device, decoded=first.decoded)
        total.seconds = first.seconds | {s: sum(m.seconds[s] for m in parts) for s in ("fill", "encode", "write")}
        total.waits = first.waits | {s: sum(m.waits[s] for m in parts) for s in ("encode", "write")}
        if isinstance(resizer := self._uploading.encoder.resizer, GpuDecoder):
            total.seconds[GPU_DECODE], total.waits[GPU_DECODE] = resizer.spent()
        total.ahead, total.images, total.wall, total.costs = first.ahead, self.read, first.wall, self.costs
        return total
