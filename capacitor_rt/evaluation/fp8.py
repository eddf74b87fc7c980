"""`calibrate-fp8`: ranges of a model's activations on images, and what encoding in 8 bits by them costs on these.

The cost is against the model in float32, and beside it that of 16 bits in the same arithmetic, so that what the 8 bits
add can be told. Pictures are decoded by one decoder in float32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ImageError, InputError
from ..fp8_calibration import Fp8Calibration
from ..images.frames import RGB, Frame, Framing, group_frames, load_frames, to_batch, to_uint8
from ..model import FullCapacitor
from ..runtime.fold_fp8 import BlockRange
from ..runtime.fp8 import Fp8Encoder
from ..version import __version__
from .metrics import cosine_similarity, psnr

Failed = Callable[[Path, ImageError], None]
LEAST_DIGITS = 8


@dataclass(frozen=True)
class ImageCost:
    """One image.

    Attributes:
        error, error16: rms of the latents' error over the rms of those in float32, of fp8 and of 16 bits.
        cosine: of the latents in fp8 and in float32.
        psnr, psnr32: in dB of the picture from latents in fp8 and in float32, against the image.
    """

    path: Path
    error: float
    error16: float
    cosine: float
    psnr: float
    psnr32: float


def calibrate(
    paths: list[Path],
    model: FullCapacitor,
    framing: Framing,
    *,
    dtype: torch.dtype = torch.bfloat16,
    background: RGB = (255, 255, 255),
    batch: int = 4,
    failed: Failed = lambda path, error: None,
    watch: Callable[[Iterable[Any]], Iterable[Any]] = lambda groups: groups,
) -> tuple[Fp8Calibration, list[ImageCost]]:
    """Go through the images twice: for the ranges, and for what encoding by them costs.

    Args:
        model: in float32, served by torch, and loaded from a file.
        dtype: of what is not 8 bits.
        failed: told once of every file that cannot be decoded.
        watch: wraps what is gone through, for a progress bar.

    Raises:
        InputError: no image could be decoded, or the model is not as a checkpoint has it.
    """
    source = model.source
    if source is None or not model.is_as_loaded:
        raise InputError(
            "a calibration belongs to a weights file: load the model by from_pretrained, and change nothing"
        )
    exact, found = Fp8Encoder(model, None, torch.float32), dict[int, BlockRange]()

    def observe(i: int, seen: BlockRange) -> None:
        found[i] = found[i].with_more(seen) if i in found else seen

    digest, count, bad = hashlib.sha256(), 0, 0
    for group in watch(group_frames(load_frames(paths, framing, model.size_multiple, background), batch)):
        if isinstance(group, tuple):
            failed(*group)
            bad += 1
            continue
        for frame in group:
            digest.update(np.ascontiguousarray(frame.pixels).data)
        count += len(group)
        exact.posterior(to_batch(group, model.device), observe)
    if not count:
        raise InputError("none of the images could be decoded: give others")
    ranges = tuple(_as_stored(found[i]) for i in range(len(found)))
    eight, sixteen = Fp8Encoder(model, ranges, dtype), Fp8Encoder(model, None, dtype)
    costs: list[ImageCost] = []
    for group in watch(group_frames(load_frames(paths, framing, model.size_multiple, background), batch)):
        if not isinstance(group, tuple):
            costs += _costs(group, model, eight, sixteen)
    return (
        Fp8Calibration(
            {"id": source.id, "revision": source.revision, "sha256": source.sha256},
            {
                "count": count,
                "failed": bad,
                "framing": {"size": framing.size, "area": framing.area},
                "sha256": digest.hexdigest(),
            },
            tuple(_values(seen) for seen in ranges),
            report(costs),
            {"capacitor_rt": __version__, "torch": str(torch.__version__)},
        ),
        costs,
    )


def report(costs: list[ImageCost]) -> dict[str, Any]:
    """Means over the images, and the one that loses most."""
    worst = min(costs, key=lambda cost: (cost.psnr - cost.psnr32, -cost.error))

    def mean(values: Iterable[float]) -> float:
        finite = [value for value in values if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.inf

    return {
        "images": len(costs),
        "latent_error": mean(c.error for c in costs),
        "latent_error_16_bits": mean(c.error16 for c in costs),
        "cosine": mean(c.cosine for c in costs),
        "psnr_float32": mean(c.psnr32 for c in costs),
        "psnr": mean(c.psnr for c in costs),
        "worst": {"name": worst.path.name, "latent_error": worst.error, "loses_db": worst.psnr32 - worst.psnr},
    }


@torch.no_grad()
def _costs(group: list[Frame], model: FullCapacitor, eight: Fp8Encoder, sixteen: Fp8Encoder) -> list[ImageCost]:
    images = to_batch(group, model.device)
    truth, fp8, half = model.encode(images), eight.encode(images), sixteen.encode(images)
    # the same start noise for both, so that only the latents differ
    noise = torch.randn((len(group), 3, *images.shape[1:3]), generator=torch.Generator().manual_seed(0))
    noise = noise.to(model.device)
    pictures, pictures32 = (model.decode(z, noise=noise) for z in (fp8, truth))
    return [
        ImageCost(
            frame.path,
            _relative(fp8[i], truth[i]),
            _relative(half[i], truth[i]),
            cosine_similarity(fp8[i : i + 1], truth[i : i + 1]).overall,
            psnr(frame.pixels, to_uint8(pictures[i])),
            psnr(frame.pixels, to_uint8(pictures32[i])),
        )
        for i, frame in enumerate(group)
    ]


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).double().square().mean().sqrt() / b.double().square().mean().sqrt().clamp_min(1e-30)).item()


def _as_stored(seen: BlockRange) -> BlockRange:
    """Rounded as the file has them, so that what is measured is what the file gives."""
    values = _values(seen)
    return BlockRange(*(torch.tensor(values[name], dtype=torch.float32) for name in ("y", "hidden", "gain")))


def _values(seen: BlockRange) -> dict[str, Any]:
    def short(x: float) -> float:
        return float(f"{x:.{LEAST_DIGITS}e}")

    return {
        "y": short(seen.y.item()),
        "hidden": [short(x) for x in seen.hidden.tolist()],
        "gain": [short(x) for x in seen.gain.tolist()],
    }
