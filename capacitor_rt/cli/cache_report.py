"""What `capacitor-rt cache` says at the end, of one cache and of several views."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..printable import counted
from .interrupts import bytes_text
from .terminal import echo, note

if TYPE_CHECKING:
    from ..cache.report import DryRun, Report


def print_dry_run(found: DryRun) -> None:
    """What a run would do."""
    for line in found.notes:
        remark(line)
    if (changes := found.update) is not None:
        before = "" if changes.before is None else f" in place of {changes.before}"
        gone = "what is gone is not known" if changes.gone is None else f"{changes.gone} gone"
        echo(
            f"an update to {counted(changes.inputs, 'input')}{before}: {changes.new} new, {changes.changed} changed, "
            f"{gone}, {changes.reused} reused ({changes.moved} under another name)"
        )
    if found.buckets or found.quarantined:
        echo("bucket (height x width)    images")
    for bucket, count in found.buckets.items():
        echo(f"{bucket!s:>23}  {count:>8}")
    for reason, count in sorted(found.quarantined.items()):
        echo(f"{'quarantined: ' + reason:>23}  {count:>8}")
    if changes is not None:
        if found.sampled:
            note(f"estimated from {counted(found.sampled, 'input')} of those that would be read")
        echo(
            f"to be read: {counted(changes.read, 'input')}; to be written: {counted(found.todo, 'task')}, "
            f"{counted(found.files, 'file')}, {bytes_text(found.todo_nbytes)} of latents"
        )
        return
    if found.sampled:
        note(f"estimated from the headers of {counted(found.sampled, 'image')}")
    tasks = f"{counted(found.tasks, 'task')} of at most {counted(found.inputs, 'image')}"
    echo(f"{tasks}, {bytes_text(found.nbytes)} of latents in all")
    sizes = ", ".join(f"{name} {bytes_text(nbytes)}" for name, nbytes in found.by_dtype.items())
    echo(f"{counted(found.files, 'file')} of latents and indexes; by --dtype: {sizes}")
    echo(f"to be written: {counted(found.todo, 'task')}, {bytes_text(found.todo_nbytes)}")


def print_report(report: Report, out: Path) -> None:
    """What a run has done, and what is to be done about the rest."""
    done = _done(report)
    if report.meters is None:
        echo(f"nothing to do: {out} holds {done}")
    else:
        rate = report.new_images / max(report.seconds, 1e-9)
        read = f"{counted(report.new_images, 'input')} read at {rate:.1f} images/s"
        echo(f"cached {done}{_reused(report)}; {read}; {report.meters}")
    print_failures(report, out)


def _done(report: Report) -> str:
    size = bytes_text(report.nbytes)
    return f"{report.cached} of {counted(report.inputs, 'image')} in {counted(report.tasks, 'task')}, {size}"


def _reused(report: Report) -> str:
    if not report.generation:
        return ""
    return f"; {counted(report.reused, 'row')} reused for generation {report.generation}"


def print_failures(report: Report, out: Path) -> None:
    """What could not be cached, and what is to be done about it."""
    if report.quarantined:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(report.quarantined.items()))
        note(f"{report.quarantined.total()} quarantined ({reasons}): see {out / 'quarantine.jsonl'}")
    if report.unfinished:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(report.failed.items()))
        note(
            f"{counted(report.unfinished, 'task')} not finished, as inputs failed for now ({reasons}): run the same "
            "command again, or add --give-up to quarantine them"
        )
        for line in report.examples:
            note(f"  {line}")


def remark(line: str) -> None:
    """A line that a user may want to know."""
    note(f"note: {line}")


def print_views(total: Report, out: Path) -> None:
    """What a run has done in every view."""
    if total.meters is not None:
        images = total.meters.images
        echo(f"{counted(images, 'input')} read at {images / max(total.seconds, 1e-9):.1f} images/s; {total.meters}")
    for name, report in total.views.items():
        new = counted(report.new_images, "input")
        echo(f"{name}: cached {_done(report)}{_reused(report)}; {new} in this run")
        print_failures(report, out / name)
