"""Blocks of the family in plain torch: FCDM's, which full_capacitor has, and the older siblings' DiCo.

NCHW in and out. Statistics of norms are taken in float32 at least, whatever the dtype of weights and activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


def full(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """Weightless RMSNorm over the channels of each pixel: `x / sqrt(mean_c x^2 + 1e-6)`. NCHW."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        y = full(x)
        return (y * torch.rsqrt(y.square().mean(1, keepdim=True) + self.eps)).to(x.dtype)


class AffineRMSNorm(nn.Module):
    """RMSNorm as above with weight and bias per channel, rounded once. NCHW."""

    eps = 1e-6

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = full(x)
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + self.eps)
        return torch.addcmul(full(self.bias)[:, None, None], y, full(self.weight)[:, None, None]).to(x.dtype)


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2, Woo et al.): `gamma*h*n + beta + h`, `n = G / (mean_c G + eps)`."""

    eps = 1e-6

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, h: Tensor) -> Tensor:
        x = full(h)
        g = x.square().sum((2, 3), keepdim=True).sqrt()
        n = g / (g.mean(1, keepdim=True) + self.eps)
        return torch.addcmul(full(self.beta), x, 1 + full(self.gamma) * n).to(h.dtype)


class Block(nn.Module):
    """FCDM block: depthwise conv, RMSNorm, expand, GELU, GRN, project, residual. NCHW in and out.

    The encoder's blocks own a `layer_scale`; the decoder's take `modulation [B, 2D]` = (scale, gate) instead.
    """

    layer_scale: nn.Parameter

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


class ChannelAttention(nn.Module):
    """Compact channel attention (DiCo, Ai et al.): each channel times a sigmoid of a 1x1 of the image's mean.

    The factors are few, and are not rounded.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, 1)

    def attention(self, h: Tensor) -> Tensor:
        """The factors, `[B, D, 1, 1]` in float32 (float64 stays)."""
        mean = full(h).mean((2, 3), keepdim=True).to(h.dtype)
        return torch.sigmoid(full(self.proj(mean)))

    def forward(self, h: Tensor) -> Tensor:
        return (full(h) * self.attention(h)).to(h.dtype)


class ConvMLP(nn.Module):
    """1x1 D -> F, GELU, 1x1 F -> D; with `normed`, a weightless RMSNorm of its own before them."""

    def __init__(self, config: ModelConfig, normed: bool):
        super().__init__()
        self.norm = RMSNorm() if normed else None
        self.conv_in = nn.Conv2d(config.model_dim, config.hidden_dim, 1)
        self.conv_out = nn.Conv2d(config.hidden_dim, config.model_dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        if self.norm is not None:
            h = self.norm(h)
        return self.conv_out(F.gelu(self.conv_in(h)))


class DicoBlock(nn.Module):
    """DiCo block: a path of convolutions with channel attention, then an MLP, each behind a norm and a gate.

    The encoder's blocks own `gate_conv` and `gate_mlp`; the decoder's take `modulation [B, 4D]`, the scales and gates
    of both paths, instead. What the tensors do not show is in the config's `dico`.
    """

    gate_conv: nn.Parameter
    gate_mlp: nn.Parameter

    def __init__(self, config: ModelConfig, gates: bool):
        super().__init__()
        if config.dico is None:
            raise ValueError("a DiCo block needs a config with dico")
        d, k = config.model_dim, config.depthwise_kernel_size
        self.reading = config.dico
        self.norm1 = RMSNorm()
        self.conv1 = nn.Conv2d(d, d, 1)
        self.conv2 = nn.Conv2d(d, d, k, padding=k // 2, groups=d)
        self.cca = ChannelAttention(d)
        self.conv3 = nn.Conv2d(d, d, 1)
        self.norm2 = RMSNorm()
        self.mlp = ConvMLP(config, normed=config.dico.mlp_norm == "double")
        if gates:
            self.gate_conv = nn.Parameter(torch.full((d,), 1e-3))
            self.gate_mlp = nn.Parameter(torch.full((d,), 1e-3))

    def split(self, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(scale1, gate1, scale2, gate2) of packed `[..., 4D]`; the gates as they multiply."""
        first, second, third, gate2 = modulation.chunk(4, -1)
        scale1, gate1, scale2 = first, second, third
        if self.reading.adaln_packing == "grouped":
            gate1, scale2 = third, second
        if self.reading.adaln_gate == "tanh":
            gate1, gate2 = torch.tanh(gate1), torch.tanh(gate2)
        return scale1, gate1, scale2, gate2

    def own_gates(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's learned gates `[D]` of both paths, as they multiply."""
        return (torch.tanh(first), torch.tanh(second)) if self.reading.encoder_gate == "tanh" else (first, second)

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        if modulation is None:
            gate1, gate2 = (gate[:, None, None] for gate in self.own_gates(self.gate_conv, self.gate_mlp))
            mid = x + gate1 * self.mix(self.norm1(x))
            return mid + gate2 * self.mlp(self.norm2(mid))
        scale1, gate1, scale2, gate2 = (m[:, :, None, None].to(x.dtype) for m in self.split(modulation))
        mid = x + gate1 * self.mix(self.norm1(x) * (1 + scale1))
        return mid + gate2 * self.mlp(self.norm2(mid) * (1 + scale2))

    def mix(self, h: Tensor) -> Tensor:
        """The first path behind its norm and before its gate."""
        return self.conv3(self.cca(F.silu(self.conv2(self.conv1(h)))))
