"""Pages of results made without a model: pictures and latents of given values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from cache_cases import pixels

from capacitor_rt.evaluation.metrics import cosine_similarity
from capacitor_rt.evaluation.view.writer import PageReport, PageWriter, Shown, ShownModel

MODELS = (ShownModel("first", 8, 16), ShownModel("second", 8, 16))
MARKUP = '"><img src=x onerror=window.owned=1></script><script>window.owned=1</script>'
HOSTILE = MARKUP + "\u2028\n\x00\udcff\u202e{{7*7}}.png"
"""As a name of a file may be, as Python holds it: markup, line breaks, NUL, a byte that is not UTF-8, bidi override."""


def shown(i: int, height: int = 48, width: int = 64, name: str | None = None, originals: bool = True) -> Shown:
    """An image whose second reconstruction is worse than its first for even `i` and better for odd ones."""
    original = pixels(height, width, seed=i)
    rng = np.random.default_rng(i)
    noise = [6 + i % 7, (2 if i % 2 else 14) + i % 5]
    decoded = {
        model.name: np.clip(original + rng.normal(0, sigma, original.shape), 0, 255).round().astype(np.uint8)
        for model, sigma in zip(MODELS, noise, strict=True)
    }
    generator = torch.Generator().manual_seed(i)
    z = torch.randn(8, height // 16, width // 16, generator=generator)
    latents = {"first": z, "second": z + 0.3 * torch.randn(z.shape, generator=generator)}
    return Shown(name or f"image {i:04d}.png", original if originals else None, decoded, latents, 1000 + i, "a note")


def make_page(out: Path, items: list[Shown], **options) -> PageReport:
    """Write a page of `items`."""
    with PageWriter(out, MODELS, "the tests", workers=1) as page:
        for item in items:
            page.add(item)
        a, b = (torch.cat([item.latents[m.name].flatten(1) for item in items], 1)[None, ..., None] for m in MODELS)
        return page.finish(cosines={("first", "second"): cosine_similarity(a, b)}, **options)
