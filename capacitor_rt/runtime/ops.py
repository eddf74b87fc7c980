"""The runtime as `torch.library` operators, so that code which calls a model compiles and exports whole.

A model is known to its operators by a number, held weakly.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import FullCapacitorInferenceConfig

if TYPE_CHECKING:
    from ..model import FullCapacitor

_models: weakref.WeakValueDictionary[int, FullCapacitor] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(model: FullCapacitor) -> int:
    """A number by which the operators find `model` while it lives."""
    number = next(_numbers)
    _models[number] = model
    return number


def _grid(image: Tensor, model: FullCapacitor) -> tuple[int, int, int]:
    """(B, h, w) of the bottleneck of an NCHW or NHWC image."""
    height, width = image.shape[2:] if image.shape[1] == 3 else image.shape[1:3]
    p = model.config.patch_size
    return image.shape[0], height // p, width // p


@torch.library.custom_op("capacitor_rt::encode", mutates_args=())
def encode(image: Tensor, model: int) -> Tensor:
    """Whitened latents, float32 `[B,Z,h,w]`, of a checked image."""
    return _models[model].runtime.encode(image)


@encode.register_fake
def _(image: Tensor, model: int) -> Tensor:
    b, h, w = _grid(image, _models[model])
    return image.new_empty((b, _models[model].config.bottleneck_dim, h, w), dtype=torch.float32)


@torch.library.custom_op("capacitor_rt::posterior", mutates_args=())
def posterior(image: Tensor, model: int) -> list[Tensor]:
    """Raw `[mean, logsnr]`, float32 `[B,Z,h,w]` each; `[mean]` of a deterministic bottleneck."""
    return [t for t in _models[model].runtime.posterior(image) if t is not None]


@posterior.register_fake
def _(image: Tensor, model: int) -> list[Tensor]:
    b, h, w = _grid(image, _models[model])
    config = _models[model].config
    shape = (b, config.bottleneck_dim, h, w)
    return [image.new_empty(shape, dtype=torch.float32) for _ in range(config.posterior_channels // shape[1])]


@torch.library.custom_op("capacitor_rt::decode", mutates_args=())
def decode(
    latents: Tensor,
    noise: Tensor,
    model: int,
    num_steps: int,
    sampler: str,
    schedule: str,
    pdg: bool,
    pdg_strength: float,
) -> Tensor:
    """Image, float32 `[B,3,H,W]`, of checked latents and unit noise of the image's shape."""
    inference = FullCapacitorInferenceConfig(num_steps, sampler, schedule, pdg, pdg_strength)
    return _models[model].runtime.decode(latents, noise, inference)


@decode.register_fake
def _(
    latents: Tensor,
    noise: Tensor,
    model: int,
    num_steps: int,
    sampler: str,
    schedule: str,
    pdg: bool,
    pdg_strength: float,
) -> Tensor:
    return torch.empty_like(noise, dtype=torch.float32)
