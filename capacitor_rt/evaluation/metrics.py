"""How well images and latents are reproduced: PSNR, its table, SSIM, cosine similarity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

COLUMNS = {"mean": "mean", "std": "std", "median": "median", "p5": "P5", "p95": "P95"}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images of one shape, `10 log10(255^2 / MSE)`.

    The MSE is over all pixels and channels, summed in integers; identical images have an infinite PSNR.

    Raises:
        InputError: another dtype, different shapes, no pixels.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise InputError(f"images are {a.dtype} and {b.dtype}: PSNR is defined here on uint8, 0-255")
    if a.shape != b.shape or a.size == 0:
        raise InputError(f"images have shapes {list(a.shape)} and {list(b.shape)}: expected one shape, not empty")
    error = a.astype(np.int32) - b
    total = int(np.square(error, out=error).sum(dtype=np.int64))
    return math.inf if total == 0 else 10 * math.log10(255**2 * a.size / total)


SSIM_WINDOW = 11
"""Pixels a side of the window of `ssim`."""


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two uint8 images `[H,W,3]`, the mean over pixels and channels, at most 1.

    As in Wang, Bovik, Sheikh and Simoncelli 2004: a Gaussian window of 11x11 pixels and a deviation of 1.5, `C1 =
    (0.01*255)^2`, `C2 = (0.03*255)^2`, the population's covariances, the mean over the places where the window fits.

    Raises:
        InputError: another dtype or rank, different shapes, a side below 11 pixels.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise InputError(f"images are {a.dtype} and {b.dtype}: SSIM is defined here on uint8, 0-255")
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[:2]) < SSIM_WINDOW:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise InputError(f"images have shapes {shapes}: expected one shape [H,W,3], sides of {SSIM_WINDOW} at least")
    # around grey, so that float32 keeps the small variances of bright areas
    x, y = (torch.tensor(t, dtype=torch.float32) - 127.5 for t in (a, b))
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = (-(offsets**2) / (2 * 1.5**2)).exp()
    weights = (weights / weights.sum()).float()
    # channels last, in which a depthwise convolution is twenty times as fast as one of single planes
    planes = torch.cat([x, y, x * x, y * y, x * y], 2).permute(2, 0, 1)[None]
    count = planes.shape[1]
    across = weights.expand(count, 1, 1, SSIM_WINDOW)
    down = across.transpose(2, 3)
    means = F.conv2d(F.conv2d(planes, down, groups=count), across, groups=count)[0]
    mx, my, xx, yy, xy = means.double().chunk(5)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    # the luminance term is of the pixels' own values
    mx, my = mx + 127.5, my + 127.5
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """`mean`, `std`, `median`, `p5`, `p95` of the finite values; `count` of all, `identical` of the infinite ones.

    The standard deviation is the population's (divided by n); percentiles are interpolated linearly. Where every value
    is infinite so are the figures, with a deviation of 0.

    Raises:
        InputError: no values, or NaN among them.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0 or np.isnan(array).any():
        raise InputError(f"a summary needs at least one number and no NaN: got {array.size} values")
    finite = array[np.isfinite(array)]
    counts = {"count": int(array.size), "identical": int(array.size - finite.size)}
    if finite.size == 0:
        return {**dict.fromkeys(COLUMNS, float(array.mean())), "std": 0.0, **counts}
    p5, median, p95 = np.percentile(finite, (5, 50, 95))
    figures = {"mean": finite.mean(), "std": finite.std(), "median": median, "p5": p5, "p95": p95}
    return {**{name: float(value) for name, value in figures.items()}, **counts}


