"""Pillow images of every mode to 8-bit RGB arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFile, TiffImagePlugin

from ..errors import ImageError
from .color import cmyk_to_rgb

_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_DEEP = {f"{kind};16{order}" for kind in ("RGB", "RGBA", "RGBX") for order in "LBN"}
_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}

_TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb8(
    image: ImageFile.ImageFile,
    background: tuple[int, int, int],
    reopen: Callable[[], ImageFile.ImageFile],
    cmyk_profile: bytes = b"",
) -> np.ndarray:
    """Pixels of an opened, not yet loaded image: uint8 `[H,W,3]`, contiguous and writable.

    Transparency is composited on `background`. `reopen` opens the same file anew (16-bit colour is read twice).
    CMYK becomes sRGB by `cmyk_profile` if that is a profile of CMYK. Raises whatever Pillow raises, and
    ImageError("unsupported") for samples without a defined range.
    """
    if (deep := _deep_samples(image, reopen)) is not None:
        return _composite(_with_key(deep, image.info.get("transparency")), background)
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = _grey16(image)[..., None]
        samples = np.broadcast_to(grey, (*grey.shape[:2], 3))
        return _composite(_with_key(samples, image.info.get("transparency")), background)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        return _composite(np.asarray(image.convert("RGBA")), background)
    if image.mode == "CMYK":
        # Pillow takes every CMYK JPEG for an inverted one; without Adobe's marker 0 means no ink (ITU-T T.872)
        plain = image.format in ("JPEG", "MPO") and "adobe" not in image.info
        inks = ImageChops.invert(image) if plain else image
        by_profile = cmyk_to_rgb(inks, cmyk_profile) if cmyk_profile else None
        return np.array(by_profile or inks.convert("RGB"))
    if image.mode in ("F", "LAB", "HSV"):
        raise ImageError("unsupported", f"samples of mode {image.mode}: convert the file to 8 or 16 bits RGB")
    # convert() copies an image that is RGB already
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF `orientation` 1-8 of uint8 `[H,W,3]`; contiguous."""
    if orientation in _TURNS:
        # Pillow walks in blocks: half the time of a transposed copy by numpy
        return np.array(Image.fromarray(pixels).transpose(_TURNS[orientation]))
    rows = slice(None, None, -1 if orientation in (3, 4) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3) else 1)
    return np.ascontiguousarray(pixels[rows, columns])


def unorient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Inverse of `orient`: what is turned back by `orientation` when it is turned upright."""
    return orient(pixels, {6: 8, 8: 6}.get(orientation, orientation))


def _deep_samples(image: ImageFile.ImageFile, reopen: Callable[[], ImageFile.ImageFile]) -> np.ndarray | None:
    """16-bit colour as uint16 `[H,W,3 or 4]`, or None for other images.

    Pillow keeps the high byte of each sample; read in the other byte order it keeps the low one.
    """
    rawmode = _rawmode(image)
    if rawmode == "LA;16B":
        # as wide as RGBA: grey high, grey low, alpha high, alpha low
        image.tile = [tile._replace(args="RGBA") for tile in image.tile]
        pairs = np.asarray(image).view(">u2")
        return pairs[..., (0, 0, 0, 1)].astype(np.uint16)
    if rawmode not in _DEEP:
        return None
    swapped = rawmode[:-1] + _OTHER_ORDER[rawmode[-1]]
    twin = reopen()
    twin.tile = [tile._replace(args=_swap(tile.args, rawmode, swapped)) for tile in twin.tile]
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(twin)


def _rawmode(image: ImageFile.ImageFile) -> str | None:
    if not image.tile:
        return None
    args = image.tile[0][3]
    rawmode = args if isinstance(args, str) else args[0] if args else None
    return rawmode if isinstance(rawmode, str) else None


def _swap(args: tuple[Any, ...] | str | None, old: str, new: str) -> tuple[Any, ...] | str:
    """Arguments of a tile's decoder with the raw mode `old` replaced."""
    return tuple(new if a == old else a for a in args) if isinstance(args, tuple) else new


def _grey16(image: ImageFile.ImageFile) -> np.ndarray:
    samples = np.asarray(image)
    if samples.dtype != np.uint16:
        if samples.size and (samples.min() < 0 or samples.max() > 65535):
            raise ImageError("unsupported", "32-bit grey samples: convert the file to 8 or 16 bits")
        samples = samples.astype(np.uint16)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(262) == 0:
        # white is zero: Pillow inverts 8 bits and forgets 16
        samples = 65535 - samples
    return samples


def _with_key(samples: np.ndarray, key: object) -> np.ndarray:
    """Scale uint16 `[H,W,C]` to uint8; a colour key (PNG's tRNS, in 16 bits) becomes an alpha channel."""
    keyed = key is not None and samples.shape[2] != 4
    pixels = np.empty((*samples.shape[:2], samples.shape[2] + keyed), np.uint8)
    for rows in _bands(samples):
        # round(v * 255 / 65535) in integers
        pixels[rows, :, : samples.shape[2]] = (samples[rows].astype(np.uint32) * 255 + 32895) >> 16
        if keyed:
            pixels[rows, :, -1] = (samples[rows] != np.asarray(key, np.uint16)).any(axis=2) * np.uint8(255)
    return pixels


def _bands(pixels: np.ndarray) -> Iterator[slice]:
    """Rows of about a million pixels each, so that wider types between take no memory to speak of."""
    height, width = pixels.shape[:2]
    step = max(1, (1 << 20) // max(1, width))
    return (slice(top, top + step) for top in range(0, height, step))


def _composite(pixels: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """uint8 `[H,W,3]` unchanged; `[H,W,4]` over `background`, rounded to nearest."""
    if pixels.shape[2] == 3:
        return np.ascontiguousarray(pixels)
    flat = np.empty((*pixels.shape[:2], 3), np.uint8)
    for rows in _bands(pixels):
        alpha = pixels[rows, :, 3:].astype(np.uint16)
        over = pixels[rows, :, :3] * alpha + np.array(background, np.uint16) * (255 - alpha)
        flat[rows] = (over + 127) // 255
    return flat
