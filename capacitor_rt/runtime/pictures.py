"""Tables for `resize` without an image at hand: what checks and benchmarks of the op call it with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capacitor_kernels.pictures import UNIT, Field, between_bytes

PRECISION = 14
"""Bits of the weights of `tent_weights`."""


def table(pictures: Sequence[tuple[int, int]], height: int, width: int) -> tuple[Tensor, int, int]:
    """Pictures of these heights and widths, one behind another, each squeezed into an image of its own.

    Every second one is turned: resampled along its height first, and written from right to left.

    Returns:
        int32 `[N, FIELDS]` on the CPU, and how many elements `source` and `weights` have.
    """
    sizes = torch.zeros(len(pictures), len(Field), dtype=torch.int32)
    source = weights = 0
    for i, (rows, columns) in enumerate(pictures):
        lengths, steps = (columns, rows), (3, 3 * columns)
        if i % 2:
            lengths, steps = lengths[::-1], steps[::-1]
        row = dict(zip((Field.LENGTH_A, Field.LENGTH_B, Field.STEP_A, Field.STEP_B), (*lengths, *steps), strict=True))
        row |= {Field.SOURCE: source // UNIT, Field.COUNT_A: width, Field.COUNT_B: height, Field.IMAGE: i}
        row |= {Field.OUT: 3 * (width - 1) * (i % 2), Field.OUT_A: -3 if i % 2 else 3, Field.OUT_B: 3 * width}
        for axis, length, count in (("A", lengths[0], width), ("B", lengths[1], height)):
            taps = 2 * max(1, -(-length // count)) + 1
            row |= {Field[f"TAPS_{axis}"]: taps, Field[f"PRECISION_{axis}"]: PRECISION}
            row[Field[f"WEIGHTS_{axis}"]] = weights
            weights += count * (1 + taps)
        source += -(-3 * rows * columns // UNIT) * UNIT
        for field, value in row.items():
            sizes[i, field] = value
    between = between_bytes(sizes)
    sizes[:, Field.BETWEEN] = (between.cumsum(0) - between) // UNIT
    return sizes, source, weights


def tent_weights(sizes: Tensor) -> Tensor:
    """int32 `[K]`: weights for a table of `table`, tents as wide as what falls on one pixel, with a lobe below zero."""
    parts = []
    for row in sizes.tolist():
        for axis in ("A", "B"):
            length, count, taps = (row[Field[f"{name}_{axis}"]] for name in ("LENGTH", "COUNT", "TAPS"))
            centers = (torch.arange(count, dtype=torch.float64) + 0.5) * length / count
            first = (centers - taps / 2).floor().clamp(0, max(length - taps, 0))
            away = (first + torch.arange(taps)[:, None] + 0.5 - centers).abs() / (taps / 2)
            w = 1.2 * (1 - away).clamp_min(0) - 0.1
            w = (w / w.sum(0) * (1 << PRECISION)).round()
            parts += [first.int(), w.int().flatten()]
    return torch.cat(parts)


def tables(sizes: Tensor) -> dict[str, Tensor]:
    """The arguments of `resize` that no random values can stand for, by name."""
    return {"images": sizes, "weights": tent_weights(sizes)}
