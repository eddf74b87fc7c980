"""Unpatchify: out_proj, PixelShuffle and the one-step sampler in one GEMM that writes the image.

    x0    = PixelShuffle(tokens @ w + b)                      w [D, 3pp], column c*pp + py*p + px
    image = scale_x0 * x0 + scale_noise * noise

With one step of DDIM the image is an axpy of the prediction and the starting noise, so it belongs in the
epilogue; scale_noise is absent and scale_x0 is 1 where the prediction itself is wanted. A uint8 image is
floor(127.5*x + 128), clamped. Columns of a tile run along p pixels of a row, and the tokens beside them go on
where they stop: sectors are written whole. Rows of a tile may belong to several images.

FLOPs 2*T*D*3pp; bytes (T*D + D*3pp) * itemsize + 3pp*T * (itemsize(image) + itemsize(noise)).

Measured facts: GPU timings not measured yet. Compiled, Triton 3.6.0, p 16, D 896, bf16 image, fp32 noise,
2026-11-23: the epilogue holds addresses and noise beside the accumulator, so 128x128 takes 192 registers on
sm_90 (one CTA an SM) and spills 344 to 480 bytes at 4 warps on sm_80 and 120; 128x64 takes 94 (two CTAs) and
176 (two), no spills.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..jit import grouped_tile
from ..launch import (
    FLOATS,
    Launch,
    cdiv,
    check_int32,
    check_tensor,
    compiler_options,
    compute_capability,
    dot_precision,
    run_launches,
)
from ..tuning import Family, GemmConfig, Shape, flat_gemm_default, lookup, register

IMAGE_DTYPES = (torch.uint8, *FLOATS)


@triton.jit
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
):
    PIXELS: tl.constexpr = 3 * PATCH * PATCH
    EVEN_K: tl.constexpr = DIM % BLOCK_K == 0
    EVEN_N: tl.constexpr = PIXELS % BLOCK_N == 0
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(PIXELS, BLOCK_N), GROUP_M)
    rm = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    in_n = rn < PIXELS
    # rows past the end read the last token again and are dropped at the store
    a_ptrs = tokens_ptr + tl.minimum(rm, tokens - 1).to(tl.int64)[:, None] * DIM + rk[None, :]
    w_ptrs = w_ptr + rk[:, None] * PIXELS + rn[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, DIM, BLOCK_K):
        a = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=rk[None, :] < DIM - k, other=0.0)
        if EVEN_K and EVEN_N:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(rk[:, None] < DIM - k) & in_n[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * PIXELS

    bias = tl.load(bias_ptr + rn, mask=in_n, other=0.0).to(tl.float32)
    out = (acc + bias[None, :]) * scale_x0  # [BLOCK_M, BLOCK_N]
    per_image = grid_h * grid_w
    width = grid_w * PATCH
    plane = per_image * (PATCH * PATCH)
    inside = rm % per_image
    corner = inside // grid_w * (PATCH * width) + inside % grid_w * PATCH
    first = (rm // per_image).to(tl.int64) * (3 * plane) + corner
    offset = rn // (PATCH * PATCH) * plane + rn // PATCH % PATCH * width + rn % PATCH
    at = first[:, None] + offset[None, :]
    mask = (rm < tokens)[:, None] & in_n[None, :]
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
    for name, size in (("height", height), ("width", width)):
        if size < patch or size % patch:
            below = max(size // patch, 1) * patch
            raise ValueError(f"{name} {size} of image is not a multiple of {patch}: use {below} or {below + patch}")
    if batch < 1:
        raise ValueError("image has no images: its first dimension is 0")
    if (noise is not None) != (scale_noise != 0.0):
        given = "missing" if noise is None else "given"
        raise ValueError(f"noise is {given} and scale_noise is {scale_noise}: pass both, or neither")
    grid_h, grid_w = height // patch, width // patch
    check_tensor("tokens", tokens, shape=(batch * grid_h * grid_w, None), dtypes=FLOATS, like=image)
    dim, pixels = tokens.shape[1], 3 * patch * patch
    check_tensor("w", w, shape=(dim, pixels), dtypes=tokens.dtype, like=image)
    check_tensor("b", b, shape=(pixels,), dtypes=(torch.float32, tokens.dtype), like=image)
    if noise is not None:
        check_tensor("noise", noise, shape=tuple(image.shape), dtypes=FLOATS, like=image)
    if config is None:
        key = {"tokens_per_image": grid_h * grid_w, "dim": dim, "depth": pixels}
        config = lookup("unpatchify", compute_capability(tokens), key, tokens.dtype)
    launches = _launches(tokens, w, b, noise, image, patch, float(scale_x0), float(scale_noise), config)
    run_launches(launches, tokens.device)


def _launches(
    tokens: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    noise: torch.Tensor | None,
    image: torch.Tensor,
    patch: int,
    scale_x0: float,
    scale_noise: float,
    config: GemmConfig,
) -> list[Launch]:
    count, dim = tokens.shape
    check_int32("number of tokens", count + config.block_m)
    check_int32("values of one image", image[0].numel())
    tiles_m = cdiv(count, config.block_m)
    programs = tiles_m * cdiv(w.shape[1], config.block_n)
    check_int32("number of tiles", programs)
    args = {
        "tokens_ptr": tokens,
        "w_ptr": w,
        "bias_ptr": b,
        "noise_ptr": b if noise is None else noise,
        "image_ptr": image,
        "tokens": count,
        "grid_h": image.shape[2] // patch,
        "grid_w": image.shape[3] // patch,
        "tiles_m": tiles_m,
        "scale_x0": scale_x0,
        "scale_noise": scale_noise,
        "DIM": dim,
        "PATCH": patch,
        "NOISE": noise is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PRECISION": dot_precision(tokens.dtype),
    }
    options = compiler_options(config.num_warps, config.num_stages, config.maxnreg)
    return [Launch(unpatchify_kernel, (programs,), args, options)]


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    """Half the columns of a plain GEMM tile: 64-bit addresses and the noise take the registers of the other half."""
    config = flat_gemm_default(cc, shape["tokens_per_image"], shape["depth"], shape["dim"], dtype, use)
    return replace(config, block_n=min(config.block_n, 64))


def _example(shape: Shape, dtype: torch.dtype, config: GemmConfig) -> list[Launch]:
    patch = round((shape["depth"] / 3) ** 0.5)
    grid_h, grid_w, dim = cdiv(shape["tokens_per_image"], 16), 16, shape["dim"]

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    tokens, w, b = empty(2 * grid_h * grid_w, dim), empty(dim, shape["depth"]), empty(shape["depth"], of=torch.float32)
    image = (2, 3, grid_h * patch, grid_w * patch)
    noise = empty(*image, of=torch.float32)
    return _launches(tokens, w, b, noise, empty(*image), patch, 1.0, 0.5, config)


register(Family("unpatchify", GemmConfig, ("dim", "depth"), ("tokens_per_image",), _default, _example))
