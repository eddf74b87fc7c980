"""FLUX.2's latent space, reached by a measured map: `Flux2Calibration` and the way there and back.

A distillation of FLUX.2's latents is near them, not in them. `capacitor-rt calibrate` fits a line per channel between
the raw latents of a model and those of FLUX.2's autoencoder on the same images, and writes it, its quality and its
provenance as strict JSON. What goes through it is approximate, and is to be labelled so.

Latents here are 2x2-patchified, order `c*4 + i*2 + j`: `[C,h,w]` or `[B,C,h,w]`, C = 128 for the published models.
"Raw" is before FLUX.2's batch norm, as `pixel_unshuffle(AutoencoderKLFlux2.encode(x).latent_dist.mode(), 2)`;
"normalised" is after it, `(raw - running_mean) / sqrt(running_var + eps)`, as FLUX.2's transformer takes them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import strict_json
from .errors import CapacitorError, InputError
from .schema import Anything, Choice, Invalid, ListOf, MapOf, Number, Optional, Record, Text

FORMAT = "capacitor-flux2-calibration/1"
SIDES = ("before", "after")
LEAST_COSINE = 0.9
"""Mean cosine of calibrated and true normalised latents over channels, under which a calibration is refused."""
LEAST_IMAGES = 1000
_MOST_BYTES = 4 << 20
# far from what latents have, and near enough for every product of them to be a float32
_LARGEST, _LEAST = 1e6, 1e-6


def _numbers(low: float = -_LARGEST, high: float = _LARGEST) -> ListOf:
    return ListOf(Number(low, high, whole=False), 1, 4096)


_COSINE = Number(-1.001, 1.001, whole=False)
_LINES = Record(
    {
        "a": _numbers(),
        "b": _numbers(),
        "r2": _numbers(-1e30),
        "cosine": ListOf(_COSINE, 1, 4096),
        "mean_cosine": _COSINE,
        "overall_cosine": _COSINE,
    }
)
_ERROR = Number(0, 1e30, whole=False)
_RECORDS = MapOf(Anything(), 100)
_SCHEMA = Record(
    {
        "format": Choice((FORMAT,)),
        "approximate": Choice((True,)),
        "latent_space": Text(longest=4096),
        "model": _RECORDS,
        "flux2": _RECORDS,
        "images": _RECORDS,
        "code": _RECORDS,
        "whitening": Optional(Record({"mean": _numbers(), "std": _numbers(_LEAST)})),
        "batch_norm": Record(
            {"running_mean": _numbers(), "running_var": _numbers(0), "eps": Number(1e-12, 1, whole=False)}
        ),
        "channels": ListOf(Number(0, 4095), 1, 4096),
        "side": Choice(SIDES),
        "side_error": Record(dict.fromkeys(SIDES, _ERROR)),
        "mean": _LINES,
        "mode": _LINES,
    },
    optional=("approximate",),
)


class PoorCalibrationError(CapacitorError):
    """Latents that do not stand for FLUX.2's, even after the best line per channel."""


class BatchNorm(Protocol):
    """What is read of `AutoencoderKLFlux2.bn`: float `[C]` statistics and `eps`."""

    running_mean: Any
    running_var: Any
    eps: float


