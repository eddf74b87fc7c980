"""`capacitor-rt verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from ..errors import InputError
from ..printable import counted
from .interrupts import bytes_text, interruptible
from .options import Device, Revision, check_cache, resolve_device
from .terminal import echo, note

if TYPE_CHECKING:
    from ..cache.verify import Verification


def verify(
    root: Annotated[Path, typer.Argument(help="Folder of the cache.", callback=check_cache)],
    workers: Annotated[int, typer.Option(min=1, help="Threads that read.")] = 4,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Move what is damaged to OUT/damaged, so that the cache command makes it anew."),
    ] = False,
    decode: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Decode N rows of all buckets and tasks, and compare them with --images."
        ),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="With --decode: what was cached: the folder, list, tar or Parquet files.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="With --decode: the model (default: as the plan names it).")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, metavar="DB", help="With --decode: how much worse than encoded anew a row may decode."),
    ] = 1.0,
    sheet: Annotated[
        Path | None, typer.Option(help="With --decode: a picture of the worst rows beside their images.")
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
) -> None:
    """Compare every byte of a cache, or of each view in a folder, with its hashes and name what is damaged.

    With --decode, rows are also decoded and compared with the images that they were made of. A row is poor if it
    decodes more than the tolerance worse than its image encoded anew.

    Ends with 1 if something is damaged, poor, or still to be written; 3 if images of the sample are gone or changed.
    """
    if decode is None and (images or model or sheet):
        raise InputError("--images, --model and --sheet are for --decode N: add it")
    if decode is not None and images is None:
        raise InputError("--decode compares rows with their images: give what was cached by --images")
    from ..cache.views import views_in

    several = views_in(root)
    if several and decode is not None:
        raise InputError(f"{root} holds the caches of several views: --decode is for one of them, give its folder")
    if several:
        every = [_verify(place, workers, repair, quiet, f"{place.name}: ") for place in several]
        raise typer.Exit(int(any(found.problems or found.unfinished for found in every)))
    found = _verify(root, workers, repair, quiet)
    if decode is None or images is None or found.problems or not found.rows:
        if found.problems or found.unfinished:
            raise typer.Exit(1)
        return
    with interruptible():
        code = _decode(root, decode, images, model, tolerance, sheet, revision, device)
    if code or found.unfinished:
        raise typer.Exit(1 if found.unfinished else code)


def _verify(root: Path, workers: int, repair: bool, quiet: bool, name: str = "") -> Verification:
    """Verify a cache, called `name`, and say what was found."""
    with interruptible():
        from ..cache.verify import verify as check

        with tqdm(desc="verify", unit="task", disable=quiet or None, leave=False) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(1)

            found = check(root, workers=workers, advance=advance)
        if repair and found.problems:
            from ..cache.repair import repair as mend

            for line in found.problems:
                note(f"damaged: {line}")
            for line in mend(root, found):
                note(f"repaired: {line}")
            found = check(root, workers=workers)
    for line in found.notes:
        note(f"note: {line}")
    for line in found.problems:
        note(f"damaged: {line}")
    if found.unfinished:
        note(f"unfinished: {counted(found.unfinished, 'task')} still to be written: run the cache command again")
    state = counted(len(found.problems), "problem") if found.problems else "no damage"
    tasks = f"{counted(found.tasks, 'task')}, {bytes_text(found.nbytes)}"
    echo(f"{name}{counted(found.rows, 'row')} of {counted(found.inputs, 'input')}, {tasks}: {state}")
    return found


def _decode(
    root: Path,
    count: int,
    images: str,
    model: str | None,
    tolerance: float,
    sheet: Path | None,
    revision: str | None,
    device: str,
) -> int:
    """Compare rows with their images; the exit code."""
    from ..cache.folder import CacheFolder
    from ..cache.model_source import Checkpoint
    from ..cache.plan import load_plan
    from .verify_decode import decode_sample, save_sheet

    with CacheFolder(root) as folder:
        plan = load_plan(folder)
    assert plan is not None
    named = plan.fields["model"]
    if model is None and revision is None:
        revision = named["revision"]
    checkpoint = Checkpoint(model or named["id"], resolve_device(device), None, revision)
    found = decode_sample(root, count, images, checkpoint, tolerance=tolerance)
    echo(found.text())
    for id, why in list(found.missing.items())[:3]:
        note(f"not compared: {id}: {why}")
    if found.missing:
        note(f"{len(found.missing)} of {found.rows} rows were not compared: their images are gone or changed")
    if sheet is not None:
        echo(f"the worst {save_sheet(found, sheet, f'{root} by {checkpoint.name}')} rows: {sheet}")
    poor = [row for row in found.compared if row.is_poor(tolerance)]
    for row in poor[:5]:
        note(f"poor: {row.id}: {row.cached:.2f} dB, and {row.anew:.2f} dB encoded anew")
    if poor:
        note(
            f"{len(poor)} of {len(found.compared)} rows decode more than {tolerance:g} dB worse than their images "
            "encoded anew: these latents are not of this model, pixels or settings; cache into a new OUT"
        )
        return 1
    return 3 if found.missing else 0
