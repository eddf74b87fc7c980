"""The model behind the interfaces of diffusers' autoencoders: for pipelines, trainers and scripts that take one.

`CapacitorFlux2VAE` stands where an `AutoencoderKLFlux2` does, `CapacitorVAE` where an `AutoencoderKL` does.
"""

from __future__ import annotations

from .vae import CapacitorFlux2VAE, CapacitorVAE

__all__ = ["CapacitorFlux2VAE", "CapacitorVAE"]
