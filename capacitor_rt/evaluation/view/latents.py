"""What a page shows of latents: statistics per channel, three principal components as colours, maps of the channels."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

COMPONENT_CLIP = 2.5
"""Colours of a principal component span its mean +- so many of its standard deviations."""
MAP_CLIP = 4.0
"""Colours of a channel's map span -MAP_CLIP to MAP_CLIP: whitened channels have mean 0 and standard deviation 1."""
MAP_COLUMNS = 16


class LatentMoments:
    """Means and covariances of channels over any number of latents, from sums in float64: memory does not grow."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    def update(self, latents: Tensor) -> None:
        """Add the positions of latents `[C,h,w]`."""
        vectors = latents.detach().flatten(1).double().cpu()
        total, products = vectors.sum(1), vectors @ vectors.T
        self._sum = total if self._sum is None else self._sum + total
        self._products = products if self._products is None else self._products + products
        self.count += vectors.shape[1]

    def merge(self, other: LatentMoments) -> None:
        """Add everything that was added to `other`."""
        if other._sum is None or other._products is None:
            return
        self._sum = other._sum if self._sum is None else self._sum + other._sum
        self._products = other._products if self._products is None else self._products + other._products
        self.count += other.count

    @property
    def mean(self) -> Tensor:
        """Per channel, float64 `[C]`."""
        assert self._sum is not None
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Of the population, float64 `[C,C]`."""
        assert self._products is not None
        return self._products / self.count - self.mean.outer(self.mean)

    @property
    def std(self) -> Tensor:
        """Of the population, float64 `[C]`."""
        return self.covariance.diagonal().clamp_min(0).sqrt()


class PrincipalBasis:
    """The three directions in which latents vary most, and the colours of latents by them.

    `share` is their share of the variance. A component's sign makes its largest weight positive. With fewer than three
    channels the colours that are left stay grey.
    """

    def __init__(self, moments: LatentMoments):
        variances, axes = torch.linalg.eigh(moments.covariance)
        n = min(3, len(variances))
        axes = axes[:, -n:].flip(1)
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        self._mean = moments.mean
        self._axes = axes * torch.where(largest < 0, -1.0, 1.0)
        self._scale = variances[-n:].flip(0).clamp_min(1e-24).sqrt()
        self.share = float(variances[-n:].sum() / variances.sum().clamp_min(1e-300))

    def colours(self, latents: Tensor) -> np.ndarray:
        """Latents `[C,h,w]` as uint8 `[h,w,3]`: +-`COMPONENT_CLIP` standard deviations of a component are 0 and 255."""
        h, w = latents.shape[1:]
        vectors = latents.flatten(1).double().T - self._mean
        levels = (vectors @ self._axes) / (self._scale * COMPONENT_CLIP)
        image = torch.full((h * w, 3), 127, dtype=torch.uint8)
        image[:, : levels.shape[1]] = (levels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return image.reshape(h, w, 3).numpy()


def map_levels(latents: Tensor) -> np.ndarray:
    """Maps of all channels in one picture: latents `[C,h,w]` to uint8 `[rows*h, columns*w]`, row after row.

    `MAP_COLUMNS` maps lie side by side. -MAP_CLIP is 0, 0 is 127.5, MAP_CLIP is 255; unused places are 127.
    """
    c, h, w = latents.shape
    rows = -(-c // MAP_COLUMNS)
    levels = torch.full((rows * MAP_COLUMNS, h, w), 127, dtype=torch.uint8)
    scaled = latents.float().cpu() / MAP_CLIP * 127.5 + 127.5
    levels[:c] = scaled.nan_to_num(127).round().clamp(0, 255).to(torch.uint8)
    grid = levels.reshape(rows, MAP_COLUMNS, h, w).permute(0, 2, 1, 3)
    return grid.reshape(rows * h, MAP_COLUMNS * w).numpy()


class LatentSpool:
    """Latents in the order they came, on disk in float16, for the second pass that a common basis needs."""

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._shapes: list[tuple[int, ...]] = []

    def append(self, latents: Tensor) -> None:
        """Add latents `[C,h,w]`."""
        half = latents.detach().float().clamp(-65504, 65504).half().cpu().contiguous()
        self._file.write(half.numpy().tobytes())
        self._shapes.append(tuple(half.shape))

    def __iter__(self) -> Iterator[Tensor]:
        """Everything added, float16 `[C,h,w]` each."""
        self._file.seek(0)
        for shape in self._shapes:
            data = self._file.read(2 * int(np.prod(shape)))
            yield torch.from_numpy(np.frombuffer(data, np.float16).reshape(shape).copy())

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()
