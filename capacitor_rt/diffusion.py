"""Noise schedule and samplers: float32 steps with coefficients computed in float64.

The schedule is the shifted-cosine log-SNR of variance-preserving diffusion,
`lambda(t) = -2 ln tan(a t + b)`, `alpha^2 = sigmoid(lambda)`, `sigma^2 = sigmoid(-lambda)`; t runs from 1 (noise) to 0.
DDIM: Song et al., "Denoising Diffusion Implicit Models", eq. 12 with eta = 0.
DPM-Solver++(2M): Lu et al., "DPM-Solver++", algorithm 2 (data prediction, exponential integrator in lambda/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from .config import FullCapacitorInferenceConfig, ModelConfig

PredictX0 = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class NoiseLevel:
    """One point of the schedule. `half_logsnr` is `ln(alpha / sigma)`."""

    t: float
    alpha: float
    sigma: float
    half_logsnr: float


def noise_level(t: float, logsnr_min: float, logsnr_max: float) -> NoiseLevel:
    """Schedule at time `t` in [0, 1]."""
    b = math.atan(math.exp(-0.5 * logsnr_max))
    a = math.atan(math.exp(-0.5 * logsnr_min)) - b
    logsnr = -2.0 * math.log(math.tan(a * t + b))
    alpha = math.sqrt(1.0 / (1.0 + math.exp(-logsnr)))
    sigma = math.sqrt(1.0 / (1.0 + math.exp(logsnr)))
    return NoiseLevel(t, alpha, sigma, 0.5 * logsnr)


def time_grid(num_steps: int, schedule: str) -> list[float]:
    """`num_steps + 1` times from 1 down to 0."""
    if schedule == "linear":
        return [1.0 - k / num_steps for k in range(num_steps + 1)]
    return [0.5 * (1.0 + math.cos(math.pi * k / num_steps)) for k in range(num_steps + 1)]


def noise_levels(model: ModelConfig, inference: FullCapacitorInferenceConfig) -> list[NoiseLevel]:
    """The `num_steps + 1` levels that a sampler walks through."""
    times = time_grid(inference.num_steps, inference.schedule)
    return [noise_level(t, model.logsnr_min, model.logsnr_max) for t in times]


def unit_noise(shape: tuple[int, ...], seed: int | None, device: torch.device, source: str = "cpu") -> Tensor:
    """Unit normal float32 noise of `shape` on `device`.

    With a seed and `source` "cpu" it has the same values on every device; "device" draws them there, which is faster
    and gives values of that kind of device's own. Nothing waits for the device.
    """
    if seed is None:
        return torch.randn(shape, device=device, dtype=torch.float32)
    place = device.type if source == "device" else "cpu"
    if place != "cpu":
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    # from page-locked memory the copy goes on while the host does
    noise = torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")
    noise.normal_(generator=torch.Generator("cpu").manual_seed(seed))
    return noise.to(device, non_blocking=True)


def token_mask(shape: Sequence[int], ratio: float, seed: int | None, device: torch.device | str = "cpu") -> Tensor:
    """Tokens that guidance by tokens drops: bool `[B,1,h,w]` for latents of `shape [B,Z,h,w]`.

    Of each group of 2x2 tokens the share `ratio`, chosen at random by `seed`, the same on every device. How the
    published code draws its mask is not known: only the groups are. Nothing waits for the device.
    """
    batch, _, height, width = shape
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    groups = (batch, 4, -(-height // 2), -(-width // 2))
    order = torch.rand(groups, generator=generator, device="cpu").argsort(1)
    mask = pixel_shuffle((order < round(4 * ratio)).float(), 2)[..., :height, :width].bool().contiguous()
    return mask.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else mask.to(device)


def ddim(predict_x0: PredictX0, x: Tensor, levels: list[NoiseLevel]) -> Tensor:
    """Deterministic DDIM. `x` float32 is the state at `levels[0]`; returns the state at `levels[-1]`."""
    for now, after in pairwise(levels):
        x0 = predict_x0(x, now.t)
        # eps = (x - alpha x0) / sigma, put into x' = alpha' x0 + sigma' eps
        ratio = after.sigma / now.sigma
        x = torch.add(x * ratio, x0, alpha=after.alpha - ratio * now.alpha)
    return x


def dpmpp_2m(predict_x0: PredictX0, x: Tensor, levels: list[NoiseLevel]) -> Tensor:
    """DPM-Solver++(2M), first step of first order. Arguments as in `ddim`."""
    previous: Tensor | None = None
    previous_h = 0.0
    for now, after in pairwise(levels):
        x0 = predict_x0(x, now.t)
        h = after.half_logsnr - now.half_logsnr
        data = x0
        if previous is not None:
            r0 = previous_h / h
            data = x0 + (x0 - previous) * (0.5 / r0)
        x = torch.add(x * (after.sigma / now.sigma), data, alpha=-after.alpha * math.expm1(-h))
        previous, previous_h = x0, h
    return x


SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}


def sample(predict_x0: PredictX0, noise: Tensor, model: ModelConfig, inference: FullCapacitorInferenceConfig) -> Tensor:
    """Integrate from pure noise to the image.

    Args:
        predict_x0: `(x_t float32 [B,3,H,W], t) -> x0` of the same shape; guidance is the caller's business.
        noise: unit normal float32 `[B,3,H,W]`.

    Returns:
        float32 `[B,3,H,W]`, not clamped.
    """
    levels = noise_levels(model, inference)
    start = noise * (levels[0].sigma * model.pixel_noise_std)
    return SAMPLERS[inference.sampler](predict_x0, start, levels)