@dataclass(frozen=True)
class ChannelLines:
    """Lines `raw FLUX.2 channel = a * x + b` fitted on some of the images and scored on the others.

    Attributes:
        a, b: slope and intercept of each FLUX.2 channel, `[C]`.
        r2: share of the channel's variance that the line explains, `[C]`.
        cosine: of the calibrated and the true normalised channel, both less their means, `[C]`.
        mean_cosine: mean of `cosine`.
        overall_cosine: of all channels together.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    r2: tuple[float, ...]
    cosine: tuple[float, ...]
    mean_cosine: float
    overall_cosine: float


@dataclass(frozen=True)
class Flux2Calibration:
    """Contents of a calibration file.

    Attributes:
        latent_space: of the model's latents, e.g. `full_capacitor/whitened@<revision>`.
        model, flux2: id, revision and SHA-256 of the weights of both autoencoders.
        images: how many were fitted (`fit`), scored (`held_out`) and left out as undecodable (`failed`), their framing,
            and the hash of the pixels.
        code: versions of this package, torch and diffusers.
        whitening: `mean` and `std` of the model's own whitening, `[C]` each; None without statistics.
        batch_norm: `running_mean` and `running_var`, `[C]` each, and `eps` of the FLUX.2 autoencoder.
        channels: which channel of the model becomes each FLUX.2 channel; 0, 1, 2, ... where they keep their order.
        side: "before" or "after": on which side of FLUX.2's batch norm the model's raw mean lies as it is.
        side_error: RMS distance of the raw mean, as it is, from FLUX.2's latents on either side, in units of their
            standard deviation.
        mean: lines from the posterior's raw mean.
        mode: lines from the mode `alpha * mean`, for latents without a logsnr.
    """

    latent_space: str
    model: dict[str, Any]
    flux2: dict[str, Any]
    images: dict[str, Any]
    code: dict[str, Any]
    whitening: dict[str, tuple[float, ...]] | None
    batch_norm: dict[str, Any]
    channels: tuple[int, ...]
    side: str
    side_error: dict[str, float]
    mean: ChannelLines
    mode: ChannelLines

    def to_dict(self) -> dict[str, Any]:
        """The contents of the file."""
        return {"format": FORMAT, "approximate": True, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "calibration") -> Flux2Calibration:
        """A parsed calibration file.

        Raises:
            InputError: another format, a field that is missing or may not be so, a list of the wrong length.
            PoorCalibrationError: lines that are too poor to be used.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else type(values).__name__
            raise InputError(f"{source} is no {FORMAT} file (format {found!r}): make one by `capacitor-rt calibrate`")
        try:
            _SCHEMA.check("", values)
            read: dict[str, Any] = {field.name: values[field.name] for field in dataclasses.fields(cls)}
            count = len(read["channels"])
            read["channels"] = tuple(read["channels"])
            for name in ("mean", "mode"):
                read[name] = _lines(read[name], count, name)
            norm = read["batch_norm"]
            read["batch_norm"] = {
                "running_mean": _column(norm["running_mean"], count, "batch_norm.running_mean"),
                "running_var": _column(norm["running_var"], count, "batch_norm.running_var"),
                "eps": norm["eps"],
            }
            if read["whitening"] is not None:
                read["whitening"] = {
                    name: _column(read["whitening"][name], count, f"whitening.{name}") for name in ("mean", "std")
                }
            if sorted(read["channels"]) != list(range(count)):
                raise ValueError(f"channels are no order of 0 to {count - 1}")
            calibration = cls(**read)
        except (Invalid, ValueError) as error:
            raise InputError(f"{source} is damaged ({error}): make it anew by `capacitor-rt calibrate`") from error
        calibration.check_quality(source)
        return calibration

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Flux2Calibration:
        """Read a file that `capacitor-rt calibrate` wrote.

        Raises:
            InputError, PoorCalibrationError: it cannot be read, or see `from_dict`.
        """
        try:
            values = strict_json.read(path, _MOST_BYTES)
        except OSError as error:
            raise InputError(f"calibration {os.fspath(path)} cannot be read: {error}") from error
        except strict_json.StrictJSONError as error:
            raise InputError(f"calibration {os.fspath(path)} is not valid JSON: {error}") from error
        return cls.from_dict(values, os.fspath(path))

    def check_quality(self, source: str = "the calibration", *, with_logsnr: bool = True) -> None:
        """Raise PoorCalibrationError where the lines are too poor to stand for FLUX.2's latents.

        Args:
            with_logsnr: look at the lines of the mean; else at those of the mode.
        """
        name, lines = ("mean", self.mean) if with_logsnr else ("mode", self.mode)
        # also NaN
        if not lines.mean_cosine >= LEAST_COSINE:
            out = "keep to the model's own space" if with_logsnr else "pass logsnr, which a cache with --posterior has"
            raise PoorCalibrationError(
                f"{source}: mean cosine {lines.mean_cosine:.3f} of the {name} with FLUX.2's latents is below "
                f"{LEAST_COSINE}, so that they do not stand for them: {out}"
            )

    def check_space(self, latent_space: str) -> None:
        """Raise InputError unless latents of `latent_space` are what this calibration was measured on."""
        if latent_space != self.latent_space:
            raise InputError(
                f"the calibration is of {self.latent_space}, and the latents are of {latent_space}: calibrate the "
                "model that made them"
            )


