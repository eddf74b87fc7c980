"""DiCo's compact channel attention: one factor per image and channel, from the sums that `dwconv` left.

    mean[b, c]   = sum_i partials[b, i, c] / tokens
    factor[b, c] = sigmoid(mean[b, :] @ w + bias)

`project` multiplies the columns of its operand by the factor, as it does by GRN's gain. Sums run in the order of the
tiles, and a row of a product depends on no other row, so an image's bits depend neither on the batch nor on the run.
Few tiles per image: the products' loop over K adds them up as it goes, in one launch. Many: a first launch adds them,
with a program for each chunk of channels, and the second one finds a single tile.

FLOPs B*tiles*D + 2*B*D*D; bytes 4*B*tiles*D + D*D * itemsize + D * itemsize(bias) + B*D * itemsize, and 8*B*D more in
two launches, of which the first writes the sums and the second reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from ..config_rows import Family, Shape, register
from ..jit import load_tile, ordered_sum, release_next, sigmoid, wait_for_previous
from ..launch import (
    FLOATS,
    Launch,
    TensorLike,
    Work,
    cdiv,
    check_int32,
    check_tensor,
    compiler_options,
    compute_capability,
    dot_precision,
    nbytes_of,
    next_power_of_2,
    run_launches,
)
from ..tuning import lookup

# every program adds up all tiles of its images: more of them take longer than a second launch
FUSED_TILES = 8
SPLIT_LOADS = 16
# the fewest rows that a matrix instruction takes
IMAGES = 16


@dataclass(frozen=True)
class ChannelAttentionConfig:
    """`split` adds the tiles up in a launch of their own, of `block_c` channels per program."""

    split: bool
    block_c: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def channel_attention_sums_kernel(
    partials_ptr,
    sums_ptr,
    tiles,
    DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr = False,
):
    image = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wait_for_previous(PDL)
    sums = ordered_sum(partials_ptr, image, tiles, offs_c, DIM, UNROLL)
    release_next(PDL)
    tl.store(sums_ptr + image.to(tl.int64) * DIM + offs_c, sums, mask=offs_c < DIM)


@triton.jit
def channel_attention_kernel(
    partials_ptr,
    w_ptr,
    bias_ptr,
    factor_ptr,
    images,
    tokens,
    TILES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr = False,
):
    EVEN_N: tl.constexpr = DIM % BLOCK_N == 0
    EVEN_K: tl.constexpr = DIM % BLOCK_K == 0
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_m, in_n = offs_m < images, offs_n < DIM
    # rows past the last image read it again and are dropped at the store
    rows = tl.minimum(offs_m, images - 1).to(tl.int64)[:, None] * (TILES * DIM) + offs_k[None, :]
    w_ptrs = w_ptr + offs_k[:, None] * DIM + offs_n[None, :]
    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, DIM, BLOCK_K):
        in_k = offs_k < DIM - k
        mean = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for tile in tl.static_range(TILES):
            mean += load_tile(partials_ptr + rows + (tile * DIM + k), in_k[None, :], EVEN_K)
        w = load_tile(w_ptrs, in_k[:, None] & in_n[None, :], EVEN_K and EVEN_N)
        acc = tl.dot((mean / tokens).to(w.dtype), w, acc, input_precision=PRECISION)
        w_ptrs += BLOCK_K * DIM
    release_next(PDL)
    bias = tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
    factor = sigmoid(acc + bias[None, :]).to(factor_ptr.dtype.element_ty)
    at = offs_m.to(tl.int64)[:, None] * DIM + offs_n[None, :]
    tl.store(factor_ptr + at, factor, mask=in_m[:, None] & in_n[None, :])


def channel_attention_sums_shape(
    batch: int, channels: int, config: ChannelAttentionConfig
) -> tuple[int, int, int] | None:
    """Shape [B, 1, D] of the float32 sums that `channel_attention` needs with this config; None for none."""
    return (batch, 1, channels) if config.split else None


def channel_attention(
    partials: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    factor: torch.Tensor,
    *,
    tokens_per_image: int,
    sums: torch.Tensor | None = None,
    config: ChannelAttentionConfig | None = None,
) -> None:
    """factor = sigmoid(mean @ w + b), one row per image.

    Args:
        partials: [B, tiles, D] fp32, the sums that `dwconv` with SiLU wrote.
        w: [D, D] bf16, fp16 or fp32, from the mean's channel to the factor's; the products run in this dtype.
        b: [D], fp32 or the dtype of w.
        factor: [B, D] output, dtype of w.
        tokens_per_image: the mean is over so many.
        sums: fp32 of shape `channel_attention_sums_shape(...)`, where the config splits.
        config: launch parameters; looked up by the number of tiles when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    check_tensor("partials", partials, shape=(None, None, None), dtypes=torch.float32)
    batch, tiles, dim = partials.shape
    if 0 in partials.shape:
        raise ValueError(f"partials has shape {list(partials.shape)}, expected at least one image, tile, channel")
    if tokens_per_image < 1:
        raise ValueError(f"tokens_per_image is {tokens_per_image}, expected at least 1")
    check_tensor("w", w, shape=(dim, dim), dtypes=FLOATS, like=partials)
    check_tensor("b", b, shape=(dim,), dtypes=(torch.float32, w.dtype), like=partials)
    check_tensor("factor", factor, shape=(batch, dim), dtypes=w.dtype, like=partials)
    if config is None:
        config = lookup("channel_attention", compute_capability(partials), {"tiles": tiles, "dim": dim}, w.dtype)
    check_int32("number of programs", batch * dim)
    check_int32("number of tokens", tokens_per_image)
    launches = []
    needed = channel_attention_sums_shape(batch, dim, config)
    if needed is not None:
        if sums is None:
            raise ValueError(f"sums is missing: a config that splits needs float32 of shape {list(needed)}")
        check_tensor("sums", sums, shape=needed, dtypes=torch.float32, like=partials)
        args = {"partials_ptr": partials, "sums_ptr": sums, "tiles": tiles, "DIM": dim}
        args |= {"BLOCK_C": config.block_c, "UNROLL": SPLIT_LOADS}
        grid = (batch, cdiv(dim, config.block_c))
        launches.append(Launch(channel_attention_sums_kernel, grid, args, compiler_options(4, 1)))
    args = {
        "partials_ptr": partials if needed is None else sums,
        "w_ptr": w,
        "bias_ptr": b,
        "factor_ptr": factor,
        "images": batch,
        "tokens": float(tokens_per_image),
        "TILES": tiles if needed is None else 1,
        "DIM": dim,
        "BLOCK_M": IMAGES,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PRECISION": dot_precision(w.dtype),
    }
    grid = (cdiv(batch, IMAGES), cdiv(dim, config.block_n))
    options = compiler_options(config.num_warps, config.num_stages)
    launches.append(Launch(channel_attention_kernel, grid, args, options))
    run_launches(launches, partials.device)


def work(
    *,
    partials: TensorLike,
    w: TensorLike,
    b: TensorLike,
    factor: TensorLike,
    sums: TensorLike | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `channel_attention` called with these arguments; the sums are written and read."""
    nbytes = nbytes_of(partials, w, b, factor) + 2 * nbytes_of(sums)
    return Work(prod(partials.shape) + 2 * partials.shape[0] * prod(w.shape), nbytes)


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> ChannelAttentionConfig:
    """Narrow tiles: there are few images, and a program of every tile walks all of K."""
    padded = max(16, next_power_of_2(shape["dim"]))
    block_k = min(64 if dtype != torch.float32 else 32, padded)
    return ChannelAttentionConfig(
        split=shape["tiles"] > FUSED_TILES,
        block_c=min(128, padded),
        block_n=min(32, padded),
        block_k=block_k,
        num_warps=4,
        num_stages=3,
    )


def _suits(config: ChannelAttentionConfig, shape: Shape) -> bool:
    """Whether a row has as many launches as so many tiles ask for."""
    return config.split == (shape["tiles"] > FUSED_TILES)


register(Family("channel_attention", ChannelAttentionConfig, ("dim",), ("tiles",), _default, _suits))
