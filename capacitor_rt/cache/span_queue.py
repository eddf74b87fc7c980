"""The work of several views: spans of the inputs that are whole tasks in each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .plan import Task
from .task_queue import TaskQueue


@dataclass(frozen=True)
class Span:
    """Tasks of several views over the same inputs, each with the number of its view, in the order of the inputs."""

    tasks: tuple[tuple[int, Task], ...]

    def stretches(self) -> Iterator[tuple[range, list[tuple[int, Task]]]]:
        """The inputs in order, cut where a task begins or ends, each time with the task of every view that has one."""
        bounds = sorted({bound for _, task in self.tasks for bound in (task.first, task.stop)})
        for first, stop in pairwise(bounds):
            here = [(view, task) for view, task in self.tasks if task.first <= first < task.stop]
            if here:
                yield range(first, stop), here


def spans(tasks: Sequence[Sequence[Task]]) -> list[Span]:
    """The shortest spans, given the tasks of every view over the same inputs.

    Views whose tasks have the same number of inputs give a span for each task; of numbers that divide each other, as
    the defaults do, the largest task makes a span.
    """
    common = set.intersection(*({task.stop for task in view} for view in tasks))
    found: list[list[tuple[int, Task]]] = [[] for _ in common]
    numbers = {stop: number for number, stop in enumerate(sorted(common))}
    for view, several in enumerate(tasks):
        at = 0
        for task in several:
            found[at].append((view, task))
            at += task.stop in numbers
    return [Span(tuple(sorted(span, key=lambda item: (item[1].first, item[0])))) for span in found]


class SpanQueue:
    """Takes the leases of a span's tasks as it is iterated over, which ends when nothing can be taken now.

    Args:
        queues: of every view, over the tasks that are to be done.
        rank, size: where several processes share the work, this one begins at its part of the spans.
    """

    def __init__(self, queues: Sequence[TaskQueue], tasks: Sequence[Sequence[Task]], rank: int = 0, size: int = 1):
        self.queues = queues
        todo = [{task.number for task in queue.order} for queue in queues]
        left = [Span(tuple((v, t) for v, t in span.tasks if t.number in todo[v])) for span in spans(tasks)]
        order = [span for span in left if span.tasks]
        start = rank * len(order) // size
        self.order = order[start:] + order[:start]

    def __iter__(self) -> Iterator[Span]:
        for span in self.order:
            taken = tuple((view, task) for view, task in span.tasks if self.queues[view].take(task))
            if taken:
                yield Span(taken)

    def left(self) -> bool:
        """Whether there are tasks that others are at work on, or have left."""
        return any([queue.left() for queue in self.queues])
