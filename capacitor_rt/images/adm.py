"""The geometry of ADM (Dhariwal and Nichol 2021, arXiv:2105.05233), which DiT, SiT, REPA and LightningDiT took over.

While the shorter side is at least twice the side wanted, both sides are halved (rounded down) by a box filter; what is
left is resized by a bicubic filter until the shorter side fits, and the centre is cut out. Pixels are Pillow's to the
bit: it is Pillow that resizes, all of the picture, turned upright first.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import ImageError, InputError
from .convert import orient
from .geometry import Placement, Size
from .reasons import DEFAULT_MAX_PIXELS, TOO_LARGE

FILTER, RESAMPLE = "box+bicubic", "pillow"
"""How pixels are made, as a plan names it."""


def place_adm(size: Size, bucket: Size) -> Placement:
    """Where ADM's crop puts an upright image of `size` in the square `bucket`.

    Raises:
        ImageError: "too_large" if the image is so elongated that the resize alone would exceed `DEFAULT_MAX_PIXELS`.
        InputError: the bucket is no square.
    """
    if bucket.height != bucket.width:
        raise InputError(f"the crop adm is square, and the bucket is {bucket}: use a size")
    side = bucket.height
    half = halvings(size, side)[-1]
    # in floats, and ties to even, as the function has it
    scale = side / min(half.height, half.width)
    resize = Size(round(half.height * scale), round(half.width * scale))
    if resize.area > DEFAULT_MAX_PIXELS:
        raise ImageError(
            TOO_LARGE, f"image of {size} (height x width) must be resized to {resize} to cover {bucket}: too elongated"
        )
    top, left = (resize.height - side) // 2, (resize.width - side) // 2
    return Placement(resize, top, left, bucket, upscaled=min(size.height, size.width) < side)


def halvings(size: Size, side: int) -> list[Size]:
    """The sizes that an image goes through before the bicubic resize, its own first."""
    sizes = [size]
    while min(size.height, size.width) >= 2 * side:
        size = Size(size.height // 2, size.width // 2)
        sizes.append(size)
    return sizes


def apply_adm(pixels: np.ndarray, placement: Placement, orientation: int = 1) -> np.ndarray:
    """Resize and crop uint8 `[H,W,3]` pixels to uint8 `[h,w,3]`, contiguous.

    Args:
        placement: of the upright image, by `place_adm`.
        orientation: EXIF's, 1-8, of `pixels`.
    """
    picture = Image.fromarray(np.ascontiguousarray(orient(pixels, orientation)))
    for half in halvings(Size(picture.height, picture.width), placement.crop.height)[1:]:
        picture = picture.resize((half.width, half.height), Image.Resampling.BOX)
    resize, crop = placement.resize, placement.crop
    picture = picture.resize((resize.width, resize.height), Image.Resampling.BICUBIC)
    left, top = placement.left, placement.top
    return np.array(picture.crop((left, top, left + crop.width, top + crop.height)))


def memory(size: Size, placement: Placement) -> int:
    """Bytes that Pillow takes, at most: four a pixel of the picture, of its first resize by halves, and of the last."""
    halves = size.area + size.area // 2 + size.area // 4
    return 3 * size.area + 4 * (halves + placement.resize.area + size.height * placement.resize.width)
