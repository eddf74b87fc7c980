"""One stream of decoded images for several views: each is read and decoded once, and goes to every view's pipeline.

What a view's pipeline is given are its own tasks, in order, and its own pixels: it does what it would do alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from .decoding import DecodePool, usable_cores
from .decoding.pool import Wanted
from .meters import Meters
from .pipeline import AHEAD, Pipeline
from .plan import Task
from .span_queue import Span


class _Piece(NamedTuple):
    chosen: range
    tasks: list[tuple[int, Task]]
    views: tuple[int, ...]


class ViewsPipeline:
    """Encodes and writes the tasks of several views.

    Attributes:
        read: inputs that were decoded, for whichever views.
        costs: what storage types cost, for the meters.

    Args:
        pipelines: of every view, by the numbers that the pool has for them.
    """

    def __init__(self, pipelines: Sequence[Pipeline], decoder: DecodePool):
        self.pipelines = pipelines
        self.decoder = decoder
        self.read = 0
        self.costs: dict[str, dict[str, float | None]] = {}

    def run(self, spans: Iterable[Span]) -> None:
        """Write the tasks of all spans.

        On an exception, KeyboardInterrupt included, what is being written is finished and open tasks are dropped.
        """
        order: deque[_Piece] = deque()
        with ExitStack() as stack:
            for pipeline in self.pipelines:
                stack.enter_context(pipeline.at_work())
            for chunk in self.decoder.decode(self._wanted(spans, order), AHEAD):
                piece = order.popleft()
                is_held = self.pipelines[0].upload(chunk)
                for view, task in piece.tasks:
                    part = chunk.of(view) if view in piece.views else None
                    self.pipelines[view].accept(task, piece.chosen, piece.chosen.stop == task.stop, part)
                if not is_held:
                    chunk.release()
                self.read += len(piece.chosen) if piece.views else 0

    def _wanted(self, spans: Iterable[Span], order: deque[_Piece]) -> Iterator[Wanted]:
        for span in spans:
            for chosen, tasks in span.pieces(self.decoder.chunk):
                # an abandoned task is taken to its end, but its inputs are not decoded
                views = tuple(v for v, task in tasks if task.number not in self.pipelines[v].abandoned)
                order.append(_Piece(chosen, tasks, views))
                yield Wanted(chosen if views else range(chosen.start, chosen.start), views)

    def measure(self) -> Meters:
        """The meters as of now: those of all views added up, reading and decoding counted once."""
        parts = [pipeline.measure() for pipeline in self.pipelines]
        first = parts[0]
        total = Meters(first.workers, usable_cores(), first.device)
        total.seconds = first.seconds | {s: sum(m.seconds[s] for m in parts) for s in ("fill", "encode", "write")}
        total.waits = first.waits | {s: sum(m.waits[s] for m in parts) for s in ("encode", "write")}
        total.ahead, total.images, total.wall, total.costs = first.ahead, self.read, first.wall, self.costs
        return total
