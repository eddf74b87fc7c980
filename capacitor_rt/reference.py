"""The whole model in plain torch: truth for the tests, baseline for the bench, backend where there is no GPU.

Start at `Autoencoder`, below. Shapes: B batch, D model width, F hidden width, Z bottleneck channels, p patch; for an
image `[B,3,H,W]`, `h = H/p` and `w = W/p`. Latents are `[B,C,H/s,W/s]`: C = Z and s = p, or C = 4Z and s = 2p for
models that whiten 2x2 patches of the bottleneck. Weights may be float64, float32, bfloat16 or float16. Norm statistics,
the time embedding, AdaLN vectors, the posterior and whitening are computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import AffineRMSNorm, Block, DicoBlock, RMSNorm, full
from .conditioning import AdaLNBase, AdaLNDelta, TimeEmbed, at_least_float32
from .config import FullCapacitorInferenceConfig, ModelConfig
from .diffusion import PredictX0, sample, token_mask, unit_noise

if TYPE_CHECKING:
    from typing_extensions import Self


STATISTICS = ("latent_norm_running_mean", "latent_norm_running_var")


class Posterior(NamedTuple):
    """Raw posterior before whitening: `mean` and `logsnr`, float32 `[B,Z,h,w]`; logsnr None if deterministic."""

    mean: Tensor
    logsnr: Tensor | None


class Autoencoder(nn.Module):
    """Image to whitened latents and back. Differentiable; arguments are taken as they are, unchecked.

    Parameters and buffers carry the names of the checkpoint's tensors. A decoder-only model has `encoder` None and no
    statistics: its latents are decoded as they are.
    """

    encoder: Encoder | None
    decoder: Decoder
    latent_norm_running_mean: Tensor | None
    latent_norm_running_var: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if config.encoder_depth else None
        self.decoder = Decoder(config)
        for name, fill in zip(STATISTICS, (torch.zeros, torch.ones), strict=True):
            self.register_buffer(name, fill(config.latent_channels) if config.has_statistics else None)

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Take `tensors`, by the names of `state_dict`, for the parameters and buffers, without a copy; frozen."""
        for name in STATISTICS:
            # a decoder-only checkpoint may have statistics all the same
            setattr(self, name, tensors.get(name))
        self.load_state_dict(tensors, strict=True, assign=True)
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the convolutions compute."""
        return self.decoder.out_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where images and latents must be."""
        return self.decoder.out_proj.weight.device

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def latent_stride(self) -> int:
        """Pixels per latent in each direction."""
        return self.config.latent_stride

    def encode(self, image: Tensor) -> Tensor:
        """Whitened mode of the posterior, float32 `[B,C,H/s,W/s]`, of an image as `encode_posterior` takes it."""
        return self.latents_of(self.encode_posterior(image))

    def encode_posterior(self, image: Tensor) -> Posterior:
        """Raw posterior of an image `[B,3,H,W]` or `[B,H,W,3]`: floats in [-1,1], or uint8 in [0,255]."""
        if self.encoder is None:
            raise ValueError("a decoder-only model has no encoder")
        mean, logsnr = self.encoder(self.normalise(image))
        return Posterior(full(mean), None if logsnr is None else full(logsnr))

    def decode(
        self,
        latents: Tensor,
        *,
        inference_config: FullCapacitorInferenceConfig | None = None,
        noise: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Image, float32 `[B,3,H,W]` in about [-1,1], not clamped, of whitened latents `[B,C,h,w]`.

        Args:
            inference_config: sampler settings; default one step, no seed.
            noise: unit normal float32 `[B,3,H,W]` to start from; drawn by the settings' seed when None.
            dropped: tokens `[B,1,h,w]` that guidance by tokens leaves out (1 or True); drawn likewise when None.
        """
        inference = inference_config or FullCapacitorInferenceConfig()
        z = self.unfold_latent_patches(self.dewhiten(latents))
        if noise is None:
            p, channels = self.config.patch_size, self.config.in_channels
            shape = (z.shape[0], channels, p * z.shape[2], p * z.shape[3])
            noise = unit_noise(shape, inference.seed, z.device, inference.noise)
        return sample(self.predictor(z, inference, dropped), noise, self.config, inference)

    def normalise(self, image: Tensor) -> Tensor:
        """NCHW in [-1,1] in the weights' dtype."""
        if image.shape[1] != self.config.in_channels:
            image = image.permute(0, 3, 1, 2)
        if image.dtype == torch.uint8:
            image = image.float() / 127.5 - 1.0
        return image.to(self.dtype)

    def latents_of(self, posterior: Posterior) -> Tensor:
        """Whitened mode, float32 `[B,C,H/s,W/s]`, of what `encode_posterior` returned."""
        return self.whiten(self.fold_latent_patches(posterior_mode(*posterior)))

    def sample_latents(self, posterior: Posterior, generator: torch.Generator | None = None) -> Tensor:
        """A whitened sample, float32 `[B,C,H/s,W/s]`, of what `encode_posterior` returned.

        Args:
            generator: of torch's, on the posterior's device; the global one when None.
        """
        mean, logsnr = posterior
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self.whiten(self.fold_latent_patches(posterior_sample(mean, logsnr, noise)))

    def fold_latent_patches(self, z: Tensor) -> Tensor:
        """`[B,Z,h,w]` to `[B,C,H/s,W/s]`: the family's 2x2 latent patches, order `c*4 + i*2 + j`, where it has them."""
        patch = self.config.latent_patch
        return z if patch == 1 else F.pixel_unshuffle(z, patch)

    def unfold_latent_patches(self, z: Tensor) -> Tensor:
        """Inverse of `fold_latent_patches`."""
        patch = self.config.latent_patch
        return z if patch == 1 else F.pixel_shuffle(z, patch)

    def statistics(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation `sqrt(var + eps)` of the whitening per channel, `[C]`; None without them."""
        mean, var = self.latent_norm_running_mean, self.latent_norm_running_var
        if mean is None or var is None:
            return None
        return mean.to(dtype), torch.sqrt(var.to(dtype) + self.config.latent_running_stats_eps)

    def whiten(self, z: Tensor) -> Tensor:
        """Raw latents `[B,C,h,w]` to the model's own normalised space, float32; the identity without statistics."""
        statistics = self.statistics()
        return full(z) if statistics is None else whiten(z, *statistics)

    def dewhiten(self, z: Tensor) -> Tensor:
        """Inverse of `whiten`, float32."""
        statistics = self.statistics()
        return full(z) if statistics is None else dewhiten(z, *statistics)

    def predictor(self, z: Tensor, inference: FullCapacitorInferenceConfig, dropped: Tensor | None = None) -> PredictX0:
        """`(x_t, t) -> x0` in float32 for raw bottlenecks z `[B,Z,h,w]`, guidance included."""
        z = z.to(self.dtype)
        drop = inference.drop_for(self.config)
        if drop == "tokens" and dropped is None and self.config.dico is not None:
            dropped = token_mask(z.shape, self.config.dico.pdg_mask_ratio, inference.seed, z.device)
        dropped = dropped if drop == "tokens" else None

        def predict_x0(x_t: Tensor, t: float) -> Tensor:
            times = torch.full((z.shape[0],), t, device=z.device)
            x0 = full(self.decoder(x_t, times, z))
            if drop is None:
                return x0
            unguided = full(self.decoder(x_t, times, z, drop == "path", dropped))
            return unguided + inference.pdg_strength * (x0 - unguided)

        return predict_x0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # the statistics stay in float32, whatever the weights are cast to
        if recurse:
            for module in self.children():
                module._apply(fn)
        return super()._apply(at_least_float32(fn), recurse=False)


def _run(block: nn.Module, checkpointing: bool, *args: Tensor) -> Tensor:
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


class Patchify(nn.Module):
    """Non-overlapping `p x p` patches to tokens: `[B,3,H,W] -> [B,D,H/p,W/p]`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.model_dim, p, stride=p)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


AnyBlock: TypeAlias = Block | DicoBlock


def _blocks(config: ModelConfig, n: int, gated: bool) -> nn.ModuleList:
    """Blocks in a row; `gated` ones, the encoder's, own what the decoder's are given by AdaLN."""
    kind = Block if config.dico is None else DicoBlock
    return nn.ModuleList(kind(config, gated) for _ in range(n))


def _end_norm(config: ModelConfig) -> AffineRMSNorm | None:
    """A norm at an end of the encoder or decoder, where the architecture has one."""
    return AffineRMSNorm(config.model_dim) if config.dico and config.dico.has_end_norms else None


def _normed(norm: AffineRMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class Encoder(nn.Module):
    """`[B,3,H,W]` -> raw posterior `(mean, logsnr)`, each `[B,Z,h,w]`; logsnr None if deterministic.

    With `checkpointing` blocks are computed again in the backward pass instead of keeping what is inside of them.
    """

    checkpointing = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.patchify = Patchify(config)
        self.norm_in = _end_norm(config)
        self.blocks = _blocks(config, config.encoder_depth, gated=True)
        self.to_bottleneck = nn.Conv2d(config.model_dim, config.posterior_channels, 1)

    def all_blocks(self) -> list[AnyBlock]:
        return cast("list[AnyBlock]", list(self.blocks))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        x = _normed(self.norm_in, self.patchify(image))
        for block in self.blocks:
            x = _run(block, self.checkpointing, x)
        x = self.to_bottleneck(x)
        mean, logsnr = x.chunk(2, 1) if self.config.bottleneck_posterior_kind == "diagonal_gaussian" else (x, None)
        if self.config.bottleneck_norm_mode == "channel_wise":
            mean = RMSNorm()(full(mean))
        return mean, logsnr


def posterior_mode(mean: Tensor, logsnr: Tensor | None) -> Tensor:
    """`alpha * mean`, `alpha^2 = sigmoid(logsnr)`, in float32 (float64 stays)."""
    if logsnr is None:
        return full(mean)
    return torch.exp(0.5 * F.logsigmoid(full(logsnr))) * full(mean)


def posterior_sample(mean: Tensor, logsnr: Tensor | None, noise: Tensor) -> Tensor:
    """`alpha * mean + sigma * noise`, `sigma^2 = sigmoid(-logsnr)`; `noise` is unit normal, `[B,Z,h,w]`."""
    mode = posterior_mode(mean, logsnr)
    return mode if logsnr is None else mode + torch.exp(0.5 * F.logsigmoid(-full(logsnr))) * noise


class Decoder(nn.Module):
    """x0-prediction of the diffusion decoder; `checkpointing` as of the encoder.

    mdiffae_v1's is flat: its `blocks` stand in a row, in the place of the middle blocks, and nothing is fused.
    """

    checkpointing = False
    path_drop_mask_feature: nn.Parameter
    latent_mask_feature: nn.Parameter
    mask_feature: nn.Parameter

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.model_dim
        self.config = config
        self.patchify = Patchify(config)
        self.norm_in = _end_norm(config)
        self.latent_up = nn.Conv2d(config.bottleneck_dim, d, 1)
        self.latent_norm = _end_norm(config)
        self.fuse_in = nn.Conv2d(2 * d, d, 1)
        self.time_embed = TimeEmbed(config)
        self.adaln_base = AdaLNBase(config)
        self.adaln_deltas = nn.ModuleList(AdaLNDelta(config) for _ in range(config.decoder_depth))
        self.start_blocks = _blocks(config, config.decoder_start_blocks, gated=False)
        self.is_flat = config.dico is not None and config.dico.is_flat
        middle = _blocks(config, config.decoder_middle_blocks, gated=False)
        if self.is_flat:
            self.blocks = middle
        else:
            self.middle_blocks = middle
            self.fuse_skip = nn.Conv2d(2 * d, d, 1)
        self.end_blocks = _blocks(config, config.decoder_end_blocks, gated=False)
        for name in feature_names(config):
            self.register_parameter(name, nn.Parameter(torch.zeros(1, d, 1, 1)))
        self.norm_out = _end_norm(config)
        self.out_proj = nn.Conv2d(d, config.in_channels * config.patch_size**2, 1)

    def all_blocks(self) -> list[AnyBlock]:
        """In the order of `modulations`: start, middle, end."""
        middle = self.blocks if self.is_flat else self.middle_blocks
        return cast("list[AnyBlock]", [*self.start_blocks, *middle, *self.end_blocks])

    @property
    def drop_feature(self) -> Tensor | None:
        """What path drop puts in the place of the middle blocks' output, `[1,D,1,1]`; None for a flat decoder."""
        if self.is_flat:
            return None
        return self.mask_feature if "mask_feature" in self._parameters else self.path_drop_mask_feature

    def modulations(self, t: Tensor) -> list[Tensor]:
        """Packed (scale, gate) `[B, 2D]` float32 of every block, in order, at times `t [B]`; of DiCo blocks two."""
        a = F.silu(self.time_embed(t))
        base = self.adaln_base(a)
        return [base + delta(a) for delta in self.adaln_deltas]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        latents: Tensor,
        drop_path: bool = False,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Predict the clean image.

        Args:
            x_t: noised image `[B,3,H,W]`, cast to the weights' dtype; t: times `[B]`.
            latents: dewhitened `[B,Z,h,w]`, cast likewise.
            drop_path: the unconditional pass of path-drop guidance: the middle blocks' output is replaced.
            dropped: tokens `[B,1,h,w]` that the unconditional pass of guidance by tokens replaces (mdiffae).

        Returns:
            `[B,3,H,W]` in the weights' dtype, not clamped.
        """
        dtype = self.out_proj.weight.dtype
        mods, blocks = self.modulations(t), self.all_blocks()
        s = self._fused_inputs(x_t.to(dtype), latents.to(dtype), dropped)
        first, last = len(self.start_blocks), len(mods) - len(self.end_blocks)
        for block, mod in zip(blocks[:first], mods[:first], strict=True):
            s = _run(block, self.checkpointing, s, mod)
        if drop_path and self.drop_feature is not None:
            m = self.drop_feature.expand_as(s)
        else:
            m = s
            for block, mod in zip(blocks[first:last], mods[first:last], strict=True):
                m = _run(block, self.checkpointing, m, mod)
        x = m if self.is_flat else self.fuse_skip(torch.cat([s, m], 1))
        for block, mod in zip(blocks[last:], mods[last:], strict=True):
            x = _run(block, self.checkpointing, x, mod)
        return F.pixel_shuffle(self.out_proj(_normed(self.norm_out, x)), self.config.patch_size)

    def _fused_inputs(self, x_t: Tensor, latents: Tensor, dropped: Tensor | None) -> Tensor:
        """Tokens `[B,D,h,w]` of the noised image and the latents together."""
        late = self.config.dico is not None and self.config.dico.decoder_norm_in == "fuse_in"
        x, z = self.patchify(x_t), self.latent_up(latents)
        if dropped is not None and "latent_mask_feature" in self._parameters:
            z = torch.where(dropped.bool(), self.latent_mask_feature, z)
        x = x if late else _normed(self.norm_in, x)
        s = self.fuse_in(torch.cat([x, _normed(self.latent_norm, z)], 1))
        s = _normed(self.norm_in, s) if late else s
        if dropped is not None and self.is_flat:
            s = torch.where(dropped.bool(), self.mask_feature, s)
        return s


def feature_names(config: ModelConfig) -> tuple[str, ...]:
    """The decoder's learned features `[1,D,1,1]` for what guidance drops."""
    if config.dico is not None and config.dico.has_end_norms:
        return ("mask_feature",)
    return ("path_drop_mask_feature",) if config.dico is None else ("path_drop_mask_feature", "latent_mask_feature")


def whiten(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`(z - mean) / std` per channel, in float32. `z` is `[B,C,h,w]`, the statistics are `[C]`."""
    return (full(z) - mean[:, None, None]) / std[:, None, None]


def dewhiten(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Inverse of `whiten`."""
    return torch.addcmul(mean[:, None, None], full(z), std[:, None, None])
