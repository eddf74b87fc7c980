"""Architectures of the published models of this family (MODEL.md 2 and 9), for plans without a checkpoint.

Loading needs none of these: `checkpoint` reads every number off the tensors.
"""

from __future__ import annotations

from ..config import ModelConfig

FAMILY: dict[str, ModelConfig] = {
    "full_capacitor": ModelConfig(),
    "semdisdiffae": ModelConfig(encoder_depth=4),
    "semdisdiffae_p32_v2": ModelConfig(patch_size=32, model_dim=1024, bottleneck_dim=384),
    # decodes FLUX.2's latents as its pipeline has them: 2x2 patches as channels, normalised by FLUX.2's statistics
    "capacitor_decoder": ModelConfig(encoder_depth=0),
}
