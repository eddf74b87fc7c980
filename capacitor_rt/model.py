"""`FullCapacitor`, the public class: checks inputs, picks a backend, keeps the card's API."""

from __future__ import annotations

import importlib.util
import math
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import reference
from .config import FullCapacitorInferenceConfig, ModelConfig
from .diffusion import sample, unit_noise
from .errors import InputError

if TYPE_CHECKING:
    from .checkpoint import CheckpointSource
    from .runtime.runtime import Runtime

BACKENDS = ("auto", "torch", "triton")
SIZE_MULTIPLE = 32
IMAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)


class Posterior(NamedTuple):
    """Raw posterior before whitening: `mean` and `logsnr`, float32 `[B,Z,h,w]`; logsnr None if deterministic."""

    mean: Tensor
    logsnr: Tensor | None


class FullCapacitor(nn.Module):
    """FCDM image autoencoder with the interface of the published model.

    Parameters and buffers carry the names of the checkpoint's tensors. `latent_channels` is C, `latent_stride` is s:
    an image `[B,3,H,W]` has latents `[B,C,H/s,W/s]`.

    The Triton backend folds and packs the weights for its GPU. The parameters themselves then stay on the CPU as they
    were loaded: `state_dict` is exact, and the GPU holds the weights once.

    Args:
        config: architecture.
        backend: "torch"; "triton" (a GPU of compute capability 8.0 or later, or Triton's interpreter); "auto", which is
            "triton" on such a GPU in bfloat16 or float16 and "torch" elsewhere.
        strict_size: require H and W to be multiples of 32, as the published model does; False admits every
            multiple of the latent stride.
        low_latency: let the Triton backend run a single image by launches shaped for it. A row's bits then depend on
            whether it came alone; otherwise they depend neither on the batch nor on the place in it.
    """

    latent_norm_running_mean: Tensor | None
    latent_norm_running_var: Tensor | None

    def __init__(
        self, config: ModelConfig, *, backend: str = "auto", strict_size: bool = True, low_latency: bool = False
    ):
        super().__init__()
        if backend not in BACKENDS:
            raise InputError(f"backend {backend!r} is unknown: use one of {', '.join(map(repr, BACKENDS))}")
        self.config = config
        self.backend = backend
        self.strict_size = strict_size
        self.low_latency = low_latency
        self.source: CheckpointSource | None = None
        self.encoder = reference.Encoder(config) if config.encoder_depth else None
        self.decoder = reference.Decoder(config)
        for name in ("latent_norm_running_mean", "latent_norm_running_var"):
            # a decoder-only checkpoint has no statistics: its latents are decoded as they are
            stats = torch.zeros if name.endswith("mean") else torch.ones
            self.register_buffer(name, stats(config.latent_channels) if self.encoder is not None else None)
        # where the Triton backend runs on a GPU, while the parameters are on the CPU
        self._placed: tuple[torch.device, torch.dtype] | None = None
        self._runtime: Runtime | None = None
        self._number: int | None = None

    @classmethod
    def from_pretrained(cls, id_or_path: str | PathLike[str], **kwargs) -> FullCapacitor:
        """Load a hub id, a folder, a `.safetensors` file, or "sample" (see `checkpoint.from_pretrained`)."""
        from .checkpoint import from_pretrained

        return from_pretrained(id_or_path, cls=cls, **kwargs)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` (see `checkpoint.save_pretrained`)."""
        from .checkpoint import save_pretrained

        save_pretrained(self, folder)

    def _apply(self, fn, recurse=True):
        device, dtype = self.device, self.dtype
        probe = fn(torch.empty(0, device=device, dtype=dtype))
        placed = probe.device.type == "cuda" and self._resolve(probe.device, probe.dtype) == "triton"

        def move(t: Tensor) -> Tensor:
            if placed:
                return t.to("cpu")
            # parameters that waited on the CPU in float32 take the type that the model had
            return fn(t.to(dtype) if self._placed and t.is_floating_point() else t)

        if recurse:
            for module in self.children():
                module._apply(move)
        # what is left are the running statistics: they stay in float32, and go along
        super()._apply(reference.at_least_float32(fn), recurse=False)
        self._placed = (probe.device, probe.dtype) if placed else None
        self._free()
        return self

    def _resolve(self, device: torch.device, dtype: torch.dtype) -> str:
        """The backend that serves `device` and `dtype`."""
        if self.backend != "auto":
            return self.backend
        config = self.config
        fits = config.in_channels == 3 and config.depthwise_kernel_size == 7 and dtype in HALF_DTYPES
        if device.type != "cuda" or not fits or importlib.util.find_spec("triton") is None:
            return "torch"
        return "triton" if torch.cuda.get_device_capability(device)[0] >= 8 else "torch"

    @property
    def runtime(self) -> Runtime | None:
        """The Triton backend where it serves, made on first use; None where the torch backend does.

        Raises:
            InputError: the Triton backend was asked for where it cannot run.
        """
        if self._runtime is None and self._resolve(self.device, self.dtype) == "triton":
            from .runtime import ops
            from .runtime.runtime import Runtime

            self._runtime = Runtime(self, self.device, self.dtype)
            self._number = ops.register(self)
        return self._runtime

    def _free(self) -> None:
        if self._runtime is not None:
            self._runtime.clear()
        self._runtime = self._number = None

    def __getstate__(self) -> dict:
        # graphs and packed weights are made anew where the copy runs
        return self.__dict__ | {"_runtime": None, "_number": None}

    def load_state_dict(self, *args, **kwargs):
        self._free()
        return super().load_state_dict(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the convolutions."""
        return self._placed[1] if self._placed else self.decoder.out_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where images and latents must be."""
        return self._placed[0] if self._placed else self.decoder.out_proj.weight.device

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

    def encode(self, image: Tensor) -> Tensor:
        """Image to whitened latents: the mode of the posterior.

        Args:
            image: `[B,3,H,W]` or `[B,H,W,3]`, float32, bfloat16 or float16 in [-1,1] or uint8 in [0,255],
                of any strides, on the model's device. B may be 0.

        Returns:
            float32 `[B,C,H/s,W/s]`.

        Raises:
            InputError: wrong rank, channels, dtype, device or size; a decoder-only model; an input that requires grad.
        """
        self._check_image(image)
        if self.runtime is None or self.config.latent_patch != 1 or image.shape[0] == 0:
            return self.latents_of(self.encode_posterior(image))
        with torch.no_grad():
            if torch.compiler.is_compiling():
                return torch.ops.capacitor_rt.encode(image, self._number)
            return self._runtime.encode(image)

    def latents_of(self, posterior: Posterior) -> Tensor:
        """Whitened mode, float32 `[B,C,h,w]`, of what `encode_posterior` returned."""
        return self.whiten(self._mode(posterior))

    def encode_posterior(self, image: Tensor) -> Posterior:
        """Image to the raw posterior, before the mode is taken and whitened. Arguments and errors as in `encode`.

        Returns:
            (mean, logsnr), each float32 `[B,Z,H/p,W/p]`.
        """
        self._check_image(image)
        if self.runtime is not None and image.shape[0]:
            with torch.no_grad():
                if torch.compiler.is_compiling():
                    out = torch.ops.capacitor_rt.posterior(image, self._number)
                    return Posterior(out[0], out[1] if len(out) > 1 else None)
                return self._runtime.posterior(image)
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
    ) -> Tensor:
        """Whitened latents to image.

        Args:
            latents: `[B,C,h,w]` float32, bfloat16 or float16 on the model's device. B may be 0.
            height, width: of the image, in pixels; they must be `h*s` and `w*s`, which is also the default.
            inference_config: sampler settings; default one step, no seed.

        Returns:
            float32 `[B,3,H,W]`, about [-1,1], not clamped.

        Raises:
            InputError: wrong rank, channels, dtype or device; a height or width that does not fit the latents.
        """
        inference_config = inference_config or FullCapacitorInferenceConfig()
        self._check_latents(latents)
        batch, _, h, w = latents.shape
        size = (h * self.latent_stride, w * self.latent_stride)
        for name, given, fits in zip(("height", "width"), (height, width), size, strict=True):
            if given is not None and given != fits:
                raise InputError(
                    f"{name} {given} does not fit latents of {h}x{w}, which decode to {size[0]}x{size[1]}: "
                    f"pass {name}={fits} or leave it out"
                )
        shape = (batch, self.config.in_channels, *size)
        if self.runtime is not None and batch:
            return self._decode_fast(
                latents, unit_noise(shape, inference_config.seed, latents.device), inference_config
            )
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            z = self._unfold_latents(self.dewhiten(latents))
            noise = unit_noise(shape, inference_config.seed, latents.device)
            return sample(self._predictor(z, inference_config), noise, self.config, inference_config)

    def _decode_fast(self, latents: Tensor, noise: Tensor, inference: FullCapacitorInferenceConfig) -> Tensor:
        with torch.no_grad():
            if self.config.latent_patch != 1:
                latents = self._unfold_latents(self.dewhiten(latents))
            if torch.compiler.is_compiling():
                settings = (inference.num_steps, inference.sampler, inference.schedule)
                guidance = (inference.pdg, float(inference.pdg_strength))
                return torch.ops.capacitor_rt.decode(latents, noise, self._number, *settings, *guidance)
            return self._runtime.decode(latents, noise, inference)

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
        return (
            f"backend={self.backend!r}, strict_size={self.strict_size}, {self.latent_channels}x1/{self.latent_stride}"
        )

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

    def _check_image(self, image: Tensor) -> None:
        if self.encoder is None:
            raise InputError("this checkpoint has a decoder only: encode needs one with encoder.* tensors")
        _check_tensor("image", image, IMAGE_DTYPES, self.device)
        channels = self.config.in_channels
        if channels not in (image.shape[1], image.shape[3]):
            raise InputError(f"image has shape {list(image.shape)}: expected [B,{channels},H,W] or [B,H,W,{channels}]")
        self.check_size(*(image.shape[2:] if image.shape[1] == channels else image.shape[1:3]))

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

    def _check_latents(self, latents: Tensor) -> None:
        _check_tensor("latents", latents, LATENT_DTYPES, self.device)
        if latents.shape[1] != self.latent_channels:
            raise InputError(f"latents have shape {list(latents.shape)}: expected [B,{self.latent_channels},h,w]")
        if 0 in latents.shape[2:]:
            raise InputError(f"latents have shape {list(latents.shape)}: h and w must be at least 1")


def _check_tensor(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(t, Tensor):
        raise InputError(f"{name} is a {type(t).__name__}: pass a torch.Tensor")
    if t.dim() != 4:
        extra = f"; add the batch dimension: {name}[None]" if t.dim() == 3 else ""
        raise InputError(f"{name} has rank {t.dim()} (shape {list(t.shape)}), not 4{extra}")
    if t.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"{name} has dtype {t.dtype}: convert it to one of {names}")
    if t.device != device:
        raise InputError(f"{name} is on {t.device} and the model on {device}: move one of them with .to()")
    if t.requires_grad and torch.is_grad_enabled():
        raise InputError(f"{name} requires grad, and there is no backward pass yet: pass {name}.detach()")
