"""What the commands share: options, the model they name, lines and bars on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from ..errors import InputError

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


CHECKPOINTS = "a hub id, a folder, a .safetensors file, or 'sample' for the bundled checkpoint"

Model = Annotated[str, typer.Option("--model", "-m", help=f"Model to load: {CHECKPOINTS}.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the hub.")]
Device = Annotated[str, typer.Option(help="Device to run on: cpu, cuda, cuda:1; auto takes a GPU where there is one.")]
Backend = Annotated[str, typer.Option(help="Backend of the model: auto, torch or triton.")]
SquareSide = Annotated[int | None, typer.Option(min=1, help="Resize and centre-crop images to N x N pixels.")]
AreaSide = Annotated[
    int | None, typer.Option(min=1, help="Bring images to about N^2 pixels, in the bucket nearest in aspect.")
]
Background = Annotated[str, typer.Option(help="Colour behind transparent pixels, as RRGGBB.")]
Steps = Annotated[int, typer.Option(min=1, help="Number of passes through the decoder; the model is made for 1.")]
Seed = Annotated[int, typer.Option(help="Seed of the decoder's start noise.")]
ImagePaths = Annotated[list[Path], typer.Argument(help="Image files, or folders of them.", show_default=False)]
ComputeDtype = Annotated[
    Dtype | None,
    typer.Option("--compute-dtype", help="Type of the convolutions (default: bf16 on a GPU, fp32 on a CPU)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def resolve_device(name: str) -> str:
    """`name`, or for "auto" a GPU where there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(model: str, revision: str | None, device: str, dtype: Dtype | None, backend: str) -> FullCapacitor:
    """The model that a command names; by default bfloat16 on a GPU and float32 on the CPU."""
    import torch

    from ..model import FullCapacitor

    device = resolve_device(device)
    compute = dtype.torch() if dtype else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    return FullCapacitor.from_pretrained(model, revision=revision, device=device, dtype=compute, backend=backend)


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


def printable(text: str) -> str:
    """Text that may hold file names of any bytes, as UTF-8 with escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def note(line: str) -> None:
    """A line on standard error, clear of a progress bar."""
    tqdm.write(printable(line), file=sys.stderr)


def bar(items: Iterable[Any], total: int, unit: str) -> Iterable[Any]:
    """Progress with rate and ETA on standard error, where that is a terminal."""
    return tqdm(items, total=total, unit=unit, disable=None, dynamic_ncols=True, leave=False)
