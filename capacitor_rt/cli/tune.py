"""`capacitor-rt tune`: let this GPU choose the launch configs of a call."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, InputError
from ..printable import counted
from ..sizes import check_multiple
from .options import ComputeDtype, Device, Dtype, Revision, check_model, resolve_device
from .plan import read_architecture
from .terminal import bar, echo, note

if TYPE_CHECKING:
    import torch

    from ..config import ModelConfig
    from ..runtime.plan import PlanKey
    from ..runtime.tuner import Choice

DIRECTIONS = ("both", "encode", "decode")


def check_direction(name: str) -> str:
    """A direction's name as it is; InputError for an unknown one."""
    if name not in DIRECTIONS:
        raise InputError(f"direction {name!r} is unknown: use one of {', '.join(DIRECTIONS)}")
    return name


def tune(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Hub id, folder or file whose shapes count.", callback=check_model),
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height of the images in pixels; also the width.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width of the images in pixels.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of images per call.")] = 128,
    minutes: Annotated[float, typer.Option(min=0.01, help="Begin nothing new after this time.")] = 2.0,
    direction: Annotated[
        str, typer.Option(help="Direction of the calls: both, encode or decode.", callback=check_direction)
    ] = "both",
    op: Annotated[list[str] | None, typer.Option(help="Tune this op instead of all; may be repeated.")] = None,
    low_latency: Annotated[
        bool, typer.Option("--low-latency", help="Tune launches that are shaped for a single image.")
    ] = False,
    encode_precision: Annotated[
        str | None,
        typer.Option("--encode-precision", help="Tune an encoder in fp8 (e4m3); it needs no scales.", metavar="NAME"),
    ] = None,
    revision: Revision = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and write nothing.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write this GPU's rows to FILE, to be contributed to kernels/configs.")
    ] = None,
) -> None:
    """Measure launch configs on this GPU and keep the best: later calls of these shapes, and near ones, use them.

    Rows go to the user's cache folder (CAPACITOR_CONFIGS names another, or is "shipped" for none), and `doctor` shows
    them. They may change the last bits of results; a cache that was begun keeps the configs it has.
    """
    if export is not None and size is None:
        _export(export, device)
        return
    if size is None:
        raise InputError("nothing to tune: give --size, the images' side in pixels, or --export FILE alone")
    if low_latency and batch != 1:
        raise InputError(f"--low-latency is for one image at a time, and --batch is {batch}: give --batch 1")
    architecture = read_architecture(model, None, revision)
    check_multiple(size, width or size, architecture.latent_stride, architecture.latent_stride)
    _check_precision(encode_precision, architecture, direction)
    target = _gpu(device)
    images = size, width or size, batch
    keys = _keys(architecture, target, images, direction, low_latency, compute_dtype, encode_precision)
    _tune(architecture, keys, target, minutes, op or [], dry_run)
    if export is not None:
        _export(export, device)


def _check_precision(name: str | None, architecture: ModelConfig, direction: str) -> None:
    """Refuse a precision of the encoder where none is tuned that has launches in it."""
    if name is None:
        return
    if direction == "decode":
        raise InputError(
            f"--encode-precision {name} is of the encoder, and --direction is decode: leave one of them out"
        )
    if not architecture.encoder_depth or architecture.dico is not None:
        raise InputError(f"this model has no launches in {name}, only full_capacitor's encoder has: leave it out")
    from ..fp8_encoding import check_precision

    check_precision(name)


def _gpu(name: str) -> torch.device:
    """The GPU to measure on.

    Raises:
        InputError: there is none, or the kernels do not run on it.
    """
    import torch

    from ..checks import check_device
    from ..runtime.platform import why_not_triton

    target = check_device(resolve_device(name))
    if target.type != "cuda":
        raise InputError("tune measures on an NVIDIA GPU, and there is none here: run it on the machine with the GPU")
    target = torch.device("cuda", torch.cuda.current_device() if target.index is None else target.index)
    reason = why_not_triton(target)
    if reason is not None:
        raise InputError(f"there is nothing to tune: {reason}")
    return target


def _keys(
    architecture: ModelConfig,
    device: torch.device,
    images: tuple[int, int, int],
    direction: str,
    low_latency: bool,
    dtype: Dtype | None,
    precision: str | None,
) -> list[PlanKey]:
    """The calls whose launches are tuned: of images of so many pixels high and wide, so many at a time.

    Raises:
        InputError: none of this model's, or a GPU without launches in that precision.
    """
    import torch

    from capacitor_kernels.launch import check_e4m3, compute_capability

    from ..config import FullCapacitorInferenceConfig
    from ..runtime.plan import PlanKey

    height, width, batch = images
    cc, use = compute_capability(device), "latency" if low_latency else "throughput"
    compute = dtype.torch() if dtype else torch.bfloat16
    if precision is not None:
        try:
            check_e4m3(cc)
        except ValueError as error:
            raise InputError(str(error)) from error
    keys = []
    if direction != "decode" and architecture.encoder_depth:
        encode = PlanKey("encode", batch, height, width, compute, torch.uint8, "nhwc", cc, use)
        keys.append(replace(encode, precision=precision))
    if direction != "encode":
        inference = FullCapacitorInferenceConfig()
        keys.append(PlanKey("decode", batch, height, width, compute, torch.float32, "nchw", cc, use, inference))
    if not keys:
        raise InputError(f"direction {direction!r} is none of this model's, which has a decoder only: use decode")
    return keys


