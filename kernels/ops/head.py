"""Head: to_bottleneck, the posterior's mode and whitening, from tokens to NCHW latents in one GEMM.

    mean, logsnr = split(x @ w + b)                           w [D, 2Z]
    mean         = mean * rsqrt(mean_c(mean^2) + 1e-6)        only with norm: weightless RMSNorm
    latents      = (sqrt(sigmoid(logsnr)) * mean - shift) * scale

Everything after the products is float32. A program holds the same channels of both halves, two accumulators, so that
the mode needs no second pass; with `norm` it holds all of them. sqrt(sigmoid(s)) is taken as
exp(0.5 * (min(s, 0) - log(1 + exp(-|s|)))), which overflows for no s. A weight [D, Z] is a deterministic bottleneck: no
logsnr, and the mode is the mean. Tiles are stored along pixels.

FLOPs 2*T*D*2Z; bytes (T*D + D*2Z) * itemsize + 2Z * itemsize(b) + T*Z * itemsize of each output + 8*Z where whitened.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from ..config_rows import Shape, flat_family, register
from ..gemm import GemmConfig, flat_gemm_default, flat_tiles
from ..jit import grouped_tile, load_tile, release_next, wait_for_previous
from ..launch import (
    FLOATS,
    Launch,
    TensorLike,
    Work,
    check_int32,
    check_tensor,
    compute_capability,
    dot_precision,
    nbytes_of,
    next_power_of_2,
    run_launches,
)
from ..tuning import lookup

NORM_EPS = 1e-6
NORM_MAX_CHANNELS = 512


@triton.jit
def alpha_of(logsnr):
    """sqrt(sigmoid(logsnr)), the weight of the mean in the posterior's mode."""
    return tl.exp(0.5 * (tl.minimum(logsnr, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logsnr)))))


