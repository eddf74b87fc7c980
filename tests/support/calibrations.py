"""Contents of calibration files, made up."""

from __future__ import annotations

import torch

SPACE = "small/whitened@abc"


def numbers(count: int, seed: int, low: float = 0.5, high: float = 2.0) -> list[float]:
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) * (high - low) + low).tolist()


def document(count: int = 4, **changes) -> dict:
    """A calibration file's contents with lines that all differ."""
    lines = {
        name: {
            "a": numbers(count, seed, -2.0, -0.5),
            "b": numbers(count, seed + 1),
            "r2": [0.9] * count,
            "cosine": [0.95] * count,
            "mean_cosine": 0.95,
            "overall_cosine": 0.95,
        }
        for name, seed in (("mean", 1), ("mode", 3))
    }
    return {
        "format": "capacitor-flux2-calibration/1",
        "approximate": True,
        "latent_space": SPACE,
        "model": {"id": "small", "revision": "abc", "sha256": None},
        "flux2": {"id": "vae", "revision": None, "sha256": None},
        "images": {"fit": 900, "held_out": 100, "failed": 0},
        "code": {},
        "whitening": {"mean": numbers(count, 5), "std": numbers(count, 6)},
        "batch_norm": {"running_mean": numbers(count, 7), "running_var": numbers(count, 8), "eps": 1e-4},
        "channels": list(range(count)),
        "side": "after",
        "side_error": {"before": 1.5, "after": 0.3},
        **lines,
        **changes,
    }
