"""What the commands share: options, whose values are checked before torch is imported, and the model they name."""

from __future__ import annotations

import os
import re
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CacheError, CheckpointError, InputError
from ..sizes import SIZE_MULTIPLE

if TYPE_CHECKING:
    import torch

    from ..model import FullCapacitor


class Dtype(str, Enum):
    """Floating point formats by their short names."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"

    @property
    def full_name(self) -> str:
        """The name in torch: bfloat16, float16, float32."""
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[self.value]

    def torch(self) -> torch.dtype:
        """The torch dtype of that name."""
        import torch

        return getattr(torch, self.full_name)


class StoredDtype(str, Enum):
    """What a cache may be stored in, by short names."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    int8 = "int8"


CHECKPOINTS = "a hub id, a folder, a .safetensors file, or 'sample' for the bundled checkpoint"

BACKENDS = ("auto", "torch", "triton")


def check_model(name: str | None) -> str | None:
    """A model's name as it is.

    Raises:
        CheckpointError: it names no file or folder that is there, and cannot be a hub id.
    """
    if name is None or name == "sample" or Path(name).expanduser().exists():
        return name
    if name.endswith(".safetensors") or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise CheckpointError(
            f"{name!r} is neither a folder, nor a .safetensors file, nor a hub id like 'data-archetype/full_capacitor'"
        )
    return name


def check_backend(name: str | None) -> str | None:
    """A backend's name as it is; InputError for an unknown one."""
    if name is not None and name not in BACKENDS:
        raise InputError(f"backend {name!r} is unknown: use one of {', '.join(map(repr, BACKENDS))}")
    return name


def check_device_name(name: str) -> str:
    """A device's name as it is; InputError for one that no torch has. Whether the device is there is asked later."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise InputError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:N")
    return name


def parse_gpus(wanted: str) -> list[int]:
    """Numbers of GPUs in a list such as "0,1,3".

    Raises:
        InputError: it is no such list, or names a GPU twice.
    """
    parts = [part.strip() for part in wanted.split(",")]
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise InputError(f"gpus {wanted!r} is neither 'all' nor a list of numbers such as 0,1,3")
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise InputError(f"gpus {wanted!r} names a GPU twice: use --coordinators for more processes on each")
    return numbers


def check_gpus(wanted: str | None) -> str | None:
    """A list of GPUs as it is; InputError for anything else."""
    if wanted is not None and wanted != "all":
        parse_gpus(wanted)
    return wanted


def parse_background(text: str) -> tuple[int, int, int]:
    """RRGGBB to a colour.

    Raises:
        InputError: anything else.
    """
    try:
        red, green, blue = bytes.fromhex(text.removeprefix("#"))
    except ValueError:
        raise InputError(f"background {text!r} is not a colour: write it as RRGGBB, for instance ffffff") from None
    return red, green, blue


def check_background(text: str) -> str:
    """A colour's text as it is; InputError for anything else."""
    parse_background(text)
    return text


def check_cache(root: Path) -> Path:
    """Refuse what cannot be a cache before torch is imported."""
    if not root.is_dir():
        raise CacheError(f"{str(root)!r} is not a folder: give the folder of a cache")
    return root


def check_square(side: int | None) -> int | None:
    """A side in pixels as it is; InputError for one that no model takes."""
    if side is not None:
        from ..images.geometry import square_bucket

        square_bucket(side, SIZE_MULTIPLE)
    return side


def check_area(side: int | None) -> int | None:
    """The square root of an area in pixels as it is; InputError for one that is below every model's smallest."""
    if side is not None:
        from ..images.geometry import bucket_table

        bucket_table(side, SIZE_MULTIPLE)
    return side


def check_one_of(size: int | None, area: int | None) -> None:
    """Refuse a square and an area at once."""
    if size is not None and area is not None:
        raise InputError(f"size {size} and area {area} exclude each other: give one of them")