def _tune(
    architecture: ModelConfig,
    keys: list[PlanKey],
    device: torch.device,
    minutes: float,
    ops: list[str],
    dry_run: bool,
) -> None:
    from ..runtime.tuner import Tuner

    path = _user_file(keys[0].cc)
    tuner = Tuner(architecture, keys, device, 60 * minutes, ops)
    try:
        for _ in bar(tuner.run(), tuner.total, "config"):
            pass
    finally:
        # after an interruption too: what was measured to its end counts
        _settle(tuner.choices, path, device, dry_run)


def _settle(choices: list[Choice], path: Path, device: torch.device, dry_run: bool) -> None:
    """Print what came of every op, and keep what is new."""
    if not choices:
        return
    for choice in choices:
        echo(_line(choice))
    before, after = (sum(getattr(c, name) * c.subject.count for c in choices) for name in ("before_us", "us"))
    echo(f"launches together: {before / 1e3:.3f} -> {after / 1e3:.3f} ms, measured one by one")
    new = [choice for choice in choices if choice.is_new]
    if not new:
        echo("the present configs stay: none was worthwhile to replace")
    elif dry_run:
        echo(f"{counted(len(new), 'row')} would go to {path}")
    else:
        _write(path, new, device)
        echo(f"{counted(len(new), 'row')} written to {path}")


def _user_file(cc: int) -> Path:
    """The user's file of a compute capability, which is sound and can be written to.

    Raises:
        InputError: there is to be none. ConfigError: it is damaged.
    """
    from capacitor_kernels import tuning, user_rows

    path = user_rows.path_of(cc)
    if path is None:
        raise InputError(
            f"there is no place for rows of yours: let {user_rows.VARIABLE} name a folder "
            f"(it is {os.environ.get(user_rows.VARIABLE)!r})"
        )
    try:
        tuning.in_force(cc)
    except user_rows.UserRowsError as error:
        raise ConfigError(str(error)) from error
    return path


def _write(path: Path, choices: list[Choice], device: torch.device) -> None:
    from capacitor_kernels import tuning, user_rows

    from ..runtime.tuner import row_of

    command, cc = shlex.join(["capacitor-rt", *sys.argv[1:]]), choices[0].subject.key.cc
    families = user_rows.read(path, cc)
    for choice in choices:
        families = user_rows.merge(families, choice.subject.op, row_of(choice, device, command))
    user_rows.write(path, cc, families)
    tuning.reload()


def _line(choice: Choice) -> str:
    """What came of an op, as a line."""
    subject = choice.subject
    shape = " ".join(f"{key}={value}" for key, value in subject.shape.items())
    tried = f"{choice.tried} tried, {choice.passed_over} passed over"
    if not choice.is_new:
        return f"{subject.op:<12}{choice.us:9.1f} us x {subject.count}  stays; {tried}  ({shape})"
    changed = {
        name: value for name, value in vars(choice.config).items() if value != getattr(subject.present, name, None)
    }
    new = " ".join(f"{name}={value}" for name, value in changed.items())
    return f"{subject.op:<12}{choice.before_us:9.1f} -> {choice.us:.1f} us x {subject.count}  {new}; {tried}  ({shape})"


def _export(target: Path, device: str) -> None:
    """Write the rows in force for the GPU, or of the only file there is, to a file of the form of kernels/configs."""
    from capacitor_kernels import tuning, user_rows

    from ..runtime.configs import row_document

    cc = _exported_cc(device)
    try:
        rows = tuning.in_force(cc)
    except user_rows.UserRowsError as error:
        raise ConfigError(str(error)) from error
    if not rows:
        raise InputError(
            f"no row of yours is in force for sm_{cc}: run capacitor-rt tune --model MODEL --size 256 first"
        )
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row_document(row))
    if target.exists():
        raise InputError(f"{target} exists: give another --export")
    user_rows.write(target, cc, families)
    note(
        f"{counted(len(rows), 'row')} of sm_{cc} written to {target}: send it with the output of `capacitor-rt doctor`"
    )


def _exported_cc(device: str) -> int:
    import torch

    from capacitor_kernels import user_rows
    from capacitor_kernels.launch import compute_capability

    if resolve_device(device).startswith("cuda") and torch.cuda.is_available():
        return compute_capability(torch.device(resolve_device(device)))
    inside = user_rows.folder()
    found = sorted(inside.glob("sm_*.json")) if inside is not None else []
    if len(found) != 1 or not found[0].stem[3:].isdigit():
        raise InputError(
            f"there is no GPU here, and {len(found)} files in {inside}: export on the machine with the GPU"
        )
    return int(found[0].stem[3:])
