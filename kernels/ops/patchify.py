"""Patchify: pixels to tokens in one GEMM whose A operand is gathered from the image.

    encoder:  tokens[t, :] = patch(image)[t, :] @ w + b                                  w [3pp, D]
    decoder:  tokens[t, :] = [patch(x_t)[t, :], latents[:, t]] @ w + b                   w [3pp + Z, D]
    without an image, latents alone: tokens[t, :] = latents[:, t] @ w + b                w [Z, D]

The convolution has kernel = stride = p, so a token is a linear map of its own patch. In the decoder patchify, latent_up
and fuse_in are linear in a row too, and dewhitening is affine: folded at load, they leave one weight for the noised
image and the whitened latents together. uint8 pixels become x/127.5 - 1 on the way in.

The order of K follows the image's layout, so that neighbours in K are neighbours in memory and every 32-byte sector is
used in full: (c, py, px) for NCHW, runs of p pixels; (py, px, c) for NHWC, runs of 3p values. `pack_patchify_weight`
makes either from the convolution's weight. Latents are NCHW: their tile is read along pixels and turned on its way
through shared memory. Rows of a tile may belong to several images; no statistic spans a row, so that changes no bit.
Both layouts load 16 bytes per thread by cp.async; registers by tile and form are in kernels/NOTES.md.

FLOPs 2*T*(3pp + Z)*D; bytes T*3pp * itemsize(image) + T*Z * itemsize(latents) + (3pp + Z)*D * itemsize
+ D * itemsize(b) + T*D * itemsize(tokens).
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

LAYOUTS = ("nchw", "nhwc")
IMAGE_DTYPES = (torch.uint8, *FLOATS)


@triton.jit(do_not_specialize=["tiles_m"])
def patchify_kernel(
    image_ptr,
    latents_ptr,
    w_ptr,
    bias_ptr,
    tokens_ptr,
    tokens,
    grid_h,
    grid_w,
    tiles_m,
    PATCH: tl.constexpr,
    IMAGE: tl.constexpr,
    LATENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIM: tl.constexpr,
    NHWC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr = False,
):
    PIXELS: tl.constexpr = 3 * PATCH * PATCH if IMAGE else 0
    EVEN_K: tl.constexpr = PIXELS % BLOCK_K == 0
    EVEN_N: tl.constexpr = DIM % BLOCK_N == 0
    NORMALIZE: tl.constexpr = image_ptr.dtype.element_ty == tl.uint8
    dtype = w_ptr.dtype.element_ty
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(DIM, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_m = offs_m < tokens
    in_n = offs_n < DIM
    per_image = grid_h * grid_w
    width = grid_w * PATCH
    plane = per_image * (PATCH * PATCH)
    # rows past the end read the last patch again and are dropped at the store
    row = tl.minimum(offs_m, tokens - 1)
    inside = row % per_image
    corner = inside // grid_w * (PATCH * width) + inside % grid_w * PATCH
    first = (row // per_image).to(tl.int64) * (3 * plane) + (corner * 3 if NHWC else corner)

    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    w_ptrs = w_ptr + offs_k[:, None] * DIM + offs_n[None, :]
    if IMAGE:
        for k in range(0, PIXELS, BLOCK_K):
            kk = k + offs_k
            if NHWC:
                offset = kk // (3 * PATCH) * (3 * width) + kk % (3 * PATCH)
            else:
                offset = kk // (PATCH * PATCH) * plane + kk // PATCH % PATCH * width + kk % PATCH
            in_k = kk < PIXELS
            x = load_tile(image_ptr + first[:, None] + offset[None, :], in_k[None, :], EVEN_K)
            if NORMALIZE:
                x = x.to(tl.float32) * (1.0 / 127.5) - 1.0
            w = load_tile(w_ptrs, in_k[:, None] & in_n[None, :], EVEN_K and EVEN_N)
            acc = tl.dot(x.to(dtype), w, acc, input_precision=PRECISION)
            w_ptrs += BLOCK_K * DIM

    if LATENTS > 0:
        EVEN_Z: tl.constexpr = LATENTS % BLOCK_K == 0
        # where images are no multiples of 16 tokens, each element has an address of its own: offsets from the tile's
        # first image in 32 bits, and rows past the end clamped, since a mask would take registers too
        first_image = pid_m * BLOCK_M // per_image
        z_base = latents_ptr + first_image.to(tl.int64) * LATENTS * per_image
        z_row = offs_m if ALIGNED else row
        z_first = (z_row // per_image - first_image) * (LATENTS * per_image) + z_row % per_image
        w_ptrs = w_ptr + (PIXELS + offs_k[:, None]) * DIM + offs_n[None, :]
        # two stages: a third one's addresses spill
        for k in tl.range(0, LATENTS, BLOCK_K, num_stages=2):
            in_k = (k + offs_k < LATENTS)[:, None]
            z_ptrs = z_base + (z_first[None, :] + (k + offs_k)[:, None] * per_image)
            # [BLOCK_K, BLOCK_M]
            z = load_tile(z_ptrs, in_k & in_m[None, :] if ALIGNED else in_k, EVEN_Z and not ALIGNED)
            w = load_tile(w_ptrs, in_k & in_n[None, :], EVEN_Z and EVEN_N)
            acc = tl.dot(tl.trans(z.to(dtype)), w, acc, input_precision=PRECISION)
            w_ptrs += BLOCK_K * DIM

    release_next(PDL)
    bias = tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
    out = (acc + bias[None, :]).to(tokens_ptr.dtype.element_ty)
    out_ptrs = tokens_ptr + offs_m.to(tl.int64)[:, None] * DIM + offs_n[None, :]
    tl.store(out_ptrs, out, mask=in_m[:, None] & in_n[None, :])


def pack_patchify_weight(weight: torch.Tensor, *, patch: int, layout: str = "nchw") -> torch.Tensor:
    """[D, 3, p, p] (or [D, 3pp]) convolution weight -> [3pp, D] in the order of K that `layout` asks for, a copy."""
    _check_layout(layout)
    if patch < 1 or weight.dim() < 2 or weight[0].numel() != 3 * patch * patch:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [D, 3, {patch}, {patch}] for patch {patch}")
    kernel = weight.reshape(-1, 3, patch, patch)
    if layout == "nhwc":
        kernel = kernel.permute(0, 2, 3, 1)
    return kernel.reshape(kernel.shape[0], -1).t().clone(memory_format=torch.contiguous_format)


def patchify(
    image: torch.Tensor | None,
    w: torch.Tensor,
    b: torch.Tensor,
    tokens: torch.Tensor,
    *,
    patch: int,
    layout: str = "nchw",
    latents: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> None:
    """tokens = patches @ w + b; with latents, tokens = [patches, latents] @ w + b.

    Args:
        image: [B, 3, H, W] (layout "nchw") or [B, H, W, 3] ("nhwc"); uint8 is taken as x/127.5 - 1, bf16, fp16 or fp32
            as it is. H and W are multiples of patch. None for latents alone.
        w: [3pp (+ Z), D] bf16, fp16 or fp32, pixel rows from `pack_patchify_weight` of the same layout, latent rows
            after them. The products run in this dtype.
        b: [D], fp32 or the dtype of w.
        tokens: [B * H/p * W/p, D] output, bf16, fp16 or fp32.
        latents: [B, Z, H/p, W/p], bf16, fp16 or fp32, for the decoder's form.
        config: launch parameters; looked up by the shape of one image when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    _check_layout(layout)
    if patch < 1:
        raise ValueError(f"patch is {patch}, expected at least 1")
    batch, grid_h, grid_w = _grid(image, latents, patch, layout)
    channels = 0 if latents is None else latents.shape[1]
    depth, count = (0 if image is None else 3 * patch * patch) + channels, batch * grid_h * grid_w
    first = latents if image is None else image
    check_tensor("w", w, shape=(depth, None), dtypes=FLOATS, like=first)
    dim = w.shape[1]
    check_tensor("b", b, shape=(dim,), dtypes=(torch.float32, w.dtype), like=w)
    check_tensor("tokens", tokens, shape=(count, dim), dtypes=FLOATS, like=w)
    if config is None:
        key = {"tokens_per_image": grid_h * grid_w, "dim": dim, "depth": depth}
        config = lookup("patchify", compute_capability(w), key, w.dtype)
    check_int32("values of one image", 3 * grid_h * grid_w * patch * patch)
    check_int32("number of latents that a tile reaches over", (2 * grid_h * grid_w + config.block_m) * channels)
    tiles_m, programs = flat_tiles(count, dim, config)
    args = {
        "image_ptr": w if image is None else image,
        "latents_ptr": w if latents is None else latents,
        "w_ptr": w,
        "bias_ptr": b,
        "tokens_ptr": tokens,
        "tokens": count,
        "grid_h": grid_h,
        "grid_w": grid_w,
        "tiles_m": tiles_m,
        "PATCH": patch,
        "IMAGE": image is not None,
        "LATENTS": channels,
        "ALIGNED": grid_h * grid_w % 16 == 0,
        "DIM": dim,
        "NHWC": layout == "nhwc",
        "PRECISION": dot_precision(w.dtype),
        **config.tile(),
    }
    run_launches([Launch(patchify_kernel, (programs,), args, config.options())], w.device)


