"""From the bytes of an image file to the pixels that are encoded: the one definition of them.

Decoded as `decode` says, resized and cropped as `geometry` places it, turned upright, and then brought from its colour
profile to sRGB, in this order: resizing does not need the other two, which are done to the few pixels that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import ImageError, InputError
from . import adm, deferred
from .color import ICC_POLICIES
from .decode import CORRUPT, DEFAULT_MAX_PIXELS, Buffer, ImageHeader, OpenedImage, check_background, open_image
from .geometry import TOO_SMALL, UPSCALE_POLICIES, Placement, Size, apply, assign, place, stored_window
from .jpeg import MOST_SHRINK, shrunk
from .resample import MOST_WASTE

DECODE_POLICIES = ("exact", "fast")
CROPS = ("center", "adm")
FILTER, RESAMPLE = "lanczos", "int16"


@dataclass(frozen=True)
class PixelPolicy:
    """What of the pixels is a matter of choice. It is part of a cache's plan.

    Attributes:
        decode: "exact", or "fast": the DCT of a large JPEG shrinks it by 2, 4 or 8, never to less than twice the size
            that it is resized to.
        icc: "srgb" brings pixels with a colour profile to sRGB, "ignore" passes profiles over.
        background: RGB, 0-255, behind transparent pixels.
        upscale: "allow", or "refuse" for images smaller than their bucket.
        max_pixels: largest width x height that is decoded.
        crop: "center": resized until the bucket is just covered, then cropped at the centre; "adm": as ADM, DiT and
            those after them did it, see `images.adm`, which is a matter of squares and of `exact` decoding.

    Raises:
        InputError: a value that is none of these.
    """

    decode: str = "exact"
    icc: str = "srgb"
    background: tuple[int, int, int] = (255, 255, 255)
    upscale: str = "allow"
    max_pixels: int = DEFAULT_MAX_PIXELS
    crop: str = "center"

    def __post_init__(self) -> None:
        choices = {"decode": DECODE_POLICIES, "icc": ICC_POLICIES, "upscale": UPSCALE_POLICIES, "crop": CROPS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is unknown: use one of {', '.join(known)}")
        check_background(self.background)
        if self.crop == "adm" and self.decode != "exact":
            raise InputError(f"crop adm halves the whole picture, which decode {self.decode} does not have: use exact")
        if self.max_pixels < 1:
            raise InputError(f"max_pixels {self.max_pixels} allows no image: use 1 or more")

    def fields(self) -> dict[str, Any]:
        """Everything that the pixels depend on beside the file and its placement, as JSON has it."""
        fields = asdict(self) | {"background": list(self.background)}
        # it is a matter of the placement
        del fields["crop"]
        names = (adm.FILTER, adm.RESAMPLE) if self.crop == "adm" else (FILTER, RESAMPLE)
        return fields | dict(zip(("filter", "resample"), names, strict=True))

    def place(self, size: Size, bucket: Size) -> Placement:
        """How an upright image of `size` comes into `bucket`.

        Raises:
            ImageError: "too_small" by the policy, or "too_large" where the resize alone would be.
        """
        if self.crop == "center":
            return place(size, bucket, upscale=self.upscale)
        placement = adm.place_adm(size, bucket)
        if placement.upscaled and self.upscale == "refuse":
            raise ImageError(TOO_SMALL, f"image of {size} (height x width) is smaller than its bucket {bucket}")
        return placement


@dataclass(frozen=True)
class LoadedImage:
    """One image as it is encoded.

    Attributes:
        header: of the file.
        bucket: its number among the buckets that were to choose from.
        placement: how the upright image came into it.
        pixels: uint8 `[H,W,3]`, or `[N]` that are the record of an image to be resized elsewhere.
    """

    header: ImageHeader
    bucket: int
    placement: Placement
    pixels: np.ndarray


Admit = Callable[[int], AbstractContextManager[object]]
"""Entered while an image of so many bytes is decoded: may wait until there is memory."""


def load_image(
    data: bytes,
    policy: PixelPolicy,
    buckets: Sequence[Size],
    out: np.ndarray | None = None,
    *,
    name: str = "image",
    admit: Admit = nullcontext,
    buffer: Buffer | None = None,
    record_bytes: int | None = None,
) -> LoadedImage:
    """Decode an image file and bring it into the bucket nearest in aspect.

    Args:
        data: the file's bytes.
        buckets: to choose from.
        out: uint8 `[N]`, contiguous, with room for the pixels of any of them; `pixels` is then a view of its begin.
        name: what messages call the image.
        buffer: gives memory of so many bytes that the decoded picture may lie in, to be used again.
        record_bytes: leave the resizing to others: `out` takes a record (see `deferred`) of so many bytes at most. An
            image that needs more, or a colour profile, is resized here, and its record says so: `ready_bytes` suffice.

    Raises:
        ImageError: with one of `REASONS`, or "too_small" by the policy.
    """
    image = open_image(data, name=name, max_pixels=policy.max_pixels)
    size = Size(image.header.height, image.header.width)
    bucket = assign(size, buckets)
    placement = policy.place(size, bucket)
    resizing = adm.memory(size, placement) if policy.crop == "adm" else _resizing_memory(size, placement)
    with admit(image.memory + resizing):
        if record_bytes is not None and out is not None:
            nbytes = _record(image, policy, placement, buffer, out[:record_bytes])
            return LoadedImage(image.header, buckets.index(bucket), placement, out[:nbytes])
        pixels = frame(image, policy, placement, buffer)
    if out is not None:
        view = out[: pixels.size].reshape(pixels.shape)
        np.copyto(view, pixels)
        pixels = view
    return LoadedImage(image.header, buckets.index(bucket), placement, pixels)


def frame(image: OpenedImage, policy: PixelPolicy, placement: Placement, buffer: Buffer | None = None) -> np.ndarray:
    """The pixels of an opened image as placed: uint8 `[H,W,3]`, contiguous and writable.

    Raises:
        ImageError: with one of `REASONS`.
    """
    return _framed(_stored(image, policy, placement, buffer), image, policy, placement)


def _record(
    image: OpenedImage, policy: PixelPolicy, placement: Placement, buffer: Buffer | None, out: np.ndarray
) -> int:
    """Write an opened image's record, of pixels that are resized where `out` or the policy asks for that; its bytes."""
    pixels, orientation = _stored(image, policy, placement, buffer), image.header.orientation
    if policy.crop != "adm" and image.color_map(policy.icc) is None:
        window = stored_window(placement, orientation)
        is_resized = pixels.shape[:2] == (window.height, window.width)
        if not is_resized and deferred.record_bytes(pixels.shape, window, FILTER) <= len(out):
            return deferred.write_record(pixels, window, orientation, FILTER, out)
    return deferred.write_ready(_framed(pixels, image, policy, placement), out)