@dataclass(frozen=True)
class PsnrTable:
    """PSNR in dB of one or more models (or backends) on the same images; made by `of`.

    `values` holds per model one PSNR per image, `images` the images' names or nothing.
    """

    values: dict[str, tuple[float, ...]]
    images: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Sequence[float]], images: Sequence[str] = ()) -> PsnrTable:
        """A table of `values` per model, each in the order of `images`.

        Raises:
            InputError: no models, no values, or different numbers of them.
        """
        if not values:
            raise InputError("a table needs the values of at least one model")
        count = len(images) or len(next(iter(values.values())))
        for name, column in values.items():
            if len(column) != count or count == 0:
                raise InputError(f"{name} has {len(column)} values for {count} images")
        return cls({name: tuple(column) for name, column in values.items()}, tuple(images))

    @property
    def count(self) -> int:
        """Number of images."""
        return len(next(iter(self.values.values())))

    @property
    def rows(self) -> dict[str, dict[str, float | int]]:
        """Summary per model."""
        return {name: summary(values) for name, values in self.values.items()}

    @property
    def delta(self) -> dict[str, float | int] | None:
        """Summary of the differences image by image, first model minus second; None unless there are two.

        So its percentiles are those of the differences, not differences of percentiles. Images that either model
        reproduces exactly are left out and counted as `identical`.
        """
        if len(self.values) != 2:
            return None
        pairs = zip(*self.values.values(), strict=True)
        return summary([a - b if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs])

    def render(self, markdown: bool = True) -> str:
        """The card's table: mean, std, median, P5, P95; with two models a row of differences, signed."""
        rows = [[name, *_cells(row, "")] for name, row in self.rows.items()]
        if self.delta is not None:
            first, second = self.values
            rows.append([f"{first} - {second}", *_cells(self.delta, "+")])
        counted = f"{self.count} image{'' if self.count == 1 else 's'}"
        text = _align([f"PSNR dB, {counted}", *COLUMNS.values()], rows, markdown)
        exact = {name: row["identical"] for name, row in self.rows.items() if row["identical"]}
        return text + "".join(f"\n{name}: {n} reproduced exactly, left out of the figures" for name, n in exact.items())

    def to_dict(self) -> dict[str, Any]:
        """For JSON; None stands for the infinite PSNR of identical images."""
        return {
            "unit": "dB",
            "models": {name: _jsonable(row) for name, row in self.rows.items()},
            "delta": None if self.delta is None else _jsonable(self.delta),
            "images": list(self.images),
            "values": {name: [_finite(v) for v in values] for name, values in self.values.items()},
        }


class Similarity(NamedTuple):
    """Cosine similarities: `overall` over all elements, `per_channel` float64 `[C]`; NaN where a vector is zero."""

    overall: float
    per_channel: Tensor

    def to_dict(self) -> dict[str, Any]:
        """For JSON; None stands for NaN."""
        return {"overall": _finite(self.overall), "per_channel": [_finite(v) for v in self.per_channel.tolist()]}


class CosineSimilarity:
    """Cosine of two sequences of latent batches, from sums in float64: memory does not grow with them.

    A channel is one vector over all batches, rows and positions.
    """

    def __init__(self) -> None:
        # [3, C]: the channels' products a.b, a.a and b.b
        self._sums: Tensor | None = None

    def update(self, a: Tensor, b: Tensor) -> None:
        """Add two batches of latents `[B,C,h,w]` of one shape, any float dtype. B, h and w may change between calls.

        Raises:
            InputError: shapes differ, are not of rank 4, or have another number of channels than before.
        """
        if a.shape != b.shape or a.dim() != 4:
            raise InputError(f"latents have shapes {list(a.shape)} and {list(b.shape)}: expected one shape [B,C,h,w]")
        a, b = a.double(), b.to(a.device, torch.float64)
        sums = torch.stack([(x * y).sum((0, 2, 3)) for x, y in ((a, b), (a, a), (b, b))]).cpu()
        if self._sums is not None and sums.shape != self._sums.shape:
            raise InputError(f"latents have {sums.shape[1]} channels, and those before had {self._sums.shape[1]}")
        self._sums = sums if self._sums is None else self._sums + sums

    def result(self) -> Similarity:
        """Similarity of everything added so far.

        Raises:
            InputError: nothing was added.
        """
        if self._sums is None:
            raise InputError("a cosine needs at least one batch of latents")
        ab, aa, bb = self._sums
        overall = ab.sum() / (aa.sum() * bb.sum()).sqrt()
        return Similarity(float(overall), ab / (aa * bb).sqrt())


def cosine_similarity(a: Tensor, b: Tensor) -> Similarity:
    """`CosineSimilarity` of a single pair of batches."""
    cosine = CosineSimilarity()
    cosine.update(a, b)
    return cosine.result()


def _cells(row: dict[str, float | int], sign: str) -> list[str]:
    # a deviation is no difference, and carries no sign
    return [f"{row[name]:{sign if name != 'std' else ''}.2f}" for name in COLUMNS]


def _align(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in table
    ]
    if not markdown:
        return "\n".join("  ".join(line) for line in lines)
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _jsonable(row: dict[str, float | int]) -> dict[str, float | int | None]:
    return {name: _finite(value) for name, value in row.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
