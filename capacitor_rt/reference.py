"""The autoencoder in plain torch: truth for the tests, baseline for the bench, backend where there is no GPU.

Shapes: B batch, D model width, F hidden width, Z bottleneck channels, p patch; for an image `[B,3,H,W]`, `h = H/p`
and `w = W/p`. Weights may be float64, float32, bfloat16 or float16. Norm statistics, the time embedding, AdaLN vectors
and the posterior are computed in float32 at least; a `Float32Module` keeps its weights there when the model is cast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


def _full(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply`, kept from casting a tensor below float32."""

    def apply(t: Tensor) -> Tensor:
        out = fn(t)
        if not out.is_floating_point() or out.dtype.itemsize >= 4:
            return out
        return t.to(out.device, torch.promote_types(torch.float32, t.dtype))

    return apply


class Float32Module(nn.Module):
    """A module whose tensors never go below float32, whatever `.to(dtype)` asks for."""

    def _apply(self, fn, recurse=True):
        return super()._apply(at_least_float32(fn), recurse)


class RMSNorm(nn.Module):
    """Weightless RMSNorm over the channels of each pixel: `x / sqrt(mean_c x^2 + 1e-6)`. NCHW."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        y = _full(x)
        return (y * torch.rsqrt(y.square().mean(1, keepdim=True) + self.eps)).to(x.dtype)


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2, Woo et al.): `gamma*h*n + beta + h`, `n = G / (mean_c G + eps)`."""

    eps = 1e-6

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, h: Tensor) -> Tensor:
        x = _full(h)
        g = x.square().sum((2, 3), keepdim=True).sqrt()
        n = g / (g.mean(1, keepdim=True) + self.eps)
        return torch.addcmul(_full(self.beta), x, 1 + _full(self.gamma) * n).to(h.dtype)


class Block(nn.Module):
    """FCDM block: depthwise conv, RMSNorm, expand, GELU, GRN, project, residual. NCHW in and out.

    The encoder's blocks own a `layer_scale`; the decoder's take `modulation [B, 2D]` = (scale, gate) instead.
    """

    def __init__(self, config: ModelConfig, layer_scale: bool):
        super().__init__()
        d, f, k = config.model_dim, config.hidden_dim, config.depthwise_kernel_size
        self.dwconv = nn.Conv2d(d, d, k, padding=k // 2, groups=d)
        self.norm = RMSNorm()
        self.pwconv1 = nn.Conv2d(d, f, 1)
        self.grn = GRN(f)
        self.pwconv2 = nn.Conv2d(f, d, 1)
        if layer_scale:
            self.layer_scale = nn.Parameter(torch.full((d,), 1e-3))

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        y = self.norm(self.dwconv(x))
        if modulation is None:
            gate = self.layer_scale[:, None, None]
        else:
            scale, gate = modulation[:, :, None, None].to(x.dtype).chunk(2, 1)
            y = y * (1 + scale)
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(y))))
        return x + gate * y


