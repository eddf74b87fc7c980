"""What a checkpoint is (`ModelConfig`), which ones are known, how one is sampled (`FullCapacitorInferenceConfig`)."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import warnings
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from . import strict_json
from .errors import ConfigError
from .strict_json import StrictJSONError

POSTERIOR_KINDS = ("diagonal_gaussian", "deterministic")
SIBLINGS = ("irdiffae_v1", "mdiffae_v1", "mdiffae_v2")
NORM_MODES = ("disabled", "channel_wise")
SAMPLERS = ("ddim", "dpmpp_2m")
SCHEDULES = ("linear", "cosine")
NOISE_SOURCES = ("cpu", "device")
GUIDANCE_DROPS = ("path", "tokens")
# what no tensor of a sibling shows, with the default first
READINGS: dict[str, tuple[str, ...]] = {
    "adaln_gate": ("tanh", "raw"),
    "encoder_gate": ("raw", "tanh"),
    "mlp_norm": ("double", "single"),
    "adaln_packing": ("interleaved", "grouped"),
    "decoder_norm_in": ("patchify", "fuse_in"),
    "encoder_norm_out": ("on", "off"),
}
# far above every model, and small enough that no product of them overflows 64 bits
MOST = {
    "in_channels": 1 << 10,
    "patch_size": 1 << 10,
    "model_dim": 1 << 16,
    "encoder_depth": 1 << 10,
    "decoder_depth": 1 << 10,
    "bottleneck_dim": 1 << 16,
    "depthwise_kernel_size": 1 << 10,
    "adaln_low_rank_rank": 1 << 16,
    "hidden_dim": 1 << 20,
}
MOST_CONFIG_BYTES = 1 << 20

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} {_SHORT.repr(value)} is unknown: use one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class DicoConfig:
    """What sets the DiCo siblings apart: blocks with compact channel attention and a separate MLP, no posterior.

    The last six fields are **inferred**: parts of the published code could not be read, and no tensor shows them. Their
    defaults are our reading; `capacitor-rt probe` finds the one that a checkpoint was made under.

    Attributes:
        sibling: "irdiffae_v1" (norms at both ends), "mdiffae_v1" (the same, a flat decoder without skip) or
            "mdiffae_v2" (no norms at the ends).
        pdg_mask_ratio: share of the tokens that guidance by tokens drops.
        settled: whether the readings below have been confirmed with these weights; else loading them warns.
        adaln_gate: the decoder's gates, "tanh" or "raw".
        encoder_gate: the encoder's learned gates, "raw" or "tanh".
        mlp_norm: "double": the MLP norms once more after the block's second norm; or "single".
        adaln_packing: "interleaved" (scale, gate, scale, gate) or "grouped" (scale, scale, gate, gate).
        decoder_norm_in: whose output the decoder's first norm takes, "patchify" or "fuse_in".
        encoder_norm_out: weightless RMSNorm of the latents' channels, "on" or "off".
    """

    sibling: str
    pdg_mask_ratio: float = 0.75
    settled: bool = False
    adaln_gate: str = "tanh"
    encoder_gate: str = "raw"
    mlp_norm: str = "double"
    adaln_packing: str = "interleaved"
    decoder_norm_in: str = "patchify"
    encoder_norm_out: str = "on"

    def __post_init__(self) -> None:
        _check_choice("sibling", self.sibling, SIBLINGS)
        for name, choices in READINGS.items():
            _check_choice(name, getattr(self, name), choices)
        if not 0.0 <= self.pdg_mask_ratio <= 1.0:
            raise ConfigError(f"pdg_mask_ratio {self.pdg_mask_ratio} is no share: it is from 0 to 1")

    @property
    def has_end_norms(self) -> bool:
        """Whether affine norms stand at the ends of encoder and decoder."""
        return self.sibling != "mdiffae_v2"

    @property
    def is_flat(self) -> bool:
        """Whether the decoder's blocks stand in a row, without a skip connection."""
        return self.sibling == "mdiffae_v1"

    @property
    def drops(self) -> tuple[str, ...]:
        """What guidance can drop, its default first: the middle blocks' "path", or "tokens"."""
        return {"irdiffae_v1": ("path",), "mdiffae_v1": ("tokens",), "mdiffae_v2": ("path", "tokens")}[self.sibling]

    @property
    def open_readings(self) -> dict[str, tuple[str, ...]]:
        """The readings that matter to this sibling: what its files do not state."""
        read = [] if self.has_end_norms else ["decoder_norm_in"]
        # irdiffae's own files have the encoder's last norm
        read += ["encoder_norm_out"] if self.sibling == "irdiffae_v1" else []
        return {name: choices for name, choices in READINGS.items() if name not in read}

    @property
    def reading(self) -> dict[str, str]:
        """The six inferred choices as they are."""
        return {name: getattr(self, name) for name in READINGS}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of an autoencoder of this family; the field names and defaults are those of `config.json`.

    `dico` is set for the siblings with channel attention, whose published `config.json` says nothing of it: the tensors
    do. It implies a deterministic bottleneck, and one normed over channels unless `encoder_norm_out` is "off".

    `encoder_depth` 0 means a decoder-only checkpoint. `latent_patch` is not stored in `config.json`: it is 2 where
    the running statistics have `4 * bottleneck_dim` entries (the latents are then 2x2-patchified before whitening).
    """

    in_channels: int = 3
    patch_size: int = 16
    model_dim: int = 896
    encoder_depth: int = 8
    decoder_depth: int = 8
    decoder_start_blocks: int = 2
    decoder_end_blocks: int = 2
    bottleneck_dim: int = 128
    mlp_ratio: float = 4.0
    depthwise_kernel_size: int = 7
    adaln_low_rank_rank: int = 128
    bottleneck_posterior_kind: str = "diagonal_gaussian"
    bottleneck_norm_mode: str = "disabled"
    logsnr_min: float = -10.0
    logsnr_max: float = 10.0
    pixel_noise_std: float = 0.558
    latent_running_stats_eps: float = 1e-4
    latent_patch: int = 1
    dico: DicoConfig | None = None

    def __post_init__(self) -> None:
        if self.dico is not None:
            norm = "channel_wise" if self.dico.encoder_norm_out == "on" else "disabled"
            object.__setattr__(self, "bottleneck_posterior_kind", "deterministic")
            object.__setattr__(self, "bottleneck_norm_mode", norm)
            if self.latent_patch != 1:
                raise ConfigError(f"latent_patch {self.latent_patch} does not go with {self.dico.sibling}: it is 1")
            if self.dico.is_flat and (self.decoder_start_blocks or self.decoder_end_blocks):
                raise ConfigError(
                    f"decoder_start_blocks {self.decoder_start_blocks} and decoder_end_blocks "
                    f"{self.decoder_end_blocks} do not go with {self.dico.sibling}, whose decoder is flat: they are 0"
                )
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{f.name} {value} is not finite")
        for name in (
            "in_channels",
            "patch_size",
            "model_dim",
            "decoder_depth",
            "bottleneck_dim",
            "adaln_low_rank_rank",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} is too small: it is at least 1")
        for name in ("encoder_depth", "decoder_start_blocks", "decoder_end_blocks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} {getattr(self, name)} is negative: it is a number of blocks")
        if self.decoder_middle_blocks < 0:
            raise ConfigError(
                f"decoder_start_blocks {self.decoder_start_blocks} + decoder_end_blocks {self.decoder_end_blocks} "
                f"exceed decoder_depth {self.decoder_depth}"
            )
        if self.depthwise_kernel_size % 2 == 0 or self.depthwise_kernel_size < 1:
            raise ConfigError(f"depthwise_kernel_size {self.depthwise_kernel_size} is not a positive odd number")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name} {getattr(self, name)} is too large: it is at most {most}")
        if self.hidden_dim < 1:
            raise ConfigError(
                f"mlp_ratio {self.mlp_ratio} gives a hidden width of {self.hidden_dim}: it must be positive"
            )
        if not self.logsnr_min < self.logsnr_max:
            raise ConfigError(f"logsnr_min {self.logsnr_min} is not below logsnr_max {self.logsnr_max}")
        # beyond these, exponentials of a log-SNR and products with the noise leave float32
        for name, low, high in (
            ("logsnr_min", -80.0, 80.0),
            ("logsnr_max", -80.0, 80.0),
            ("pixel_noise_std", 0.0, 1e6),
            ("latent_running_stats_eps", 0.0, 1e6),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} {getattr(self, name)} is not from {low:g} to {high:g}")
        if self.latent_patch not in (1, 2):
            raise ConfigError(f"latent_patch {self.latent_patch} is neither 1 nor 2")
        _check_choice("bottleneck_posterior_kind", self.bottleneck_posterior_kind, POSTERIOR_KINDS)
        _check_choice("bottleneck_norm_mode", self.bottleneck_norm_mode, NORM_MODES)

    @property
    def hidden_dim(self) -> int:
        """Width F of a block's hidden layer."""
        # a ratio read back from the shapes may fall short of the whole number by a rounding error
        return int(self.model_dim * self.mlp_ratio + 1e-6)

    @property
    def decoder_middle_blocks(self) -> int:
        return self.decoder_depth - self.decoder_start_blocks - self.decoder_end_blocks

    @property
    def latent_channels(self) -> int:
        """Channels of the public (whitened) latents."""
        return self.bottleneck_dim * self.latent_patch**2

    @property
    def latent_stride(self) -> int:
        """Pixels per latent in each direction."""
        return self.patch_size * self.latent_patch

    @property
    def posterior_channels(self) -> int:
        """Output channels of `to_bottleneck`: mean and logsnr, or the mean alone."""
        return self.bottleneck_dim * (2 if self.bottleneck_posterior_kind == "diagonal_gaussian" else 1)

    @property
    def modulation_channels(self) -> int:
        """Width of a decoder block's packed AdaLN vector: scale and gate of each residual path."""
        return self.model_dim * (4 if self.dico else 2)

    @property
    def drops(self) -> tuple[str, ...]:
        """What the unconditional pass of guidance can drop, its default first."""
        return self.dico.drops if self.dico else ("path",)

    @property
    def has_statistics(self) -> bool:
        """Whether a checkpoint of this architecture with an encoder has running statistics."""
        return self.encoder_depth > 0 and self.dico is None

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json", sibling: str | None = None) -> ModelConfig:
        """Read a parsed `config.json`: missing keys take the defaults, unknown keys warn.

        Args:
            sibling: of which the tensors are, where they are those of a DiCo model; else `values` may say so.

        Raises:
            ConfigError: a value has the wrong type or is out of range.
        """
        values = dict(values)
        extra = values.get("dico") or {}
        if not isinstance(extra, dict):
            raise ConfigError(f"{source}: dico is {_SHORT.repr(extra)}, which is not an object of settings")
        sibling = sibling or extra.get("sibling")
        dico = None
        if sibling is not None:
            values.pop("dico", None)
            extra = extra | {"sibling": sibling}
            if "pdg_mask_ratio" in values:
                extra["pdg_mask_ratio"] = values.pop("pdg_mask_ratio")
            types = {f.name: str(f.type) for f in dataclasses.fields(DicoConfig)}
            dico = DicoConfig(**_read(extra, types, f"{source}, dico"))
            if dico.is_flat:
                values = {"decoder_start_blocks": 0, "decoder_end_blocks": 0} | values
        known = {f.name: str(f.type) for f in dataclasses.fields(cls) if f.name not in ("latent_patch", "dico")}
        return cls(**_read(values, known, source), dico=dico)

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` at `path` (see `from_dict`)."""
        try:
            values = strict_json.read(path, MOST_CONFIG_BYTES)
        except StrictJSONError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}; download the file again") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, not an object of settings")
        return cls.from_dict(values, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The contents of `config.json`."""
        values = dataclasses.asdict(self)
        del values["latent_patch"]
        if self.dico is None:
            del values["dico"]
        return values


def _read(values: dict[str, Any], known: dict[str, str], source: str) -> dict[str, Any]:
    """The values of known names, of the types that `known` gives them; others warn."""
    unknown = sorted(k for k in values if k not in known and not k.startswith("_"))
    if unknown:
        shown = [key[:80] for key in unknown[:20]] + (["..."] if len(unknown) > 20 else [])
        warnings.warn(f"{source}: unknown keys ignored: {', '.join(shown)}", stacklevel=3)
    return {name: _coerce(name, values[name], known[name], source) for name in known.keys() & values.keys()}


def _coerce(name: str, value: Any, kind: str, source: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # before a value is converted or shown, which a number of thousands of digits is not
    if number and not abs(value) < 2**63:
        raise ConfigError(f"{source}: {name} is not finite, or too large for any model")
    if kind == "int" and number and int(value) == value:
        return int(value)
    if kind == "float" and number:
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    raise ConfigError(f"{source}: {name} is {_SHORT.repr(value)}, which is not {'an' if kind == 'int' else 'a'} {kind}")


@dataclass(frozen=True)
class FullCapacitorInferenceConfig:
    """How `decode` samples.

    Attributes:
        num_steps: passes through the decoder, at least 1. The model is made for 1.
        sampler: "ddim" or "dpmpp_2m".
        schedule: time grid, "linear" or "cosine".
        pdg: guidance: a second, unconditional pass a step, without the middle blocks (path drop) or without tokens.
        pdg_strength: `x0 = x0_uncond + strength * (x0_cond - x0_uncond)`.
        seed: of the start noise. None draws on the latents' device.
        noise: where the noise of a seed is drawn: "cpu", with the same values on every device, or "device", which is
            faster for large images and gives values of that kind of device's own.
        pdg_drop: what the unconditional pass drops, "path" or "tokens"; the model's own choice when None.
    """

    num_steps: int = 1
    sampler: str = "ddim"
    schedule: str = "linear"
    pdg: bool = False
    pdg_strength: float = 2.0
    seed: int | None = None
    noise: str = "cpu"
    pdg_drop: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ConfigError(f"num_steps {self.num_steps!r} is not a whole number of at least 1")
        if self.seed is not None and not (isinstance(self.seed, Integral) and -(2**63) <= self.seed < 2**64):
            raise ConfigError(f"seed {self.seed!r} is no whole number of 64 bits")
        if not isinstance(self.pdg_strength, Real) or not math.isfinite(self.pdg_strength):
            raise ConfigError(f"pdg_strength {self.pdg_strength!r} is no finite number")
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("noise", self.noise, NOISE_SOURCES)
        if self.pdg_drop is not None:
            _check_choice("pdg_drop", self.pdg_drop, GUIDANCE_DROPS)

    def drop_for(self, model: ModelConfig) -> str | None:
        """What guidance drops in passes of `model`, None without guidance.

        Raises:
            ConfigError: the model cannot drop that.
        """
        if not self.pdg:
            return None
        drop = self.pdg_drop or model.drops[0]
        _check_choice("pdg_drop", drop, model.drops)
        return drop


KNOWN_MODELS: dict[str, ModelConfig] = {
    "full_capacitor": ModelConfig(),
    "semdisdiffae": ModelConfig(encoder_depth=4),
    "semdisdiffae_p32_v2": ModelConfig(patch_size=32, model_dim=1024, bottleneck_dim=384),
    # decodes FLUX.2's latents as its pipeline has them: 2x2 patches as channels, normalised by FLUX.2's statistics
    "capacitor_decoder": ModelConfig(encoder_depth=0),
    # older siblings with channel attention: parts of them are inferred (docs/numbers.md)
    "irdiffae_v1": ModelConfig(encoder_depth=4, dico=DicoConfig("irdiffae_v1")),
    "mdiffae_v1": ModelConfig(
        encoder_depth=4,
        decoder_depth=4,
        decoder_start_blocks=0,
        decoder_end_blocks=0,
        bottleneck_dim=64,
        dico=DicoConfig("mdiffae_v1"),
    ),
    "mdiffae_v2": ModelConfig(encoder_depth=4, bottleneck_dim=96, dico=DicoConfig("mdiffae_v2")),
}
"""Architectures of the published models of this family, for plans without a checkpoint.

Loading needs none of these: `checkpoint` reads every number off the tensors.
"""
