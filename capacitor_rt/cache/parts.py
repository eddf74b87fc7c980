"""What lies in a task's file: of each kind of tensor its values, or the integers and numbers that stand for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ITEM_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}
FLOATS = ("bfloat16", "float16", "float32")
"""Types that models compute in."""
INT8 = "int8"
SCALE, OFFSET = "_scale", "_offset"


@dataclass(frozen=True)
class Part:
    """A tensor that is stored.

    Attributes:
        name: such as `latents`, or `latents_scale`.
        dtype: that it is stored in.
        per_channel: one number per row and channel, `[N,C]`; otherwise one per element, `[N,C,h,w]`.
    """

    name: str
    dtype: str
    per_channel: bool = False

    def shape(self, row: tuple[int, int, int]) -> tuple[int, ...]:
        """Of a row, where a row of the kind has the shape `[C,h,w]`."""
        return row[:1] if self.per_channel else row

    def nbytes(self, row: tuple[int, int, int]) -> int:
        """Bytes of a row."""
        return math.prod(self.shape(row)) * ITEM_SIZE[self.dtype]


def parts_of(kind: str, dtype: str) -> tuple[Part, ...]:
    """The parts that a kind of tensor is stored as, in the order in which they lie in a file and in a row's hash."""
    if dtype != INT8:
        return (Part(kind, dtype),)
    return Part(kind, INT8), Part(kind + SCALE, "float32", True), Part(kind + OFFSET, "float32", True)


def value_dtype(dtype: str) -> str:
    """The type of the values that a reader gets of what is stored as `dtype`."""
    return "float32" if dtype == INT8 else dtype


def row_nbytes(kinds: Sequence[str], dtype: str, row: tuple[int, int, int]) -> int:
    """Bytes of a row, all its kinds and their parts together."""
    return sum(part.nbytes(row) for kind in kinds for part in parts_of(kind, dtype))
