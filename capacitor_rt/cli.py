"""`capacitor-rt`: images to latents and back from a shell.

Exit codes: 0 done; 3 finished, but some inputs failed; 2 usage; 1 failed; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .cache.command import cache, verify
from .doctor import doctor
from .errors import CapacitorError, CheckpointError, InputError
from .options import (
    Area,
    Backend,
    Background,
    ComputeDtype,
    Device,
    Dtype,
    Images,
    Model,
    Revision,
    Seed,
    Size,
    Steps,
    bar,
    list_images,
    load_model,
    note,
    parse_background,
)
from .plan_command import plan
from .psnr_command import psnr

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fast runtime for the full_capacitor image autoencoder.",
)


class Sampler(str, Enum):
    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"


class Schedule(str, Enum):
    linear = "linear"
    cosine = "cosine"


def finish(done: int, failed: int, what: str) -> None:
    """Say what was written; exit 3 if some inputs failed."""
    typer.echo(f"{done} {what}" + (f", {failed} failed" if failed else ""))
    if failed:
        raise typer.Exit(3)


def refuse_collisions(outputs: dict[Path, Path]) -> None:
    """`outputs` is input -> output: two inputs must not write one file."""
    seen: dict[Path, Path] = {}
    for source, target in outputs.items():
        if target in seen:
            raise InputError(f"{seen[target]} and {source} would both be written to {target}: encode them apart")
        seen[target] = source


@app.command()
def encode(
    images: Images,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for NAME.safetensors files.")],
    model: Model = "sample",
    size: Size = None,
    area: Area = None,
    posterior: Annotated[bool, typer.Option(help="Also store the posterior's raw mean and logsnr.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Stored type of the latents.")] = Dtype.fp32,
    background: Background = "ffffff",
    revision: Revision = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = None,
    backend: Backend = "auto",
) -> None:
    """Encode images, one .safetensors file each (for many images, see `cache`)."""
    from .errors import ImageError
    from .files import Framing, load_frames, save_latents, to_batch

    framing, colour = Framing(size, area), parse_background(background)
    found = list_images(images)
    # the whole name stays in the output's name: a.png and a.jpg are two images
    targets = {path: out / relative.with_name(relative.name + ".safetensors") for path, relative in found}
    refuse_collisions(targets)
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
        save_latents(targets[path], tensors, frame, capacitor.source.latent_space)
    finish(len(targets) - failed, failed, f"images encoded to {out}")


@app.command()
def decode(
    latents: Annotated[list[Path], typer.Argument(help="Files of `encode`, or shards of `cache`.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for PNG files.")],
    model: Model = "sample",
    steps: Steps = 1,
    sampler: Sampler = Sampler.ddim,
    schedule: Schedule = Schedule.linear,
    pdg: Annotated[float | None, typer.Option(help="Path-drop guidance of this strength.")] = None,
    seed: Seed = 0,
    any_space: Annotated[bool, typer.Option(help="Decode latents that another model made.")] = False,
    revision: Revision = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = None,
    backend: Backend = "auto",
) -> None:
    """Decode latents to PNG images."""
    from PIL import Image

    from .config import FullCapacitorInferenceConfig
    from .files import read_latents, to_uint8

    inference = FullCapacitorInferenceConfig(
        steps, sampler.value, schedule.value, pdg=pdg is not None, pdg_strength=2.0 if pdg is None else pdg, seed=seed
    )
    targets = {path: out / f"{path.name.removesuffix('.safetensors')}.png" for path in latents}
    refuse_collisions(targets)
    capacitor = load_model(model, revision, device, compute_dtype, backend)
    failed = written = 0
    for path in bar(latents, len(latents), "file"):
        try:
            rows, space = read_latents(path)
            if space not in (None, capacitor.source.latent_space) and not any_space:
                raise InputError(
                    f"{path} holds latents of {space}, and the model decodes {capacitor.source.latent_space}: "
                    "give --model the model that made them, or pass --any-space"
                )
            out.mkdir(parents=True, exist_ok=True)
            for i, row in enumerate(rows):
                image = capacitor.decode(row[None].to(capacitor.device), inference_config=inference)[0]
                name = targets[path] if len(rows) == 1 else targets[path].with_stem(f"{targets[path].stem}-{i:06d}")
                Image.fromarray(to_uint8(image)).save(name)
                written += 1
        except InputError as error:
            note(f"error: {error}")
            failed += 1
    finish(written, failed, f"images written to {out}")


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, folder, .safetensors file, or 'sample'.")] = "sample",
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a checkpoint's tensors, what each was read as, the counts, and every problem. Exit 1 if there is one."""
    from .checkpoint import problems_of, resolve

    source = resolve(checkpoint, revision=revision)
    reading, problems = problems_of(source)
    if as_json:
        document = {
            "source": {"id": source.id, "revision": source.revision, "sha256": source.sha256},
            "config": reading.config.to_dict(),
            "tensors": [vars(entry) for entry in reading.entries],
            "counts": reading.counts(),
            "notes": reading.notes,
            "problems": problems,
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        _print_reading(source, reading, problems)
    if problems:
        raise typer.Exit(1)


def _print_reading(source, reading, problems: list[str]) -> None:
    width = max((len(e.name) for e in reading.entries), default=0)
    for entry in reading.entries:
        if entry.read_as is None:
            meaning = "left over"
        elif (entry.read_as, entry.read_shape) == (entry.name, entry.shape):
            meaning = ""
        else:
            meaning = f"read as {entry.read_as} {list(entry.read_shape)}"
        typer.echo(f"{entry.name:<{width}}  {entry.dtype:<4}  {entry.shape!s:<20}  {meaning}".rstrip())
    config, counts = reading.config, reading.counts()
    typer.echo(
        f"\n{source.weights}\n  sha256 {source.sha256}\n"
        f"  {counts['total']:,} parameters in {len(reading.entries)} tensors: "
        f"encoder {counts['encoder']:,}, decoder {counts['decoder']:,}\n"
        f"  patch {config.patch_size}, width {config.model_dim}, hidden {config.hidden_dim}, "
        f"blocks {config.encoder_depth} + {config.decoder_depth} "
        f"({config.decoder_start_blocks}+{config.decoder_middle_blocks}+{config.decoder_end_blocks}), "
        f"latents {config.latent_channels} channels at stride {config.latent_stride}\n"
        f"  latent space {source.latent_space}"
    )
    for line in reading.notes:
        typer.echo(f"note: {line}")
    for line in problems:
        typer.echo(f"problem: {line}")
    typer.echo(f"{len(problems)} problems" if problems else "no problems")


for command in (cache, verify, psnr, plan, doctor):
    app.command()(command)


def main() -> None:
    """Entry point: expected failures end in one line and an exit code, never in a traceback."""
    warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
    try:
        app()
    except CapacitorError as error:
        note(f"error: {error}")
        sys.exit(2 if isinstance(error, InputError) and not isinstance(error, CheckpointError) else 1)
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        note(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
