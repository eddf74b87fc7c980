"""JPEGs that a GPU decodes and resizes, each with all that it takes beside the pixels, as one run of bytes.

A record is 12 int32: the stream's bytes with the sign turned, height and width of the picture, the rows and the columns
that are read of it, each from and to, the bytes of the next part, where the stream begins, and zeros; then a record as
`deferred` has it, without pixels; then, behind those of other views, the stream, as `gpu_jpeg` cuts it. The sign tells
it from a record of `deferred`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..errors import ImageError
from . import deferred, gpu_jpeg
from .decode import open_image
from .deferred import UNIT
from .geometry import Size, stored_window
from .load import FILTER, LoadedImage, View

RECORD_BYTES = 4 << 20
"""Room that a record is sure to find enough."""
STREAM_BYTES = 3 << 20
"""What has more is decoded by the CPU: it is part of what a file's pixels are."""
MOST_SIDES = 16384
"""Height and width of a bucket together, so that a record is no larger than its room: an axis of L pixels that becomes
one of N has weights of 4 * (6 * L + 9 * N) bytes at most."""
_HEAD_BYTES = 48


class Encoded(NamedTuple):
    """A record, as it is read.

    Attributes:
        shape: height and width of the picture as stored.
        window: rows and columns of it that are read.
        row: the record of the picture without its pixels, uint8 `[N]`.
        stream: uint8 `[N]`.
        begin: where the stream begins in the record; records of several views share one.
    """

    shape: tuple[int, int]
    window: tuple[slice, slice]
    row: np.ndarray
    stream: np.ndarray
    begin: int


def load_encoded(
    data: bytes, views: Sequence[View], out: np.ndarray, *, name: str = "image"
) -> list[LoadedImage | ImageError] | None:
    """The records of an image that a GPU decodes, for each view, or why a view has none; the stream is shared.

    Args:
        views: that decode and treat profiles alike.
        out: uint8, room for a record of each view. Those lie one behind the other, and then the stream.

    Returns:
        None if the CPU decodes the image, which is a matter of the file and of the policy alone.
    """
    if views[0].policy.decode != "gpu":
        return None
    stream = gpu_jpeg.stream_of(data)
    if stream is None or len(stream) > STREAM_BYTES:
        return None
    image = open_image(data, name=name, max_pixels=max(view.policy.max_pixels for view in views))
    if not image.is_usual_jpeg or image.color_map(views[0].policy.icc) is not None:
        return None
    header, orientation = image.header, image.header.orientation
    size = Size(header.height, header.width)
    shape = (size.height, size.width) if orientation < 5 else (size.width, size.height)
    begins, heads, found, at = list[int](), list[list[int]](), list[LoadedImage | ImageError](), 0
    for view in views:
        try:
            number, placement = view.place(size, name)
        except ImageError as e:
            found.append(e)
            continue
        window = stored_window(placement, orientation)
        # what is not resized is copied
        filter = "box" if shape == (window.height, window.width) else FILTER
        rows, columns = deferred.needed(shape, window, filter)
        nbytes = deferred.write_table(shape, window, orientation, filter, out[at + _HEAD_BYTES :])
        found.append(LoadedImage(header, number, placement, out[at:], at))
        heads.append([-len(stream), *shape, rows.start, rows.stop, columns.start, columns.stop, nbytes])
        begins.append(at)
        at += _HEAD_BYTES + nbytes
    out[at : at + len(stream)] = np.frombuffer(stream, np.uint8)
    for begin, head in zip(begins, heads, strict=True):
        out[begin : begin + _HEAD_BYTES].view(np.int32)[:] = [*head, at - begin, 0, 0, 0]
    end = -(-(at + len(stream)) // UNIT) * UNIT
    return [f if isinstance(f, ImageError) else replace(f, pixels=out[f.offset : end]) for f in found]


def read_encoded(record: np.ndarray) -> Encoded | None:
    """What a record says, in views of it; None if it is one of `deferred`.

    Args:
        record: uint8, from its beginning on.
    """
    head = record[:_HEAD_BYTES].view(np.int32).tolist()
    if head[0] >= 0:
        return None
    nbytes, height, width, top, bottom, left, right, table, begin = head[:9]
    window = slice(top, bottom), slice(left, right)
    return Encoded(
        (height, width), window, record[_HEAD_BYTES : _HEAD_BYTES + table], record[begin : begin - nbytes], begin
    )


def exact_pixels(stream: np.ndarray, *, name: str) -> np.ndarray:
    """uint8 `[H,W,3]` of a stream by the CPU, as it is stored: what `exact` gives for the file that it was cut from.

    Raises:
        ImageError: with one of `REASONS`.
    """
    return open_image(stream.tobytes(), name=name).stored_pixels((0, 0, 0), icc="ignore")
