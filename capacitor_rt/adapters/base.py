"""`DiffusersVAE`: a `FullCapacitor` with the methods and attributes of a diffusers VAE, less what its latents are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import companion
from ..checks import check_inference_config, check_model_dtype
from ..config import FullCapacitorInferenceConfig
from ..diffusion import unit_noise
from ..errors import InputError
from ..model import FullCapacitor
from . import settings
from .config import AdapterConfig
from .outputs import Generators, draw_normal, output_classes

if TYPE_CHECKING:
    from typing_extensions import Self

SEED = 0
_HALVES = ("encoder", "decoder")
_IGNORED = {
    "device_map",
    "disable_mmap",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "use_flashpack",
    "use_safetensors",
    "variant",
}
"""Of what diffusers' pipelines pass to a model's `from_pretrained`."""
_NEVER = -30.0
"""Log-variance of a deterministic posterior: the least that a distribution of diffusers keeps."""


if TYPE_CHECKING:
    ModelMixin = nn.Module
else:
    # a pipeline's from_pretrained takes no other vae=, and finds this name here when it loads one that it saved
    ModelMixin = output_classes().model


class DiffusersVAE(ModelMixin):
    """What both adapters share. An adapter's latents are `scale * whitened + shift` per channel, in some layout.

    Args:
        model: to be wrapped, not copied. `model.strict_size = False` admits every multiple of its stride.
        inference_config: how `decode` samples, or a dict of the settings' fields. By default one step from the noise
            of seed 0, so that a latent has one image; `{"seed": None}` draws noise anew each time.
        output_dtype: of latents and images; the model's when None, as diffusers has it.
    """

    patch: ClassVar[int] = 1
    """Adapters with 2 unfold 2x2 patches of channels, order `c*4 + i*2 + j`, to `[C/4, 2h, 2w]`."""

    config: AdapterConfig

    def __init__(
        self,
        model: FullCapacitor,
        *,
        inference_config: FullCapacitorInferenceConfig | Mapping[str, Any] | None = None,
        output_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if inference_config is None:
            inference_config = {"seed": SEED}
        self.inference_config = check_inference_config(inference_config)
        self.output_dtype = output_dtype
        self.model = model
        self.quant_conv = nn.Identity()
        self.post_quant_conv = nn.Identity()
        self.use_slicing = self.use_tiling = False
        self.training = model.training
        self._classes = output_classes()

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        backend: str = "auto",
        strict_size: bool = False,
        dtype: torch.dtype | str | None = None,
        **adapter: Any,
    ) -> Self:
        """Load a model and wrap it: frozen, in eval mode, float32 on the CPU by default.

        Args:
            id_or_path, subfolder, torch_dtype, dtype, device, revision, cache_dir, token, local_files_only,
                force_download, backend: see `FullCapacitor.from_pretrained`.
            strict_size: True admits multiples of 32 alone, as the model card does; pipelines make multiples of 16.
            adapter: arguments of the class, by default those that `save_pretrained` left in a folder. What else
                diffusers passes to its models is taken and ignored (variant, use_safetensors, low_cpu_mem_usage, ...):
                there is one file of weights.

        Raises:
            CheckpointError, InputError: see `FullCapacitor.from_pretrained` and the class.
        """
        model = FullCapacitor.from_pretrained(
            id_or_path,
            subfolder=subfolder,
            torch_dtype=torch_dtype,
            dtype=dtype,
            device=device,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            backend=backend,
            strict_size=strict_size,
        )
        assert model.source is not None, "it was loaded"
        path = companion(
            model.source,
            settings.NAME,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        kept = settings.read(path, cls.__name__)
        given = {name: value for name, value in adapter.items() if name not in _IGNORED}
        return cls(model, **{**cls._arguments(kept, model), **given})

    def save_pretrained(self, folder: str | PathLike[str], **_: Any) -> None:
        """Write the model as `FullCapacitor.save_pretrained` does, and `adapter.json` with the arguments of this class.

        `from_pretrained(folder)` of the same class gives the same adapter back; `FullCapacitor`'s gives the model.
        """
        self.model.save_pretrained(folder)
        settings.write(folder, type(self).__name__, self._settings())

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Image to the distribution of its latents.

        Args:
            x: as `FullCapacitor.encode` takes it, `[B,3,H,W]` in [-1,1] for instance; may require grad.

        Returns:
            An output whose `latent_dist` has `mean`, `std`, `logvar`, `parameters`, `mode()` and `sample(generator)`; a
            tuple of that distribution without `return_dict`.

        Raises:
            InputError: see `FullCapacitor.encode`.
        """
        self._offload_hook()
        if self.use_slicing and len(x) > 1:
            parameters = torch.cat([self._moments(row) for row in x.split(1)])
        else:
            parameters = self._moments(x)
        deterministic = self.model.config.bottleneck_posterior_kind == "deterministic"
        posterior = self._classes.distribution(parameters, deterministic=deterministic)
        return self._classes.encoded(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Generators | None = None, **_: Any) -> Any:
        """Latents to image.

        Args:
            z: `[B,C,h,w]` as `encode` gives them, any float dtype; may require grad.
            generator: of the start noise, one or one per image; the noise of `inference_config` when None.

        Returns:
            An output whose `sample` is `[B,3,H,W]` in about [-1,1], not clamped; a tuple of it without `return_dict`.

        Raises:
            InputError: see `FullCapacitor.decode`.
        """
        self._offload_hook()
        whitened = self._whitened(z)
        # for the whole batch, however it is sliced: a seed gives the same images
        stride = self.model.latent_stride
        height, width = (stride * side for side in whitened.shape[2:])
        shape = (whitened.shape[0], self.model.config.in_channels, height, width)
        noise = None
        if generator is not None:
            noise = draw_normal(shape, generator, whitened.device)
        elif self.use_slicing and len(z) > 1:
            settings = self.inference_config
            noise = unit_noise(shape, settings.seed, whitened.device, settings.noise)
        if noise is not None and self.use_slicing:
            rows = zip(whitened.split(1), noise.split(1), strict=True)
            image = torch.cat([self._decode(row, one) for row, one in rows])
        else:
            image = self._decode(whitened, noise)
        return self._classes.decoded(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Encode and decode, from a sample of the posterior or its mode; `generator` is of that sample."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the convolutions compute."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where images and latents must be."""
        return self.model.device

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether `enable_gradient_checkpointing` is in force."""
        return self.model.decoder.checkpointing

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent in each direction."""
        return self.config["spatial_compression_ratio"]

    def enable_slicing(self) -> None:
        """Encode and decode one image at a time, for less memory; the results are the same."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode batches as they come."""
        self.use_slicing = False

    def enable_tiling(self, *_: Any, **__: Any) -> None:
        """Taken, and without effect: the model normalises over whole images, and tiles would have other colours."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Undo `enable_tiling`."""
        self.use_tiling = False

    def enable_xformers_memory_efficient_attention(self, *_: Any, **__: Any) -> None:
        """Taken, and without effect: the model has no attention."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Undo `enable_xformers_memory_efficient_attention`."""

    def enable_gradient_checkpointing(self, *_: Any, **__: Any) -> None:
        """Compute blocks again in the backward pass instead of keeping what is inside of them."""
        self._set_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Undo `enable_gradient_checkpointing`."""
        self._set_checkpointing(False)

    def _set_checkpointing(self, value: bool) -> None:
        for half in (self.model.encoder, self.model.decoder):
            if half is not None:
                half.checkpointing = value

    def _settings(self) -> dict[str, Any]:
        """This adapter's arguments, for JSON."""
        dtype = None if self.output_dtype is None else str(self.output_dtype).removeprefix("torch.")
        return {"inference_config": dataclasses.asdict(self.inference_config), "output_dtype": dtype}

    @classmethod
    def _arguments(cls, kept: dict[str, Any], model: FullCapacitor) -> dict[str, Any]:
        """Arguments of the class from what `_settings` returned; none from nothing."""
        if kept.get("output_dtype"):
            kept["output_dtype"] = check_model_dtype(kept["output_dtype"])
        return kept

    def _map(self) -> tuple[list[int] | None, Tensor, Tensor]:
        """(order, scale, shift): channels of this adapter are `scale * whitened[order] + shift`, `[C,1,1]`."""
        raise NotImplementedError

    def _moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance in the adapter's space, side by side, `[B,2C,h,w]`."""
        model = self.model
        posterior = model.encode_posterior(x)
        order, scale, shift = self._map()
        mean = _ordered(model.latents_of(posterior), order) * scale + shift
        if posterior.logsnr is None:
            logvar = torch.full_like(mean, _NEVER)
        else:
            statistics = model.statistics()
            std = scale.new_ones(scale.shape) if statistics is None else statistics[1][:, None, None]
            # sigma^2 = sigmoid(-logsnr), whitened by the model and scaled here
            logvar = _ordered(model.fold_latent_patches(F.logsigmoid(-posterior.logsnr)) - 2 * std.log(), order)
            logvar = logvar + 2 * scale.abs().log()
        parts = [F.pixel_shuffle(part, self.patch) for part in (mean, logvar)]
        return torch.cat(parts, 1).to(self.output_dtype or self.dtype)

    def _whitened(self, z: Tensor) -> Tensor:
        """Latents of this adapter as the model decodes them, float32."""
        patch, channels = self.patch, self.config["latent_channels"]
        if not isinstance(z, Tensor) or z.dim() != 4 or z.shape[1] != channels:
            found = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise InputError(f"latents are {found}: expected [B,{channels},h,w]")
        if z.shape[2] % patch or z.shape[3] % patch:
            raise InputError(f"latents have shape {list(z.shape)}: h and w must be multiples of {patch}")
        order, scale, shift = self._map()
        z = (F.pixel_unshuffle(z.float(), patch) - shift) / scale
        return z if order is None else _ordered(z, sorted(range(len(order)), key=order.__getitem__))

    def _decode(self, whitened: Tensor, noise: Tensor | None) -> Tensor:
        image = self.model.decode(whitened, inference_config=self.inference_config, noise=noise)
        return image.to(self.output_dtype or self.dtype)

    def _offload_hook(self) -> None:
        """Let accelerate's offloading, which hooks `forward`, also bring the model here for `encode` and `decode`."""
        hook = self.__dict__.get("_hf_hook")
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)

    def __getattr__(self, name: str) -> Any:
        # not registered twice: the state dict has each tensor once
        return getattr(self.model, name) if name in _HALVES else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HALVES:
            super().__setattr__(name, value)
        elif name == "decoder" and value is None:
            raise InputError("decoder cannot be None: the model knows its device and dtype by it")
        else:
            # for instance vae.decoder = torch.compile(vae.decoder)
            setattr(self.model, name, value)


def _ordered(x: Tensor, order: list[int] | None) -> Tensor:
    return x if order is None else x[:, order]