def _stored(image: OpenedImage, policy: PixelPolicy, placement: Placement, buffer: Buffer | None) -> np.ndarray:
    """The pixels of an opened image as it is stored, shrunk if the policy allows."""
    shrink = _shrink(image.header, placement) if policy.decode == "fast" and image.shrinks else 0
    pixels = image.stored_pixels(policy.background, icc=policy.icc, shrink=shrink, buffer=buffer)
    height, width = pixels.shape[:2] if image.header.orientation < 5 else pixels.shape[1::-1]
    if (height, width) != (shrunk(image.header.height, shrink), shrunk(image.header.width, shrink)):
        raise ImageError(CORRUPT, f"pixels of {height}x{width}, where the header says {image.header}")
    return pixels


def _framed(pixels: np.ndarray, image: OpenedImage, policy: PixelPolicy, placement: Placement) -> np.ndarray:
    orientation = image.header.orientation
    if policy.crop == "adm":
        pixels = adm.apply_adm(pixels, placement, orientation)
    else:
        pixels = apply(pixels, placement, FILTER, orientation)
    color = image.color_map(policy.icc)
    return color(pixels) if color else pixels


def _resizing_memory(size: Size, placement: Placement) -> int:
    """Bytes of the picture resized along one axis and along both, at most."""
    area = min(placement.resize.area, MOST_WASTE * placement.crop.area)
    return 3 * (area + max(size.height * placement.resize.width, size.width * placement.resize.height))


def _shrink(header: ImageHeader, placement: Placement) -> int:
    """The power of two by which the DCT may shrink an image that is at least twice too large afterwards."""
    for shrink in range(MOST_SHRINK, 0, -1):
        height, width = shrunk(header.height, shrink), shrunk(header.width, shrink)
        if height >= 2 * placement.resize.height and width >= 2 * placement.resize.width:
            return shrink
    return 0