@triton.jit(do_not_specialize=["tiles_m"])
def head_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    shift_ptr,
    scale_ptr,
    latents_ptr,
    mean_ptr,
    logsnr_ptr,
    tokens,
    tokens_per_image,
    tiles_m,
    DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSTERIOR: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    WHITEN: tl.constexpr,
    LATENTS: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr = False,
):
    WIDTH: tl.constexpr = 2 * CHANNELS if POSTERIOR else CHANNELS
    EVEN_K: tl.constexpr = DIM % BLOCK_K == 0
    EVEN_N: tl.constexpr = CHANNELS % BLOCK_N == 0
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(CHANNELS, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # channels of one half
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_n = offs_n < CHANNELS
    # rows past the end read the last token again and are dropped at the store
    x_ptrs = x_ptr + tl.minimum(offs_m, tokens - 1).to(tl.int64)[:, None] * DIM + offs_k[None, :]
    w_ptrs = w_ptr + offs_k[:, None] * WIDTH + offs_n[None, :]

    wait_for_previous(PDL)
    mean = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    logsnr = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, DIM, BLOCK_K):
        in_w = (offs_k[:, None] < DIM - k) & in_n[None, :]
        x = load_tile(x_ptrs, offs_k[None, :] < DIM - k, EVEN_K)
        w = load_tile(w_ptrs, in_w, EVEN_K and EVEN_N)
        mean = tl.dot(x, w, mean, input_precision=PRECISION)
        if POSTERIOR:
            v = load_tile(w_ptrs + CHANNELS, in_w, EVEN_K and EVEN_N)
            logsnr = tl.dot(x, v, logsnr, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * WIDTH

    release_next(PDL)
    mean += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if NORM:
        # columns past the last channel are zero: no weight, no bias
        mean *= tl.rsqrt(tl.sum(mean * mean, axis=1) / CHANNELS + EPS)[:, None]
    # offsets from the tile's first image in 32 bits: where images are no multiples of 16 tokens, each element has an
    # address of its own
    first_image = pid_m * BLOCK_M // tokens_per_image
    base = first_image.to(tl.int64) * CHANNELS * tokens_per_image
    at = (offs_m // tokens_per_image - first_image) * (CHANNELS * tokens_per_image) + offs_m % tokens_per_image
    at = at[:, None] + offs_n[None, :] * tokens_per_image  # [BLOCK_M, BLOCK_N]
    mask = (offs_m < tokens)[:, None] & in_n[None, :]
    if POSTERIOR:
        logsnr += tl.load(bias_ptr + CHANNELS + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if RAW:
        tl.store(mean_ptr + base + at, mean.to(mean_ptr.dtype.element_ty), mask=mask)
        if POSTERIOR:
            tl.store(logsnr_ptr + base + at, logsnr.to(logsnr_ptr.dtype.element_ty), mask=mask)
    if LATENTS:
        mode = mean
        if POSTERIOR:
            mode = alpha_of(logsnr) * mean
        if WHITEN:
            shift = tl.load(shift_ptr + offs_n, mask=in_n, other=0.0)[None, :]
            mode = (mode - shift) * tl.load(scale_ptr + offs_n, mask=in_n, other=0.0)[None, :]
        tl.store(latents_ptr + base + at, mode.to(latents_ptr.dtype.element_ty), mask=mask)


def head(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    *,
    latents: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    logsnr: torch.Tensor | None = None,
    whiten_mean: torch.Tensor | None = None,
    whiten_rstd: torch.Tensor | None = None,
    norm: bool = False,
    config: GemmConfig | None = None,
) -> None:
    """Write latents, the raw posterior, or both; outputs that are None are not computed.

    Args:
        x: [B*h*w, D] bf16, fp16 or fp32 tokens.
        w: [D, 2Z], dtype of x, mean columns first; or [D, Z] for a bottleneck without posterior.
        b: [2Z] or [Z], fp32 or the dtype of x.
        latents: [B, Z, h, w] output, bf16, fp16 or fp32: the mode, whitened if statistics are given.
        mean, logsnr: [B, Z, h, w] fp32 outputs, both or neither (mean alone without posterior).
        whiten_mean, whiten_rstd: [Z] fp32, the running mean and 1 / sqrt(running_var + eps), or neither.
        norm: normalise the mean over channels first (`bottleneck_norm_mode` "channel_wise").
        config: launch parameters, block_n channels of each half; looked up by the shape of one image when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    output = latents if latents is not None else mean
    if output is None:
        raise ValueError("neither latents nor mean is given: pass at least one output")
    check_tensor("x", x, shape=(None, None), dtypes=FLOATS)
    dim = x.shape[1]
    name = "latents" if latents is not None else "mean"
    check_tensor(name, output, shape=(None, None, None, None), like=x)
    shape = tuple(output.shape)
    if 0 in shape:
        raise ValueError(f"{name} has shape {list(shape)}, expected at least one image, channel and pixel")
    channels, per_image = shape[1], shape[2] * shape[3]
    tokens = shape[0] * per_image
    check_tensor("x", x, shape=(tokens, dim))
    check_tensor("w", w, shape=(dim, None), dtypes=x.dtype, like=x)
    posterior = w.shape[1] != channels
    if posterior and w.shape[1] != 2 * channels:
        raise ValueError(
            f"w has {w.shape[1]} columns, expected {2 * channels} (mean and logsnr) or {channels} (no posterior) "
            f"for the {channels} channels of {name}"
        )
    if (mean is not None and posterior) != (logsnr is not None):
        raise ValueError("pass mean and logsnr both or neither; without posterior there is no logsnr")
    check_tensor("b", b, shape=(w.shape[1],), dtypes=(torch.float32, x.dtype), like=x)
    if latents is not None:
        check_tensor("latents", latents, shape=shape, dtypes=FLOATS, like=x)
    for raw_name, raw in (("mean", mean), ("logsnr", logsnr)):
        if raw is not None:
            check_tensor(raw_name, raw, shape=shape, dtypes=torch.float32, like=x)
    _check_statistics(whiten_mean, whiten_rstd, latents, channels, x)
    config = config or _config(x, channels, per_image, norm)
    if norm and config.block_n < channels:
        raise ValueError(f"norm needs all {channels} channels in one tile, config has block_n {config.block_n}")
    tiles_m, programs = flat_tiles(tokens, channels, config)
    check_int32("number of latents that a tile reaches over", (2 * per_image + config.block_m) * channels)
    # a pointer that the kernel's switches leave unused still has to be one
    args = {
        "x_ptr": x,
        "w_ptr": w,
        "bias_ptr": b,
        "shift_ptr": b if whiten_mean is None else whiten_mean,
        "scale_ptr": b if whiten_rstd is None else whiten_rstd,
        "latents_ptr": b if latents is None else latents,
        "mean_ptr": b if mean is None else mean,
        "logsnr_ptr": b if logsnr is None else logsnr,
        "tokens": tokens,
        "tokens_per_image": per_image,
        "tiles_m": tiles_m,
        "DIM": dim,
        "CHANNELS": channels,
        "POSTERIOR": posterior,
        "NORM": norm,
        "EPS": NORM_EPS,
        "WHITEN": whiten_mean is not None,
        "LATENTS": latents is not None,
        "RAW": mean is not None,
        "PRECISION": dot_precision(x.dtype),
        **config.tile(),
    }
    run_launches([Launch(head_kernel, (programs,), args, config.options())], x.device)


def _check_statistics(
    mean: torch.Tensor | None, rstd: torch.Tensor | None, latents: torch.Tensor | None, channels: int, x: torch.Tensor
) -> None:
    if (mean is None) != (rstd is None):
        raise ValueError("pass whiten_mean and whiten_rstd both or neither")
    if mean is None or rstd is None:
        return
    if latents is None:
        raise ValueError("whitening statistics are given but latents is None: pass latents too")
    check_tensor("whiten_mean", mean, shape=(channels,), dtypes=torch.float32, like=x)
    check_tensor("whiten_rstd", rstd, shape=(channels,), dtypes=torch.float32, like=x)


def _config(x: torch.Tensor, channels: int, per_image: int, norm: bool) -> GemmConfig:
    key = {"tokens_per_image": per_image, "dim": x.shape[1], "channels": channels}
    config: GemmConfig = lookup("head", compute_capability(x), key, x.dtype)
    if not norm or config.block_n >= channels:
        return config
    if channels > NORM_MAX_CHANNELS:
        raise ValueError(
            f"norm over {channels} channels does not fit one tile of at most {NORM_MAX_CHANNELS}: ask for mean and "
            "logsnr without norm and normalise them with torch"
        )
    # all channels in a tile, with fewer rows and a shallower pipeline to pay for them
    block_n = next_power_of_2(channels)
    return replace(config, block_m=max(16, 64 * 128 // block_n), block_n=block_n, block_k=16, num_warps=8, num_stages=2)


def work(
    *,
    x: TensorLike,
    w: TensorLike,
    b: TensorLike,
    latents: TensorLike | None = None,
    mean: TensorLike | None = None,
    logsnr: TensorLike | None = None,
    whiten_mean: TensorLike | None = None,
    whiten_rstd: TensorLike | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `head` called with these arguments."""
    nbytes = nbytes_of(x, w, b, latents, mean, logsnr, whiten_mean, whiten_rstd)
    return Work(2 * x.shape[0] * prod(w.shape), nbytes)


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    """Half the columns of a plain GEMM tile, since there are two accumulators."""
    config = flat_gemm_default(cc, shape["tokens_per_image"], shape["channels"], shape["dim"], dtype, use)
    config = replace(config, block_n=max(16, min(config.block_n, 128) // 2))
    if dtype == torch.float32 or _suits(config, shape):
        return config
    return replace(config, block_m=64, block_k=64, num_stages=3)


def _suits(config: GemmConfig, shape: Shape) -> bool:
    """Whether the stores fit the registers: an address for each element where images are no multiples of 16 tokens."""
    return shape["tokens_per_image"] % 16 == 0 or config.num_warps == 8 or config.block_m <= 64


register(flat_family("head", ("dim", "channels"), _default, _suits))
