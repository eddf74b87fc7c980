"""What a tensor descriptor of the host stands for: a 2-d tensor and the box that one copy moves."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from .parse import PtxError

# the longest row that each swizzle mode of the hardware takes, in bytes
ROW_LIMITS = {0: 256, 1: 32, 2: 64, 3: 128}
_MAX_BOX = 256


class TensorMap:
    """A row-major tensor at `address`; sizes, and strides in elements, outer first.

    Raises:
        PtxError: what the driver would refuse to encode, or more than plain 2-d tiles.
    """

    def __init__(
        self,
        address: int,
        swizzle: int,
        itemsize: int,
        block: Sequence[int],
        shape: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        self.swizzle, self.itemsize = swizzle, itemsize
        self.block, self.shape, self.strides = tuple(block), tuple(shape), tuple(strides)
        if len(self.block) != 2 or len(self.shape) != 2 or self.strides[1] != 1:
            raise PtxError(f"tensor descriptor of shape {self.shape}, strides {self.strides}: only plain 2-d ones")
        if address % 16 or self.strides[0] * itemsize % 16 or max(self.block) > _MAX_BOX:
            raise PtxError(f"the driver would refuse address {address:#x}, strides {self.strides}, box {self.block}")
        count = ((self.shape[0] - 1) * self.strides[0] + self.shape[1]) * itemsize
        self._bytes = np.frombuffer((ctypes.c_uint8 * count).from_address(address), np.uint8)

    def box(self, x: int, y: int) -> np.ndarray:
        """uint8 `[rows, bytes]` of the box at column x and row y; zeros outside the tensor."""
        (height, width), size = self.block, self.itemsize
        out = np.zeros((height, width * size), np.uint8)
        y0, y1, x0, x1 = max(y, 0), min(y + height, self.shape[0]), max(x, 0), min(x + width, self.shape[1])
        if y0 < y1 and x0 < x1:
            pitch = self.strides[0] * size
            first = self._bytes[y0 * pitch + x0 * size :]
            rows = np.lib.stride_tricks.as_strided(first, (y1 - y0, (x1 - x0) * size), (pitch, 1))
            out[y0 - y : y1 - y, (x0 - x) * size : (x1 - x) * size] = rows
        return out
