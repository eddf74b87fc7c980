"""`calibrate`: the line per channel from a model's raw latents to those of FLUX.2's autoencoder, measured on images.

Everything comes from sums over positions in float64, so that memory does not grow with the images: of both latents,
their squares, and the products of every pair of channels. A line through the raw latents of FLUX.2 and one through the
normalised ones are the same up to the batch norm, and so are their R^2 and correlations; which side of it the model's
latents are on as they are is told by their distance from either.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import strict_json
from ..checkpoint import tensors_sha256
from ..errors import CapacitorError, ImageError, InputError
from ..flux2_space import LEAST_IMAGES, ChannelLines, Flux2Calibration
from ..images.frames import RGB, Framing, group_frames, load_frames, to_batch
from ..model import FullCapacitor
from ..reference import posterior_mode
from ..version import __version__
from .flux2 import Flux2

HOLD_OUT = 10
"""Every so many images one is scored and not fitted."""
CLEARER = 0.01
"""By how much another order of channels must correlate better than the given one, in the mean, to be believed."""


def calibrate(
    paths: Iterable[Path],
    model: FullCapacitor,
    flux2: Flux2,
    framing: Framing,
    *,
    flux2_name: str = "flux2",
    background: RGB = (255, 255, 255),
    batch: int = 8,
    workers: int = 4,
    least_images: int = LEAST_IMAGES,
    failed: Callable[[Path, ImageError], None] = lambda path, error: None,
) -> Flux2Calibration:
    """Encode every image by both autoencoders and fit FLUX.2's latents by lines through the model's.

    The quality is not judged here: `Flux2Calibration.check_quality` does.

    Args:
        paths: image files; every tenth is held out to be scored.
        flux2_name: what to call the FLUX.2 autoencoder in the provenance.
        batch: neighbouring images of one size that are encoded together, at most.
        least_images: fewer that can be decoded are refused.
        failed: told of every file that cannot be decoded.

    Raises:
        InputError: too few images; a model without an encoder or with other latents than FLUX.2's in shape; latents of
            a channel that are the same everywhere.
    """
    _check_shapes(model, flux2)
    space = _provenance(model)
    fit, held = (_Pair(model.latent_channels) for _ in range(2))
    digest, bad = hashlib.sha256(), 0
    multiple = math.lcm(model.size_multiple, flux2.size_multiple)
    number = 0
    for group in group_frames(load_frames(paths, framing, multiple, background, workers), batch):
        if isinstance(group, tuple):
            failed(*group)
            bad += 1
            continue
        for frame in group:
            digest.update(np.ascontiguousarray(frame.pixels).data)
        mean, mode, normalised = _latents(model, flux2, to_batch(group, model.device))
        is_held = (torch.arange(number, number + len(group)) % HOLD_OUT == HOLD_OUT - 1).to(mean.device)
        number += len(group)
        for pair, rows in ((fit, ~is_held), (held, is_held)):
            if rows.any():
                pair.mean.add(mean[rows], normalised[rows])
                pair.mode.add(mode[rows], normalised[rows])
    if number < max(least_images, HOLD_OUT):
        raise InputError(
            f"{number} images could be decoded, and a calibration needs {max(least_images, HOLD_OUT)}: give more"
        )
    norm_mean, norm_std = (t.double().flatten().cpu() for t in flux2.statistics())
    order = fit.mean.order()
    before, after = held.mean.distances(order, norm_mean, norm_std)
    statistics = model.statistics(torch.float64)
    whitening = (
        None if statistics is None else {k: _floats(t) for k, t in zip(("mean", "std"), statistics, strict=True)}
    )
    norm = flux2.vae.bn
    return Flux2Calibration(
        **space,
        flux2={"id": flux2_name, "sha256": tensors_sha256(flux2.vae.state_dict())},
        images={
            "fit": number - number // HOLD_OUT,
            "held_out": number // HOLD_OUT,
            "failed": bad,
            "size": framing.size,
            "area": framing.area,
            "sha256": digest.hexdigest(),
        },
        code={"capacitor_rt": __version__, "torch": torch.__version__, "diffusers": _version_of("diffusers")},
        whitening=whitening,
        batch_norm={
            "running_mean": _floats(norm.running_mean),
            "running_var": _floats(norm.running_var),
            "eps": float(norm.eps),
        },
        channels=tuple(order),
        side="before" if before < after else "after",
        side_error={"before": before, "after": after},
        mean=_lines(fit.mean, held.mean, order, norm_mean, norm_std),
        mode=_lines(fit.mode, held.mode, order, norm_mean, norm_std),
    )


def save(calibration: Flux2Calibration, path: str | os.PathLike[str]) -> None:
    """Write a calibration as strict JSON, whole or not at all.

    Raises:
        InputError: the file exists. OSError: it cannot be written.
    """
    path = Path(path)
    refuse_existing(path)
    try:
        strict_json.write_new(path, calibration.to_dict())
    except FileExistsError:
        refuse_existing(path)
        raise


def refuse_existing(path: Path) -> None:
    """Raise InputError where `path` exists: a calibration is never overwritten."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists: give another --out, or move it away")


