"""The pictures of a page: lossless, so that nothing is shown that neither the image nor the model made."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from ...errors import ImageError
from ...images.decode import decode_image
from ...images.opening import FORMATS
from ...images.reading import read_bytes
from ...images.reasons import DEFAULT_MAX_PIXELS

THUMB_SIDE = 96
LARGEST_SIDE = 16383
"""Pixels a side of a WebP picture at most, by its format."""


def save_exact(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 `[H,W,3]` as lossless WebP."""
    # method 0: a tenth larger than the best, and ten times as fast
    Image.fromarray(pixels).save(path, "WEBP", lossless=True, quality=0, method=0)


def save_thumb(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 `[H,W,3]` as a small picture for the list."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMB_SIDE, THUMB_SIDE))
    image.save(path, "WEBP", quality=80)


def glimpse(path: str | os.PathLike[str]) -> np.ndarray | None:
    """What can be seen of an image file that was refused, uint8 `[H,W,3]`: all of it, a part, or None for nothing.

    Not to be called from several threads at once: Pillow has one switch for all of them.
    """
    try:
        data = read_bytes(path)
    except ImageError:
        return None
    try:
        return decode_image(data).pixels
    except ImageError:
        return _part_of(data)


def _part_of(data: bytes) -> np.ndarray | None:
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > DEFAULT_MAX_PIXELS:
                return None
            image.draft("RGB", (THUMB_SIDE, THUMB_SIDE))
            return np.asarray(image.convert("RGB"))
    except Exception:
        # Pillow's decoders raise whatever they like at damaged data, and a thumbnail is worth no failure
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def save_maps(path: Path, levels: np.ndarray) -> None:
    """Write uint8 `[H,W]` as lossless WebP in diverging colours: blue below the middle, red above it."""
    save_exact(path, DIVERGING[levels])


def _diverging() -> np.ndarray:
    """256 colours from blue by way of near white to red, uint8 `[256,3]`."""
    stops = np.array(
        [(0.0, 5, 48, 97), (0.25, 67, 147, 195), (0.5, 247, 247, 247), (0.75, 214, 96, 77), (1, 103, 0, 31)]
    )
    at = np.linspace(0, 1, 256)
    return np.stack([np.interp(at, stops[:, 0], stops[:, i]) for i in (1, 2, 3)], 1).round().astype(np.uint8)


DIVERGING = _diverging()
