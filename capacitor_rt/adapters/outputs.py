"""diffusers' own classes where it is installed, else others of the same attributes: what encode and decode return, and
what a model is derived from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..extras import is_installed

Generators = torch.Generator | list[torch.Generator]
"""One for the whole batch, or one per image."""


def draw_normal(shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Unit normal float32 noise on `device`, drawn where the generator lives; from a list of them, a row each."""
    if isinstance(generator, list):
        if len(generator) == 1:
            return draw_normal(shape, generator[0], device)
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: pass one, or one per image")
        return torch.cat([draw_normal((1, *shape[1:]), one, device) for one in generator])
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


class DiagonalGaussian:
    """A normal distribution per element: `parameters [B,2C,h,w]` = (mean, logvar), logvar clamped to [-30, 20].

    Attributes:
        mean, logvar, std, var: `[B,C,h,w]`; std and var are 0 where `deterministic`.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, 1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def sample(self, generator: Generators | None = None) -> Tensor:
        """`mean + std * n`, n unit normal."""
        if generator is None:
            return self.mean + self.std * torch.randn_like(self.mean)
        noise = draw_normal(tuple(self.mean.shape), generator, self.mean.device)
        return self.mean + self.std * noise.to(self.mean.dtype)

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """Kullback-Leibler divergence from `other`, by default the unit normal, `[B]`."""
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            shift = (self.mean - other.mean).square()
            terms = (shift + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum((1, 2, 3))

    def nll(self, sample: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of `sample`, summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1)
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dims)


@dataclass
class EncoderOutput:
    """What `encode` returns without diffusers; `[0]` is the distribution."""

    latent_dist: DiagonalGaussian

    def __getitem__(self, i: int) -> DiagonalGaussian:
        return (self.latent_dist,)[i]


@dataclass
class DecoderOutput:
    """What `decode` returns without diffusers; `[0]` is the image."""

    sample: Tensor

    def __getitem__(self, i: int) -> Tensor:
        return (self.sample,)[i]


class OutputClasses(NamedTuple):
    """Classes of the distribution, of what `encode` and of what `decode` return, and the base class of models."""

    distribution: Any
    encoded: Any
    decoded: Any
    model: type[nn.Module]


OWN = OutputClasses(DiagonalGaussian, EncoderOutput, DecoderOutput, nn.Module)


@cache
def output_classes() -> OutputClasses:
    """diffusers' classes; our own where it is not installed or cannot be imported."""
    if not is_installed("diffusers"):
        return OWN
    try:
        from diffusers.models.autoencoders.vae import DecoderOutput as Decoded
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput
        from diffusers.models.modeling_utils import ModelMixin
    except (ImportError, RuntimeError):
        return OWN
    return OutputClasses(DiagonalGaussianDistribution, AutoencoderKLOutput, Decoded, ModelMixin)