class Patchify(nn.Module):
    """Non-overlapping `p x p` patches to tokens: `[B,3,H,W] -> [B,D,H/p,W/p]`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.model_dim, p, stride=p)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class Encoder(nn.Module):
    """`[B,3,H,W]` -> raw posterior `(mean, logsnr)`, each `[B,Z,h,w]`; logsnr None if deterministic."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.patchify = Patchify(config)
        self.blocks = nn.ModuleList(Block(config, layer_scale=True) for _ in range(config.encoder_depth))
        self.to_bottleneck = nn.Conv2d(config.model_dim, config.posterior_channels, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.patchify(image)
        for block in self.blocks:
            x = block(x)
        x = self.to_bottleneck(x)
        mean, logsnr = x.chunk(2, 1) if self.config.bottleneck_posterior_kind == "diagonal_gaussian" else (x, None)
        if self.config.bottleneck_norm_mode == "channel_wise":
            mean = RMSNorm()(mean)
        return mean, logsnr


class Posterior(NamedTuple):
    """Raw posterior before whitening: `mean` and `logsnr`, float32 `[B,Z,h,w]`; logsnr None if deterministic."""

    mean: Tensor
    logsnr: Tensor | None


def posterior_mode(mean: Tensor, logsnr: Tensor | None) -> Tensor:
    """`alpha * mean`, `alpha^2 = sigmoid(logsnr)`, in float32 (float64 stays)."""
    if logsnr is None:
        return _full(mean)
    return torch.exp(0.5 * F.logsigmoid(_full(logsnr))) * _full(mean)


def posterior_sample(mean: Tensor, logsnr: Tensor | None, noise: Tensor) -> Tensor:
    """`alpha * mean + sigma * noise`, `sigma^2 = sigmoid(-logsnr)`; `noise` is unit normal, `[B,Z,h,w]`."""
    mode = posterior_mode(mean, logsnr)
    return mode if logsnr is None else mode + torch.exp(0.5 * F.logsigmoid(-_full(logsnr))) * noise


class TimeEmbed(Float32Module):
    """Sinusoidal embedding of `1000 t` and a two-layer MLP: `[B] -> [B, D]`, in float32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.register_buffer("freqs", default_freqs())
        self.proj_in = nn.Linear(256, config.model_dim)
        self.proj_out = nn.Linear(config.model_dim, config.model_dim)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].to(self.freqs) * 1000.0 * self.freqs
        return self.proj_out(F.silu(self.proj_in(torch.cat([angles.sin(), angles.cos()], 1))))


def default_freqs() -> Tensor:
    """The 128 frequencies `10000^(-k/127)` of the time embedding, float32."""
    return torch.tensor([10000.0 ** (-k / 127) for k in range(128)], dtype=torch.float32)


class AdaLNBase(Float32Module):
    """`proj`: the modulation that all blocks share, from `SiLU(cond)`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.proj = nn.Linear(config.model_dim, 2 * config.model_dim)

    def forward(self, a: Tensor) -> Tensor:
        return self.proj(a)


class AdaLNDelta(Float32Module):
    """One block's low-rank correction of the shared modulation."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.down = nn.Linear(config.model_dim, config.adaln_low_rank_rank, bias=False)
        self.up = nn.Linear(config.adaln_low_rank_rank, 2 * config.model_dim, bias=False)

    def forward(self, a: Tensor) -> Tensor:
        return self.up(self.down(a))


class Decoder(nn.Module):
    """x0-prediction of the diffusion decoder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.model_dim
        self.config = config
        self.patchify = Patchify(config)
        self.latent_up = nn.Conv2d(config.bottleneck_dim, d, 1)
        self.fuse_in = nn.Conv2d(2 * d, d, 1)
        self.time_embed = TimeEmbed(config)
        self.adaln_base = AdaLNBase(config)
        self.adaln_deltas = nn.ModuleList(AdaLNDelta(config) for _ in range(config.decoder_depth))

        def blocks(n: int) -> nn.ModuleList:
            return nn.ModuleList(Block(config, layer_scale=False) for _ in range(n))

        self.start_blocks = blocks(config.decoder_start_blocks)
        self.middle_blocks = blocks(config.decoder_middle_blocks)
        self.end_blocks = blocks(config.decoder_end_blocks)
        self.fuse_skip = nn.Conv2d(2 * d, d, 1)
        self.path_drop_mask_feature = nn.Parameter(torch.zeros(1, d, 1, 1))
        self.out_proj = nn.Conv2d(d, config.in_channels * config.patch_size**2, 1)

    def modulations(self, t: Tensor) -> list[Tensor]:
        """Packed (scale, gate) `[B, 2D]` float32 of every block, in order, at times `t [B]`."""
        a = F.silu(self.time_embed(t))
        base = self.adaln_base(a)
        return [base + delta(a) for delta in self.adaln_deltas]

    def forward(self, x_t: Tensor, t: Tensor, latents: Tensor, drop_path: bool = False) -> Tensor:
        """Predict the clean image.

        Args:
            x_t: noised image `[B,3,H,W]`, cast to the weights' dtype; t: times `[B]`.
            latents: dewhitened `[B,Z,h,w]`, cast likewise.
            drop_path: the unconditional pass of path-drop guidance: the middle blocks' output is replaced.

        Returns:
            `[B,3,H,W]` in the weights' dtype, not clamped.
        """
        dtype = self.out_proj.weight.dtype
        mods = self.modulations(t)
        s = torch.cat([self.patchify(x_t.to(dtype)), self.latent_up(latents.to(dtype))], 1)
        s = self.fuse_in(s)
        first, last = len(self.start_blocks), len(mods) - len(self.end_blocks)
        for block, mod in zip(self.start_blocks, mods[:first], strict=True):
            s = block(s, mod)
        if drop_path:
            m = self.path_drop_mask_feature.expand_as(s)
        else:
            m = s
            for block, mod in zip(self.middle_blocks, mods[first:last], strict=True):
                m = block(m, mod)
        x = self.fuse_skip(torch.cat([s, m], 1))
        for block, mod in zip(self.end_blocks, mods[last:], strict=True):
            x = block(x, mod)
        return F.pixel_shuffle(self.out_proj(x), self.config.patch_size)


def whiten(z: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """`(z - mean) / sqrt(var + eps)` per channel, in float32. `z` is `[B,C,h,w]`, the statistics are `[C]`."""
    return (_full(z) - mean[:, None, None]) / torch.sqrt(var + eps)[:, None, None]


def dewhiten(z: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Inverse of `whiten`."""
    return torch.addcmul(mean[:, None, None], _full(z), torch.sqrt(var + eps)[:, None, None])
