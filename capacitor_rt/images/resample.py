"""Antialiased resampling of uint8 pixels in whole numbers: a picture's bytes are the same wherever they are computed.

Along each axis an output pixel is a weighted mean of the input pixels under its filter, which a reduction stretches by
its factor (filters and windows are Pillow's). Weights are computed in float64, made to sum to one and rounded to 16-bit
integers, with as many bits behind the point as the axis's largest weight allows, at most 22. One axis is resampled
first, its sums are rounded to uint8, and then the other. Pillow's weights have 22 bits: few pixels differ from its, by
1, and hardly one by 2.

`torch.nn.functional.interpolate(antialias=True)` does the same arithmetic on uint8, and is the fastest where it has the
filter (Lanczos came with torch 2.12): it is taken if it gives the same bytes for a small picture. Otherwise, and where
little of the resized picture is wanted, matrix products give the sums exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# bits of the weights behind the point
_MOST_PRECISION = 22
# output pixels of one matrix product: their windows overlap
_BLOCK = 16
# so that float32 sums pixels times a byte of the weights, 255 * 128 * taps, without rounding
_MOST_TAPS = 512
# of a large picture, that are turned at a time, and that are in floating point at a time
_MOST_BYTES, _MOST_NUMBERS = 1 << 20, 1 << 17
MOST_WASTE = 8
"""torch resizes all of a picture, ten times as fast as matrix products the part that is wanted."""
# of the rows, that leaving the others out is worth a copy
_LEAST_SAVING = 0.1


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: np.ndarray) -> np.ndarray:
    angle = x * np.pi
    return np.where(x == 0, 1.0, np.sin(angle) / np.where(x == 0, 1.0, angle))


def _bicubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0.0)


def _box(x: np.ndarray) -> np.ndarray:
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


# each with half its width in pixels
FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "lanczos": (_lanczos, 3.0),
    "bicubic": (_bicubic, 2.0),
    "bilinear": (_bilinear, 1.0),
    "box": (_box, 0.5),
}


@dataclass(frozen=True)
class Window:
    """What is wanted of a picture resized to `height` x `width`: rows `top` to `bottom`, columns `left` to `right`."""

    height: int
    width: int
    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class AxisWeights:
    """One axis: output pixel i is the sum of `taps[i,k] * input[first[i]+k]` over k, rounded at bit `precision`.

    `first`: int32 `[N]`, ascending. `taps`: int16 `[N,K]`, zero behind the end of a filter. Read-only.
    """

    first: np.ndarray
    taps: np.ndarray
    precision: int


def resample(
    pixels: np.ndarray,
    window: Window,
    filter: str = "lanczos",
    columns_first: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resize uint8 `[H,W,3]` pixels and cut out the window: uint8 `[h,w,3]`, contiguous, never a view of `pixels`.

    Args:
        columns_first: resample along the height before the width, as is right for a picture that is turned by 90
            degrees afterwards: the rounding between the two is then that of the turned picture.
        out: uint8 `[h,w,3]`, contiguous, that takes the result; it may not overlap `pixels`.
    """
    (resized,) = resample_all(pixels[None], window, filter, columns_first, None if out is None else [out])
    return resized


