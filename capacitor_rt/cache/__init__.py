"""Latents on disk: `cache_images` writes them, `LatentDataset` reads them, `verify` checks them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import BucketBatchSampler, LatentDataset
    from .model_source import Checkpoint
    from .plan import CacheRequest
    from .run import cache_images, forecast

_EXPORTS = {
    "BucketBatchSampler": "dataset",
    "Checkpoint": "model_source",
    "LatentDataset": "dataset",
    "CacheRequest": "plan",
    "cache_images": "run",
    "forecast": "run",
}

__all__ = ["BucketBatchSampler", "CacheRequest", "Checkpoint", "LatentDataset", "cache_images", "forecast"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