model_option = partial(typer.Option, rich_help_panel="Model and device")
image_option = partial(typer.Option, rich_help_panel="Images")

Model = Annotated[str, model_option("--model", "-m", help=f"Model to load: {CHECKPOINTS}.", callback=check_model)]
Revision = Annotated[str | None, model_option(help="Branch, tag or commit of the model on the hub.")]
Device = Annotated[
    str,
    model_option(
        help="Device to run on: cpu, cuda, cuda:1; auto takes a GPU where there is one.", callback=check_device_name
    ),
]
Backend = Annotated[str, model_option(help="Backend of the model: auto, torch or triton.", callback=check_backend)]
SquareSide = Annotated[
    int | None, image_option(min=1, help="Resize and centre-crop images to N x N pixels.", callback=check_square)
]
AreaSide = Annotated[
    int | None,
    image_option(min=1, help="Bring images to about N^2 pixels, in the bucket nearest in aspect.", callback=check_area),
]
Background = Annotated[
    str, image_option(help="Colour behind transparent pixels, as RRGGBB.", callback=check_background)
]
Gpus = Annotated[
    str | None,
    model_option(
        "--gpus",
        help="A process on each GPU, which share the work: all, or numbers such as 0,1,3.",
        metavar="LIST",
        callback=check_gpus,
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Number of passes through the decoder; the model is made for 1.")]
Seed = Annotated[int, typer.Option(help="Seed of the decoder's start noise.")]
ImagePaths = Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)]
ComputeDtype = Annotated[
    Dtype | None,
    model_option("--compute-dtype", help="Type of the convolutions (default: bf16 on a GPU, fp32 on a CPU)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def resolve_device(name: str) -> str:
    """`name`, or for "auto" a GPU where there is one. Of several processes on a machine's GPUs each gets its own."""
    if name not in ("auto", "cuda"):
        return name
    import torch

    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    # of torchrun and of Slurm, which give every process all GPUs unless they are told otherwise
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or ""
    count = torch.cuda.device_count()
    return f"cuda:{int(local) % count}" if local.isdecimal() and count > 1 else "cuda"


def load_model(model: str, revision: str | None, device: str, dtype: Dtype | None, backend: str) -> FullCapacitor:
    """The model that a command names; by default bfloat16 on a GPU and float32 on the CPU."""
    import torch

    from ..model import FullCapacitor

    device = resolve_device(device)
    compute = dtype.torch() if dtype else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    return FullCapacitor.from_pretrained(model, revision=revision, device=device, dtype=compute, backend=backend)


def list_images(inputs: list[Path]) -> list[tuple[Path, Path]]:
    """(file, path relative to the input it was found under) of every image; folders are searched.

    Raises:
        InputError: an input does not exist. CacheError: a folder cannot be listed, or holds no image.
    """
    from ..images.scan import scan

    found: list[tuple[Path, Path]] = []
    for item in inputs:
        if item.is_dir():
            listing = scan(item)
            found += [(Path(os.fsdecode(listing.locate(p))), Path(os.fsdecode(p))) for p in listing.paths]
        elif item.exists():
            found.append((item, Path(item.name)))
        else:
            raise InputError(f"{str(item)!r} does not exist: give image files or folders")
    return found


def visible_gpus(wanted: str) -> list[str]:
    """Devices that `--gpus` names: "all", or numbers of GPUs as CUDA counts those that it sees.

    Raises:
        InputError: there is none, or none of that number.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise InputError("there is no GPU here: give --device cpu --coordinators N instead of --gpus")
    if wanted == "all":
        return [f"cuda:{i}" for i in range(count)]
    numbers = parse_gpus(wanted)
    missing = [i for i in numbers if i >= count]
    if missing:
        raise InputError(f"there is no GPU {missing[0]}: CUDA sees {count}, from 0 to {count - 1}")
    return [f"cuda:{i}" for i in numbers]
