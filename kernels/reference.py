"""Each op in plain torch: the truth in float64, the eager yardstick in the working dtype.

One function per op, same arguments in the same layout, results returned instead of written. Statistics are taken in
float32 or better, as in the model; everything else happens in the dtype of the activations, as eager torch would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .pictures import Field


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
    scaled_sumsq: torch.Tensor | None = None,
    eps: float = 1e-6,
    gelu: str = "erf",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h [T, F], sums [B, F]): h = gelu(rmsnorm(y) @ w1 + b1) and the sums of h^2 over each image.

    `scaled_sumsq` are those of y times what w1 has folded in, for a second norm; gelu "none" is no activation.
    """
    wide = _wide(y.dtype)
    rstd = torch.rsqrt(sumsq.to(wide).sum(1, keepdim=True) / y.shape[1] + eps)
    if scaled_sumsq is not None:
        rstd = rstd * torch.rsqrt(rstd.square() * scaled_sumsq.to(wide).sum(1, keepdim=True) / y.shape[1] + eps)
    normed = (y.to(wide) * rstd).to(y.dtype)
    pre = normed @ w1.to(y.dtype) + b1.to(y.dtype)
    h = pre if gelu == "none" else gelu_fit(pre) if gelu == "fit" else F.gelu(pre)
    return h, h.to(wide).square().view(-1, tokens_per_image, h.shape[1]).sum(1)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """x rounded to e4m3, the nearest even, and cut off at 448, as GPUs convert."""
    return x.float().clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def expand_fp8(
    y: torch.Tensor,
    w1: torch.Tensor,
    scale: torch.Tensor,
    b1: torch.Tensor,
    sumsq: torch.Tensor,
    h_inverse: torch.Tensor,
    *,
    tokens_per_image: int,
    eps: float = 1e-6,
    gelu: str = "fit",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h * h_inverse [T, F] before it is rounded to e4m3, sums [B, F] of h^2), in the dtype of sumsq.

    h = gelu(rstd * scale * (y @ w1^T) + b1), y [T, D] and w1 [F, D] being e4m3.
    """
    wide = sumsq.dtype
    rstd = torch.rsqrt(sumsq.sum(1, keepdim=True) / y.shape[1] + eps)
    pre = (y.to(wide) @ w1.to(wide).t()) * rstd * scale.to(wide) + b1.to(wide)
    h = gelu_fit(pre) if gelu == "fit" else F.gelu(pre)
    return h * h_inverse.to(wide), h.square().view(-1, tokens_per_image, h.shape[1]).sum(1)


def project_fp8(
    h: torch.Tensor,
    gain: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    b2: torch.Tensor,
    residual: torch.Tensor,
    *,
    tokens_per_image: int,
) -> torch.Tensor:
    """out [T, D] = w2_scale * (h @ e4m3(w2 * (1 + gain))^T) + b2 + residual, in float32, or float64 as b2 is.

    h [T, F] is e4m3; w2 [D, F] and gain [B, F] are float16 values, whose product is rounded to float16 once.
    """
    wide = _wide(b2.dtype)
    images = []
    for rows, row in zip(h.to(wide).split(tokens_per_image), gain.double(), strict=True):
        weights = e4m3(torch.addcmul(w2.double(), w2.double(), row).to(torch.float16))
        images.append(rows @ weights.to(wide).t())
    return torch.cat(images) * w2_scale.to(wide) + b2 + residual.to(wide)


def grn(sums: torch.Tensor, gamma: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """gain [B, F] = gamma * G / (mean_c G + eps), G = sqrt(sums), sums [B, F] of squares over each image."""
    norms = sums.sqrt()
    return gamma.to(sums.dtype) * norms / (norms.mean(1, keepdim=True) + eps)


def project(
    h: torch.Tensor,
    gain: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor,
    residual: torch.Tensor,
    *,
    tokens_per_image: int,
    multiply: bool = False,
) -> torch.Tensor:
    """out [T, D] = (h * (1 + gain)) @ w2 + b2 + residual, one gain row [F] per image.

    With `multiply` h is multiplied by the gain itself; without a gain it is taken as it is.
    """
    scaled = h
    if gain is not None:
        per_token = gain.to(h.dtype).repeat_interleave(tokens_per_image, dim=0)
        scaled = h * per_token if multiply else h + h * per_token
    return residual.to(h.dtype) + (scaled @ w2.to(h.dtype) + b2.to(h.dtype))


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """out [T, D] = x / sqrt(mean_c x^2 + eps) * weight + bias, in float32 or better, rounded once."""
    wide = x.to(_wide(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype) + bias.to(wide.dtype)).to(x.dtype)


def row_squares(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """[T, 1]: the sums over channels of x^2, or of (scale * x)^2, in float32 or better."""
    wide = x.to(_wide(x.dtype))
    return (wide if scale is None else wide * scale.to(wide.dtype)).square().sum(1, keepdim=True)


def channel_attention(sums: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *, tokens_per_image: int) -> torch.Tensor:
    """factor [B, D] = sigmoid(sums / tokens_per_image @ w + b), sums [B, D] over each image, in the dtype of w."""
    mean = (sums / tokens_per_image).to(w.dtype)
    return torch.sigmoid(mean @ w + b.to(w.dtype))


def dwconv_silu(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *, batch: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [T, C], sums [B, C]): y = silu(depthwise 7x7 of x plus b), and its sums over each image."""
    y = F.silu(dwconv(x, w, b, batch=batch, height=height, width=width)[0])
    return y, y.to(_wide(y.dtype)).view(batch, -1, y.shape[1]).sum(1)


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


