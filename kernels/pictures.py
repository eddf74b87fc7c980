"""The table of pictures that `ops.resize` takes: where each lies, how it is resampled, and where it goes.

A module without torch until a table is checked, so that processes which only prepare pictures need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

UNIT = 16
"""Records, and what lies between the passes, begin at multiples of so many bytes."""
MOST_PRECISION = 22
"""Bits of a weight behind its point."""
MOST_PICTURES = 65535
"""Of one launch: the limit of a grid's second axis."""


class Field(IntEnum):
    """Columns of the table of pictures, int32.

    `SOURCE` and `BETWEEN` are places in `source` and `workspace` in units of 16 bytes, `ORIGIN` is the byte from there
    at which the first pixel that is read lies. `STEP_A`, `STEP_B`: bytes from one pixel to the next. `LENGTH_A`,
    `LENGTH_B`: pixels that are read. `COUNT_A`, `COUNT_B`: pixels that are written. `WEIGHTS_A`, `WEIGHTS_B`: where in
    `weights` an axis's table begins, `first [count]` and then `taps [TAPS, count]`. `IMAGE`: of `out`; `OUT` is the
    byte of that image at which the first pixel goes, `OUT_A` and `OUT_B` are steps from there.
    """

    SOURCE = 0
    ORIGIN = 1
    STEP_A = 2
    STEP_B = 3
    LENGTH_A = 4
    LENGTH_B = 5
    COUNT_A = 6
    COUNT_B = 7
    TAPS_A = 8
    TAPS_B = 9
    WEIGHTS_A = 10
    WEIGHTS_B = 11
    PRECISION_A = 12
    PRECISION_B = 13
    BETWEEN = 14
    IMAGE = 15
    OUT = 16
    OUT_A = 17
    OUT_B = 18


def columns(sizes: torch.Tensor) -> Any:
    """A table on the CPU as an int64 numpy array `[FIELDS, N]`, on which small sums take a quarter of torch's time."""
    return sizes.numpy().astype("int64").T


def between_bytes(sizes: torch.Tensor) -> torch.Tensor:
    """Bytes that each picture of a table takes between the passes, int64 `[N]`, in whole units of 16."""
    import torch

    return torch.from_numpy(_between(columns(sizes)))


def _between(t: Any) -> Any:
    return (3 * t[Field.LENGTH_B] * t[Field.COUNT_A] + UNIT - 1) // UNIT * UNIT


def check_sizes(sizes: torch.Tensor, source: int, weights: int, workspace: int, out: tuple[int, ...]) -> Any:
    """Refuse a table, on the CPU, by which anything outside of these many elements would be read or written.

    Returns:
        its `columns`.
    """
    import torch

    if sizes.device.type != "cpu" or sizes.dtype != torch.int32 or sizes.dim() != 2 or sizes.shape[1] != len(Field):
        raise ValueError(
            f"sizes is {sizes.dtype} {list(sizes.shape)} on {sizes.device}, expected int32 [N, {len(Field)}] on the CPU"
        )
    if not 1 <= len(sizes) <= MOST_PICTURES:
        raise ValueError(f"sizes has {len(sizes)} pictures, expected 1 to {MOST_PICTURES}: split the batch")
    t = columns(sizes)
    images, height, width, _ = out
    for field in (f for f in Field if f.name.startswith(("LENGTH", "COUNT", "TAPS"))):
        _require(field, t, 1, 2**31, "at least 1")
    for field in (Field.PRECISION_A, Field.PRECISION_B):
        _require(field, t, 0, MOST_PRECISION, f"0 to {MOST_PRECISION} bits")
    reach = (t[Field.LENGTH_A] - 1) * t[Field.STEP_A], (t[Field.LENGTH_B] - 1) * t[Field.STEP_B]
    _within("source", UNIT * t[Field.SOURCE] + t[Field.ORIGIN], reach, 3, source)
    for axis in ("A", "B"):
        entries = t[Field[f"COUNT_{axis}"]] * (1 + t[Field[f"TAPS_{axis}"]])
        _within("weights", t[Field[f"WEIGHTS_{axis}"]], (), entries, weights)
    _within("workspace", UNIT * t[Field.BETWEEN], (), _between(t), workspace)
    _within("out", t[Field.IMAGE], (), 1, images)
    steps = (t[Field.COUNT_A] - 1) * t[Field.OUT_A], (t[Field.COUNT_B] - 1) * t[Field.OUT_B]
    _within("an image of out", t[Field.OUT], steps, 3, 3 * height * width)
    return t


def _require(field: Field, t: Any, least: int, most: int, expected: str) -> None:
    values = t[field]
    if values.min() < least or values.max() > most:
        at = int(((values < least) | (values > most)).argmax())
        raise ValueError(f"{field.name} of picture {at} is {values[at]}, expected {expected}")


def _within(name: str, begin: Any, reaches: Sequence[Any], size: Any, length: int) -> None:
    """Require that `size` elements at `begin`, moved by any of the reaches, lie within `length`, 2^31 apart at most."""
    low, high = begin, begin + size
    for reach in reaches:
        low, high = low + reach * (reach < 0), high + reach * (reach > 0)
    wrong = (low < 0) | (high > length) | (high - low >= 2**31)
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"picture {at} uses elements {low[at]} to {high[at]} of {name}, which has {length}: "
            "pass the tables of these tensors"
        )
