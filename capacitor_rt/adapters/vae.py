"""`CapacitorFlux2VAE` and `CapacitorVAE`: which latents the two interfaces have, and their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..conditioning import at_least_float32
from ..errors import InputError
from ..flux2_space import BatchNorm, Flux2Calibration
from ..model import FullCapacitor
from . import settings
from .base import DiffusersVAE, ModelMixin
from .config import AdapterConfig, shared_settings

if TYPE_CHECKING:
    from typing_extensions import Self


__all__ = ["CapacitorFlux2VAE", "CapacitorVAE", "ModelMixin"]


class CapacitorVAE(DiffusersVAE):
    """`AutoencoderKL`'s interface; latents are the model's whitened ones, `[B,128,H/16,W/16]` for the published model.

    Args:
        latent_scale: what a training loop multiplies latents by. Those of `encode` are divided by it, and those given
            to `decode` multiplied, so that the loop sees whitened latents: 0.18215 for loops that have it written in
            them; others read it from `config.scaling_factor`.
        model, inference_config, output_dtype: see `DiffusersVAE`.

    Raises:
        InputError: `latent_scale` is not positive.
    """

    def __init__(self, model: FullCapacitor, *, latent_scale: float = 1.0, **shared: Any):
        super().__init__(model, **shared)
        if not 0 < latent_scale < float("inf"):
            raise InputError(f"latent_scale {latent_scale} is not positive: pass what the loop multiplies latents by")
        self.latent_scale = latent_scale
        self.config = AdapterConfig(
            shared_settings(model, model.latent_stride, model.latent_channels)
            # whitened: a mean of 0 and a deviation of 1 that nothing has to undo
            | {"scaling_factor": latent_scale, "latents_mean": None, "latents_std": None}
        )

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "latent_scale": self.latent_scale}

    def _map(self) -> tuple[list[int] | None, Tensor, Tensor]:
        scale = torch.full((1, 1, 1), 1 / self.latent_scale, device=self.device)
        return None, scale, torch.zeros_like(scale)


class FixedBatchNorm(nn.BatchNorm2d):
    """Statistics of latents, float32 `[C]` whatever the model's dtype, which training does not move."""

    def __init__(self, mean: Tensor, var: Tensor, eps: float):
        super().__init__(len(mean), eps=eps, affine=False, device="meta")
        self.running_mean, self.running_var = (t.detach().float().clone() for t in (mean, var))
        self.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Nothing: the statistics are part of the model."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(at_least_float32(fn), recurse)


