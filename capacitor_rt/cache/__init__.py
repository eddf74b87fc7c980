"""Latents on disk: `cache_images` writes them, `LatentDataset` reads them, `verify` checks them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coordinators import cache_on
    from .dataset import LatentDataset, LatentRow
    from .model_source import Checkpoint
    from .options import RunOptions
    from .outlook import dry_run
    from .request import CacheRequest
    from .run import cache_images
    from .sampler import BucketBatchSampler
    from .sources import ColumnsRequest
    from .views import parse_views
    from .views_run import cache_views, dry_run_views

# imported on first use: none of these is needed to import the package, and some load torch's data loaders
_EXPORTS = {
    "BucketBatchSampler": ("sampler", "BucketBatchSampler"),
    "CacheRequest": ("plan", "CacheRequest"),
    "Checkpoint": ("model_source", "Checkpoint"),
    "LatentDataset": ("dataset", "LatentDataset"),
    "LatentRow": ("dataset", "LatentRow"),
    "cache_images": ("run", "cache_images"),
    "cache_on": ("coordinators", "cache_on"),
    "ColumnsRequest": ("sources", "ColumnsRequest"),
    "RunOptions": ("options", "RunOptions"),
    "cache_views": ("views_run", "cache_views"),
    "dry_run": ("outlook", "dry_run"),
    "dry_run_views": ("views_run", "dry_run_views"),
    "parse_views": ("views", "parse_views"),
    # the names of version 0.1
    "Request": ("plan", "CacheRequest"),
    "forecast": ("outlook", "dry_run"),
}

__all__ = [
    "BucketBatchSampler",
    "CacheRequest",
    "Checkpoint",
    "ColumnsRequest",
    "LatentDataset",
    "LatentRow",
    "RunOptions",
    "cache_images",
    "cache_on",
    "cache_views",
    "dry_run",
    "dry_run_views",
    "parse_views",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _EXPORTS[name]
    return getattr(import_module(f".{module}", __name__), attribute)
