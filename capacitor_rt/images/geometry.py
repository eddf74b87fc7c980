"""Sizes, aspect-ratio buckets and the resize-and-crop that brings an image to one. All sizes are whole pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ImageError, InputError
from .convert import orient
from .reasons import DEFAULT_MAX_PIXELS, TOO_LARGE
from .resample import FILTERS, Window, resample

TOO_SMALL = "too_small"
"""Reason of an image that would have to be enlarged under `upscale="refuse"`."""
UPSCALE_POLICIES = ("allow", "refuse")


@dataclass(frozen=True, order=True)
class Size:
    """Height and width in pixels, each at least 1; ordered by height, then width."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise InputError(f"size {self} is empty: height and width are at least 1")

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def area(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Placement:
    """How an image comes into its bucket: resized to `resize`, then `crop` cut out at row `top`, column `left`.

    `upscaled` records that the resize enlarges.
    """

    resize: Size
    top: int
    left: int
    crop: Size
    upscaled: bool = False


def square_bucket(side: int, multiple: int) -> Size:
    """The one bucket of a fixed size.

    Raises:
        InputError: `side` is not a multiple of `multiple`; names the nearest that are.
    """
    _check_multiple(multiple)
    if side < multiple or side % multiple:
        below, above = side // multiple * multiple, (max(side, 0) // multiple + 1) * multiple
        use = f"{below} or {above}" if below > 0 else f"{above}"
        raise InputError(f"size {side} is not a multiple of {multiple}: use {use}")
    return Size(side, side)


def bucket_table(area_side: int, multiple: int, max_aspect: float = 4.0) -> tuple[Size, ...]:
    """The sizes of at most `area_side`^2 pixels that cannot grow: aspect-ratio buckets, sorted, without duplicates.

    A size is in the table if both sides are multiples of `multiple`, the longer over the shorter is at most
    `max_aspect`, and no other such size is at least as high and as wide. With (H, W) the table holds (W, H). The
    ratio is the correctly rounded quotient, so that 12 x 10 fits 1.2, which is a little less than 6/5 in binary.

    Raises:
        InputError: no size fits, or an argument out of range.
    """
    _check_multiple(multiple)
    if area_side < multiple:
        raise InputError(f"area side {area_side} is below {multiple}, the smallest side: use {multiple} or more")
    if not 1.0 <= max_aspect < float("inf"):
        raise InputError(f"max_aspect {max_aspect} is not a ratio of the longer side to the shorter: use 1 or more")
    widest: list[Size] = []
    height = multiple
    while height * multiple <= area_side**2:
        width = min(area_side**2 // height, int(height * max_aspect) + 1) // multiple * multiple
        while width / height > max_aspect:
            width -= multiple
        if width and height / width <= max_aspect:
            widest.append(Size(height, width))
        height += multiple
    # heights ascend, so a size is dominated exactly if a later one is at least as wide
    table: list[Size] = []
    for size in reversed(widest):
        if not table or size.width > table[-1].width:
            table.append(size)
    return tuple(reversed(table))


def assign(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest in the logarithm; of equally near ones the largest, then the widest.

    The ratio of ratios is compared, a correctly rounded quotient of integers: the same on every machine.
    """
    if not buckets:
        raise InputError("there are no buckets to choose from: pass at least one")

    def distance(bucket: Size) -> tuple[float, int, int]:
        a, b = size.width * bucket.height, size.height * bucket.width
        return max(a, b) / min(a, b), -bucket.area, bucket.height

    return min(buckets, key=distance)


def place(size: Size, bucket: Size, *, upscale: str = "allow") -> Placement:
    """Resize that just covers `bucket` (aspect kept, the free side rounded half up), then the crop at its centre.

    Args:
        size: of the upright image.
        bucket: the size wanted.
        upscale: "allow", or "refuse" to reject images smaller than the bucket in either direction.

    Raises:
        ImageError: "too_small" by policy; "too_large" if the image is so elongated that the resize alone would
            exceed `DEFAULT_MAX_PIXELS`.
    """
    if upscale not in UPSCALE_POLICIES:
        raise InputError(f"upscale {upscale!r} is unknown: use one of {', '.join(map(repr, UPSCALE_POLICIES))}")
    upscaled = size.height < bucket.height or size.width < bucket.width
    if upscaled and upscale == "refuse":
        raise ImageError(TOO_SMALL, f"image of {size} (height x width) is smaller than its bucket {bucket}")
    if size.width * bucket.height >= size.height * bucket.width:
        resize = Size(bucket.height, _rounded(size.width * bucket.height, size.height))
    else:
        resize = Size(_rounded(size.height * bucket.width, size.width), bucket.width)
    if resize.area > DEFAULT_MAX_PIXELS:
        raise ImageError(
            TOO_LARGE, f"image of {size} (height x width) must be resized to {resize} to cover {bucket}: too elongated"
        )
    top, left = (resize.height - bucket.height) // 2, (resize.width - bucket.width) // 2
    return Placement(resize, top, left, bucket, upscaled)


def apply(
    pixels: np.ndarray,
    placement: Placement,
    filter: str = "lanczos",
    orientation: int = 1,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resize and crop uint8 `[H,W,3]` pixels to uint8 `[h,w,3]`, contiguous.

    Antialiased (see `resample`), no shortcut through a smaller image; pixels whose size is already `placement.resize`
    are only cropped, bit for bit.

    Args:
        placement: of the upright image.
        orientation: EXIF's, 1-8, of `pixels`. What has to be turned is turned last, when it is small; the pixels are
            those of the picture turned first.
        out: uint8 `[h,w,3]`, contiguous, that takes pixels which need no turning, and is then what is returned.
    """
    if filter not in FILTERS:
        raise InputError(f"filter {filter!r} is unknown: use one of {', '.join(FILTERS)}")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise InputError(f"pixels are {pixels.dtype} {list(pixels.shape)}: expected uint8 [H,W,3]")
    window = stored_window(placement, orientation)
    if orientation == 1:
        return resample(pixels, window, filter, out=out)
    return orient(resample(pixels, window, filter, columns_first=orientation >= 5), orientation)


def stored_window(placement: Placement, orientation: int) -> Window:
    """What a placement of the upright image takes of the image as it is stored."""
    resize, crop = placement.resize, placement.crop
    top, left, bottom, right = placement.top, placement.left, placement.top + crop.height, placement.left + crop.width
    if min(top, left) < 0 or bottom > resize.height or right > resize.width:
        raise InputError(f"crop {crop} at row {top}, column {left} does not lie within {resize}: use place()")
    return _as_stored(Window(resize.height, resize.width, top, left, bottom, right), orientation)


def _as_stored(window: Window, orientation: int) -> Window:
    """A window of the upright image in the image as it is stored."""
    height, width = window.height, window.width
    rows, columns = (window.top, window.bottom), (window.left, window.right)
    if orientation in (3, 4, 7, 8):
        rows = height - rows[1], height - rows[0]
    if orientation in (2, 3, 6, 7):
        columns = width - columns[1], width - columns[0]
    if orientation >= 5:
        height, width, rows, columns = width, height, columns, rows
    return Window(height, width, rows[0], columns[0], rows[1], columns[1])


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _check_multiple(multiple: int) -> None:
    if multiple < 1:
        raise InputError(f"multiple {multiple} is not positive")
