"""Random training crops: scale, orientation, tint of grey ones. Everything is drawn from one `torch.Generator`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .pca import PatchPCA, fit
from .photos import Photo


class CropSampler:
    """Batches of random crops of a few photographs, float32 `[B,3,size,size]` in [-1,1].

    Args:
        photos: what to draw from, by `Photo.weight`.
        pixels: uint8 `[H,W,3]` of each.
        generator: source of all randomness.
        scales: half of the crops are cut from a photograph resized by a factor drawn from this range (log-uniform).
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        pixels: Sequence[np.ndarray],
        generator: torch.Generator,
        scales: tuple[float, float] = (0.3, 1.0),
    ):
        self.grey = [photo.grey for photo in photos]
        self.images = [torch.from_numpy(np.ascontiguousarray(p.transpose(2, 0, 1))) for p in pixels]
        self.weights = torch.tensor([photo.weight for photo in photos])
        self.generator = generator
        self.scales = scales

    def batch(self, count: int, size: int) -> Tensor:
        picks = torch.multinomial(self.weights, count, replacement=True, generator=self.generator).tolist()
        return torch.stack([self._crop(i, size) for i in picks]) * 2.0 - 1.0

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def _below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def _crop(self, index: int, size: int) -> Tensor:
        image = self.images[index]
        height, width = image.shape[1:]
        low, high = (math.log(s) for s in self.scales)
        # half of the crops keep the photograph's own pixels
        scale = 1.0 if self._below(2) else math.exp(self._uniform(low, high))
        side = min(max(8, round(size / scale)), height, width)
        top, left = self._below(height - side + 1), self._below(width - side + 1)
        crop = image[:, top : top + side, left : left + side].float() / 255.0
        if side != size:
            crop = F.interpolate(crop[None], (size, size), mode="bicubic", antialias=side > size)[0]
        crop = torch.rot90(crop, self._below(4), (1, 2))
        if self._below(2):
            crop = crop.flip(2)
        crop = self._tint(crop[:1]) if self.grey[index] else crop
        return crop.clamp(0.0, 1.0)

    def _tint(self, grey: Tensor) -> Tensor:
        """Map grey `[1,h,w]` onto the line between two random colours, a dark and a light one."""
        dark = torch.rand(3, 1, 1, generator=self.generator) * 0.3
        light = 0.5 + torch.rand(3, 1, 1, generator=self.generator) * 0.6
        return dark + (light - dark) * grey


def crop_pca(sampler: CropSampler, count: int, size: int, patch: int) -> PatchPCA:
    """PCA of `count` crops: it generalises better than a PCA of the photographs themselves, whose scales are few."""
    crops = ((sampler.batch(1, size)[0].permute(1, 2, 0).numpy() + 1) * 127.5 for _ in range(count))
    return fit(crops, patch)