def _grid(image: torch.Tensor | None, latents: torch.Tensor | None, patch: int, layout: str) -> tuple[int, int, int]:
    """(B, h, w) of the tokens of checked inputs."""
    if image is None:
        if latents is None:
            raise ValueError("neither image nor latents are given: pass at least one of them")
        check_tensor("latents", latents, shape=(None, None, None, None), dtypes=FLOATS)
        if 0 in latents.shape:
            raise ValueError(
                f"latents have shape {list(latents.shape)}, expected at least one image, channel and pixel"
            )
        return latents.shape[0], latents.shape[2], latents.shape[3]
    channel_axis = 1 if layout == "nchw" else 3
    shape = tuple(3 if axis == channel_axis else None for axis in range(4))
    check_tensor("image", image, shape=shape, dtypes=IMAGE_DTYPES)
    batch, height, width = (size for axis, size in enumerate(image.shape) if axis != channel_axis)
    grid_h, grid_w = check_patches(batch, height, width, patch)
    if latents is not None:
        check_tensor("latents", latents, shape=(batch, None, grid_h, grid_w), dtypes=FLOATS, like=image)
    return batch, grid_h, grid_w


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected one of {LAYOUTS}")


def work(
    *,
    image: TensorLike | None = None,
    w: TensorLike,
    b: TensorLike,
    tokens: TensorLike,
    latents: TensorLike | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `patchify` called with these arguments."""
    return Work(2 * tokens.shape[0] * prod(w.shape), nbytes_of(image, w, b, tokens, latents))


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    """A plain GEMM tile, but half the columns on sm_80-89 and sm_120, where the decoder's two loops spill."""
    config = flat_gemm_default(cc, shape["tokens_per_image"], shape["dim"], shape["depth"], dtype, use)
    if cc == 90 and config.num_warps == 8:
        # a shallow k leaves room under 128 registers for what the decoder's latents take: two CTAs on an SM
        return replace(config, block_k=min(config.block_k, 32), num_stages=4, maxnreg=128)
    if cc in (90, 100):
        return config
    # without the limit ptxas spills 8 bytes on sm_80 to make room for a third CTA
    return replace(config, block_n=min(config.block_n, 64), num_stages=3, maxnreg=224)


register(flat_family("patchify", ("dim", "depth"), _default))
