"""Figures that others published, which no file of results holds."""

from __future__ import annotations

PUBLISHED_SOURCE = "RTX 5090, bfloat16, eager, from the model cards of full_capacitor and capacitor_decoder"
# RTX 5090, bf16: milliseconds of this model and of the FLUX.2 VAE, peak memory in percent of the latter's; encode from
# the card of full_capacitor, decode from capacitor_decoder's
PUBLISHED: dict[str, tuple[float, float | None, float | None]] = {
    "card: encode 256x256, batch 128": (42.56, 383.41, 8.1),
    "card: encode 512x512, batch 32": (44.97, 353.58, 8.0),
    "capacitor_decoder: decode 512x512, batch 1": (7.34, None, None),
    "capacitor_decoder: decode 1024x1024, batch 1": (11.60, None, None),
    "capacitor_decoder: decode 2048x2048, batch 1": (55.81, None, None),
}
# dB over 2000 images: mean, std, median, P5, P95
PUBLISHED_PSNR = {
    "full_capacitor (card)": (36.62, 4.63, 36.55, 29.14, 44.05),
    "FLUX.2 VAE (card)": (36.28, 4.53, 36.07, 28.90, 43.63),
    "difference (card)": (0.34, 0.68, 0.41, -0.85, 1.31),
}