def to_flux2(
    latents: Tensor,
    calibration: Flux2Calibration,
    bn: BatchNorm | None = None,
    *,
    logsnr: Tensor | None = None,
    normalised: bool = True,
) -> Tensor:
    """Whitened latents to FLUX.2's space, approximately: the calibration's lines, then FLUX.2's batch norm.

    Args:
        latents: whitened mode, `[C,h,w]` or `[B,C,h,w]`, any float dtype, as `encode` returns it and caches hold it.
        bn: the batch norm of the FLUX.2 autoencoder that the latents are for; that of the calibration when None.
        logsnr: of the posterior, in the latents' shape. With it the latents are divided by alpha, `alpha^2 =
            sigmoid(logsnr)`, and go through the lines of the mean; without it through those of the mode.
        normalised: False leaves the batch norm out: what `AutoencoderKLFlux2.encode` gives, patchified.

    Returns:
        float32 in the shape of `latents`.

    Raises:
        InputError: another number of channels, or a `logsnr` of another shape.
        PoorCalibrationError: the lines that would be used are too poor.
    """
    _check_channels(latents, calibration)
    calibration.check_quality(with_logsnr=logsnr is not None)
    raw = latents.float()
    if calibration.whitening is not None:
        mean, std = (_like(raw, calibration.whitening[name]) for name in ("mean", "std"))
        raw = torch.addcmul(mean, raw, std)
    lines = calibration.mode
    if logsnr is not None:
        if logsnr.shape != latents.shape:
            raise InputError(f"logsnr has shape {list(logsnr.shape)}, and the latents {list(latents.shape)}")
        raw = raw * torch.exp(-0.5 * F.logsigmoid(logsnr.float()))
        lines = calibration.mean
    flux2 = torch.addcmul(_like(raw, lines.b), _in_order(raw, calibration.channels), _like(raw, lines.a))
    if not normalised:
        return flux2
    mean, std = _statistics(raw, calibration, bn)
    return (flux2 - mean) / std


def from_flux2(
    latents: Tensor, calibration: Flux2Calibration, bn: BatchNorm | None = None, *, normalised: bool = True
) -> Tensor:
    """Inverse of `to_flux2` without a logsnr: latents of FLUX.2 to the model's own whitened mode, to be decoded by it.

    Arguments, result and errors as there.
    """
    _check_channels(latents, calibration)
    calibration.check_quality(with_logsnr=False)
    flux2 = latents.float()
    if normalised:
        mean, std = _statistics(flux2, calibration, bn)
        flux2 = torch.addcmul(mean, flux2, std)
    lines = calibration.mode
    raw = (flux2 - _like(flux2, lines.b)) / _like(flux2, lines.a)
    back = sorted(range(len(calibration.channels)), key=calibration.channels.__getitem__)
    raw = _in_order(raw, tuple(back))
    if calibration.whitening is None:
        return raw
    mean, std = (_like(raw, calibration.whitening[name]) for name in ("mean", "std"))
    return (raw - mean) / std


def _check_channels(latents: Tensor, calibration: Flux2Calibration) -> None:
    count = len(calibration.channels)
    if latents.dim() not in (3, 4) or latents.shape[-3] != count:
        raise InputError(
            f"latents have shape {list(latents.shape)}: the calibration is of [{count},h,w] or [B,{count},h,w]"
        )


def _statistics(like: Tensor, calibration: Flux2Calibration, bn: BatchNorm | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the batch norm, `[C,1,1]`."""
    own = calibration.batch_norm
    given = (own["running_mean"], own["running_var"], own["eps"])
    mean, var, eps = given if bn is None else (bn.running_mean, bn.running_var, bn.eps)
    if len(mean) != len(calibration.channels) or len(var) != len(mean):
        raise InputError(f"the batch norm has {len(mean)} channels, and the calibration {len(calibration.channels)}")
    return _like(like, mean), torch.sqrt(_like(like, var) + eps)


def _in_order(raw: Tensor, channels: tuple[int, ...]) -> Tensor:
    if channels == tuple(range(len(channels))):
        return raw
    return raw.index_select(-3, torch.tensor(channels, device=raw.device))


def _like(latents: Tensor, values: Any) -> Tensor:
    """A number per channel as float32 `[C,1,1]` beside the latents."""
    return torch.as_tensor(values, dtype=torch.float32, device=latents.device)[:, None, None]


def _lines(values: Mapping[str, Any], count: int, name: str) -> ChannelLines:
    columns = {key: _column(values[key], count, f"{name}.{key}") for key in ("a", "b", "r2", "cosine")}
    if any(abs(a) < _LEAST for a in columns["a"]):
        raise ValueError(f"{name}.a holds 0")
    return ChannelLines(
        **columns, mean_cosine=float(values["mean_cosine"]), overall_cosine=float(values["overall_cosine"])
    )


def _column(values: Any, count: int, name: str) -> tuple[float, ...]:
    if len(values) != count:
        raise ValueError(f"{name} is no list of {count} numbers")
    return tuple(float(v) for v in values)
