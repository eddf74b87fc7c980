"""PSNR of the sample checkpoint beside PCA's: `python -m capacitor_rt.sample.report [CHECKPOINT]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch

from ..config import FullCapacitorInferenceConfig
from ..model import FullCapacitor
from . import pca, photos

SEED = 0


@dataclass(frozen=True)
class Row:
    """PSNR in dB of one photograph, through a PCA of as many components as the latent has channels and the model."""

    name: str
    pca: float
    model: float


def reconstruct(
    model: FullCapacitor, pixels: np.ndarray, inference: FullCapacitorInferenceConfig | None = None
) -> np.ndarray:
    """uint8 `[H,W,3]` -> latents -> uint8 `[H,W,3]`, by default in one step with seed 0."""
    image = torch.from_numpy(np.ascontiguousarray(pixels))[None].to(model.device)
    inference = inference or FullCapacitorInferenceConfig(seed=SEED)
    restored = model.reconstruct(image, inference)[0].permute(1, 2, 0)
    return pca.to_uint8(restored.cpu().double().numpy())


def baseline(patch: int = 16) -> pca.PatchPCA:
    """PCA of the colour training photographs, whole, on one patch grid."""
    return pca.fit([photos.load(p) for p in photos.TRAINING if not p.grey], patch)


def held_out_rows(model: FullCapacitor, fitted: pca.PatchPCA) -> list[Row]:
    """One row per held-out photograph, cropped at the centre to multiples of 32."""
    rows = []
    for photo in photos.HELD_OUT:
        pixels = photos.centre_crop(photos.load(photo))
        linear = photos.psnr(pixels, fitted.reconstruct(pixels, model.config.bottleneck_dim))
        rows.append(Row(photo.name, linear, photos.psnr(pixels, reconstruct(model, pixels))))
    return rows


def print_table(model: FullCapacitor) -> None:
    """Print the held-out table as Markdown, with the mean."""
    rows = held_out_rows(model, baseline(model.config.patch_size))
    rows.append(Row("mean", float(np.mean([r.pca for r in rows])), float(np.mean([r.model for r in rows]))))
    print("| held-out photograph | PCA, dB | model, dB | gain, dB |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.pca:.2f} | {row.model:.2f} | {row.model - row.pca:+.2f} |")


if __name__ == "__main__":
    print_table(FullCapacitor.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "sample"))
