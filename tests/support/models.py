"""Small models with random weights, made in one way for every test."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from capacitor_rt import FullCapacitor, ModelConfig
from capacitor_rt.config import KNOWN_MODELS

# one block each way, patches of 8 pixels: for launches under the interpreter
TINY = ModelConfig(
    patch_size=8,
    model_dim=24,
    encoder_depth=1,
    decoder_depth=1,
    decoder_start_blocks=1,
    decoder_end_blocks=0,
    bottleneck_dim=4,
    adaln_low_rank_rank=2,
)
# the published patch and stride, and a block in every part
SMALL = ModelConfig(
    model_dim=32,
    encoder_depth=1,
    decoder_depth=3,
    decoder_start_blocks=1,
    decoder_end_blocks=1,
    bottleneck_dim=8,
    adaln_low_rank_rank=4,
)

# the siblings with channel attention, a block in every part
TINY_SIBLINGS = {
    name: dataclasses.replace(
        config,
        patch_size=8,
        model_dim=16,
        encoder_depth=1,
        decoder_depth=1 if config.dico.is_flat else 3,
        decoder_start_blocks=0 if config.dico.is_flat else 1,
        decoder_end_blocks=0 if config.dico.is_flat else 1,
        bottleneck_dim=8,
        adaln_low_rank_rank=4,
    )
    for name, config in KNOWN_MODELS.items()
    if config.dico
}


def randomise(model: FullCapacitor, seed: int = 0) -> FullCapacitor:
    """Weights such that every one matters to the output, statistics unlike the identity; frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 and p.shape[0] > 1 else 0.2
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
        if model.latent_norm_running_mean is not None:
            model.latent_norm_running_mean.copy_(torch.randn(model.latent_channels, generator=generator))
            model.latent_norm_running_var.copy_(torch.rand(model.latent_channels, generator=generator) + 0.5)
    return model.requires_grad_(False).eval()


def random_model(
    config: ModelConfig = SMALL, *, seed: int = 0, options: dict[str, Any] | None = None, **changes: Any
) -> FullCapacitor:
    """A `FullCapacitor` of `config` with `changes`, on the CPU; `options` are its constructor's."""
    return randomise(FullCapacitor(dataclasses.replace(config, **changes), **(options or {})), seed)
