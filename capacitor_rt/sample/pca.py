"""Linear PCA of 16x16 colour patches: the baseline to beat, and where training starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..images.frames import to_uint8


@dataclass(frozen=True)
class PatchPCA:
    """Principal components of `p x p` RGB patches in [-1,1], flattened channel first: `(c, y, x)`.

    Attributes:
        patch: p.
        mean: `[3pp]` float64.
        components: `[3pp, 3pp]`, orthonormal rows, largest variance first.
        variances: `[3pp]`, of the components.
    """

    patch: int
    mean: np.ndarray
    components: np.ndarray
    variances: np.ndarray

    def reconstruct(self, pixels: np.ndarray, k: int) -> np.ndarray:
        """`pixels` uint8 `[H,W,3]`, H and W multiples of p, through the first `k` components and back to uint8."""
        basis = self.components[:k]
        flat = to_patches(pixels, self.patch) - self.mean
        height, width = pixels.shape[:2]
        restored = from_patches(flat @ basis.T @ basis + self.mean, self.patch, height, width)
        return to_uint8(torch.from_numpy(restored).permute(2, 0, 1))


def to_patches(pixels: np.ndarray, patch: int) -> np.ndarray:
    """uint8 `[H,W,3]` -> float64 `[H/p * W/p, 3pp]` in [-1,1]; a rest below and right is left out."""
    h, w = pixels.shape[0] // patch, pixels.shape[1] // patch
    x = pixels[: h * patch, : w * patch].astype(np.float64) / 127.5 - 1.0
    return x.reshape(h, patch, w, patch, 3).transpose(0, 2, 4, 1, 3).reshape(h * w, -1)


def from_patches(flat: np.ndarray, patch: int, height: int, width: int) -> np.ndarray:
    """Inverse of `to_patches`: float64 `[H,W,3]`, about [-1,1]."""
    x = flat.reshape(height // patch, width // patch, 3, patch, patch).transpose(0, 3, 1, 4, 2)
    return x.reshape(height, width, 3)


def fit(images: Iterable[np.ndarray], patch: int = 16, shifts: Iterable[tuple[int, int]] = ((0, 0),)) -> PatchPCA:
    """Fit on the patches of uint8 `[H,W,3]` images, each also cut at every offset (y, x) of `shifts`."""
    offsets = tuple(shifts)
    length = 3 * patch**2
    total, products, count = np.zeros(length), np.zeros((length, length)), 0
    for image in images:
        for y, x in offsets:
            flat = to_patches(image[y:, x:], patch)
            total += flat.sum(0)
            products += flat.T @ flat
            count += len(flat)
    mean = total / count
    variances, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    return PatchPCA(patch, mean, vectors[:, ::-1].T.copy(), np.maximum(variances[::-1], 0.0))
