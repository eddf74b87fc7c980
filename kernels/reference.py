"""Each launch in plain torch: the truth in float64, the eager yardstick in the working dtype.

One function a launch, same arguments in the same layout, results returned instead of written. Statistics are taken in
float32 or better, as in the model; everything else happens in the dtype of the activations, as eager
torch would.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics: float64 stays, everything narrower is taken in float32."""
    return torch.promote_types(dtype, torch.float32)


def gelu_fit(x: torch.Tensor) -> torch.Tensor:
    """The sigmoid fit of GELU that the kernels use."""
    x2 = (x * x).clamp_max(60.0)
    return x * torch.sigmoid(x * (1.5950158 + x2 * (0.074011293 - 0.00070303368 * x2)))


def expand(
    y: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    sumsq: torch.Tensor,
    *,
    tokens_per_image: int,
    eps: float = 1e-6,
    gelu: str = "erf",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h [T, F], sums [B, F]): h = gelu(rmsnorm(y) @ w1 + b1) and the sums of h^2 over each image."""
    wide = _wide(y.dtype)
    rstd = torch.rsqrt(sumsq.to(wide).sum(1, keepdim=True) / y.shape[1] + eps)
    normed = (y.to(wide) * rstd).to(y.dtype)
    pre = normed @ w1.to(y.dtype) + b1.to(y.dtype)
    h = gelu_fit(pre) if gelu == "fit" else F.gelu(pre)
    return h, h.to(wide).square().view(-1, tokens_per_image, h.shape[1]).sum(1)


def grn(sums: torch.Tensor, gamma: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """gain [B, F] = gamma * G / (mean_c G + eps), G = sqrt(sums), sums [B, F] of squares over each image."""
    norms = sums.sqrt()
    return gamma.to(sums.dtype) * norms / (norms.mean(1, keepdim=True) + eps)


def project(
    h: torch.Tensor,
    gain: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    residual: torch.Tensor,
    *,
    tokens_per_image: int,
) -> torch.Tensor:
    """out [T, D] = (h * (1 + gain)) @ w2 + b2 + residual, one gain row [F] per image."""
    per_token = gain.to(h.dtype).repeat_interleave(tokens_per_image, dim=0)
    scaled = h + h * per_token
    return residual.to(h.dtype) + (scaled @ w2.to(h.dtype) + b2.to(h.dtype))


def dwconv(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *, batch: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [T, C], sums [T, 1]): depthwise 7x7 with zero padding and bias, and the sums of y^2 over channels."""
    channels = x.shape[1]
    image = x.view(batch, height, width, channels).permute(0, 3, 1, 2)
    kernel = w.to(x.dtype).t().reshape(channels, 1, 7, 7)
    y = F.conv2d(image, kernel, b.to(x.dtype), padding=3, groups=channels)
    y = y.permute(0, 2, 3, 1).reshape(-1, channels)
    return y, y.to(_wide(x.dtype)).square().sum(1, keepdim=True)
