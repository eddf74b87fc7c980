"""Unpatchify: out_proj, PixelShuffle and the one-step sampler in one GEMM that writes the image.

    x0    = PixelShuffle(tokens @ w + b)                      w [D, 3pp], column c*pp + py*p + px
    image = scale_x0 * x0 + scale_noise * noise

With one step of DDIM the image is an axpy of the prediction and the starting noise, so it belongs in the epilogue;
scale_noise is absent and scale_x0 is 1 where the prediction itself is wanted. A uint8 image is floor(127.5*x + 128),
clamped. Columns of a tile run along p pixels of a row, and the tokens beside them go on where they stop: sectors are
written whole. Rows of a tile may belong to several images. The epilogue holds addresses and noise beside the
accumulator, so tiles have half the columns of a plain GEMM's; what more of them cost is in kernels/NOTES.md.

FLOPs 2*T*D*3pp; bytes (T*D + D*3pp) * itemsize + 3pp * itemsize(b) + 3pp*T * (itemsize(image) + itemsize(noise)).
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
    check_patches,
    check_tensor,
    compute_capability,
    dot_precision,
    nbytes_of,
    run_launches,
)
from ..tuning import lookup

IMAGE_DTYPES = (torch.uint8, *FLOATS)


@triton.jit(do_not_specialize=["tiles_m"])
def unpatchify_kernel(
    tokens_ptr,
    w_ptr,
    bias_ptr,
    noise_ptr,
    image_ptr,
    tokens,
    grid_h,
    grid_w,
    tiles_m,
    scale_x0,
    scale_noise,
    DIM: tl.constexpr,
    PATCH: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr = False,
):
    PIXELS: tl.constexpr = 3 * PATCH * PATCH
    EVEN_K: tl.constexpr = DIM % BLOCK_K == 0
    EVEN_N: tl.constexpr = PIXELS % BLOCK_N == 0
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(PIXELS, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_n = offs_n < PIXELS
    # rows past the end read the last token again and are dropped at the store
    a_ptrs = tokens_ptr + tl.minimum(offs_m, tokens - 1).to(tl.int64)[:, None] * DIM + offs_k[None, :]
    w_ptrs = w_ptr + offs_k[:, None] * PIXELS + offs_n[None, :]

    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, DIM, BLOCK_K):
        a = load_tile(a_ptrs, offs_k[None, :] < DIM - k, EVEN_K)
        w = load_tile(w_ptrs, (offs_k[:, None] < DIM - k) & in_n[None, :], EVEN_K and EVEN_N)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * PIXELS

    release_next(PDL)
    bias = tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
    out = (acc + bias[None, :]) * scale_x0  # [BLOCK_M, BLOCK_N]
    per_image = grid_h * grid_w
    width = grid_w * PATCH
    plane = per_image * (PATCH * PATCH)
    inside = offs_m % per_image
    corner = inside // grid_w * (PATCH * width) + inside % grid_w * PATCH
    first = (offs_m // per_image).to(tl.int64) * (3 * plane) + corner
    offset = offs_n // (PATCH * PATCH) * plane + offs_n // PATCH % PATCH * width + offs_n % PATCH
    at = first[:, None] + offset[None, :]
    mask = (offs_m < tokens)[:, None] & in_n[None, :]
    if NOISE:
        out = tl.fma(tl.load(noise_ptr + at, mask=mask, other=0.0).to(tl.float32), scale_noise, out)
    if image_ptr.dtype.element_ty == tl.uint8:
        out = tl.minimum(tl.maximum(tl.floor(out * 127.5 + 128.0), 0.0), 255.0)
    tl.store(image_ptr + at, out.to(image_ptr.dtype.element_ty), mask=mask)


def unpatchify(
    tokens: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    image: torch.Tensor,
    *,
    patch: int,
    scale_x0: float = 1.0,
    noise: torch.Tensor | None = None,
    scale_noise: float = 0.0,
    config: GemmConfig | None = None,
) -> None:
    """image = scale_x0 * PixelShuffle(tokens @ w + b) + scale_noise * noise.

    Args:
        tokens: [B * H/p * W/p, D] bf16, fp16 or fp32.
        w: [D, 3pp], dtype of tokens, columns in the order c, py, px.
        b: [3pp], fp32 or the dtype of tokens.
        image: [B, 3, H, W] output, bf16, fp16, fp32, or uint8 (values in [-1, 1] become 0 to 255, clamped).
        noise: [B, 3, H, W] bf16, fp16 or fp32, needed if and only if scale_noise is not zero.
        config: launch parameters; looked up by the shape of one image when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    if patch < 1:
        raise ValueError(f"patch is {patch}, expected at least 1")
    check_tensor("image", image, shape=(None, 3, None, None), dtypes=IMAGE_DTYPES)
    batch, _, height, width = image.shape
    grid_h, grid_w = check_patches(batch, height, width, patch)
    if (noise is not None) != (scale_noise != 0.0):
        given = "missing" if noise is None else "given"
        raise ValueError(f"noise is {given} and scale_noise is {scale_noise}: pass both, or neither")
    check_tensor("tokens", tokens, shape=(batch * grid_h * grid_w, None), dtypes=FLOATS, like=image)
    (count, dim), pixels = tokens.shape, 3 * patch * patch
    check_tensor("w", w, shape=(dim, pixels), dtypes=tokens.dtype, like=image)
    check_tensor("b", b, shape=(pixels,), dtypes=(torch.float32, tokens.dtype), like=image)
    if noise is not None:
        check_tensor("noise", noise, shape=tuple(image.shape), dtypes=FLOATS, like=image)
    if config is None:
        key = {"tokens_per_image": grid_h * grid_w, "dim": dim, "depth": pixels}
        config = lookup("unpatchify", compute_capability(tokens), key, tokens.dtype)
    check_int32("values of one image", 3 * height * width)
    tiles_m, programs = flat_tiles(count, pixels, config)
    args = {
        "tokens_ptr": tokens,
        "w_ptr": w,
        "bias_ptr": b,
        "noise_ptr": b if noise is None else noise,
        "image_ptr": image,
        "tokens": count,
        "grid_h": grid_h,
        "grid_w": grid_w,
        "tiles_m": tiles_m,
        "scale_x0": float(scale_x0),
        "scale_noise": float(scale_noise),
        "DIM": dim,
        "PATCH": patch,
        "NOISE": noise is not None,
        "PRECISION": dot_precision(tokens.dtype),
        **config.tile(),
    }
    run_launches([Launch(unpatchify_kernel, (programs,), args, config.options())], tokens.device)


def work(
    *,
    tokens: TensorLike,
    w: TensorLike,
    b: TensorLike,
    image: TensorLike,
    noise: TensorLike | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `unpatchify` called with these arguments."""
    return Work(2 * tokens.shape[0] * prod(w.shape), nbytes_of(tokens, w, b, image, noise))


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    """Half the columns of a plain GEMM tile: 64-bit addresses and the noise take the registers of the other half."""
    config = flat_gemm_default(cc, shape["tokens_per_image"], shape["depth"], shape["dim"], dtype, use)
    # to make room for a fifth small CTA on sm_80, ptxas would spill
    maxnreg = 128 if cc == 80 and use == "latency" and config.block_m <= 64 else None
    return replace(config, block_n=min(config.block_n, 64), maxnreg=maxnreg)


register(flat_family("unpatchify", ("dim", "depth"), _default))
