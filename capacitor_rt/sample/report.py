"""PSNR of the sample checkpoint beside PCA's: `python -m capacitor_rt.sample.report [CHECKPOINT]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch

from .. import checkpoint
from ..config import FullCapacitorInferenceConfig
from ..evaluation.metrics import psnr
from ..images.frames import to_uint8
from ..reference import Autoencoder
from . import pca, photos
from .augment import CropSampler, crop_pca

SEED = 0


@dataclass(frozen=True)
class HeldOutPsnr:
    """PSNR in dB of one photograph: through PCAs of as many components as the latent has channels, and the model."""

    name: str
    pca: tuple[float, ...]
    model: float


def read_model(id_or_path: str) -> Autoencoder:
    """The model of a checkpoint (hub id, folder, file or "sample"), in float32 on the CPU."""
    read = checkpoint.read(checkpoint.resolve(id_or_path))
    model = Autoencoder(read.config)
    model.load_state_dict(read.tensors)
    return model.eval()


@torch.no_grad()
def reconstruct(
    model: Autoencoder, pixels: np.ndarray, inference: FullCapacitorInferenceConfig | None = None
) -> np.ndarray:
    """uint8 `[H,W,3]` -> latents -> uint8 `[H,W,3]`, by default in one step with seed 0."""
    image = torch.from_numpy(np.ascontiguousarray(pixels))[None].to(model.device)
    inference = inference or FullCapacitorInferenceConfig(seed=SEED)
    return to_uint8(model.decode(model.encode(image), inference_config=inference)[0])


def baseline(patch: int = 16) -> pca.PatchPCA:
    """PCA of the colour training photographs, whole, on one patch grid."""
    return pca.fit([photos.load(p) for p in photos.TRAINING if not p.grey], patch)


def held_out_rows(model: Autoencoder, *baselines: pca.PatchPCA) -> list[HeldOutPsnr]:
    """One row per held-out photograph, cropped at the centre to multiples of 32."""
    rows = []
    for photo in photos.HELD_OUT:
        pixels = photos.centre_crop(photos.load(photo))
        linear = [psnr(pixels, b.reconstruct(pixels, model.config.bottleneck_dim)) for b in baselines]
        rows.append(HeldOutPsnr(photo.name, tuple(linear), psnr(pixels, reconstruct(model, pixels))))
    return rows


def crops_baseline(patch: int = 16, count: int = 1500, size: int = 160) -> pca.PatchPCA:
    """PCA of random training crops, about where training starts: a stronger baseline than `baseline`."""
    pixels = [photos.load(p) for p in photos.TRAINING]
    sampler = CropSampler(photos.TRAINING, pixels, torch.Generator().manual_seed(SEED))
    return crop_pca(sampler, count, size, patch)


def print_table(model: Autoencoder) -> None:
    """Print the held-out table as Markdown, with the mean; the gain is over the PCA of the photographs."""
    patch = model.config.patch_size
    rows = held_out_rows(model, baseline(patch), crops_baseline(patch))
    table = {row.name: (*row.pca, row.model) for row in rows}
    table["mean"] = tuple(np.mean(list(table.values()), 0))
    print("| held-out photograph | PCA of photographs | PCA of crops | model | gain |\n|---|---|---|---|---|")
    for name, (whole, crops, neural) in table.items():
        print(f"| {name} | {whole:.2f} | {crops:.2f} | {neural:.2f} | {neural - whole:+.2f} |")


if __name__ == "__main__":
    print_table(read_model(sys.argv[1] if len(sys.argv) > 1 else "sample"))
