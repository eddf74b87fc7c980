"""Image files to the frames that are encoded, and decoded images back to bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ImageError, InputError
from .decode import open_image
from .geometry import Placement, Size, assign, bucket_table, place, square_bucket
from .load import PixelPolicy, frame
from .opening import ImageHeader
from .reading import read_bytes

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Framing:
    """What part of an image is encoded, and how large.

    `size` N: a square of N pixels a side. `area` N: the bucket of about N^2 pixels nearest in aspect. Neither: the
    image as it is, its edges cropped to the multiple that the model needs; only a smaller image is enlarged.
    """

    size: int | None = None
    area: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.area is not None:
            raise InputError(f"size {self.size} and area {self.area} exclude each other: give one of them")

    def placement(self, image: Size, multiple: int) -> Placement:
        """Resize and crop of an upright image of size `image` for a model that needs multiples of `multiple`."""
        if self.size is not None:
            return place(image, square_bucket(self.size, multiple))
        if self.area is not None:
            return place(image, assign(image, bucket_table(self.area, multiple)))
        crop = Size(*(max(multiple, side // multiple * multiple) for side in (image.height, image.width)))
        if crop.height > image.height or crop.width > image.width:
            return place(image, crop)
        return Placement(image, (image.height - crop.height) // 2, (image.width - crop.width) // 2, crop)


@dataclass(frozen=True)
class Frame:
    """One image as it is encoded: uint8 `[H,W,3]`, and how it came about."""

    path: Path
    pixels: np.ndarray
    header: ImageHeader
    placement: Placement


def load_frame(path: Path, framing: Framing, multiple: int, background: RGB = (255, 255, 255)) -> Frame:
    """Read, decode, resize, crop and turn upright one image file, as a cache with the default policy does.

    Raises:
        ImageError: the file is not an image that can be decoded.
    """
    policy = PixelPolicy(background=background)
    image = open_image(read_bytes(path), name=str(path))
    placement = framing.placement(Size(image.header.height, image.header.width), multiple)
    return Frame(path, frame(image, policy, placement), image.header, placement)


def load_frames(
    paths: Iterable[Path], framing: Framing, multiple: int, background: RGB = (255, 255, 255), workers: int = 4
) -> Iterator[tuple[Path, Frame | ImageError]]:
    """`load_frame` of every path, in order, a few ahead of the reader; a bad file yields its error."""

    def load(path: Path) -> Frame | ImageError:
        try:
            return load_frame(path, framing, multiple, background)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        todo = iter(paths)
        ahead: list[tuple[Path, Future[Frame | ImageError]]] = []
        for path in chain(islice(todo, 2 * workers), todo):
            ahead.append((path, pool.submit(load, path)))
            if len(ahead) >= 2 * workers:
                first, future = ahead.pop(0)
                yield first, future.result()
        for first, future in ahead:
            yield first, future.result()


def group_frames(
    frames: Iterable[tuple[Path, Frame | ImageError]], batch: int
) -> Iterator[list[Frame] | tuple[Path, ImageError]]:
    """Neighbouring frames of one size, at most `batch`, and errors by themselves, all in order."""
    waiting: list[Frame] = []
    for path, loaded in frames:
        shape = waiting[0].pixels.shape if waiting else None
        fits = isinstance(loaded, Frame) and loaded.pixels.shape == shape and len(waiting) < batch
        if waiting and not fits:
            yield waiting
            waiting = []
        if isinstance(loaded, Frame):
            waiting.append(loaded)
        else:
            yield path, loaded
    if waiting:
        yield waiting


def to_batch(frames: list[Frame], device: torch.device) -> Tensor:
    """Frames of one size to uint8 `[B,H,W,3]` on `device`."""
    return torch.from_numpy(np.stack([f.pixels for f in frames])).to(device)


def to_uint8(image: Tensor) -> np.ndarray:
    """Decoded image `[3,H,W]` in about [-1,1] to uint8 `[H,W,3]`, rounded and clamped."""
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