def resample_all(
    pictures: np.ndarray,
    window: Window,
    filter: str = "lanczos",
    columns_first: bool = False,
    outs: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """`resample` of each of uint8 `[N,H,W,3]`. torch computes the weights once for all of them, not once for each."""
    resized: Iterable[np.ndarray]
    if pictures.shape[1:3] == (window.height, window.width):
        resized = pictures[:, window.top : window.bottom, window.left : window.right]
    elif _is_for_torch(window, filter):
        resized = _by_torch(pictures, window, filter, columns_first)
    else:
        resized = (by_matrices(pixels, window, filter, columns_first) for pixels in pictures)
    if outs is None:
        # a copy even of a whole picture: resized rows are no view of `pixels`, but their memory may be larger
        return [picture.copy() for picture in resized]
    for out, picture in zip(outs, resized, strict=True):
        np.copyto(out, picture)
    return list(outs)


def _is_for_torch(window: Window, filter: str) -> bool:
    wanted = (window.bottom - window.top) * (window.right - window.left)
    return window.height * window.width <= MOST_WASTE * wanted and torch_agrees(filter)


def by_matrices(pixels: np.ndarray, window: Window, filter: str, columns_first: bool = False) -> np.ndarray:
    """`resample` with numpy, which computes nothing but what the window needs."""
    height, width = pixels.shape[:2]
    rows = axis_weights(filter, height, window.height, window.top, window.bottom)
    columns = axis_weights(filter, width, window.width, window.left, window.right)
    top, bottom = span(filter, height, window.height, window.top, window.bottom)
    left, right = span(filter, width, window.width, window.left, window.right)
    needed = pixels[top:bottom, left:right]
    if columns_first:
        return _along_width(_along_height(needed, rows, top), columns, left)
    return _along_height(_along_width(needed, columns, left), rows, top)


@cache
def torch_agrees(filter: str) -> bool:
    """Whether this torch has the filter and gives the bytes that are defined here."""
    pixels = (np.arange(53 * 37 * 3, dtype=np.uint32) * 2654435761 >> 24).astype(np.uint8).reshape(53, 37, 3)
    for height, width in ((16, 24), (53, 90), (71, 5)):
        window = Window(height, width, 0, 0, height, width)
        try:
            (theirs,) = _by_torch(pixels[None], window, filter, False)
        except (RuntimeError, NotImplementedError, ValueError, AttributeError):
            return False
        if not np.array_equal(theirs, by_matrices(pixels, window, filter)):
            return False
    return True


def _by_torch(pictures: np.ndarray, window: Window, filter: str, columns_first: bool) -> np.ndarray:
    """uint8 `[N,h,w,3]` of uint8 `[N,H,W,3]`; not contiguous."""
    import torch
    from torch.nn.functional import interpolate

    def to_size(picture: Tensor, height: int, width: int) -> Tensor:
        return interpolate(picture, size=(height, width), mode=filter, antialias=True)

    count, height, width = pictures.shape[:3]
    # torch takes channels_last by the strides: those of this order of the axes, that of a single picture included
    flat = torch.from_numpy(np.require(pictures, requirements=("C", "W")).reshape(-1))
    picture = flat.view(count, height, width, 3).permute(0, 3, 1, 2)
    if columns_first:
        picture = to_size(picture, window.height, width)[:, :, window.top : window.bottom]
        resized = to_size(picture, window.bottom - window.top, window.width)
    else:
        top, bottom = span(filter, height, window.height, window.top, window.bottom)
        if bottom - top < (1 - _LEAST_SAVING) * height:
            narrow = torch.empty(count, height, window.width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            # the other rows are read for no row that is wanted
            narrow[:, :, top:bottom] = to_size(picture[:, :, top:bottom], bottom - top, window.width)
            picture = narrow
        resized = to_size(picture, window.height, window.width)[:, :, window.top : window.bottom]
    return resized[..., window.left : window.right].permute(0, 2, 3, 1).numpy()


@lru_cache(maxsize=256)
def axis_weights(filter: str, length: int, resized: int, begin: int, end: int) -> AxisWeights:
    """Weights that resample `length` pixels to `resized`, of the output pixels `begin` to `end`."""
    first, weights = _exact_weights(filter, length, resized, begin, end)
    precision = _precision(filter, length, resized)
    scaled = weights * (1 << precision)
    taps = np.trunc(scaled + np.where(weights >= 0, 0.5, -0.5)).astype(np.int16)
    first.flags.writeable = taps.flags.writeable = False
    return AxisWeights(first, taps, precision)


def _exact_weights(filter: str, length: int, resized: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """`first` and, in float64 `[N,K]`, the weights before they are rounded."""
    function, half_width = FILTERS[filter]
    scale = length / resized
    support = half_width * max(scale, 1.0)
    centers = scale * (np.arange(begin, end) + 0.5)
    first = np.maximum((centers - support + 0.5).astype(np.int32), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int32), length)
    inputs = first[:, None] + np.arange((last - first).max())
    weights = function((inputs - centers[:, None] + 0.5) * (1.0 / scale if scale >= 1.0 else 1.0))
    weights[inputs >= last[:, None]] = 0.0
    # one by one: a sum in pairs may round otherwise
    return first, weights / np.cumsum(weights, axis=1)[:, -1:]


@lru_cache(maxsize=256)
def _precision(filter: str, length: int, resized: int) -> int:
    # of the whole axis, so that a part of it has the weights of the whole
    largest = max(float(_exact_weights(filter, length, resized, *part)[1].max()) for part in _parts(resized))
    precision = 0
    while precision < _MOST_PRECISION and int(0.5 + largest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    return precision


def _parts(resized: int, size: int = 4096) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + size, resized)) for begin in range(0, resized, size))


