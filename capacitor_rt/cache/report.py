"""What a run has done, or would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..images.geometry import Size
from .dtype_costs import DtypeCost
from .meters import Meters


@dataclass
class Report:
    """What a cache holds after a run, and what the run did.

    Attributes:
        inputs, cached, tasks, nbytes: numbers of inputs, of rows and of committed tasks, and bytes of their latents.
        quarantined: number of inputs by reason.
        failures: reason and message of inputs that failed for now, by id; their tasks are not finished, and the next
            run tries again.
        unfinished: tasks that are not finished because of them.
        new_images: inputs that this run has read.
        reused: inputs whose rows this run has taken over from an earlier generation.
        generation: number of the generation that was written; 0 for a cache that was never updated.
        seconds: wall time of the run, planning included.
        meters: what its stages did; None if there was nothing to encode.
        costs: what each storage type costs, where it was measured.
        views: of a run over several views the report of each, by name, of which this is the sum.
    """

    inputs: int
    cached: int
    quarantined: Counter[str]
    tasks: int
    nbytes: int
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)
    unfinished: int = 0
    new_images: int = 0
    reused: int = 0
    generation: int = 0
    seconds: float = 0.0
    meters: Meters | None = None
    costs: list[DtypeCost] = field(default_factory=list)
    views: dict[str, Report] = field(default_factory=dict)

    @property
    def failed(self) -> Counter[str]:
        """Number of inputs that failed for now, by reason."""
        return Counter(reason for reason, _ in self.failures.values())

    @property
    def examples(self) -> list[str]:
        """A few of these inputs with what happened, one line each."""
        return [f"{id}: {message}" for id, (_, message) in list(self.failures.items())[:3]]

    @property
    def exit_code(self) -> int:
        """0: every input is cached; 3: some are quarantined; 1: some tasks are not finished."""
        if self.unfinished:
            return 1
        return 3 if self.quarantined.total() else 0


def joined(reports: Sequence[Report]) -> Report:
    """The report of several runs, at least one, that have shared the tasks of one cache."""
    if reports[0].views:
        meters_of = [report.meters for report in reports if report.meters is not None]
        views = {name: joined([report.views[name] for report in reports]) for name in reports[0].views}
        return replace(of_views(views), meters=Meters.joined(meters_of) if meters_of else None)
    # the one that accounted last has seen the most
    last = max(reports, key=lambda report: report.tasks)
    meters = [report.meters for report in reports if report.meters is not None]
    failures = {id: why for report in reports for id, why in report.failures.items()}
    return replace(
        last,
        # what failed for one may have succeeded for another
        failures=failures if last.unfinished else {},
        new_images=sum(report.new_images for report in reports),
        reused=sum(report.reused for report in reports),
        seconds=max(report.seconds for report in reports),
        meters=Meters.joined(meters) if meters else None,
        costs=next((report.costs for report in reports if report.costs), []),
    )


def of_views(views: dict[str, Report]) -> Report:
    """The sum of the reports of several views, at least one; inputs count in each."""
    every = list(views.values())
    return Report(
        inputs=sum(report.inputs for report in every),
        cached=sum(report.cached for report in every),
        quarantined=sum((report.quarantined for report in every), Counter()),
        tasks=sum(report.tasks for report in every),
        nbytes=sum(report.nbytes for report in every),
        failures={id: why for report in every for id, why in report.failures.items()},
        unfinished=sum(report.unfinished for report in every),
        new_images=sum(report.new_images for report in every),
        reused=sum(report.reused for report in every),
        generation=max(report.generation for report in every),
        seconds=max(report.seconds for report in every),
        meters=every[0].meters,
        costs=next((report.costs for report in every if report.costs), []),
        views=views,
    )


def after(first: Report, then: Report) -> Report:
    """The report of a run that had an interim part."""
    meters = [report.meters for report in (first, then) if report.meters is not None]
    return replace(
        then,
        new_images=first.new_images + then.new_images,
        meters=Meters.joined(meters) if meters else None,
        costs=first.costs or then.costs,
    )


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
        files: files of latents and indexes, in all.
        by_dtype: `nbytes` of each storage type.
        update: of an update what is the same and what is not; `buckets`, `quarantined` and bytes are then of what would
            be encoded, and `files` are those that would be written.
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
    files: int = 0
    by_dtype: dict[str, int] = field(default_factory=dict)
    update: Changes | None = None


@dataclass
class Changes:
    """What an update would find changed. Inputs are estimates where not all were read: see `DryRun.sampled`.

    Attributes:
        before, inputs: number of inputs of the cache, None where its list is damaged, and of the source now.
        new: inputs under names that the cache does not have, of bytes that no row has.
        changed: inputs under names that it has whose bytes no row has (any more), and what is no image, if it is read.
        gone: names that are no longer there; None as `before`.
        reused: inputs whose rows are kept.
        moved: those of them that are there under another name, or as a copy.
        read: inputs that would be read, as neither their time nor their size tells that they are the same.
    """

    before: int | None
    inputs: int
    new: int
    changed: int
    gone: int | None
    reused: int
    moved: int
    read: int
