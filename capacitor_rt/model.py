"""`FullCapacitor`, the public class: checks inputs, hands them to a backend, keeps the card's interface."""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checkpoint
from .checks import IMAGE_DTYPES, LATENT_DTYPES, check_device, check_input, check_latents, check_multiple, check_out
from .config import FullCapacitorInferenceConfig, ModelConfig
from .diffusion import unit_noise
from .errors import InputError
from .reference import Posterior
from .runtime.backend import ServedAutoencoder

if TYPE_CHECKING:
    from typing_extensions import Self

SIZE_MULTIPLE = 32


class FullCapacitor(ServedAutoencoder):
    """FCDM image autoencoder with the interface of the published model.

    Parameters and buffers carry the names of the checkpoint's tensors. `latent_channels` is C, `latent_stride` is s:
    an image `[B,3,H,W]` has latents `[B,C,H/s,W/s]`.

    The Triton backend folds and packs the weights for its GPU, once, when first called; the packed copies lie beside
    the parameters. Changes of parameters in place are noticed at the next call, except those made through `.data` or
    under `torch.inference_mode`. `.to("cpu")` frees graphs, arenas and packed weights. To train, use backend="torch".

    Calls from several threads take turns; any current stream will do, and nothing waits for the device.

    Args:
        config: architecture.
        backend: "torch"; "triton" (a GPU of compute capability 8.0 or later, or Triton's interpreter); "auto", which is
            "triton" on such a GPU in bfloat16 or float16 and "torch" elsewhere.
        strict_size: require H and W to be multiples of 32, as the published model does; False admits every
            multiple of the latent stride.
        low_latency: let the Triton backend run a single image by launches shaped for it. A row's bits then depend on
            whether it came alone; otherwise they depend neither on the batch nor on the place in it.
    """

    def __init__(
        self, config: ModelConfig, *, backend: str = "auto", strict_size: bool = True, low_latency: bool = False
    ):
        super().__init__(config, backend=backend, low_latency=low_latency)
        self.strict_size = strict_size
        self.source: checkpoint.CheckpointSource | None = None

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
        strict: bool = True,
        backend: str = "auto",
        strict_size: bool = True,
        low_latency: bool = False,
    ) -> Self:
        """Load a model, frozen and in eval mode.

        Args:
            id_or_path: hub id, folder, `.safetensors` file, or "sample" for the bundled one.
            device: default CPU.
            dtype, torch_dtype: of the convolutions' weights, default float32 whatever the file holds. Statistics, time
                embedding and AdaLN stay in float32.
            revision, cache_dir, token, local_files_only, force_download, subfolder: as in `huggingface_hub`;
                HF_HUB_OFFLINE is honoured.
            strict: False only warns of tensors that belong to no part of the model. Missing tensors are always an
                error.
            backend, strict_size, low_latency: see the class.

        Raises:
            CheckpointError: not found, not readable, or its tensors do not fit; all of them are listed.
            InputError: `device` is not there.
        """
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise InputError(f"dtype {dtype} and torch_dtype {torch_dtype} differ: pass one of them")
        target = check_device(device)
        source = checkpoint.resolve(
            id_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
        )
        read = checkpoint.read(source, strict=strict)
        with torch.device("meta"):
            model = cls(read.config, backend=backend, strict_size=strict_size, low_latency=low_latency)
        model.load_checkpoint(read.tensors)
        model.source = source
        return model.to(device=target, dtype=dtype or torch_dtype or torch.float32)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, each whole or not at all.

        Tensors keep their dtype; `from_pretrained(folder)` gives the same model back.
        """
        checkpoint.save(folder, self.config, self.state_dict())

    @property
    def size_multiple(self) -> int:
        """H and W of an image must be multiples of this."""
        return math.lcm(SIZE_MULTIPLE, self.latent_stride) if self.strict_size else self.latent_stride

    def forward(self, image: Tensor) -> Tensor:
        """`encode`."""
        return self.encode(image)

    def encode(self, image: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Image to whitened latents: the mode of the posterior.

        Args:
            image: `[B,3,H,W]` or `[B,H,W,3]`, float32, bfloat16 or float16 in [-1,1] or uint8 in [0,255],
                of any strides, on the model's device. B may be 0.
            out: float32, bfloat16 or float16 `[B,C,H/s,W/s]` to write to, rounded once.

        Returns:
            float32 `[B,C,H/s,W/s]`, or `out`.

        Raises:
            InputError: wrong rank, channels, dtype, device or size; a decoder-only model; an input that requires grad.
        """
        self._offload_hook()
        batch, height, width = self._check_image(image)
        shape = (batch, self.latent_channels, height // self.latent_stride, width // self.latent_stride)
        check_out(out, shape, image.device)
        if batch == 0:
            return _write(torch.empty(shape, device=image.device), out)
        if not self._fast or self.config.latent_patch != 1:
            return _write(self.latents_of(self.encode_posterior(image)), out)
        with torch.no_grad():
            if torch.compiler.is_compiling():
                return _write(torch.ops.capacitor_rt.encode(image, self._number), out)
            return self.triton.encode(image, out)

    def encode_posterior(self, image: Tensor) -> Posterior:
        """Image to the raw posterior, before the mode is taken and whitened. Arguments and errors as in `encode`.

        Returns:
            (mean, logsnr), each float32 `[B,Z,H/p,W/p]`.
        """
        self._offload_hook()
        batch, height, width = self._check_image(image)
        if batch == 0:
            p = self.config.patch_size
            shape = (0, self.config.bottleneck_dim, height // p, width // p)
            mean, logsnr = (torch.empty(shape, device=image.device) for _ in range(2))
            return Posterior(mean, logsnr if self.config.bottleneck_posterior_kind == "diagonal_gaussian" else None)
        with torch.no_grad():
            if not self._fast:
                # an enclosing autocast would override the dtypes chosen here
                with torch.autocast(image.device.type, enabled=False):
                    return super().encode_posterior(image)
            if torch.compiler.is_compiling():
                out = torch.ops.capacitor_rt.posterior(image, self._number)
                return Posterior(out[0], out[1] if len(out) > 1 else None)
            return self.triton.posterior(image)

    def decode(
        self,
        latents: Tensor,
        height: int | None = None,
        width: int | None = None,
        inference_config: FullCapacitorInferenceConfig | None = None,
        *,
        noise: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Whitened latents to image.

        Args:
            latents: `[B,C,h,w]` float32, bfloat16 or float16 on the model's device. B may be 0.
            height, width: of the image, in pixels; they must be `h*s` and `w*s`, which is also the default.
            inference_config: sampler settings; default one step, no seed.
            noise: unit normal float32 `[B,3,H,W]` to start from; drawn by the settings' seed when None.
            out: float32, bfloat16 or float16 `[B,3,H,W]` to write to, rounded once.

        Returns:
            float32 `[B,3,H,W]`, about [-1,1], not clamped, or `out`.

        Raises:
            InputError: wrong rank, channels, dtype or device; a height or width that does not fit the latents.
        """
        inference = inference_config or FullCapacitorInferenceConfig()
        self._offload_hook()
        check_input("latents", latents, LATENT_DTYPES, self.device)
        batch, *size = check_latents(latents, self.latent_channels, self.latent_stride, height, width)
        shape = (batch, self.config.in_channels, *size)
        check_out(out, shape, latents.device)
        if noise is None:
            # for the whole batch, however it is split: a seed gives the same image
            noise = _noise(shape, inference.seed, latents)
        else:
            check_input("noise", noise, (torch.float32,), latents.device, shape)
        if batch == 0:
            return _write(torch.empty(shape, device=latents.device), out)
        with torch.no_grad():
            if not self._fast:
                with torch.autocast(latents.device.type, enabled=False):
                    return _write(super().decode(latents, inference_config=inference, noise=noise), out)
            if self.config.latent_patch != 1:
                # these models whiten by a step of its own
                latents = self.unfold_latent_patches(self.dewhiten(latents))
            if torch.compiler.is_compiling():
                settings = (inference.num_steps, inference.sampler, inference.schedule)
                guidance = (inference.pdg, float(inference.pdg_strength))
                return _write(torch.ops.capacitor_rt.decode(latents, noise, self._number, *settings, *guidance), out)
            return self.triton.decode(latents, noise, inference, out)

    def reconstruct(self, image: Tensor, inference_config: FullCapacitorInferenceConfig | None = None) -> Tensor:
        """`decode(encode(image))`: float32 `[B,3,H,W]` (NCHW also for an NHWC image)."""
        return self.decode(self.encode(image), inference_config=inference_config)

    def extra_repr(self) -> str:
        latents = f"{self.latent_channels}x1/{self.latent_stride}"
        return f"backend={self.backend!r}, strict_size={self.strict_size}, {latents}"

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError, naming the nearest legal sizes, unless `height` x `width` pixels can be encoded."""
        check_multiple(height, width, self.size_multiple, self.latent_stride)

    def _check_image(self, image: Tensor) -> tuple[int, int, int]:
        """(B, H, W) of an image that the encoder takes."""
        if self.encoder is None:
            raise InputError("this checkpoint has a decoder only: encode needs one with encoder.* tensors")
        check_input("image", image, IMAGE_DTYPES, self.device)
        channels = self.config.in_channels
        if channels not in (image.shape[1], image.shape[3]):
            raise InputError(f"image has shape {list(image.shape)}: expected [B,{channels},H,W] or [B,H,W,{channels}]")
        height, width = image.shape[2:] if image.shape[1] == channels else image.shape[1:3]
        self.check_size(height, width)
        return image.shape[0], height, width


def _noise(shape: tuple[int, ...], seed: int | None, like: Tensor) -> Tensor:
    if seed is not None and torch.compiler.is_compiling():
        return torch.ops.capacitor_rt.seeded_noise(like, list(shape), seed)
    return unit_noise(shape, seed, like.device)


def _write(result: Tensor, out: Tensor | None) -> Tensor:
    """The result, in `out` where one is given."""
    if out is None:
        return result
    with torch.no_grad():
        return out.copy_(result)
