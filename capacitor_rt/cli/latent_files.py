"""`capacitor-rt encode` and `decode`: one file of latents per image."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..extras import require_extra
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
from .terminal import bar, echo, note

if TYPE_CHECKING:
    from torch import Tensor

    from ..images.frames import Frame
    from ..model import FullCapacitor

LATENT_FORMAT = "capacitor-latent/1"


class Sampler(str, Enum):
    """Samplers of the decoder."""

    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"


class Schedule(str, Enum):
    """Time grids of a sampler."""

    linear = "linear"
    cosine = "cosine"


def finish(done: int, failed: int, what: str) -> None:
    """Say what was written; exit 3 if some inputs failed."""
    echo(f"{done} {what}" + (f", {failed} failed" if failed else ""))
    if failed:
        raise typer.Exit(3)


def refuse_collisions(outputs: dict[Path, Path]) -> None:
    """`outputs` is input -> output: two inputs must not write one file."""
    seen: dict[Path, Path] = {}
    for source, target in outputs.items():
        if target in seen:
            raise InputError(f"{seen[target]} and {source} would both be written to {target}: encode them apart")
        seen[target] = source


def refuse_existing(target: Path) -> None:
    """A picture that is there may be the original: it is never overwritten."""
    if target.exists():
        raise InputError(f"{target} exists: move it away, or give another --out")


def picture_name(latents: Path) -> str:
    """Name of the picture that a file of latents becomes: a.png.safetensors to a.png, a.jpg.safetensors to a.jpg.png.

    Two inputs that differ in the extension alone thus stay two pictures.
    """
    name = latents.name.removesuffix(".safetensors")
    return name if name.lower().endswith(".png") else f"{name}.png"


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
    refuse_collisions(targets)
    from ..errors import ImageError
    from ..images.frames import Framing, load_frames, to_batch

    framing, colour = Framing(size, area), parse_background(background)
    capacitor = load_model(model, revision, device, compute_dtype, backend)
    failed = 0
    frames = load_frames(targets, framing, capacitor.size_multiple, colour)
    for path, frame in bar(frames, len(targets), "image"):
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
    finish(len(targets) - failed, failed, f"images encoded to {out}")


def decode(
    latents: Annotated[list[Path], typer.Argument(help="Files of `encode`, or shards of a cache.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files.")],
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
    """Decode latents into one PNG file per image.

    Ends with 3 if some files could not be decoded.
    """
    from ..config import FullCapacitorInferenceConfig

    inference = FullCapacitorInferenceConfig(
        steps, sampler.value, schedule.value, pdg=pdg is not None, pdg_strength=2.0 if pdg is None else pdg, seed=seed
    )
    targets = {path: out / picture_name(path) for path in latents}
    for path, target in targets.items():
        if not path.is_file():
            raise InputError(f"{str(path)!r} is not a file: give files of latents")
        refuse_existing(target)
    refuse_collisions(targets)
    image_module = require_extra("PIL.Image")
    from ..images.frames import to_uint8

    capacitor = load_model(model, revision, device, compute_dtype, backend)
    failed = written = 0
    for path in bar(latents, len(latents), "file"):
        try:
            rows, space = read_latents(path)
            if space not in (None, latent_space(capacitor)) and not any_space:
                raise InputError(
                    f"{path} holds latents of {space}, and the model decodes {latent_space(capacitor)}: "
                    "give --model the model that made them, or pass --any-space"
                )
            if space is None:
                note(
                    f"note: {path} does not name the space of its latents: they are taken for {latent_space(capacitor)}"
                )
            out.mkdir(parents=True, exist_ok=True)
            for i, row in enumerate(rows):
                name = targets[path] if len(rows) == 1 else targets[path].with_stem(f"{targets[path].stem}-{i:06d}")
                refuse_existing(name)
                image = capacitor.decode(row[None].to(capacitor.device), inference_config=inference)[0]
                image_module.fromarray(to_uint8(image)).save(name, format="PNG")
                written += 1
        except InputError as error:
            note(f"error: {error}")
            failed += 1
    finish(written, failed, f"images written to {out}")


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


def read_latents(path: Path) -> tuple[Tensor, str | None]:
    """`latents [N,C,h,w]` of a file written by `encode` or of a cache shard, and the name of their space.

    Raises:
        InputError: not a safetensors file, or without `latents` of rank 4.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if "latents" not in file.keys():  # noqa: SIM118
                names = ", ".join(file.keys()) or "no tensors"
                raise InputError(f"{path} holds {names}: expected a tensor named 'latents'")
            latents, metadata = file.get_tensor("latents"), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    if latents.dim() != 4:
        raise InputError(f"{path}: latents have shape {list(latents.shape)}, expected [N,C,h,w]")
    return latents, metadata.get("latent_space")
