"""JPEGs that a GPU decodes and resizes, each with all that it takes beside the pixels, as one run of bytes.

A record is eight int32: the stream's bytes with the sign turned, height and width of the picture, the rows and the
columns that are read of it, each from and to, and where the stream begins; then a record as `deferred` has it, without
pixels; then the stream, as `gpu_jpeg` cuts it. The sign tells it from a record of `deferred`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import deferred, gpu_jpeg, jpeg
from .decode import open_image
from .deferred import UNIT
from .geometry import Size, assign, stored_window
from .load import FILTER, LoadedImage, View

RECORD_BYTES = 4 << 20
"""Most bytes of a record. What would be more is decoded by the CPU, so it is part of what a file's pixels are."""
_HEAD_BYTES = 32


class Encoded(NamedTuple):
    """A record, as it is read.

    Attributes:
        shape: height and width of the picture as stored.
        window: rows and columns of it that are read.
        row: the record of the picture without its pixels, uint8 `[N]`.
        stream: uint8 `[N]`.
    """

    shape: tuple[int, int]
    window: tuple[slice, slice]
    row: np.ndarray
    stream: np.ndarray


def load_encoded(data: bytes, view: View, out: np.ndarray, *, name: str = "image") -> LoadedImage | None:
    """The record of an image that a GPU decodes, at the begin of `out`, uint8 of `RECORD_BYTES` at least.

    None if the CPU decodes it, which is a matter of the file and of the policy alone.

    Raises:
        ImageError: "too_large", or "too_small" by the policy.
    """
    policy, buckets = view
    if policy.decode != "gpu" or jpeg.read_header(data) is None:
        return None
    stream = gpu_jpeg.stream_of(data)
    if stream is None:
        return None
    image = open_image(data, name=name, max_pixels=policy.max_pixels)
    if image.color_map(policy.icc) is not None:
        return None
    header, orientation = image.header, image.header.orientation
    size = Size(header.height, header.width)
    bucket = assign(size, buckets)
    placement = policy.place(size, bucket)
    window = stored_window(placement, orientation)
    shape = (size.height, size.width) if orientation < 5 else (size.width, size.height)
    # what is not resized is copied
    filter = "box" if shape == (window.height, window.width) else FILTER
    rows, columns = deferred.needed(shape, window, filter)
    begin = _HEAD_BYTES + deferred.table_bytes(shape, window, filter)
    if begin + len(stream) > RECORD_BYTES:
        return None
    head = [-len(stream), *shape, rows.start, rows.stop, columns.start, columns.stop, begin]
    out[:_HEAD_BYTES].view(np.int32)[:] = head
    deferred.write_table(shape, window, orientation, filter, out[_HEAD_BYTES:begin])
    out[begin : begin + len(stream)] = np.frombuffer(stream, np.uint8)
    end = -(-(begin + len(stream)) // UNIT) * UNIT
    return LoadedImage(header, buckets.index(bucket), placement, out[:end])


def read_encoded(record: np.ndarray) -> Encoded | None:
    """What a record says, in views of it; None if it is one of `deferred`.

    Args:
        record: uint8, from its begin on.
    """
    head = record[:_HEAD_BYTES].view(np.int32).tolist()
    if head[0] >= 0:
        return None
    nbytes, height, width, top, bottom, left, right, begin = head
    window = slice(top, bottom), slice(left, right)
    return Encoded((height, width), window, record[_HEAD_BYTES:begin], record[begin : begin - nbytes])


def exact_pixels(stream: np.ndarray, *, name: str) -> np.ndarray:
    """uint8 `[H,W,3]` of a stream by the CPU, as it is stored: what `exact` gives for the file that it was cut from.

    Raises:
        ImageError: with one of `REASONS`.
    """
    return open_image(stream.tobytes(), name=name).stored_pixels((0, 0, 0), icc="ignore")
