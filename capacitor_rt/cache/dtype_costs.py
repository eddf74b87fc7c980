"""What each storage type costs, measured on images of the source: error of latents, and of the pictures they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import FullCapacitorInferenceConfig
from ..errors import ImageError
from ..images.frames import to_uint8
from ..images.geometry import Size
from ..images.load import load_image
from ..reference import Autoencoder
from .parts import row_nbytes
from .plan import CachePlan
from .quantization import stored_as, values_of
from .request import DTYPES
from .sources import Source

# inputs that are tried for each image: some may not be images
_TRIES = 4


@dataclass(frozen=True)
class DtypeCost:
    """One storage type, means over the images that were measured.

    Attributes:
        dtype: "bf16", "fp16", "fp32" or "int8".
        row_nbytes: bytes of an image's latents, all kinds together.
        error: of `latents`, relative to those that the model computes, in the L2 norm.
        cosine: of the two, the lowest of all images.
        psnr: dB of the decoded picture against the one of what the model computes, of the same noise, uint8; infinite
            where they are equal.
        loss: dB by which the PSNR of the picture against the image that was encoded falls.
    """

    dtype: str
    row_nbytes: float
    error: float
    cosine: float
    psnr: float
    loss: float

    def __str__(self) -> str:
        picture = "the same pictures" if math.isinf(self.psnr) else f"pictures {self.psnr:.1f} dB from unrounded ones"
        return (
            f"{self.dtype}: {self.row_nbytes / 1e3:.4g} kB an image, latents off by {self.error:.2%} (cosine "
            f"{self.cosine:.6f}), {picture}, {round(self.loss, 3) + 0.0:.3f} dB lost"
        )


def measure_dtypes(plan: CachePlan, source: Source, model: Autoencoder, images: int) -> tuple[int, list[DtypeCost]]:
    """Number of images that were measured, and the cost of every type; they are spread evenly over the inputs."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in DTYPES}
    reader, most = source.open(), min(_TRIES * images, plan.count)
    ordinals = np.unique(np.linspace(0, plan.count - 1, most).round().astype(int)).tolist()
    # the first of every few, then the second: those that are left over are spread as evenly
    for ordinal in [o for first in range(_TRIES) for o in ordinals[first::_TRIES]]:
        if len(found["fp32"]) == images:
            break
        try:
            loaded = load_image(reader.read(ordinal), plan.policy, plan.buckets, name=source.listing.id(ordinal))
        except ImageError:
            # the run will say why
            continue
        for name, cost in _costs(plan, model, loaded.pixels).items():
            found[name].append(cost)
    count = len(found["fp32"])
    return count, [_mean(name, costs) for name, costs in found.items() if costs]


@torch.no_grad()
def _costs(plan: CachePlan, model: Autoencoder, pixels: np.ndarray) -> dict[str, tuple[float, ...]]:
    image = torch.from_numpy(pixels)[None].to(model.device)
    exact = model.encode(image).float()
    reference = _picture(model, exact)
    row = plan.row_shape(Size(*pixels.shape[:2]))
    costs: dict[str, tuple[float, ...]] = {}
    for name, dtype in DTYPES.items():
        latents = values_of(stored_as({"latents": exact}, dtype), ["latents"])["latents"].float()
        a, b = latents.double().flatten(), exact.double().flatten()
        picture = reference if torch.equal(latents, exact) else _picture(model, latents)
        costs[name] = (
            row_nbytes(plan.tensors, dtype, row),
            float((a - b).norm() / b.norm().clamp_min(1e-30)),
            float(torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-30)),
            _squared_error(picture, reference),
            _squared_error(picture, pixels),
            _squared_error(reference, pixels),
        )
    return costs


def _picture(model: Autoencoder, latents: Tensor) -> np.ndarray:
    """uint8 `[H,W,3]`, from noise that is always the same."""
    return to_uint8(model.decode(latents, inference_config=FullCapacitorInferenceConfig(seed=0))[0])


def _squared_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a.astype(np.float64) - b).mean())


def _decibels(errors: Sequence[float]) -> float:
    """Mean PSNR; infinite if all pictures are equal. An equal one among others counts as one of 108 dB."""
    if not any(errors):
        return math.inf
    return float(np.mean([10 * math.log10(255**2 / max(error, 1e-6)) for error in errors]))


def _mean(name: str, costs: Sequence[tuple[float, ...]]) -> DtypeCost:
    nbytes, error, cosine, apart, now, before = zip(*costs, strict=True)
    psnr = _decibels(apart)
    loss = 0.0 if math.isinf(psnr) else _decibels(before) - _decibels(now)
    return DtypeCost(name, float(np.mean(nbytes)), float(np.mean(error)), min(1.0, *cosine), psnr, loss)


def describe(images: int, costs: Sequence[DtypeCost], stored: str) -> list[str]:
    """Lines for a user; the type that is stored comes first."""
    if not costs:
        return ["no image could be measured: what storing costs is not known"]
    first = sorted(costs, key=lambda cost: DTYPES[cost.dtype] != stored)
    return [f"what storing costs, measured on {images} of these images:", *(f"  {cost}" for cost in first)]


def as_json(costs: Sequence[DtypeCost]) -> dict[str, dict[str, float | None]]:
    """By attribute and type, for `Meters.report`; infinite numbers are null."""
    if not costs:
        return {}
    rows = [asdict(cost) for cost in costs]
    names = ("row_nbytes", "error", "cosine", "psnr", "loss")
    return {
        f"dtype_{name}": {row["dtype"]: row[name] if math.isfinite(row[name]) else None for row in rows}
        for name in names
    }