def span(filter: str, length: int, resized: int, begin: int, end: int) -> tuple[int, int]:
    """Begin and end of the input pixels that the output pixels `begin` to `end` read."""
    scale = length / resized
    support = FILTERS[filter][1] * max(scale, 1.0)
    first = int(scale * (begin + 0.5) - support + 0.5)
    return max(first, 0), min(int(scale * (end - 1 + 0.5) + support + 0.5), length)


def _along_height(pixels: np.ndarray, weights: AxisWeights, start: int) -> np.ndarray:
    """uint8 `[L,W,3]`, whose first row is row `start` of the input, to `[N,W,3]`."""
    length, width = pixels.shape[:2]
    flat = pixels.reshape(length, width * 3)
    out = np.empty((len(weights.first), width * 3), np.uint8)
    for rows, inputs, high, low in _blocks(weights, start, length):
        for strip in _strips(width * 3, inputs.stop - inputs.start, _MOST_NUMBERS):
            part = flat[inputs, strip].astype(high.dtype)
            out[rows, strip] = _rounded(high @ part, low @ part, weights.precision)
    return out.reshape(-1, width, 3)


def _along_width(pixels: np.ndarray, weights: AxisWeights, start: int) -> np.ndarray:
    """uint8 `[H,L,3]`, whose first column is column `start` of the input, to `[H,N,3]`."""
    height, length = pixels.shape[:2]
    out = np.empty((height, len(weights.first), 3), np.uint8)
    for strip in _strips(height, length * 3, _MOST_BYTES):
        # one product of many rows, where each row's own would be of three columns
        columns = np.ascontiguousarray(pixels[strip].transpose(1, 0, 2))
        out[strip] = _along_height(columns, weights, start).transpose(1, 0, 2)
    return out


def _strips(length: int, each: int, most: int) -> Iterator[slice]:
    """Parts of an axis whose places hold `each`, at most so much together if it is not one place's."""
    step = max(1, most // each)
    return (slice(begin, min(begin + step, length)) for begin in range(0, length, step))


def _blocks(weights: AxisWeights, start: int, length: int) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray]]:
    """Output pixels, the input pixels that they read, and the high and low bytes of the weights, `[outputs,inputs]`."""
    taps = weights.taps.astype(np.int32)
    low = (taps + 128 & 255) - 128
    high = taps - low >> 8
    dtype = np.float32 if taps.shape[1] <= _MOST_TAPS else np.float64
    count = taps.shape[1]
    for begin in range(0, len(taps), _BLOCK):
        first = weights.first[begin : begin + _BLOCK] - start
        stop = int(first[-1]) + count
        dense = np.zeros((2, len(first), stop - int(first[0])), dtype)
        at = (np.arange(len(first))[:, None], first[:, None] - first[0] + np.arange(count))
        dense[0][at], dense[1][at] = high[begin : begin + _BLOCK], low[begin : begin + _BLOCK]
        # behind the end of the input the weights are zero
        inputs = slice(int(first[0]), min(stop, length))
        dense = dense[:, :, : inputs.stop - inputs.start]
        yield slice(begin, begin + len(first)), inputs, dense[0], dense[1]


def _rounded(high: np.ndarray, low: np.ndarray, precision: int) -> np.ndarray:
    # 255 times the sizes of the weights, which add up to less than 2 at 22 bits: below 2^31
    sums = high.astype(np.int32)
    sums <<= 8
    sums += low.astype(np.int32)
    sums += 1 << precision >> 1
    sums >>= precision
    np.clip(sums, 0, 255, out=sums)
    return sums.astype(np.uint8)