def patchify(
    image: torch.Tensor | None,
    w: torch.Tensor,
    b: torch.Tensor,
    *,
    patch: int,
    layout: str = "nchw",
    latents: torch.Tensor | None = None,
) -> torch.Tensor:
    """tokens [T, D]: patches (K in the layout's order), followed by latents, times w plus b, in the dtype of w.

    Without an image it is the latents alone.
    """
    if image is None:
        if latents is None:
            raise ValueError("neither image nor latents")
        return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).to(w.dtype) @ w + b.to(w.dtype)
    if image.dtype == torch.uint8:
        image = image.to(_wide(w.dtype)) / 127.5 - 1.0
    nchw = image if layout == "nchw" else image.permute(0, 3, 1, 2)
    batch, _, height, width = nchw.shape
    grid = nchw.reshape(batch, 3, height // patch, patch, width // patch, patch)
    order = (0, 2, 4, 1, 3, 5) if layout == "nchw" else (0, 2, 4, 3, 5, 1)
    depth = 3 * patch * patch
    rows = grid.permute(order).reshape(-1, depth).to(w.dtype)
    if latents is not None:
        rows = torch.cat([rows, latents.permute(0, 2, 3, 1).reshape(rows.shape[0], -1).to(w.dtype)], dim=1)
    return rows @ w + b.to(w.dtype)


def head(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    *,
    grid: tuple[int, int],
    channels: int,
    whiten_mean: torch.Tensor | None = None,
    whiten_rstd: torch.Tensor | None = None,
    norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(latents, mean, logsnr), each [B, Z, h, w], logsnr None for w [D, Z]: the posterior's mode, whitened."""
    both = (x @ w + b.to(x.dtype)).to(_wide(x.dtype))
    both = both.view(-1, *grid, w.shape[1]).permute(0, 3, 1, 2)
    mean, logsnr = (both, None) if w.shape[1] == channels else both.split(channels, dim=1)
    if norm:
        mean = mean * torch.rsqrt(mean.square().mean(1, keepdim=True) + 1e-6)
    latents = mean if logsnr is None else torch.exp(0.5 * F.logsigmoid(logsnr)) * mean
    if whiten_mean is not None and whiten_rstd is not None:
        latents = whiten(latents, whiten_mean, whiten_rstd)
    return latents, mean, logsnr


def fuse_skip(s: torch.Tensor, m: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """out [T, N] = [s, m] @ w + b."""
    return torch.cat([s, m], dim=1) @ w.to(s.dtype) + b.to(s.dtype)


def unpatchify(
    tokens: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    *,
    patch: int,
    grid: tuple[int, int],
    scale_x0: float = 1.0,
    noise: torch.Tensor | None = None,
    scale_noise: float = 0.0,
) -> torch.Tensor:
    """image [B, 3, H, W] = scale_x0 * PixelShuffle(tokens @ w + b) + scale_noise * noise, float32 or better."""
    flat = tokens @ w.to(tokens.dtype) + b.to(tokens.dtype)
    x0 = F.pixel_shuffle(flat.view(-1, *grid, w.shape[1]).permute(0, 3, 1, 2), patch)
    image = scale_x0 * x0.to(_wide(tokens.dtype))
    return image if noise is None else image + scale_noise * noise.to(image.dtype)


def pixels_to_bytes(image: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as bytes: floor(127.5*x + 128), clamped."""
    return (image * 127.5 + 128.0).floor().clamp(0.0, 255.0).to(torch.uint8)


def whiten(z: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """(z - mean) * rstd per channel of [B, Z, h, w], in float32 or better."""
    wide = _wide(z.dtype)
    return (z.to(wide) - mean.to(wide).view(-1, 1, 1)) * rstd.to(wide).view(-1, 1, 1)


def dewhiten(z: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """z * std + mean per channel of [B, Z, h, w], in float32 or better."""
    wide = _wide(z.dtype)
    return z.to(wide) * std.to(wide).view(-1, 1, 1) + mean.to(wide).view(-1, 1, 1)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, tokens_per_image: int, scale: float | None = None
) -> torch.Tensor:
    """out [T, D] = softmax(q @ k^T * scale) @ v, every image by itself; scale is 1 / sqrt(D) when None."""
    q, k, v = (t.view(-1, tokens_per_image, t.shape[1]) for t in (q, k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
    weights = torch.softmax(scores.to(_wide(q.dtype)), dim=2).to(q.dtype)
    return (weights @ v).flatten(0, 1)


def resize(source: torch.Tensor, weights: torch.Tensor, *, sizes: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """out [B, H, W, 3] uint8, zero where no picture of the table `sizes` goes; sums are taken in int64."""
    flat, tables = source.long(), weights.long()
    channels = torch.arange(3, device=source.device)
    out = torch.zeros(tuple(shape), dtype=torch.uint8, device=source.device)
    for row in sizes.tolist():
        a, b = (torch.arange(row[field], device=source.device) for field in (Field.LENGTH_A, Field.LENGTH_B))
        at = 16 * row[Field.SOURCE] + row[Field.ORIGIN] + b[:, None] * row[Field.STEP_B] + a * row[Field.STEP_A]
        pixels = flat[at[..., None] + channels]
        for axis, dim in (("A", 1), ("B", 0)):
            count, taps, begin, precision = (
                row[Field[f"{name}_{axis}"]] for name in ("COUNT", "TAPS", "WEIGHTS", "PRECISION")
            )
            first, w = tables[begin : begin + count * (1 + taps)].view(1 + taps, count).split((1, taps))
            inputs = (first + torch.arange(taps, device=source.device)[:, None]).clamp(0, pixels.shape[dim] - 1)
            # [taps, count, the other axis, 3]
            windows = pixels.movedim(dim, 0)[inputs]
            sums = (windows * w[:, :, None, None]).sum(0) + (1 << precision >> 1)
            pixels = (sums >> precision).clamp(0, 255).movedim(0, dim)
        b, a = (torch.arange(size, device=source.device) for size in pixels.shape[:2])
        into = row[Field.OUT] + b[:, None] * row[Field.OUT_B] + a * row[Field.OUT_A]
        out[row[Field.IMAGE]].view(-1)[into[..., None] + channels] = pixels.to(torch.uint8)
    return out
