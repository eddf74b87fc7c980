"""Colour profiles to sRGB, by lcms2 as Pillow has it: 8 bits, perceptual intent.

A profile that cannot be read, or is of another colour space than the samples, is passed over, as viewers do. Where a
profile moves no colour by more than 1/255 (those that say sRGB) pixels are left alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

try:
    from PIL import ImageCms
except ImportError:
    ImageCms = None  # type: ignore[assignment]

ICC_POLICIES = ("srgb", "ignore")
ColorMap = Callable[[np.ndarray], np.ndarray]
"""uint8 `[H,W,3]` to uint8 `[H,W,3]`."""

# corners, greys and what lies between
_GRID = 9


@lru_cache(maxsize=128)
def to_srgb(profile: bytes, space: str) -> ColorMap | None:
    """What brings pixels of an ICC `profile` to sRGB; None if nothing has to be done.

    Args:
        space: of the samples: "RGB", or "GRAY" for three equal channels.
    """
    transform = _transform(profile, space)
    if transform is None:
        return None
    if space == "GRAY":
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        table = np.asarray(ImageCms.applyTransform(ramp, transform))[0]
        if _nearly_equal(table, np.arange(256)[:, None]):
            return None
        return lambda pixels: table[pixels[..., 0]]
    steps = np.linspace(0, 255, _GRID).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    if _nearly_equal(_apply(transform, grid), grid):
        return None
    return lambda pixels: _apply(transform, pixels)


def cmyk_to_rgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """A CMYK image (0 is no ink) by its profile; None if the profile is not one of CMYK."""
    transform = _transform(profile, "CMYK")
    return None if transform is None else ImageCms.applyTransform(image, transform)


@lru_cache(maxsize=128)
def _transform(profile: bytes, space: str) -> Any:
    if ImageCms is None:
        return None
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[space]
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != space:
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _apply(transform: Any, pixels: np.ndarray) -> np.ndarray:
    return np.array(ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(pixels)), transform))


def _nearly_equal(mapped: np.ndarray, pixels: np.ndarray) -> bool:
    return bool(abs(mapped.astype(int) - pixels).max() <= 1)
