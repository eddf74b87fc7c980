"""A tiny model for the runtime's tests, and where these run."""

from __future__ import annotations

import torch
from models import TINY, random_model

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-4
ONE_STEP = FullCapacitorInferenceConfig(seed=7)


def tiny(
    backend: str = "triton",
    device: str = DEVICE,
    dtype: torch.dtype = torch.float32,
    *,
    cuda_graphs: bool = True,
    overlap: bool = False,
    memory_budget: int | None = None,
    **changes,
) -> FullCapacitor:
    """A model of one block each way; the same seed gives the same weights to both backends."""
    options = {"backend": backend, "cuda_graphs": cuda_graphs, "overlap": overlap, "memory_budget": memory_budget}
    return random_model(TINY, options=options | {"strict_size": False}, **changes).to(device, dtype)


def encode_in_child(model: FullCapacitor, image: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Latents, and how often weights were folded for them; importable, for processes that are spawned."""
    return model.encode(image.to(model.device)).cpu(), model.stats().folds