class _Sums:
    """Sums over positions of a source x and a target y, float64: N, x, x^2, y, y^2 per channel and x_i y_j."""

    def __init__(self, channels: int):
        self.count = 0
        self.x, self.xx, self.y, self.yy = torch.zeros(4, channels, dtype=torch.float64)
        self.xy = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add latents `[B,C,h,w]`."""
        x, y = (t.movedim(1, 0).flatten(1).double() for t in (x, y))
        self.count += x.shape[1]
        self.x += x.sum(1).cpu()
        self.y += y.sum(1).cpu()
        self.xx += x.square().sum(1).cpu()
        self.yy += y.square().sum(1).cpu()
        self.xy += (x @ y.T).cpu()

    def order(self) -> list[int]:
        """Source channel of each target channel: as they come, unless another order correlates clearly better."""
        n = self.count
        covariance = self.xy / n - torch.outer(self.x, self.y) / n**2
        spread = torch.outer(_variance(self.xx, self.x, n), _variance(self.yy, self.y, n)).sqrt()
        correlation = (covariance / spread).abs().nan_to_num(0.0)
        best = correlation.argmax(0)
        given = list(range(len(best)))
        if sorted(best.tolist()) == given and correlation.amax(0).mean() > correlation.diagonal().mean() + CLEARER:
            return best.tolist()
        return given

    def distances(self, order: list[int], norm_mean: Tensor, norm_std: Tensor) -> tuple[float, float]:
        """RMS of x minus y before and after y's batch norm, in units of y's deviation there."""
        n, x, xx, xy = self.count, self.x[order], self.xx[order], self.xy[order, range(len(order))]
        variance = _variance(self.yy, self.y, n)
        after = (xx - 2 * xy + self.yy) / n
        y2 = norm_std**2 * self.yy + 2 * norm_std * norm_mean * self.y + n * norm_mean**2
        before = (xx - 2 * (norm_std * xy + norm_mean * x) + y2) / n
        ratios = (before / (variance * norm_std**2), after / variance)
        return tuple(ratio.clamp(min=0).mean().sqrt().item() for ratio in ratios)  # type: ignore[return-value]


class _Pair:
    """Sums from the posterior's mean and from its mode."""

    def __init__(self, channels: int):
        self.mean, self.mode = _Sums(channels), _Sums(channels)


def _lines(fit: _Sums, held: _Sums, order: list[int], norm_mean: Tensor, norm_std: Tensor) -> ChannelLines:
    """Least squares on `fit`, scored on `held`; slope and intercept are for latents before the batch norm."""
    n, at = fit.count, range(len(order))
    x, xx, xy = fit.x[order], fit.xx[order], fit.xy[order, at]
    variance = _variance(xx, x, n)
    constant = (variance <= 1e-12 * (xx / n)).nonzero().flatten().tolist()
    if constant:
        raise InputError(f"channels {constant[:5]} of the latents are the same everywhere: no line can be fitted")
    a = (xy / n - x * fit.y / n**2) / variance
    b = (fit.y - a * x) / n
    n, x, xx, xy = held.count, held.x[order], held.xx[order], held.xy[order, at]
    # about their means: what the batch norm leaves of a mean says nothing of the likeness
    h = a * x + n * b
    hh = n * _variance(a**2 * xx + 2 * a * b * x + n * b**2, h, n)
    hy = a * (xy - x * held.y / n)
    total = n * _variance(held.yy, held.y, n)
    error = hh - 2 * hy + total + (h - held.y) ** 2 / n
    cosine = (hy / (hh * total).sqrt()).nan_to_num(0.0)
    return ChannelLines(
        a=_floats(a * norm_std),
        b=_floats(b * norm_std + norm_mean),
        r2=_floats((1 - error / total).nan_to_num(0.0, neginf=0.0)),
        cosine=_floats(cosine),
        mean_cosine=cosine.mean().item(),
        overall_cosine=(hy.sum() / (hh.sum() * total.sum()).sqrt()).nan_to_num(0.0).item(),
    )


@torch.no_grad()
def _latents(model: FullCapacitor, flux2: Flux2, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Raw mean and mode of the model and normalised latents of FLUX.2, `[B,C,h,w]`."""
    mean, logsnr = model.encode_posterior(pixels)
    mode = model.fold_latent_patches(posterior_mode(mean, logsnr))
    return model.fold_latent_patches(mean), mode, flux2.encode(pixels.to(flux2.device)).to(mean.device)


def _check_shapes(model: FullCapacitor, flux2: Flux2) -> None:
    if model.encoder is None:
        raise InputError("this checkpoint has a decoder only: there is nothing to calibrate")
    theirs = len(flux2.vae.bn.running_mean)
    if (model.latent_channels, model.latent_stride) != (theirs, flux2.size_multiple):
        raise InputError(
            f"the model has latents of {model.latent_channels} channels and stride {model.latent_stride}, and FLUX.2's "
            f"patched ones have {theirs} and {flux2.size_multiple}: they cannot be compared channel by channel"
        )


def _provenance(model: FullCapacitor) -> dict[str, Any]:
    source = model.source if model.is_as_loaded else None
    if source is None:
        sha256 = tensors_sha256(model.state_dict())
        space = f"full_capacitor/whitened@sha256:{sha256[:16]}"
        return {"latent_space": space, "model": {"id": "memory", "revision": None, "sha256": sha256}}
    identity = {"id": source.id, "revision": source.revision, "sha256": source.sha256}
    return {"latent_space": source.latent_space, "model": identity}


def _variance(squares: Tensor, sums: Tensor, n: int) -> Tensor:
    return (squares / n - (sums / n) ** 2).clamp(min=0)


def _floats(t: Tensor) -> tuple[float, ...]:
    values = tuple(t.detach().double().cpu().tolist())
    if not all(map(math.isfinite, values)):
        raise CapacitorError("latents of these images are not finite: neither autoencoder should give such")
    return values


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
