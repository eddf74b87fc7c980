"""The FLUX.2 autoencoder of diffusers behind `FullCapacitor`'s interface, for comparisons: encode, decode, reconstruct.

Normalised as the FLUX.2 pipeline does it: the mode of the posterior, 2x2 pixels to channels (order `c*4 + i*2 + j`),
the running statistics of the batch norm. On GPUs its attention runs by this project's kernel, so that large images need
no matrix of scores. diffusers is optional (the extra `bench`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import FullCapacitorInferenceConfig
from ..errors import CheckpointError, InputError
from ..extras import install_hint, is_installed
from ..hub_access import unreachable
from .spatial_attention import use_attention

HUB_ID = "black-forest-labs/FLUX.2-dev"
SIZE_MULTIPLE = 16
PATCH = 2
# vae/config.json of the published weights, less what only pipelines read
CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "batch_norm_eps": 1e-4,
    "batch_norm_momentum": 0.1,
    "patch_size": (2, 2),
}


def missing() -> str | None:
    """Why the FLUX.2 VAE cannot be built here, in one line that says what to install; None where it can."""
    if not is_installed("diffusers"):
        return f"diffusers is not installed: {install_hint('bench')}"
    try:
        from diffusers import AutoencoderKLFlux2  # noqa: F401
    except (ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"diffusers has no usable AutoencoderKLFlux2 ({reason}): pip install -U 'diffusers>=0.36'"
    return None


def require() -> None:
    """Raise InputError unless the FLUX.2 VAE can be built here."""
    reason = missing()
    if reason:
        raise InputError(f"the FLUX.2 VAE needs diffusers: {reason}")


def _vae_class() -> Any:
    require()
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2


class Flux2(nn.Module):
    """An `AutoencoderKLFlux2` that takes and gives what `FullCapacitor` does; latents `[B,128,H/16,W/16]`.

    Args:
        vae: the diffusers model, of which nothing but its attention processors is changed.
        attention: "auto" (this project's kernel on NVIDIA GPUs in bfloat16 and float16, torch elsewhere), "triton" or
            "torch".
    """

    size_multiple = SIZE_MULTIPLE

    def __init__(self, vae: Any, attention: str = "auto"):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        use_attention(self.vae, attention)

    @classmethod
    def random(cls, config: dict[str, Any] | None = None, seed: int = 0, attention: str = "auto") -> Flux2:
        """The published architecture (or `config`) in float32 on the CPU, weights as torch initialises them."""
        vae_class = _vae_class()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(vae_class(**(config or CONFIG)), attention)

    @classmethod
    def from_pretrained(
        cls, id_or_path: str = HUB_ID, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Flux2:
        """Load a hub id or folder; weights in its `vae` subfolder, or at its root.

        Raises:
            InputError: diffusers is absent. CheckpointError: no weights can be found or fetched.
        """
        vae_class = _vae_class()
        folder = Path(id_or_path)
        at_root = folder.is_dir() and not (folder / "vae").is_dir()
        why = None if folder.is_dir() else unreachable()
        try:
            vae = vae_class.from_pretrained(
                id_or_path,
                subfolder=None if at_root else "vae",
                torch_dtype=dtype,
                low_cpu_mem_usage=False,
                # else each file would be asked for again and again, for half a minute
                local_files_only=why is not None,
            )
        except (OSError, ValueError) as error:
            reason = why or str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"no FLUX.2 VAE at {id_or_path} ({reason}): give a folder that holds its vae (psnr: flux2:FOLDER), "
                "or log in to the hub where the weights were accepted"
            ) from None
        return cls(vae).to(device)

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image `[B,3,H,W]` in [-1,1], or uint8 `[B,H,W,3]`, to normalised latents, float32 `[B,128,H/16,W/16]`."""
        if image.dtype == torch.uint8:
            image = image.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        mode = self.vae.encode(image.to(self.dtype)).latent_dist.mode()
        mean, std = self.statistics()
        return (F.pixel_unshuffle(mode, PATCH).float() - mean) / std

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        height: int | None = None,
        width: int | None = None,
        inference_config: FullCapacitorInferenceConfig | None = None,
    ) -> Tensor:
        """Normalised latents to image, float32 `[B,3,H,W]`; a VAE has no steps, so only the latents count."""
        mean, std = self.statistics()
        z = F.pixel_shuffle(latents.float() * std + mean, PATCH)
        return self.vae.decode(z.to(self.dtype), return_dict=False)[0].float()

    def reconstruct(self, image: Tensor, inference_config: FullCapacitorInferenceConfig | None = None) -> Tensor:
        """`decode(encode(image))`."""
        return self.decode(self.encode(image))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `sqrt(var + eps)` of the batch norm per channel, float32 `[128,1,1]`."""
        norm = self.vae.bn
        mean, var = (t.float()[:, None, None] for t in (norm.running_mean, norm.running_var))
        return mean, (var + norm.eps).sqrt()
