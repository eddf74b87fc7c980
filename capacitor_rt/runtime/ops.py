"""The runtime as `torch.library` operators, so that code which calls a model compiles and exports whole.

A model is known to its operators by a number, held weakly; the number means nothing in another process, where an
exported program that was saved cannot find its model. Inductor keeps these operators out of the CUDA graphs that it
captures itself: they replay graphs of their own, whose memory is outside its pool.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..config import FullCapacitorInferenceConfig, ModelConfig
from ..diffusion import unit_noise
from ..errors import InputError

if TYPE_CHECKING:
    from .runtime import Runtime


class Served(Protocol):
    """What the operators need of a model."""

    config: ModelConfig

    @property
    def runtime(self) -> Runtime | None:
        """The Triton backend, None where the torch backend serves."""


_models: weakref.WeakValueDictionary[int, Served] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
# the tag came with torch 2.9
_TAGS = tuple(tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None)


def register(model: Served) -> int:
    """A number by which the operators find `model` while it lives."""
    number = next(_numbers)
    _models[number] = model
    return number


def _model(number: int) -> Served:
    if number not in _models:
        raise InputError(
            f"model {number} of this compiled or exported program is not in this process any more: compile or "
            "export again with a model that is kept alive (backend='torch' exports into a file of its own)"
        )
    return _models[number]


def _runtime(number: int) -> Runtime:
    runtime = _model(number).runtime
    if runtime is None:
        raise InputError(
            f"model {number} of this compiled or exported program is served by the torch backend now: it was moved or "
            "cast, or failed its check on this GPU, so move it back or compile again"
        )
    return runtime


def _grid(image: Tensor, model: Served) -> tuple[int, int, int]:
    """(B, h, w) of the bottleneck of an NCHW or NHWC image."""
    height, width = image.shape[2:] if image.shape[1] == 3 else image.shape[1:3]
    p = model.config.patch_size
    return image.shape[0], height // p, width // p


@torch.library.custom_op("capacitor_rt::encode", mutates_args=(), tags=_TAGS)
def encode(image: Tensor, model: int) -> Tensor:
    """Whitened latents, float32 `[B,Z,h,w]`, of a checked image."""
    return _runtime(model).encode(image)


@encode.register_fake
def _(image: Tensor, model: int) -> Tensor:
    b, h, w = _grid(image, _model(model))
    return image.new_empty((b, _model(model).config.bottleneck_dim, h, w), dtype=torch.float32)


@torch.library.custom_op("capacitor_rt::posterior", mutates_args=(), tags=_TAGS)
def posterior(image: Tensor, model: int) -> list[Tensor]:
    """Raw `[mean, logsnr]`, float32 `[B,Z,h,w]` each; `[mean]` of a deterministic bottleneck."""
    return [t for t in _runtime(model).posterior(image) if t is not None]


@posterior.register_fake
def _(image: Tensor, model: int) -> list[Tensor]:
    b, h, w = _grid(image, _model(model))
    config = _model(model).config
    shape = (b, config.bottleneck_dim, h, w)
    return [image.new_empty(shape, dtype=torch.float32) for _ in range(config.posterior_channels // shape[1])]


@torch.library.custom_op("capacitor_rt::decode", mutates_args=(), tags=_TAGS)
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
    return _runtime(model).decode(latents, noise, inference)


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


@torch.library.custom_op("capacitor_rt::seeded_noise", mutates_args=(), tags=_TAGS)
def seeded_noise(like: Tensor, shape: list[int], seed: int, source: str) -> Tensor:
    """`unit_noise` of a seed on the device of `like`: a generator of one's own cannot be traced."""
    return unit_noise(tuple(shape), seed, like.device, source)


@seeded_noise.register_fake
def _(like: Tensor, shape: list[int], seed: int, source: str) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
