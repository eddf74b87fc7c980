"""Encoding in fp8 as a model does it: the calibration of its weights, and an encoder where the model is."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checkpoint import CheckpointSource
from .config import ModelConfig
from .errors import InputError
from .fp8_calibration import Fp8Calibration, load, places
from .reference import Autoencoder, Posterior
from .runtime.platform import INSTALL_TRITON

if TYPE_CHECKING:
    from .runtime.fold_fp8 import Ranges
    from .runtime.fp8 import Fp8Encoder

PRECISIONS = (None, "fp8")


def check_precision(name: str | None) -> None:
    """Refuse a precision of the encoder that does not exist."""
    if name not in PRECISIONS:
        raise InputError(f"encode_precision {name!r} is unknown: use None (that of dtype) or 'fp8'")


def require_folding() -> None:
    """Refuse fp8 where Triton is absent: weights are folded by the package of the kernels, which needs it."""
    if importlib.util.find_spec("triton") is None:
        raise InputError(
            f"fp8 needs Triton, by whose kernels' package weights are folded: {INSTALL_TRITON} (Linux only)"
        )


def find_calibration(source: CheckpointSource, path: str | os.PathLike[str] | None = None) -> Fp8Calibration:
    """The calibration of a checkpoint's weights: at `path`, else beside them, else in the user's cache folder.

    Raises:
        InputError: there is none, or it is damaged or of other weights.
    """
    if path is not None:
        return load(Path(path), source.sha256)
    for place in places(source.weights, source.sha256, source.id == "sample"):
        if place.is_file():
            return load(place, source.sha256)
    raise InputError(
        f"encoding in fp8 needs scales for these weights, and {source.id} has none: make them by "
        f"`capacitor-rt calibrate-fp8 {source.id} IMAGES`, a hundred varied ones"
    )


def encoding_name(calibration: Fp8Calibration) -> str:
    """What names latents of a calibration beside their weights, as another calibration gives other latents."""
    return f"fp8-{calibration.sha256[:8]}"


def ranges_from(calibration: Fp8Calibration) -> Ranges:
    """The ranges of a calibration as tensors."""
    from .runtime.fold_fp8 import BlockRange

    return tuple(
        BlockRange(*(torch.tensor(block[name], dtype=torch.float32) for name in ("y", "hidden", "gain")))
        for block in calibration.ranges
    )


class Fp8Encoding:
    """Emulated encoders by one calibration, made anew where the model was moved or cast.

    Raises:
        InputError: the calibration is not of an encoder of this architecture; Triton is absent.
    """

    def __init__(self, calibration: Fp8Calibration, config: ModelConfig):
        require_folding()
        from .runtime.fold_fp8 import check_ranges

        self.ranges = ranges_from(calibration)
        check_ranges(self.ranges, config.encoder_depth, config.hidden_dim)
        self._made: tuple[torch.device, torch.dtype, Fp8Encoder] | None = None

    def posterior(self, loaded: Autoencoder, image: Tensor, dtype: torch.dtype) -> Posterior:
        """Raw posterior of an image on its device.

        Args:
            loaded: the model as loaded, whose tensors are folded.
            dtype: of what is not in 8 bits.
        """
        from .runtime.fp8 import Fp8Encoder

        if self._made is None or self._made[:2] != (image.device, dtype):
            encoder = Fp8Encoder(loaded, self.ranges, dtype, image.device)
            self._made = (image.device, dtype, encoder)
        return self._made[2].posterior(image)
