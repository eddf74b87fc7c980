"""`FullCapacitor`, the public class: checks inputs, hands them to a backend, keeps the card's interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import (
    IMAGE_DTYPES,
    LATENT_DTYPES,
    check_dropped,
    check_inference_config,
    check_input,
    check_latents,
    check_out,
)
from .config import FullCapacitorInferenceConfig
from .errors import InputError
from .pretrained import PretrainedAutoencoder
from .reference import Autoencoder, Posterior
from .runtime.memory import copy_into


class FullCapacitor(PretrainedAutoencoder):
    """FCDM image autoencoder with the interface of the published model.

    Parameters and buffers carry the names of the checkpoint's tensors. `latent_channels` is C, `latent_stride` is s:
    an image `[B,3,H,W]` has latents `[B,C,H/s,W/s]`.

    The Triton backend folds and packs the weights for its GPU, once, when first called; the packed copies lie beside
    the parameters. Changes of parameters in place are noticed at the next call, except those made through `.data` or
    under `torch.inference_mode`. `.to("cpu")` and `release()` free graphs, arenas and packed weights.

    The torch backend is differentiable, and "auto" takes it where an input or a parameter requires grad.

    Calls from several threads take turns; any current stream will do, and nothing waits for the device.

    Args:
        config: architecture.
        backend: "torch"; "triton" (a GPU of compute capability 8.0 or later, or Triton's interpreter); "auto", which is
            "triton" on such a GPU in bfloat16 or float16 and "torch" elsewhere, and for whatever needs gradients.
        strict_size: require H and W to be multiples of 32, as the published model does; False admits every
            multiple of the latent stride.
        low_latency: let the Triton backend run a single image by launches shaped for it, which cut sums in slices. A
            row's bits then depend on whether it came alone; otherwise they depend neither on the batch nor on the
            place in it.
        cuda_graphs: capture a CUDA graph for each shape and replay it; else launches are queued one by one.
        overlap: make two branches of a graph of the halves of an even batch, so that one half takes the SMs that the
            other leaves idle between and at the end of its launches. Bits stay as they are. What it gains is not
            measured yet.
        narrow_tiles: run few images by narrower tiles, which leave the same bits; turned off by itself on a GPU where
            they were compared and did not.
        dependent_launch: let each launch start while the one before is at its end, and wait there: programmatic
            dependent launch, compute capability 9.0 or later. Bits stay as they are; the gain is not measured yet.
        memory_budget: bytes that the Triton backend may keep in arenas beside the packed weights; by default at most
            2 GiB and an eighth of the device's memory. `release()` frees them.
    """

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
            InputError: wrong rank, channels, dtype, device or size; a decoder-only model; a gradient is asked for of
                backend="triton".
        """
        self._offload_hook()
        batch, height, width = self._check_image(image)
        shape = (batch, self.latent_channels, height // self.latent_stride, width // self.latent_stride)
        check_out(out, shape, image.device)
        if batch == 0:
            return _write(torch.empty(shape, device=image.device), out)
        self._check_fp8(image)
        if self.config.latent_patch == 1:
            if self._traced(image):
                return _write(torch.ops.capacitor_rt.encode(image, self._number), out)
            latents = self._by_triton("encoder", image, lambda runtime: runtime.encode(image, out))
            if latents is not None:
                return latents
        return _write(self.latents_of(self.encode_posterior(image)), out)

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
        self._check_fp8(image)
        if self._traced(image):
            out = torch.ops.capacitor_rt.posterior(image, self._number)
            return Posterior(out[0], out[1] if len(out) > 1 else None)
        posterior = self._by_triton("encoder", image, lambda runtime: runtime.posterior(image))
        if posterior is not None:
            return posterior
        if self._fp8 is not None:
            return self._emulated_fp8(image)
        # an enclosing autocast would override the dtypes chosen here
        with torch.autocast(image.device.type, enabled=False):
            return Autoencoder.encode_posterior(self, image)

    def decode(
        self,
        latents: Tensor,
        height: int | None = None,
        width: int | None = None,
        inference_config: FullCapacitorInferenceConfig | Mapping[str, Any] | None = None,
        *,
        noise: Tensor | None = None,
        dropped: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Whitened latents to image.

        Args:
            latents: `[B,C,h,w]` float32, bfloat16 or float16 on the model's device. B may be 0.
            height, width: of the image, in pixels; they must be `h*s` and `w*s`, which is also the default.
            inference_config: sampler settings, or a dict of their fields; default one step, no seed.
            noise: unit normal float32 `[B,3,H,W]` to start from; drawn by the settings' seed when None.
            dropped: bool `[B,1,h,w]`, True for the tokens that guidance by tokens (mdiffae) leaves out in its
                unconditional pass; drawn in groups of 2x2 by the settings' seed when None.
            out: float32, bfloat16 or float16 `[B,3,H,W]` to write to, rounded once.

        Returns:
            float32 `[B,3,H,W]`, about [-1,1], not clamped, or `out`.

        Raises:
            InputError: wrong rank, channels, dtype or device; a height or width that does not fit the latents.
            ConfigError: settings that are unknown, out of range, or not of this model.
        """
        inference = check_inference_config(inference_config)
        self._offload_hook()
        check_input("latents", latents, LATENT_DTYPES, self.device)
        batch, *size = check_latents(latents, self.latent_channels, self.latent_stride, height, width)
        shape = (batch, self.config.in_channels, *size)
        check_out(out, shape, latents.device)
        if noise is not None:
            check_input("noise", noise, (torch.float32,), latents.device, shape)
        drop = inference.drop_for(self.config)
        if dropped is not None:
            check_dropped(dropped, drop, (batch, 1, *latents.shape[2:]), latents.device)
        if batch == 0:
            return _write(torch.empty(shape, device=latents.device), out)
        if noise is None:
            # for the whole batch, however it is split: a seed gives the same image
            noise = self._noise(shape, inference, latents)
        if drop == "tokens" and dropped is None:
            dropped = self._dropped(latents, inference.seed)
        if drop != "tokens" and self._traced(latents):
            settings = (inference.num_steps, inference.sampler, inference.schedule)
            guidance = (inference.pdg, float(inference.pdg_strength))
            z = self._bottleneck(latents)
            return _write(torch.ops.capacitor_rt.decode(z, noise, self._number, *settings, *guidance), out)
        image = self._by_triton(
            "decoder",
            latents,
            lambda runtime: runtime.decode(self._bottleneck(latents), noise, inference, out, dropped),
        )
        if image is not None:
            return image
        with torch.autocast(latents.device.type, enabled=False):
            image = Autoencoder.decode(self, latents, inference_config=inference, noise=noise, dropped=dropped)
            return _write(image, out)

    def reconstruct(
        self, image: Tensor, inference_config: FullCapacitorInferenceConfig | Mapping[str, Any] | None = None
    ) -> Tensor:
        """`decode(encode(image))`: float32 `[B,3,H,W]` (NCHW also for an NHWC image)."""
        return self.decode(self.encode(image), inference_config=inference_config)

    def extra_repr(self) -> str:
        latents = f"{self.latent_channels}x1/{self.latent_stride}"
        return f"backend={self.backend!r}, strict_size={self.strict_size}, {latents}"

    def _check_image(self, image: Tensor) -> tuple[int, int, int]:
        """(B, H, W) of an image that the encoder takes."""
        if self.encoder is None:
            raise InputError("this checkpoint has a decoder only: encode needs one with encoder.* tensors")
        check_input("image", image, IMAGE_DTYPES, self.device)
        channels = self.config.in_channels
        # sizes may be symbols of torch.compile, which `in` cannot compare
        if image.shape[1] != channels and image.shape[3] != channels:
            raise InputError(f"image has shape {list(image.shape)}: expected [B,{channels},H,W] or [B,H,W,{channels}]")
        height, width = image.shape[2:] if image.shape[1] == channels else image.shape[1:3]
        self.check_size(height, width)
        if image.is_floating_point():
            self._look_once(image)
        return image.shape[0], height, width

    def _bottleneck(self, latents: Tensor) -> Tensor:
        """What the runtime decodes: whitened latents, raw where whitening 2x2 patches is a step of its own."""
        return latents if self.config.latent_patch == 1 else self.unfold_latent_patches(self.dewhiten(latents))


def _write(result: Tensor, out: Tensor | None) -> Tensor:
    """The result, in `out` where one is given."""
    return result if out is None else copy_into(out, result)
