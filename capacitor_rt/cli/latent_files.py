"""`capacitor-rt encode` and `decode`: one file of latents per image."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CacheError, InputError
from ..extras import require_extra
from ..printable import counted
from .latent_sources import find_latents, note_space
from .options import (
    AreaSide,
    Backend,
    Background,
    ComputeDtype,
    Device,
    Dtype,
    ImagePaths,
    Model,
    Revision,
    Seed,
    SquareSide,
    Steps,
    check_one_of,
    list_images,
    load_model,
    parse_background,
)
from .terminal import bar, echo, note, progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..images.frames import Frame
    from ..model import FullCapacitor

LATENT_FORMAT = "capacitor-latent/1"
FILE_NAME_BYTES = 255
"""Most bytes of a file's name on Linux."""


class Sampler(str, Enum):
    """Samplers of the decoder."""

    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"


class Schedule(str, Enum):
    """Time grids of a sampler."""

    linear = "linear"
    cosine = "cosine"


def finish(done: int, failed: int, what: str) -> None:
    """Say how many images `what` was done to; exit 3 if some inputs failed."""
    echo(f"{counted(done, 'image')} {what}" + (f", {failed} failed" if failed else ""))
    if failed:
        raise typer.Exit(3)


def refuse_collisions(outputs: dict[Path, Path], verb: str) -> None:
    """`outputs` is input -> output: two inputs must not write one file."""
    seen: dict[Path, Path] = {}
    for source, target in outputs.items():
        if target in seen:
            raise InputError(f"{seen[target]} and {source} would both be written to {target}: {verb} them apart")
        seen[target] = source


def refuse_existing(target: Path) -> None:
    """What is there is never overwritten: it may be the original.

    Raises:
        InputError: it is there, or a file is in the place of its folder.
    """
    file = next((folder for folder in target.parents if folder.is_file()), None)
    if file is not None:
        raise InputError(f"{file} is a file: give a folder as --out")
    if target.exists():
        raise InputError(f"{target} exists: move it away, or give another --out")


def refuse_long_name(target: Path) -> None:
    """Refuse a name that the file system does not take: it costs one input alone."""
    length = len(os.fsencode(target.name))
    if length > FILE_NAME_BYTES:
        raise InputError(
            f"{target.name} cannot be a file: its name has {length} bytes, {FILE_NAME_BYTES} are allowed: shorten the "
            "name of the input"
        )


def encode(
    images: ImagePaths,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the NAME.safetensors files, one per image.")],
    model: Model = "sample",
    size: SquareSide = None,
    area: AreaSide = None,
    posterior: Annotated[bool, typer.Option(help="Also store the raw mean and logsnr of the posterior.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Type in which the latents are stored.")] = Dtype.fp32,
    background: Background = "ffffff",
    revision: Revision = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = None,
    backend: Backend = "auto",
) -> None:
    """Encode images into one .safetensors file per image. For many images, use `cache`.

    Ends with 3 if some images could not be decoded.
    """
    check_one_of(size, area)
    found = list_images(images)
    # the whole name stays in the output's name: a.png and a.jpg are two images
    targets = {path: out / relative.with_name(relative.name + ".safetensors") for path, relative in found}
    refuse_collisions(targets, "encode")
    for target in targets.values():
        if len(os.fsencode(target.name)) <= FILE_NAME_BYTES:
            refuse_existing(target)
    from ..errors import ImageError
    from ..images.frames import Framing, load_frames, to_batch

    framing, colour = Framing(size, area), parse_background(background)
    capacitor = load_model(model, revision, device, compute_dtype, backend)
    failed = 0
    usable = []
    for path, target in targets.items():
        try:
            refuse_long_name(target)
            usable.append(path)
        except InputError as error:
            note(f"error: {error}")
            failed += 1
    frames = load_frames(usable, framing, capacitor.size_multiple, colour)
    for path, frame in bar(frames, len(usable), "image"):
        if isinstance(frame, ImageError):
            note(f"{frame.reason}: {frame}")
            failed += 1
            continue
        mean_logsnr = capacitor.encode_posterior(to_batch([frame], capacitor.device))
        tensors = {"latents": capacitor.latents_of(mean_logsnr).to(dtype.torch())}
        if posterior:
            tensors |= {k: v for k, v in mean_logsnr._asdict().items() if v is not None}
        targets[path].parent.mkdir(parents=True, exist_ok=True)
        save_latents(targets[path], tensors, frame, latent_space(capacitor))
    finish(len(targets) - failed, failed, f"encoded to {out}")


