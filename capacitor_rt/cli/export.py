"""`capacitor-rt export`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..cache.export.request import ARCHITECTURES, FORMATS, LAYOUTS, SPACES, ExportRequest
from ..errors import InputError
from ..printable import counted
from .interrupts import bytes_text, interruptible
from .options import Dtype, check_cache
from .terminal import echo, note

Formats = Enum("Formats", {name: name for name in FORMATS}, type=str)  # type: ignore[misc]
Layouts = Enum("Layouts", {name: name for name in LAYOUTS}, type=str)  # type: ignore[misc]
Spaces = Enum("Spaces", {name: name for name in SPACES}, type=str)  # type: ignore[misc]
Architectures = Enum("Architectures", {name: name for name in ARCHITECTURES}, type=str)  # type: ignore[misc]
_DEV = Architectures("f2d")


def export(
    root: Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of the cache.", callback=check_cache)],
    out: Annotated[Path, typer.Argument(help="Folder of the export: a new one, an empty one, or one to go on with.")],
    format: Annotated[Formats, typer.Option("--format", "-f", help="Whose format to write.", show_default=False)],
    layout: Annotated[
        Layouts | None, typer.Option(help="As cached, [C,h/16,w/16], or its pixel shuffle, [C/4,h/8,w/8].")
    ] = None,
    space: Annotated[Spaces | None, typer.Option(help="The model's own space, or FLUX.2's, approximately.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="File of `calibrate`, for --space flux2.")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="folder|FILE", help="Class labels: sorted top folders, or ids and labels.")
    ] = None,
    captions: Annotated[
        str | None, typer.Option(metavar="txt|json|FILE", help="Captions: files beside the images, or one with ids.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The folder that was cached, for --captions txt|json, repa and repae.")
    ] = None,
    posterior: Annotated[bool, typer.Option("--posterior", help="Write the posterior's deviation too.")] = False,
    scale: Annotated[float, typer.Option(help="Factor on the latents, for loops that multiply by its inverse.")] = 1.0,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the latents, where the format has a choice.")] = None,
    stats: Annotated[
        str | None, typer.Option(metavar="dataset", help="Measure lightningdit's latents_stats.pt on the cache.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="prx|micro|plain|energon", help="Variant of mds or wds.")
    ] = None,
    text_latents: Annotated[
        Path | None, typer.Option(help="Safetensors file with a text encoder's tensor per id.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Of the names of wds shards.")] = "latents",
    architecture: Annotated[Architectures, typer.Option(help="FLUX.2 model of musubi-tuner.")] = _DEV,
    shard_rows: Annotated[int | None, typer.Option(min=1, help="Most rows of a lightningdit shard.")] = None,
    shard_bytes: Annotated[int | None, typer.Option(min=1, help="Most bytes of an mds, wds or repae shard.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
) -> None:
    """Write a cache in the format of a trainer, or go on with an unfinished export.

    Everything is checked before anything is written, and every row is read back and compared with the cache. Ends with
    2 where the trainer would not read what was asked for, 1 on failure and 130 when interrupted; the same command then
    goes on from the last finished shard. docs/trainers.md has each format.
    """
    request = ExportRequest(
        format=format.value,
        layout=layout.value if layout else None,
        space=space.value if space else None,
        calibration=calibration,
        dtype=dtype.value if dtype else None,
        labels=labels,
        captions=captions,
        images=images,
        posterior=posterior,
        scale=scale,
        stats=stats,
        preset=preset,
        text_latents=text_latents,
        prefix=prefix,
        architecture=architecture.value,
        shard_rows=shard_rows,
        shard_bytes=shard_bytes,
    ).resolved()
    for path in (calibration, text_latents):
        if path is not None and not path.is_file():
            raise InputError(f"{str(path)!r} is not a file")
    with interruptible():
        from ..cache.export import describe_export, export_cache

        if dry_run:
            found = describe_export(root, out, request)
            for line in found.notes:
                note(f"note: {line}")
            size = bytes_text(found.nbytes)
            there = f"{counted(found.rows, 'row')} would be in {counted(found.files, 'file')}"
            echo(f"{there} with {size} of tensors; {found.done} are there")
            return
        report = export_cache(root, out, request, progress=not quiet, note=lambda line: note(f"note: {line}"))
    done = f"{counted(report.rows, 'row')} in {counted(report.files, 'file')}, {bytes_text(report.nbytes)}"
    echo(f"exported {done}" if report.new_rows else f"nothing to do: {out} holds {done}")
    kept = f"rounded by at most {report.rounding:.3g}" if report.rounding else "no value rounded"
    kept = f"{report.conversion} in float32, {kept}" if report.conversion else kept
    echo(f"read back by {' and '.join(report.read_back)} and compared with the cache, row by row: {kept}")
    for line in report.advice:
        echo(line)
