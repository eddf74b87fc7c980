"""Fast runtime for the full_capacitor image autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .cache.dataset import LatentDataset
    from .cache.sampler import BucketBatchSampler
    from .config import FullCapacitorInferenceConfig, ModelConfig
    from .errors import CacheError, CapacitorError, CheckpointError, ConfigError, ImageError, InputError
    from .model import FullCapacitor

# imported on first use: `import capacitor_rt` loads neither triton nor pyarrow
_EXPORTS = {
    "FullCapacitor": "model",
    "FullCapacitorInferenceConfig": "config",
    "ModelConfig": "config",
    "LatentDataset": "cache.dataset",
    "BucketBatchSampler": "cache.sampler",
    "CapacitorError": "errors",
    "ConfigError": "errors",
    "InputError": "errors",
    "CheckpointError": "errors",
    "ImageError": "errors",
    "CacheError": "errors",
}

__all__ = [
    "BucketBatchSampler",
    "CacheError",
    "CapacitorError",
    "CheckpointError",
    "ConfigError",
    "FullCapacitor",
    "FullCapacitorInferenceConfig",
    "ImageError",
    "InputError",
    "LatentDataset",
    "ModelConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
