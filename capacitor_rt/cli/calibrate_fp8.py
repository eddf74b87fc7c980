"""`capacitor-rt calibrate-fp8`: scales for encoding in 8 bits, and what it costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..printable import counted
from .options import (
    CHECKPOINTS,
    AreaSide,
    AsJson,
    Background,
    Device,
    Dtype,
    ImagePaths,
    Revision,
    SquareSide,
    check_model,
    check_one_of,
    list_images,
    load_model,
    parse_background,
)
from .terminal import bar, echo, echo_json, note

if TYPE_CHECKING:
    from ..fp8_calibration import Fp8Calibration
    from ..model import FullCapacitor

SIDE = 256


def check_model_name(name: str) -> str:
    """A model's name as it is, which is not left out here."""
    check_model(name)
    return name


def calibrate_fp8(
    model: Annotated[str, typer.Argument(help=f"Model: {CHECKPOINTS}.", callback=check_model_name)],
    images: ImagePaths,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write, instead of one beside the weights.")
    ] = None,
    size: SquareSide = None,
    area: AreaSide = None,
    batch: Annotated[int, typer.Option(min=1, help="Largest number of images of one size that run together.")] = 4,
    background: Background = "ffffff",
    revision: Revision = None,
    device: Device = "auto",
    compute_dtype: Annotated[
        Dtype, typer.Option("--compute-dtype", help="Type of what is not in 8 bits: bf16 or fp16.")
    ] = Dtype.bf16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it costs, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the scales of an encoder in fp8 (e4m3) on IMAGES, and print what encoding by them costs on these.

    The arithmetic is emulated in plain torch, so no GPU is needed. Images are brought to 256 x 256 unless --size or
    --area says otherwise. A hundred varied images settle the scales; the costs are those of the images given. The
    file lies beside the weights, or for the sample in the user's cache folder, with the hash of weights and images.

    Ends with 3 if some images could not be decoded.
    """
    check_one_of(size, area)
    if compute_dtype is Dtype.fp32:
        raise InputError("--compute-dtype fp32 leaves nothing to gain by fp8: give bf16 or fp16")
    found = [path for path, _ in list_images(images)]
    if out is not None and not dry_run:
        from ..fp8_calibration import refuse_existing

        refuse_existing(out)
    from ..fp8_encoding import require_folding

    require_folding()
    from ..evaluation.fp8 import calibrate
    from ..images.frames import Framing

    loaded = load_model(model, revision, device, Dtype.fp32, "torch")
    target = None if dry_run else _target(out, loaded)
    calibration, _ = calibrate(
        found,
        loaded,
        Framing(SIDE if size is None and area is None else size, area),
        dtype=compute_dtype.torch(),
        background=parse_background(background),
        batch=batch,
        failed=lambda path, error: note(f"{error.reason}: {error}"),
        watch=lambda groups: bar(groups, -(-len(found) // batch), "batch"),
    )
    if as_json:
        echo_json(calibration.report | {"out": None if target is None else str(target)})
    else:
        _print(calibration, compute_dtype.full_name)
    if target is not None:
        from ..fp8_calibration import save

        save(calibration, target)
        note(f"scales written to {target}")
    if calibration.images["failed"]:
        note(f"{calibration.images['failed']} of {len(found)} images could not be decoded")
        raise typer.Exit(3)


def _target(out: Path | None, model: FullCapacitor) -> Path:
    """The file to write: the one asked for, else the first place that can be written to."""
    from ..fp8_calibration import places, refuse_existing

    if out is not None:
        return out
    source = model.source
    if source is None:
        raise InputError("the model is no file's: give --out")
    for place in places(source.weights, source.sha256, source.id == "sample"):
        refuse_existing(place)
        existing = next(folder for folder in (place.parent, *place.parent.parents) if folder.exists())
        if os.access(existing, os.W_OK):
            return place
    raise InputError(f"neither the folder of {source.weights} nor the user's cache can be written to: give --out")


def _print(calibration: Fp8Calibration, half: str) -> None:
    r: dict[str, Any] = calibration.report
    echo(f"{counted(r['images'], 'image')}, against the model in float32:")
    echo(f"latent error   {100 * r['latent_error']:.3f} %, in {half} alone {100 * r['latent_error_16_bits']:.3f} %")
    echo(f"cosine         {r['cosine']:.6f}")
    echo(f"PSNR           {r['psnr_float32']:.3f} -> {r['psnr']:.3f} dB")
    worst = r["worst"]
    loses = f"loses {worst['loses_db']:.3f} dB" if worst["loses_db"] >= 0 else f"gains {-worst['loses_db']:.3f} dB"
    echo(f"worst image    {worst['name']}: {loses}, latent error {100 * worst['latent_error']:.3f} %")
