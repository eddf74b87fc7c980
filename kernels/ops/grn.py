"""GRN's gain per image and hidden channel, from the partial sums of squares that expand left.

    G[b, f]    = sqrt(sum_i partials[b, i, f])
    gain[b, f] = gamma[f] * G[b, f] / (mean_f G[b, :] + eps)

The project kernel then scales h by 1 + gain. Sums run in the order of the tiles, so the result depends neither on the
batch nor on the run. Few tiles per image: one program per image does everything in one launch. Many tiles (a single
2048 x 2048 image has 128): a first launch sums them with a program for each chunk of channels, a second one takes the
mean over the image's G (4*F bytes, from L2) and writes the gain.

FLOPs 2*B*tiles*F; bytes 4*B*tiles*F + F * itemsize(gamma) + (4 + itemsize) * B*F, and 4*B*F more in two launches, the
second of which reads G again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from ..config_rows import Family, Shape, register
from ..jit import ordered_sum, release_next, wait_for_previous
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
    nbytes_of,
    next_power_of_2,
    run_launches,
)
from ..tuning import lookup

# more tiles than this keep a single program busy for longer than a second launch takes
FUSED_TILES = 8
# a program of the fused kernel holds all channels, and twice as many loads would spill
FUSED_LOADS, SPLIT_LOADS = 8, 16


@dataclass(frozen=True)
class GrnConfig:
    """`split` chooses two launches, of `block_f` channels per program; the fused one takes all channels."""

    split: bool
    block_f: int
    num_warps: int


@triton.jit
def grn_fused_kernel(
    partials_ptr,
    gamma_ptr,
    gain_ptr,
    norms_ptr,
    tiles,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_F: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr = False,
):
    image = tl.program_id(0)
    offs_f = tl.arange(0, BLOCK_F)
    in_f = offs_f < HIDDEN
    wait_for_previous(PDL)
    norms = tl.sqrt(ordered_sum(partials_ptr, image, tiles, offs_f, HIDDEN, UNROLL))
    release_next(PDL)
    mean = tl.sum(norms, axis=0) / HIDDEN
    gamma = tl.load(gamma_ptr + offs_f, mask=in_f, other=0.0).to(tl.float32)
    out = image.to(tl.int64) * HIDDEN + offs_f
    tl.store(norms_ptr + out, norms, mask=in_f)
    gain = gamma * (norms / (mean + eps))
    tl.store(gain_ptr + out, gain.to(gain_ptr.dtype.element_ty), mask=in_f)


@triton.jit
def grn_norms_kernel(
    partials_ptr,
    norms_ptr,
    tiles,
    HIDDEN: tl.constexpr,
    BLOCK_F: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr = False,
):
    image = tl.program_id(0)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_f = offs_f < HIDDEN
    wait_for_previous(PDL)
    norms = tl.sqrt(ordered_sum(partials_ptr, image, tiles, offs_f, HIDDEN, UNROLL))
    release_next(PDL)
    tl.store(norms_ptr + image.to(tl.int64) * HIDDEN + offs_f, norms, mask=in_f)


@triton.jit
def grn_gain_kernel(
    norms_ptr,
    gamma_ptr,
    gain_ptr,
    eps,
    HIDDEN: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr = False,
):
    image = tl.program_id(0)
    base = norms_ptr + image.to(tl.int64) * HIDDEN
    every = tl.arange(0, PADDED)
    wait_for_previous(PDL)
    mean = tl.sum(tl.load(base + every, mask=every < HIDDEN, other=0.0), axis=0) / HIDDEN
    release_next(PDL)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_f = offs_f < HIDDEN
    norms = tl.load(base + offs_f, mask=in_f, other=0.0)
    gamma = tl.load(gamma_ptr + offs_f, mask=in_f, other=0.0).to(tl.float32)
    gain = gamma * (norms / (mean + eps))
    out = gain_ptr + image.to(tl.int64) * HIDDEN + offs_f
    tl.store(out, gain.to(gain_ptr.dtype.element_ty), mask=in_f)


def grn(
    partials: torch.Tensor,
    gamma: torch.Tensor,
    gain: torch.Tensor,
    *,
    norms: torch.Tensor,
    eps: float = 1e-6,
    config: GrnConfig | None = None,
) -> None:
    """gain = gamma * G / (mean(G) + eps), one row per image.

    Args:
        partials: [B, tiles, F] fp32, the sums of squares that `expand` wrote.
        gamma: [F], fp32 or the dtype of gain.
        gain: [B, F] output in bf16, fp16 or fp32: the dtype of the hidden activations it will scale.
        norms: [B, F] fp32 output, G itself.
        eps: added to the mean of G.
        config: launch parameters; looked up by the number of tiles when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    check_tensor("partials", partials, shape=(None, None, None), dtypes=torch.float32)
    batch, tiles, hidden = partials.shape
    if 0 in partials.shape:
        raise ValueError(f"partials has shape {list(partials.shape)}, expected at least one image, tile, channel")
    check_tensor("gain", gain, shape=(batch, hidden), dtypes=FLOATS, like=partials)
    check_tensor("gamma", gamma, shape=(hidden,), dtypes=(torch.float32, gain.dtype), like=partials)
    check_tensor("norms", norms, shape=(batch, hidden), dtypes=torch.float32, like=partials)
    check_int32("number of programs", batch * hidden)
    if config is None:
        config = lookup("grn", compute_capability(partials), {"tiles": tiles, "hidden": hidden}, gain.dtype)
    options = compiler_options(config.num_warps, 1)
    padded = next_power_of_2(hidden)
    sums = {"partials_ptr": partials, "norms_ptr": norms, "tiles": tiles, "HIDDEN": hidden}
    scale = {"gamma_ptr": gamma, "gain_ptr": gain, "eps": eps}
    if config.split:
        grid, block = (batch, cdiv(hidden, config.block_f)), {"BLOCK_F": config.block_f}
        second = scale | block | {"norms_ptr": norms, "HIDDEN": hidden, "PADDED": padded}
        launches = [
            Launch(grn_norms_kernel, grid, sums | block | {"UNROLL": SPLIT_LOADS}, options),
            Launch(grn_gain_kernel, grid, second, options),
        ]
    else:
        # loads past the last tile are masked: few tiles need no more than theirs
        unroll = min(FUSED_LOADS, next_power_of_2(tiles))
        launches = [Launch(grn_fused_kernel, (batch,), sums | scale | {"BLOCK_F": padded, "UNROLL": unroll}, options)]
    run_launches(launches, partials.device)


def work(
    *,
    partials: TensorLike,
    gamma: TensorLike,
    gain: TensorLike,
    norms: TensorLike,
    config: GrnConfig | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `grn` called with these arguments; without a config, those of one launch."""
    read_again = nbytes_of(norms) if config is not None and config.split else 0
    return Work(2 * prod(partials.shape), nbytes_of(partials, gamma, gain, norms) + read_again)


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GrnConfig:
    if shape["tiles"] <= FUSED_TILES:
        return GrnConfig(split=False, block_f=256, num_warps=16 if shape["hidden"] > 2048 else 4)
    return GrnConfig(split=True, block_f=min(128, next_power_of_2(shape["hidden"])), num_warps=4)


register(Family("grn", GrnConfig, ("hidden",), ("tiles",), _default))
