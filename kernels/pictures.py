"""The table of pictures that `ops.resize` takes: where each lies, how it is resampled, and where it goes.

A module without torch until a table is checked, so that processes which only prepare pictures need none.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

UNIT = 16
"""Records, and what lies between the passes, begin at multiples of so many bytes."""
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


def between_bytes(sizes: torch.Tensor) -> torch.Tensor:
    """Bytes that each picture of a table takes between the passes, int64 `[N]`, in whole units of 16."""
    nbytes = 3 * sizes[:, Field.LENGTH_B].long() * sizes[:, Field.COUNT_A]
    return (nbytes + UNIT - 1) // UNIT * UNIT


def check_sizes(sizes: torch.Tensor, source: int, weights: int, workspace: int, out: tuple[int, ...]) -> None:
    """Refuse a table, on the CPU, by which anything outside of these many elements would be read or written."""
    import torch

    if sizes.device.type != "cpu" or sizes.dtype != torch.int32 or sizes.dim() != 2 or sizes.shape[1] != len(Field):
        raise ValueError(
            f"sizes is {sizes.dtype} {list(sizes.shape)} on {sizes.device}, expected int32 [N, {len(Field)}] on the CPU"
        )
    if not 1 <= len(sizes) <= MOST_PICTURES:
        raise ValueError(f"sizes has {len(sizes)} pictures, expected 1 to {MOST_PICTURES}: split the batch")
    t = {field: sizes[:, field].long() for field in Field}
    images, height, width, _ = out
    counts = {name: t[name] for name in Field if name.name.split("_")[0] in ("LENGTH", "COUNT", "TAPS")}
    for field, values in counts.items():
        _require(field.name, values >= 1, values, "at least 1")
    for field in (Field.PRECISION_A, Field.PRECISION_B):
        _require(field.name, (t[field] >= 0) & (t[field] <= 22), t[field], "0 to 22 bits")
    reach = (t[Field.LENGTH_A] - 1) * t[Field.STEP_A], (t[Field.LENGTH_B] - 1) * t[Field.STEP_B]
    _within("source", 16 * t[Field.SOURCE] + t[Field.ORIGIN], reach, 3, source)
    nothing = t[Field.ORIGIN] * 0
    for axis in ("A", "B"):
        entries = t[Field[f"COUNT_{axis}"]] * (1 + t[Field[f"TAPS_{axis}"]])
        _within("weights", t[Field[f"WEIGHTS_{axis}"]], (nothing, nothing), entries, weights)
    _within("workspace", 16 * t[Field.BETWEEN], (nothing, nothing), between_bytes(sizes), workspace)
    _within("out", t[Field.IMAGE], (nothing, nothing), 1, images)
    steps = (t[Field.COUNT_A] - 1) * t[Field.OUT_A], (t[Field.COUNT_B] - 1) * t[Field.OUT_B]
    _within("an image of out", t[Field.OUT], steps, 3, 3 * height * width)


def _require(name: str, fine: torch.Tensor, values: torch.Tensor, expected: str) -> None:
    if not bool(fine.all()):
        at = int((~fine).nonzero()[0])
        raise ValueError(f"{name} of picture {at} is {int(values[at])}, expected {expected}")


def _within(
    name: str, begin: torch.Tensor, reach: tuple[torch.Tensor, torch.Tensor], size: torch.Tensor | int, length: int
) -> None:
    """Require that `size` elements at `begin`, moved by either reach or both, lie within `length`."""
    low = begin + sum(r.clamp(max=0) for r in reach)
    high = begin + sum(r.clamp(min=0) for r in reach) + size
    fine = (low >= 0) & (high <= length) & (high - low < 2**31)
    if not bool(fine.all()):
        at = int((~fine).nonzero()[0])
        raise ValueError(
            f"picture {at} uses elements {int(low[at])} to {int(high[at])} of {name}, which has {length}: "
            "pass the tables of these tensors"
        )
