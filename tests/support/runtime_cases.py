"""Small models with random weights for the runtime's tests, and where these run."""

from __future__ import annotations

import dataclasses

import torch

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig, ModelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-4
ONE_STEP = FullCapacitorInferenceConfig(seed=7)
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


def randomise(model: FullCapacitor, seed: int = 0) -> FullCapacitor:
    """Weights such that every one matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 and p.shape[0] > 1 else 0.2
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
        if model.latent_norm_running_mean is not None:
            model.latent_norm_running_mean.copy_(torch.randn(model.latent_channels, generator=generator))
            model.latent_norm_running_var.copy_(torch.rand(model.latent_channels, generator=generator) + 0.5)
    return model.requires_grad_(False).eval()


def tiny(
    backend: str = "triton",
    device: str = DEVICE,
    dtype: torch.dtype = torch.float32,
    *,
    cuda_graphs: bool = True,
    memory_budget: int | None = None,
    **changes,
) -> FullCapacitor:
    """A model of one block each way; the same seed gives the same weights to both backends."""
    options = {"backend": backend, "cuda_graphs": cuda_graphs, "memory_budget": memory_budget}
    model = FullCapacitor(dataclasses.replace(TINY, **changes), strict_size=False, **options)
    return randomise(model).to(device, dtype)


def encode_in_child(model: FullCapacitor, image: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Latents, and how often weights were folded for them; importable, for processes that are spawned."""
    return model.encode(image.to(model.device)).cpu(), model.stats().folds