class CapacitorFlux2VAE(DiffusersVAE):
    """`AutoencoderKLFlux2`'s interface: latents `[B,32,H/8,W/8]`, whose 2x2 patches `bn` normalises.

    FLUX.2's own code patchifies what `encode` gives and normalises it by `bn`, which holds the model's own statistics:
    so it works on the model's whitened latents, and a transformer is to be trained or tuned on them. A transformer
    that was trained on FLUX.2's latents is served, approximately, with a `calibration`.

    Args:
        bn: other statistics: of the FLUX.2 autoencoder for a decoder-only model (`capacitor_decoder`), which decodes
            that one's normalised latents and has none itself.
        calibration: a `Flux2Calibration`, or the path of its file: latents are then FLUX.2's, approximately, and `bn`
            is that of the FLUX.2 autoencoder that was measured.
        model, inference_config, output_dtype: see `DiffusersVAE`.

    Raises:
        InputError: a number of channels that does not divide by 4, a decoder-only model without `bn`, statistics or a
            calibration of another number of channels, a calibration of another latent space.
        PoorCalibrationError: the calibration's lines of the mode are too poor.
    """

    patch = 2

    def __init__(
        self,
        model: FullCapacitor,
        *,
        bn: BatchNorm | None = None,
        calibration: Flux2Calibration | str | PathLike[str] | None = None,
        **shared: Any,
    ):
        super().__init__(model, **shared)
        channels, stride = model.latent_channels, model.latent_stride
        if channels % 4 or stride % 2:
            raise InputError(f"latents of {channels} channels and stride {stride} cannot be unfolded into 2x2 patches")
        if calibration is not None and not isinstance(calibration, Flux2Calibration):
            calibration = Flux2Calibration.read(calibration)
        self.calibration = calibration
        self._has_own_bn = bn is None
        self.bn = self._batch_norm(bn)
        self.config = AdapterConfig(
            shared_settings(model, stride // 2, channels // 4)
            | {
                "scaling_factor": 1.0,
                "batch_norm_eps": self.bn.eps,
                "batch_norm_momentum": 0.1,
                "patch_size": (2, 2),
                **_unfolded_statistics(self.bn),
            }
        )

    def _settings(self) -> dict[str, Any]:
        bn = None if self._has_own_bn else statistics_of(self.bn)
        calibration = None if self.calibration is None else self.calibration.to_dict()
        return {**super()._settings(), "bn": bn, "calibration": calibration}

    @classmethod
    def _arguments(cls, kept: dict[str, Any], model: FullCapacitor) -> dict[str, Any]:
        arguments = super()._arguments(kept, model)
        if arguments.get("bn"):
            mean, var, eps = (arguments["bn"][name] for name in ("running_mean", "running_var", "eps"))
            arguments["bn"] = FixedBatchNorm(torch.tensor(mean), torch.tensor(var), eps)
        if arguments.get("calibration"):
            calibration = Flux2Calibration.from_dict(arguments["calibration"], settings.NAME)
            assert model.source is not None, "it was loaded"
            # the model was saved with it, under another name
            arguments["calibration"] = dataclasses.replace(calibration, latent_space=model.source.latent_space)
        return arguments

    def _batch_norm(self, bn: BatchNorm | None) -> FixedBatchNorm:
        model, calibration = self.model, self.calibration
        mean, var = model.latent_norm_running_mean, model.latent_norm_running_var
        eps = model.config.latent_running_stats_eps
        if calibration is not None:
            calibration.check_quality(with_logsnr=False)
            if model.source is not None:
                calibration.check_space(model.source.latent_space)
            norm = calibration.batch_norm
            mean, var, eps = torch.tensor(norm["running_mean"]), torch.tensor(norm["running_var"]), norm["eps"]
        if bn is not None:
            mean, var, eps = bn.running_mean, bn.running_var, bn.eps
        if mean is None or var is None:
            raise InputError("this model has no statistics of its own: pass bn=, that of the FLUX.2 autoencoder")
        if not len(mean) == len(var) == model.latent_channels:
            raise InputError(f"bn has {len(mean)} channels, and the latents have {model.latent_channels}")
        return FixedBatchNorm(mean, var, eps).to(model.device)

    def _map(self) -> tuple[list[int] | None, Tensor, Tensor]:
        if self.calibration is None:
            mean, var = self.bn.running_mean, self.bn.running_var
            assert mean is not None and var is not None
            return None, torch.sqrt(var + self.bn.eps)[:, None, None], mean[:, None, None]
        lines, white, order = self.calibration.mode, self.calibration.whitening, list(self.calibration.channels)
        a, b = (torch.tensor(values, device=self.device)[:, None, None] for values in (lines.a, lines.b))
        if white is None:
            return order, a, b
        mean, std = (torch.tensor(white[k], device=self.device)[order, None, None] for k in ("mean", "std"))
        return order, a * std, torch.addcmul(b, a, mean)


def statistics_of(bn: FixedBatchNorm) -> dict[str, Any]:
    """The statistics, for JSON."""
    assert bn.running_mean is not None and bn.running_var is not None
    return {"running_mean": bn.running_mean.tolist(), "running_var": bn.running_var.tolist(), "eps": bn.eps}


def _unfolded_statistics(bn: FixedBatchNorm) -> dict[str, list[float]]:
    """Mean and deviation of the unfolded channels, for loops that normalise by them and know no batch norm."""
    assert bn.running_mean is not None and bn.running_var is not None
    mean, var = (t.double().view(-1, 4) for t in (bn.running_mean, bn.running_var))
    whole = (var + mean.var(1, correction=0, keepdim=True)).mean(1)
    return {"latents_mean": mean.mean(1).tolist(), "latents_std": (whole + bn.eps).sqrt().tolist()}
