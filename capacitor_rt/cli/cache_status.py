"""`capacitor-rt status`, `diff` and `gc`: looking at caches, and removing what is no longer needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..printable import counted
from .interrupts import bytes_text
from .options import check_cache
from .terminal import echo, echo_json, note

if TYPE_CHECKING:
    from ..cache.status import Status


def status(
    root: Annotated[Path, typer.Argument(help="Folder of the cache.", callback=check_cache)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say how far a cache, or each view in a folder, is, who is at work, how fast, and whether the disk will do.

    Ends with 0 if every input is done, 1 if some are still to be done.
    """
    from ..cache.status import status as look
    from ..cache.views import views_in

    several = views_in(root)
    found = {place: look(place) for place in several or [root]}
    if as_json:
        texts = {place.name: status.to_json() for place, status in found.items()}
        echo_json(texts if several else found[root].to_json())
    else:
        for place, status in found.items():
            if several:
                echo(f"{place.name}:")
            _print_status(status, place)
    raise typer.Exit(int(any(_is_unfinished(status) for status in found.values())))


def _is_unfinished(found: Status) -> bool:
    return found.done_tasks < found.tasks or found.is_interim


def _print_status(found: Status, root: Path) -> None:
    unfinished = _is_unfinished(found)
    done = f"{found.done_inputs} of {counted(found.inputs, 'input')} done ({found.done_inputs / found.inputs:.1%})"
    echo(f"{done}, {found.done_tasks} of {counted(found.tasks, 'task')}")
    echo(f"{counted(found.rows, 'row')}, {bytes_text(found.nbytes)} of latents")
    for reason, count in found.quarantined.most_common():
        echo(f"quarantined: {reason} {count}")
    if found.is_interim:
        echo("inputs of the same bytes as others are still to be added: run the cache command again")
    if found.generation:
        echo(f"generation {found.generation}, by `cache --update`")
    for task, who in sorted(found.workers.items()):
        echo(f"task {task}: {who}")
    for update in found.updates:
        done = f"{update.done_inputs} of {counted(update.inputs, 'input')} done"
        echo(f"an update is unfinished: {done}, {update.done_tasks} of {counted(update.tasks, 'task')}")
    if unfinished:
        _print_outlook(found.rate, found.left_seconds, found.left_nbytes, found.free_nbytes)
    if found.litter_nbytes:
        echo(f"{bytes_text(found.litter_nbytes)} can be removed by `capacitor-rt gc {root}`")


def _print_outlook(rate: float | None, seconds: float | None, left: int, free: int) -> None:
    if rate is not None:
        when = f", {seconds / 3600:.1f} h to go" if seconds is not None else ", and nobody is at work now"
        echo(f"{rate:.1f} inputs/s lately{when}")
    if left:
        enough = "" if left <= free else ": too little, free some"
        echo(f"about {bytes_text(left)} are still to be written, {bytes_text(free)} are free{enough}")


def diff(
    old: Annotated[Path, typer.Argument(help="Folder of a cache.", callback=check_cache)],
    new: Annotated[Path, typer.Argument(help="Folder of another.", callback=check_cache)],
) -> None:
    """Say what differs between two caches: settings, and inputs added, removed, changed or encoded otherwise.

    Ends with 0 if they are the same, 1 if they differ.
    """
    from ..cache.compare import compare

    found = compare(old, new)
    for line in found.settings:
        echo(line)
    for kind, count in found.counts.items():
        if count:
            shown = ", ".join(map(repr, found.examples[kind])) + (", ..." if count > len(found.examples[kind]) else "")
            echo(f"{count} {kind}: {shown}")
    echo(f"{found.same} the same")
    raise typer.Exit(int(bool(found)))


def gc(
    root: Annotated[Path, typer.Argument(help="Folder of the cache.", callback=check_cache)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    drop_updates: Annotated[
        bool, typer.Option("--drop-updates", help="Give up unfinished updates, and remove what they have written.")
    ] = False,
    compact: Annotated[
        bool,
        typer.Option(
            "--compact", help="First copy the rows of files that updates have left hardly needed, so that they go, too."
        ),
    ] = False,
    min_live: Annotated[
        float, typer.Option(min=0.01, max=1, help="With --compact: files of which less than this is needed.")
    ] = 0.5,
) -> None:
    """Remove what a repaired or retried cache has moved away, what killed runs have left, and earlier generations.

    Programs that still read an earlier generation need it: end them first.
    """
    from ..cache.compaction import compact as copy_rows
    from ..cache.garbage import collect, used_in_part
    from ..cache.views import views_in

    several = views_in(root)
    for place in several or [root]:
        if compact and not dry_run:
            copy_rows(place, min_live, note)
        uses = used_in_part(place)
        for use in uses:
            note(f"{use.name}: {use.needed} of {counted(use.rows, 'row')} needed ({use.live:.0%})")
        if wanting := [use for use in uses if use.live < min_live]:
            dead = sum(int(use.nbytes * (1 - use.live)) for use in wanting)
            files = counted(len(wanting), "file")
            echo(
                f"{place}: {bytes_text(dead)} of {files} are of no use: `gc --compact` copies the rest and removes them"
            )
    found = [
        (f"{place.name}/{name}" if several else name, size)
        for place in several or [root]
        for name, size in collect(place, dry_run=dry_run, drop_updates=drop_updates)
    ]
    for name, size in found:
        note(f"{name}: {bytes_text(size)}")
    done = "would be removed" if dry_run else "removed"
    echo(f"{counted(len(found), 'file')}, {bytes_text(sum(size for _, size in found))} {done}")
