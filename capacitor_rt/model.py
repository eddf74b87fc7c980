"""`FullCapacitor`, the public class: checks inputs, picks a backend, keeps the card's API."""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import reference
from .checks import IMAGE_DTYPES, LATENT_DTYPES, check_out, check_tensor
from .config import FullCapacitorInferenceConfig, ModelConfig
from .diffusion import sample, unit_noise
from .errors import InputError
from .reference import Posterior
from .runtime.backend import ServedModule
from .runtime.placement import Place

if TYPE_CHECKING:
    from .checkpoint import CheckpointSource

SIZE_MULTIPLE = 32


class FullCapacitor(ServedModule):
    """FCDM image autoencoder with the interface of the published model.

    Parameters and buffers carry the names of the checkpoint's tensors. `latent_channels` is C, `latent_stride` is s:
    an image `[B,3,H,W]` has latents `[B,C,H/s,W/s]`.

    The Triton backend folds and packs the weights for its GPU, once, when first called. The parameters themselves then
    rest on the CPU as they were loaded (see `placement`): `state_dict` is exact, and the GPU holds the weights once.
    Changes of parameters in place are noticed at the next call, except those made through `.data` or under
    `torch.inference_mode`. `.to("cpu")` frees graphs, arenas and packed weights. To train, use backend="torch".

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

    weights = ("encoder", "decoder")
    latent_norm_running_mean: Tensor | None
    latent_norm_running_var: Tensor | None

    def __init__(
        self, config: ModelConfig, *, backend: str = "auto", strict_size: bool = True, low_latency: bool = False
    ):
        super().__init__(config, backend)
        self.strict_size = strict_size
        self.low_latency = low_latency
        self.source: CheckpointSource | None = None
        self.encoder = reference.Encoder(config) if config.encoder_depth else None
        self.decoder = reference.Decoder(config)
        for name in ("latent_norm_running_mean", "latent_norm_running_var"):
            # a decoder-only checkpoint has no statistics: its latents are decoded as they are
            stats = torch.zeros if name.endswith("mean") else torch.ones
            self.register_buffer(name, stats(config.latent_channels) if self.encoder is not None else None)

    @classmethod
    def from_pretrained(cls, id_or_path: str | PathLike[str], **kwargs) -> FullCapacitor:
        """Load a hub id, a folder, a `.safetensors` file, or "sample" (see `checkpoint.from_pretrained`)."""
        from .checkpoint import from_pretrained

        return from_pretrained(id_or_path, cls=cls, **kwargs)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` (see `checkpoint.save_pretrained`)."""
        from .checkpoint import save_pretrained

        save_pretrained(self, folder)

    def registered_place(self) -> Place:
        weight = self.decoder.out_proj.weight
        return weight.device, weight.dtype

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def latent_stride(self) -> int:
        return self.config.latent_stride

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
            return self.runtime.encode(image, out)

    def latents_of(self, posterior: Posterior) -> Tensor:
        """Whitened mode, float32 `[B,C,h,w]`, of what `encode_posterior` returned."""
        return self.whiten(self._mode(posterior))

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
        if self._fast:
            with torch.no_grad():
                if torch.compiler.is_compiling():
                    out = torch.ops.capacitor_rt.posterior(image, self._number)
                    return Posterior(out[0], out[1] if len(out) > 1 else None)
                return self.runtime.posterior(image)
        self.wake()
        # an enclosing autocast would override the dtypes chosen here
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            image = self._normalise(image)
            mean, logsnr = self.encoder(image)
        return Posterior(mean.float(), None if logsnr is None else logsnr.float())

    def decode(
        self,
        latents: Tensor,
        height: int | None = None,
        width: int | None = None,
        inference_config: FullCapacitorInferenceConfig | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Whitened latents to image.

        Args:
            latents: `[B,C,h,w]` float32, bfloat16 or float16 on the model's device. B may be 0.
            height, width: of the image, in pixels; they must be `h*s` and `w*s`, which is also the default.
            inference_config: sampler settings; default one step, no seed.
            out: float32, bfloat16 or float16 `[B,3,H,W]` to write to, rounded once.

        Returns:
            float32 `[B,3,H,W]`, about [-1,1], not clamped, or `out`.

        Raises:
            InputError: wrong rank, channels, dtype or device; a height or width that does not fit the latents.
        """
        inference_config = inference_config or FullCapacitorInferenceConfig()
        self._offload_hook()
        shape = self._check_latents(latents, height, width)
        check_out(out, shape, latents.device)
        if shape[0] == 0:
            return _write(torch.empty(shape, device=latents.device), out)
        # for the whole batch, however it is split: a seed gives the same image
        noise = _noise(shape, inference_config.seed, latents)
        if self._fast:
            return self._decode_fast(latents, noise, inference_config, out)
        self.wake()
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            z = self._unfold_latents(self.dewhiten(latents))
            image = sample(self._predictor(z, inference_config), noise, self.config, inference_config)
        return _write(image, out)

    def _decode_fast(
        self, latents: Tensor, noise: Tensor, inference: FullCapacitorInferenceConfig, out: Tensor | None
    ) -> Tensor:
        with torch.no_grad():
            if self.config.latent_patch != 1:
                latents = self._unfold_latents(self.dewhiten(latents))
            if torch.compiler.is_compiling():
                settings = (inference.num_steps, inference.sampler, inference.schedule)
                guidance = (inference.pdg, float(inference.pdg_strength))
                return _write(torch.ops.capacitor_rt.decode(latents, noise, self._number, *settings, *guidance), out)
            return self.runtime.decode(latents, noise, inference, out)

    def reconstruct(self, image: Tensor, inference_config: FullCapacitorInferenceConfig | None = None) -> Tensor:
        """`decode(encode(image))`: float32 `[B,3,H,W]` (NCHW also for an NHWC image)."""
        return self.decode(self.encode(image), inference_config=inference_config)

    def whiten(self, z: Tensor) -> Tensor:
        """Raw latents `[B,C,h,w]` to the model's own normalised space, float32; the identity without statistics."""
        if self.latent_norm_running_mean is None:
            return z.float()
        return reference.whiten(z, *self._statistics())

    def dewhiten(self, z: Tensor) -> Tensor:
        """Inverse of `whiten`, float32."""
        if self.latent_norm_running_mean is None:
            return z.float()
        return reference.dewhiten(z, *self._statistics())

    def extra_repr(self) -> str:
        rest = "" if self._placed is None else f", on {self.device} in {self.dtype}, weights at rest"
        latents = f"{self.latent_channels}x1/{self.latent_stride}"
        return f"backend={self.backend!r}, strict_size={self.strict_size}, {latents}{rest}"

    def _statistics(self) -> tuple[Tensor, Tensor, float]:
        return (
            self.latent_norm_running_mean,
            self.latent_norm_running_var,
            self.config.latent_running_stats_eps,
        )

    def _mode(self, posterior: Posterior) -> Tensor:
        mode = reference.posterior_mode(*posterior)
        # order c*4 + i*2 + j of the family's 2x2 latent patches
        return mode if self.config.latent_patch == 1 else nn.functional.pixel_unshuffle(mode, self.config.latent_patch)

    def _unfold_latents(self, z: Tensor) -> Tensor:
        return z if self.config.latent_patch == 1 else nn.functional.pixel_shuffle(z, self.config.latent_patch)

    def _predictor(self, z: Tensor, inference: FullCapacitorInferenceConfig):
        z = z.to(self.dtype)

        def predict_x0(x_t: Tensor, t: float) -> Tensor:
            times = torch.full((z.shape[0],), t, device=z.device)
            x0 = self.decoder(x_t, times, z).float()
            if not inference.pdg:
                return x0
            unguided = self.decoder(x_t, times, z, drop_path=True).float()
            return unguided + inference.pdg_strength * (x0 - unguided)

        return predict_x0

    def _check_image(self, image: Tensor) -> tuple[int, int, int]:
        """(B, H, W) of an image that the encoder takes."""
        if self.encoder is None:
            raise InputError("this checkpoint has a decoder only: encode needs one with encoder.* tensors")
        check_tensor("image", image, IMAGE_DTYPES, self.device)
        channels = self.config.in_channels
        if channels not in (image.shape[1], image.shape[3]):
            raise InputError(f"image has shape {list(image.shape)}: expected [B,{channels},H,W] or [B,H,W,{channels}]")
        height, width = image.shape[2:] if image.shape[1] == channels else image.shape[1:3]
        self.check_size(height, width)
        return image.shape[0], height, width

    def _normalise(self, image: Tensor) -> Tensor:
        """NCHW in [-1,1] in the weights' dtype."""
        if image.shape[1] != self.config.in_channels:
            image = image.permute(0, 3, 1, 2)
        if image.dtype == torch.uint8:
            image = image.float() / 127.5 - 1.0
        return image.to(self.dtype)

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError, naming the nearest legal sizes, unless `height` x `width` pixels can be encoded."""
        multiple = self.size_multiple
        for name, size in (("height", height), ("width", width)):
            if size % multiple or size == 0:
                below, above = size // multiple * multiple, (size // multiple + 1) * multiple
                use = f"{below} or {above}" if below else f"{above}"
                hint = ""
                if self.strict_size and size and size % self.latent_stride == 0:
                    hint = f", or strict_size=False, which admits multiples of {self.latent_stride}"
                raise InputError(f"{name} {size} is not a multiple of {multiple}: use {use}{hint}")

    def _check_latents(self, latents: Tensor, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Shape of the image that these latents decode to."""
        check_tensor("latents", latents, LATENT_DTYPES, self.device)
        if latents.shape[1] != self.latent_channels:
            raise InputError(f"latents have shape {list(latents.shape)}: expected [B,{self.latent_channels},h,w]")
        batch, _, h, w = latents.shape
        if 0 in (h, w):
            raise InputError(f"latents have shape {list(latents.shape)}: h and w must be at least 1")
        size = (h * self.latent_stride, w * self.latent_stride)
        for name, given, fits in zip(("height", "width"), (height, width), size, strict=True):
            if given is not None and given != fits:
                raise InputError(
                    f"{name} {given} does not fit latents of {h}x{w}, which decode to {size[0]}x{size[1]}: "
                    f"pass {name}={fits} or leave it out"
                )
        return batch, self.config.in_channels, *size


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
