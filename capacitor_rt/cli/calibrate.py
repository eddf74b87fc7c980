"""`capacitor-rt calibrate`: how far a model's latents are from FLUX.2's, and the lines that bring them there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..printable import counted
from .options import (
    AreaSide,
    Backend,
    Background,
    ComputeDtype,
    Device,
    ImagePaths,
    Model,
    Revision,
    SquareSide,
    check_one_of,
    list_images,
    load_model,
    parse_background,
)
from .terminal import bar, echo, note

if TYPE_CHECKING:
    from ..flux2_space import ChannelLines, Flux2Calibration

SIDE = 512


def calibrate(
    images: ImagePaths,
    flux2: Annotated[
        str, typer.Option("--flux2", help="The FLUX.2 autoencoder: a hub id, or a folder with the weights or a `vae`.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")] = Path("flux2-calibration.json"),
    model: Model = "sample",
    size: SquareSide = None,
    area: AreaSide = None,
    batch: Annotated[int, typer.Option(min=1, help="Largest number of images of one size that run together.")] = 8,
    least_images: Annotated[
        int,
        typer.Option("--least-images", min=10, help="Refuse fewer images; the lines of fewer are not to be trusted."),
    ] = 1000,
    background: Background = "ffffff",
    revision: Revision = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = None,
    backend: Backend = "auto",
) -> None:
    """Fit FLUX.2's latents by a line per channel through the model's, for `export --space flux2`.

    Images are brought to 512 x 512 unless --size or --area says otherwise. One in ten is not fitted but scored. Nothing
    is written where the calibrated latents do not stand for FLUX.2's (mean cosine under 0.9).

    Nobody has run this with FLUX.2's real weights yet: it is tested on autoencoders of that shape whose lines are
    known.

    Ends with 3 if some images could not be decoded.
    """
    check_one_of(size, area)
    found = [path for path, _ in list_images(images)]
    if len(found) < least_images:
        raise InputError(f"{len(found)} images are too few: give {least_images}, or lower --least-images")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out.absolute().parent} for --out does not exist: create it first")
    from ..evaluation.calibrate import calibrate as measure
    from ..evaluation.calibrate import refuse_existing, save
    from ..evaluation.flux2 import Flux2, require
    from ..images.frames import Framing

    refuse_existing(out)
    require()
    capacitor = load_model(model, revision, device, compute_dtype, backend)
    theirs = Flux2.from_pretrained(flux2, device=capacitor.device, dtype=capacitor.dtype)
    calibration = measure(
        bar(found, len(found), "image"),
        capacitor,
        theirs,
        Framing(SIDE if size is None and area is None else size, area),
        flux2_name=Path(flux2).resolve().name if Path(flux2).is_dir() else flux2,
        background=parse_background(background),
        batch=batch,
        least_images=least_images,
        failed=lambda path, error: note(f"{error.reason}: {error}"),
    )
    _print(calibration)
    calibration.check_quality(f"{model} against {flux2}")
    save(calibration, out)
    echo(f"approximate lines to FLUX.2's space written to {out}")
    if calibration.images["failed"]:
        note(f"{calibration.images['failed']} of {len(found)} images could not be decoded")
        raise typer.Exit(3)


def _print(calibration: Flux2Calibration) -> None:
    counts = calibration.images
    echo(f"{counted(counts['fit'], 'image')} fitted, {counts['held_out']} scored")
    errors = calibration.side_error
    echo(
        f"as they are, the raw latents lie {calibration.side} FLUX.2's batch norm: {errors['before']:.3f} deviations "
        f"from its latents before it, {errors['after']:.3f} from those after it"
    )
    moved = sum(i != c for i, c in enumerate(calibration.channels))
    echo("channels are in FLUX.2's order" if not moved else f"{moved} channels are in another order than FLUX.2's")
    for name in ("mean", "mode"):
        echo(f"{name}: {_summary(getattr(calibration, name))}")


def _summary(lines: ChannelLines) -> str:
    r2 = sorted(lines.r2)
    return (
        f"cosine {lines.mean_cosine:.4f} in the mean of channels ({min(lines.cosine):.4f} to {max(lines.cosine):.4f}), "
        f"{lines.overall_cosine:.4f} overall; R^2 {sum(r2) / len(r2):.4f} ({r2[0]:.4f} to {r2[-1]:.4f})"
    )
