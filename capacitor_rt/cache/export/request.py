"""What a caller of the exporters asks for, and what each format can be asked for. Needs neither torch nor a cache."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import InputError

PATCHIFIED, UNPATCHIFIED = "patchified", "unpatchified"
"""`[C, H/s, W/s]` as cached, or its `pixel_shuffle` `[C/4, 2H/s, 2W/s]`: the same tokens, twice the side."""
LAYOUTS = (PATCHIFIED, UNPATCHIFIED)
WHITENED, FLUX2 = "whitened", "flux2"
SPACES = (WHITENED, FLUX2)
STORED = "stored"
"""As a dtype: that of the cache."""
DTYPES = {"fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}
ARCHITECTURES = {"f2d": "flux_2_dev", "f2k4b": "flux_2_klein_4b", "f2k9b": "flux_2_klein_9b"}
"""musubi-tuner's short names of the FLUX.2 models, and the long ones in its files."""
REQUIRED, TAKEN, UNUSED = "required", "taken", "unused"


@dataclass(frozen=True)
class FormatRules:
    """What a format can hold. Of alternatives the first is the default.

    Attributes:
        reader: whose format it is.
        layouts, dtypes: those that the reader takes.
        space: the default; None where neither space can be taken for granted.
        labels, captions, flips, posterior, scale: `REQUIRED`, `TAKEN` or `UNUSED`.
        text_latents: of a text encoder, by id.
        presets: variants of the format.
        one_size: the reader takes images of one size only.
        cut: the option by which files are cut, "rows" or "bytes"; None for a file per row.
    """

    reader: str
    layouts: tuple[str, ...] = LAYOUTS
    dtypes: tuple[str, ...] = (STORED,)
    space: str | None = WHITENED
    labels: str = UNUSED
    captions: str = UNUSED
    flips: str = UNUSED
    posterior: str = UNUSED
    scale: str = UNUSED
    text_latents: str = UNUSED
    presets: tuple[str, ...] = ()
    one_size: bool = False
    cut: str | None = None


_FLUX2_READERS = {"layouts": (PATCHIFIED,), "space": None}

FORMATS: dict[str, FormatRules] = {
    "lightningdit": FormatRules("LightningDiT", labels=REQUIRED, flips=REQUIRED, one_size=True, cut="rows"),
    "mds": FormatRules(
        "MosaicML streaming: PRX, micro_diffusion",
        layouts=(UNPATCHIFIED, PATCHIFIED),
        dtypes=("fp16", "fp32"),
        captions=TAKEN,
        posterior=TAKEN,
        scale=TAKEN,
        text_latents=TAKEN,
        presets=("prx", "micro", "plain"),
        cut="bytes",
    ),
    "wds": FormatRules(
        "WebDataset: TREAD, megatron-energon",
        dtypes=("fp32", "fp16"),
        labels=TAKEN,
        captions=TAKEN,
        flips=TAKEN,
        posterior=TAKEN,
        scale=TAKEN,
        text_latents=TAKEN,
        presets=("plain", "energon"),
        cut="bytes",
    ),
    "repa": FormatRules(
        "REPA, SRA",
        layouts=(UNPATCHIFIED,),
        dtypes=("fp32",),
        labels=REQUIRED,
        posterior=TAKEN,
        scale=TAKEN,
        one_size=True,
    ),
    "repae": FormatRules(
        "REPA-E",
        dtypes=("fp32",),
        labels=REQUIRED,
        posterior=TAKEN,
        scale=TAKEN,
        one_size=True,
        cut="bytes",
    ),
    "mar": FormatRules(
        "MAR", dtypes=("fp32",), labels=REQUIRED, flips=REQUIRED, posterior=TAKEN, scale=TAKEN, one_size=True
    ),
    "ddt": FormatRules(
        "DDT",
        layouts=(UNPATCHIFIED, PATCHIFIED),
        dtypes=("fp32",),
        labels=REQUIRED,
        posterior=TAKEN,
        scale=TAKEN,
        one_size=True,
    ),
    "musubi": FormatRules("musubi-tuner", dtypes=("bf16", "fp32", "fp16"), **_FLUX2_READERS),  # type: ignore[arg-type]
    "automodel": FormatRules(
        "NeMo Automodel",
        dtypes=("fp16", "bf16", "fp32"),
        captions=TAKEN,
        text_latents=TAKEN,
        **_FLUX2_READERS,  # type: ignore[arg-type]
    ),
    "comfy": FormatRules("ComfyUI", dtypes=("fp32",), **_FLUX2_READERS),  # type: ignore[arg-type]
}