def decode(
    latents: Annotated[
        list[Path], typer.Argument(help="Caches, files of `encode`, or folders of them.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.")],
    id: Annotated[
        list[str] | None, typer.Option("--id", metavar="GLOB", help="Of a cache: rows whose id matches; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most pictures.")] = None,
    model: Model = "sample",
    steps: Steps = 1,
    sampler: Annotated[Sampler, typer.Option(help="Sampler of the decoder.")] = Sampler.ddim,
    schedule: Annotated[Schedule, typer.Option(help="Time grid of the sampler.")] = Schedule.linear,
    pdg: Annotated[float | None, typer.Option(help="Guide by path drop, with this strength.")] = None,
    seed: Seed = 0,
    any_space: Annotated[bool, typer.Option(help="Also decode latents that another model made.")] = False,
    revision: Revision = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = None,
    backend: Backend = "auto",
) -> None:
    """Decode latents into one PNG file per image, named by the image that was encoded.

    Ends with 3 if some could not be decoded.
    """
    from ..config import FullCapacitorInferenceConfig

    inference = FullCapacitorInferenceConfig(
        steps, sampler.value, schedule.value, pdg=pdg is not None, pdg_strength=2.0 if pdg is None else pdg, seed=seed
    )
    sources = find_latents(latents, out, id or [], limit)
    targets = {path: target for source in sources for path, target in source.targets.items()}
    refuse_collisions(targets, "decode")
    for target in targets.values():
        if len(os.fsencode(target.name)) <= FILE_NAME_BYTES:
            refuse_existing(target)
    image_module = require_extra("PIL.Image")
    from ..images.frames import to_uint8

    capacitor = load_model(model, revision, device, compute_dtype, backend)
    failed = written = 0
    for line in (line for source in sources for line in source.refused):
        note(f"error: {line}")
        failed += 1
    with progress(len(targets), "picture") as advance:
        for source in sources:
            try:
                space, pictures = source.read()
                note_space(source, space, latent_space(capacitor), any_space)
            except InputError as error:
                note(f"error: {error}")
                failed += 1
                continue
            for target, read in pictures:
                try:
                    refuse_long_name(target)
                    refuse_existing(target)
                    image = capacitor.decode(read().to(capacitor.device), inference_config=inference)[0]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    image_module.fromarray(to_uint8(image)).save(target, format="PNG")
                    written += 1
                except (InputError, CacheError) as error:
                    note(f"error: {error}")
                    failed += 1
                advance()
    finish(written, failed, f"written to {out}")


def latent_space(model: FullCapacitor) -> str:
    """The space of the latents of a model that was loaded from a checkpoint."""
    assert model.source is not None, "load_model() gives a model with its source"
    return model.source.latent_space


def save_latents(path: Path, tensors: dict[str, Tensor], frame: Frame, space: str) -> None:
    """Write the latents of one image; the space they are in and the geometry they stand for are its metadata."""
    from safetensors.torch import save_file

    from ..checkpoint import replacing

    header = frame.header
    metadata = {
        "format": LATENT_FORMAT,
        "latent_space": space,
        "source": os.fsencode(frame.path.name).decode("utf-8", "backslashreplace"),
        "image": json.dumps({"height": header.height, "width": header.width, "orientation": header.orientation}),
        "placement": json.dumps(asdict(frame.placement)),
    }
    with replacing(path) as temporary:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, metadata=metadata)
