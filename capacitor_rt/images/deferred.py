"""Pictures that are decoded and not resized yet, each with all that resizing it takes, as one run of bytes.

A record is a row of `capacitor_kernels.pictures.Field` in int32, the weights of both axes, and the pixels that the
wanted window reads, each part on a multiple of 16 bytes, places counted from the beginning of the record. The bytes are
enough to resize it: `capacitor_kernels.ops.resize` on a GPU, with the bits that `resample` gives. Records of several
windows of a picture share its pixels, which lie behind the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from capacitor_kernels.pictures import UNIT, Field

from .resample import Window, axis_weights, span

_FIELDS = tuple(Field)
_ROW_BYTES = -(-4 * len(Field) // UNIT) * UNIT


class _Axis(NamedTuple):
    """One axis: the input pixels `begin` to `end` that are read, and what the record says of it.

    `pixels` is how many are written. `table`, int32, is `first [pixels]` and then `taps [taps, pixels]`, with zeros up
    to a multiple of 16 bytes.
    """

    begin: int
    end: int
    pixels: int
    taps: int
    precision: int
    table: np.ndarray


def record_bytes(shape: tuple[int, ...], windows: Sequence[Window], filter: str) -> int:
    """Bytes of the records of a stored picture of `shape` (H, W, 3), of which `windows` are wanted."""
    axes = [_axes(shape[0], shape[1], window, filter) for window in windows]
    rows, columns = _needed(axes)
    tables = sum(axis.table.nbytes for both in axes for axis in both)
    return len(axes) * _ROW_BYTES + tables + _whole(3 * len(rows) * len(columns))


def write_records(
    pixels: np.ndarray, windows: Sequence[Window], orientation: int, filter: str, out: np.ndarray
) -> tuple[list[int], int]:
    """Write the records of uint8 `[H,W,3]` pixels to the beginning of `out`, uint8 `[N]` on a multiple of 16.

    Args:
        windows: what is wanted of the picture resized, as it is stored.
        orientation: EXIF's: the resized picture is to be turned upright as that says.

    Returns:
        where the record of each window begins, and the bytes of all.
    """
    axes = [_axes(pixels.shape[0], pixels.shape[1], window, filter) for window in windows]
    rows, columns = _needed(axes)
    needed = pixels[rows.start : rows.stop, columns.start : columns.stop]
    sizes = [_ROW_BYTES + sum(axis.table.nbytes for axis in both) for both in axes]
    begins, source = [sum(sizes[:i]) for i in range(len(sizes))], sum(sizes)
    for begin, size, (of_rows, of_columns) in zip(begins, sizes, axes, strict=True):
        origin = 3 * ((of_rows.begin - rows.start) * len(columns) + of_columns.begin - columns.start)
        place = {Field.SOURCE: (source - begin) // UNIT, Field.ORIGIN: origin}
        _write(of_rows, of_columns, 3 * len(columns), place, orientation, out[begin : begin + size])
    np.copyto(out[source : source + needed.size].reshape(needed.shape), needed)
    return begins, source + _whole(needed.size)


def _needed(axes: Sequence[tuple[_Axis, _Axis]]) -> tuple[range, range]:
    """The rows and the columns of a picture that are read for any of its windows."""
    rows, columns = (range(min(a.begin for a in of), max(a.end for a in of)) for of in zip(*axes, strict=True))
    return rows, columns


def write_table(shape: tuple[int, int], window: Window, orientation: int, filter: str, out: np.ndarray) -> int:
    """Write the record of a picture of `shape` (H, W) whose pixels are not there yet, and will lie anywhere; its bytes.

    They are to be the rows and columns that `needed` says, and nothing else.
    """
    rows, columns = _axes(*shape, window, filter)
    nbytes = table_bytes(shape, window, filter)
    _write(rows, columns, 3 * (columns.end - columns.begin), {}, orientation, out[:nbytes])
    return nbytes


def table_bytes(shape: tuple[int, int], window: Window, filter: str) -> int:
    """Bytes of the record of a picture of `shape` (H, W), all but its pixels."""
    return _ROW_BYTES + sum(axis.table.nbytes for axis in _axes(*shape, window, filter))


def needed(shape: tuple[int, int], window: Window, filter: str) -> tuple[slice, slice]:
    """The rows and the columns of a picture of `shape` (H, W) that are read."""
    rows, columns = _axes(*shape, window, filter)
    return slice(rows.begin, rows.end), slice(columns.begin, columns.end)


def _write(
    rows: _Axis, columns: _Axis, stride: int, place: dict[Field, int], orientation: int, out: np.ndarray
) -> None:
    """Write a record, all but its pixels, whose rows are `stride` bytes apart and begin at `place`."""
    a, b, steps = columns, rows, (3, stride)
    if orientation >= 5:
        # what is turned by 90 degrees is resampled along its height first
        a, b, steps = b, a, steps[::-1]
    row = dict.fromkeys(_FIELDS, 0) | place
    row |= {Field.STEP_A: steps[0], Field.STEP_B: steps[1]}
    row |= {Field.LENGTH_A: a.end - a.begin, Field.LENGTH_B: b.end - b.begin}
    row |= {Field.COUNT_A: a.pixels, Field.COUNT_B: b.pixels, Field.TAPS_A: a.taps, Field.TAPS_B: b.taps}
    row |= {Field.WEIGHTS_A: _ROW_BYTES // 4, Field.WEIGHTS_B: _ROW_BYTES // 4 + len(a.table)}
    row |= {Field.PRECISION_A: a.precision, Field.PRECISION_B: b.precision}
    # upright, a runs along the width
    step_a, step_b = 3, 3 * a.pixels
    if orientation in (2, 3, 6, 7):
        row[Field.OUT], step_a = step_a * (a.pixels - 1), -step_a
    if orientation in (3, 4, 7, 8):
        row[Field.OUT], step_b = row[Field.OUT] + step_b * (b.pixels - 1), -step_b
    row |= {Field.OUT_A: step_a, Field.OUT_B: step_b}
    out[: 4 * len(_FIELDS)].view(np.int32)[:] = [row[field] for field in _FIELDS]
    out[_ROW_BYTES:].view(np.int32)[:] = np.concatenate((a.table, b.table))


def ready_bytes(height: int, width: int) -> int:
    """Bytes of the record of a picture that is resized already."""
    return record_bytes((height, width), [Window(height, width, 0, 0, height, width)], "box")


def write_ready(pixels: np.ndarray, out: np.ndarray) -> int:
    """Write the record of pixels that are resized and upright already, and will be copied; its bytes."""
    height, width = pixels.shape[:2]
    return write_records(pixels, [Window(height, width, 0, 0, height, width)], 1, "box", out)[1]


def _axes(height: int, width: int, window: Window, filter: str) -> tuple[_Axis, _Axis]:
    return (
        _axis(filter, height, window.height, window.top, window.bottom),
        _axis(filter, width, window.width, window.left, window.right),
    )


@lru_cache(maxsize=256)
def _axis(filter: str, length: int, resized: int, begin: int, end: int) -> _Axis:
    first_read, last_read = span(filter, length, resized, begin, end)
    weights = axis_weights(filter, length, resized, begin, end)
    count, taps = weights.taps.shape
    table = np.zeros(-(-count * (1 + taps) // 4) * 4, np.int32)
    table[:count] = weights.first - first_read
    table[count : count * (1 + taps)] = weights.taps.T.ravel()
    return _Axis(first_read, last_read, count, taps, weights.precision, table)


def _whole(nbytes: int) -> int:
    return -(-nbytes // UNIT) * UNIT
