"""What a run has done, or would do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..images.geometry import Size
from .meters import Meters


@dataclass
class Report:
    """What a cache holds after a run, and what the run did.

    Attributes:
        inputs, cached, tasks, nbytes: numbers of inputs, of rows and of committed tasks, and bytes of their latents.
        quarantined: number of inputs by reason.
        failed: number of inputs that failed for now, by reason; their tasks are not finished, and the next run tries
            again.
        unfinished: tasks that are not finished because of them.
        examples: a few of these inputs with what happened, one line each.
        new_images: inputs that this run has read.
        seconds: wall time of the run, planning included.
        meters: what its stages did; None if there was nothing to encode.
    """

    inputs: int
    cached: int
    quarantined: Counter[str]
    tasks: int
    nbytes: int
    failed: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0
    examples: list[str] = field(default_factory=list)
    new_images: int = 0
    seconds: float = 0.0
    meters: Meters | None = None

    @property
    def exit_code(self) -> int:
        """0: every input is cached; 3: some are quarantined; 1: some tasks are not finished."""
        if self.unfinished:
            return 1
        return 3 if self.quarantined.total() else 0


@dataclass
class DryRun:
    """What a run would do.

    Attributes:
        buckets: number of inputs by bucket.
        quarantined: number of inputs by the reason seen in their header.
        tasks, nbytes: number of tasks in all, and the bytes of their latents if every input can be cached.
        todo, todo_nbytes: the same of what is still to be written.
        inputs: most inputs per task.
        notes: what a user may want to know before the work starts, one line per note.
        sampled: number of headers read, where that is not all of them: `buckets`, `quarantined` and bytes are then
            estimates.
    """

    buckets: dict[Size, int]
    quarantined: Counter[str]
    tasks: int
    todo: int
    nbytes: int
    todo_nbytes: int
    inputs: int
    notes: list[str] = field(default_factory=list)
    sampled: int | None = None