@dataclass(frozen=True)
class ExportRequest:
    """What a caller asks for; None takes the format's default.

    Attributes:
        format: one of `FORMATS`.
        layout: "patchified" or "unpatchified".
        space: "whitened", the model's own, or "flux2", through `calibration`.
        calibration: file of `capacitor-rt calibrate`.
        dtype: "fp16", "fp32" or "bf16" where the format has a choice.
        labels: "folder", by the sorted top folders of the ids, or a file of ids and labels.
        captions: "txt" or "json", files beside the images, or a file of ids and captions.
        images: the folder that was cached, where the export reads it again.
        posterior: write the standard deviation of the posterior too.
        scale: factor on latents and deviations, for loops that multiply by their inverse.
        stats: "dataset" measures LightningDiT's latents_stats.pt instead of leaving the latents as they are.
        preset: variant of the format.
        text_latents: safetensors file with one tensor of a text encoder per id.
        prefix: of the names of wds shards.
        architecture: FLUX.2 model that musubi-tuner trains, one of `ARCHITECTURES`.
        shard_rows, shard_bytes: most rows or bytes of a file.
    """

    format: str
    layout: str | None = None
    space: str | None = None
    calibration: Path | None = None
    dtype: str | None = None
    labels: str | None = None
    captions: str | None = None
    images: Path | None = None
    posterior: bool = False
    scale: float = 1.0
    stats: str | None = None
    preset: str | None = None
    text_latents: Path | None = None
    prefix: str = "latents"
    architecture: str = "f2d"
    shard_rows: int | None = None
    shard_bytes: int | None = None

    @property
    def rules(self) -> FormatRules:
        return FORMATS[self.format]

    def resolved(self) -> ExportRequest:
        """The request with its defaults filled in.

        Raises:
            InputError: something that the format, or its reader, cannot take.
        """
        if self.format not in FORMATS:
            raise InputError(f"format {self.format!r} is unknown: use one of {', '.join(FORMATS)}")
        rules = self.rules
        preset = self._choice("preset", self.preset, rules.presets)
        layout = self._choice("layout", self.layout or _preset_layout(preset), rules.layouts)
        dtype = self._choice("dtype", self.dtype or _preset_dtype(preset), (*rules.dtypes, *_preset_dtypes(preset)))
        space = self.space or rules.space
        if space is None:
            raise InputError(
                f"{rules.reader} reads latents of FLUX.2: pass --space flux2 with --calibration FILE, which converts "
                "approximately, or --space whitened for a model that is trained on full_capacitor's own latents"
            )
        if space not in SPACES:
            raise InputError(f"space {space!r} is unknown: use one of {', '.join(SPACES)}")
        self._check_space(space)
        self._check_uses()
        self._check_values(preset, layout)
        return replace(self, layout=layout, space=space, dtype=dtype, preset=preset)

    def _choice(self, name: str, value: str | None, choices: tuple[str, ...]) -> str | None:
        if value is None:
            return choices[0] if choices else None
        if value not in choices:
            there = f"use {' or '.join(choices)}" if choices else f"leave --{name} away"
            if name == "layout":
                there += f", because {self.rules.reader} would misread the stride"
            raise InputError(f"--{name} {value} does not go with --format {self.format}: {there}")
        return value

    def _check_space(self, space: str) -> None:
        if space == FLUX2 and self.calibration is None:
            raise InputError("--space flux2 needs --calibration FILE: measure one by `capacitor-rt calibrate`")
        if space != FLUX2 and self.calibration is not None:
            raise InputError(f"--calibration is for --space flux2, and the space is {space}: leave one of them away")
        if space == FLUX2 and self.posterior:
            raise InputError("--posterior is the deviation in the model's own space: leave it away with --space flux2")

    def _check_uses(self) -> None:
        given = {
            "labels": self.labels is not None,
            "captions": self.captions is not None,
            "posterior": self.posterior,
            "scale": self.scale != 1.0,
            "text_latents": self.text_latents is not None,
        }
        for name, there in given.items():
            rule, option = getattr(self.rules, name), f"--{name.replace('_', '-')}"
            if there and rule == UNUSED:
                raise InputError(f"{option} does not go with --format {self.format}: {self.rules.reader} reads none")
        if self.stats is not None and (self.format, self.stats) != ("lightningdit", "dataset"):
            raise InputError(f"--stats {self.stats}: it is --stats dataset, with --format lightningdit")
        for name in ("rows", "bytes"):
            value = getattr(self, f"shard_{name}")
            if value is not None and self.rules.cut != name:
                other = f"use --shard-{self.rules.cut}" if self.rules.cut else "it writes a file per row"
                raise InputError(f"--shard-{name} does not go with --format {self.format}: {other}")
            if value is not None and value < 1:
                raise InputError(f"--shard-{name} {value} is too small: it is at least 1")

    def _check_values(self, preset: str | None, layout: str | None) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"--scale {self.scale} is no positive number")
        if preset in ("prx", "micro") and layout == PATCHIFIED:
            raise InputError(
                f"--preset {preset} takes 8 pixels for a latent and would misread --layout patchified: "
                "leave it away, or use --preset plain"
            )
        if preset == "micro" and self.text_latents is None:
            raise InputError(
                "micro_diffusion reads caption_latents in every row: give --text-latents FILE.safetensors, one float16 "
                "tensor [tokens, channels] per id"
            )
        if self.text_latents is not None and preset in ("prx", "plain"):
            raise InputError(f"--text-latents goes with --preset micro or energon, not {preset}")
        if preset == "micro" and (self.posterior or self.dtype == "fp32"):
            extra = "--posterior" if self.posterior else "--dtype fp32"
            raise InputError(f"micro_diffusion reads float16 latents as they are used: leave {extra} away")
        if not re.fullmatch(r"[\w-]+", self.prefix):
            raise InputError(f"--prefix {self.prefix!r}: use letters, digits, - and _")
        if self.architecture not in ARCHITECTURES:
            raise InputError(f"architecture {self.architecture!r} is unknown: use one of {', '.join(ARCHITECTURES)}")
        reads_pictures = self.format in ("repa", "repae")
        if (reads_pictures or self.captions in ("txt", "json")) and self.images is None:
            reader = self.rules.reader.partition(",")[0]
            what = f"{reader} reads the pictures too" if reads_pictures else f"{self.captions} captions lie beside them"
            raise InputError(f"--images DIR is missing, the folder that was cached: {what}")


def _preset_layout(preset: str | None) -> str | None:
    return UNPATCHIFIED if preset == "energon" else None


def _preset_dtype(preset: str | None) -> str | None:
    return "bf16" if preset == "energon" else None


def _preset_dtypes(preset: str | None) -> tuple[str, ...]:
    return ("bf16",) if preset == "energon" else ()
