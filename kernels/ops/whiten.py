"""Whitening of latents and its inverse, per channel, in float32 whatever goes in and out.

    whiten:    out = (z - mean[c]) * rstd[c],   rstd = 1 / sqrt(running_var + eps)
    dewhiten:  out = z * std[c] + mean[c],      std = sqrt(running_var + eps)

Inside encode and decode both are folded into their neighbours; these are the ops behind the public `whiten()` and
`dewhiten()`. A program takes a tile of rows, where a row is one channel of one image.

FLOPs 2*B*Z*h*w; bytes B*Z*h*w * (itemsize in + itemsize out) + 8*Z.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from ..config_rows import Family, Shape, register
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


@dataclass(frozen=True)
class WhitenConfig:
    """`block_rows` channels of `block_pixels` pixels per program."""

    block_rows: int
    block_pixels: int
    num_warps: int


@triton.jit
def whiten_kernel(
    z_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    rows,
    pixels,
    channels,
    pixel_tiles,
    INVERSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_row = pid // pixel_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_pixel = pid % pixel_tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    in_rows = offs_row < rows
    mask = in_rows[:, None] & (offs_pixel[None, :] < pixels)
    at = offs_row.to(tl.int64)[:, None] * pixels + offs_pixel[None, :]
    z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_ROWS, BLOCK_PIXELS]
    shift = tl.load(shift_ptr + offs_row % channels, mask=in_rows, other=0.0)[:, None]
    scale = tl.load(scale_ptr + offs_row % channels, mask=in_rows, other=0.0)[:, None]
    out = tl.fma(z, scale, shift) if INVERSE else (z - shift) * scale
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def whiten(
    z: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    out: torch.Tensor,
    *,
    config: WhitenConfig | None = None,
) -> None:
    """out = (z - mean) * rstd per channel.

    Args:
        z: [B, Z, h, w] latents, bf16, fp16 or fp32.
        mean, rstd: [Z] fp32, the running mean and 1 / sqrt(running_var + eps).
        out: [B, Z, h, w] output, bf16, fp16 or fp32; may be z itself.
        config: launch parameters; looked up by the number of pixels when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    _run(z, mean, rstd, "rstd", out, False, config)


def dewhiten(
    z: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    out: torch.Tensor,
    *,
    config: WhitenConfig | None = None,
) -> None:
    """out = z * std + mean per channel, the inverse of `whiten`; std is sqrt(running_var + eps), [Z] fp32."""
    _run(z, mean, std, "std", out, True, config)


def _run(
    z: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    scale_name: str,
    out: torch.Tensor,
    inverse: bool,
    config: WhitenConfig | None,
) -> None:
    check_tensor("z", z, shape=(None, None, None, None), dtypes=FLOATS)
    if 0 in z.shape:
        raise ValueError(f"z has shape {list(z.shape)}, expected at least one image, channel and pixel")
    batch, channels, height, width = z.shape
    check_tensor("mean", mean, shape=(channels,), dtypes=torch.float32, like=z)
    check_tensor(scale_name, scale, shape=(channels,), dtypes=torch.float32, like=z)
    check_tensor("out", out, shape=tuple(z.shape), dtypes=FLOATS, like=z)
    rows, pixels = batch * channels, height * width
    if config is None:
        config = lookup("whiten", compute_capability(z), {"pixels": pixels}, z.dtype)
    check_int32("number of channels over all images", rows + config.block_rows)
    check_int32("pixels of one channel", pixels + config.block_pixels)
    pixel_tiles = cdiv(pixels, config.block_pixels)
    programs = cdiv(rows, config.block_rows) * pixel_tiles
    check_int32("number of programs", programs)
    args = {
        "z_ptr": z,
        "shift_ptr": mean,
        "scale_ptr": scale,
        "out_ptr": out,
        "rows": rows,
        "pixels": pixels,
        "channels": channels,
        "pixel_tiles": pixel_tiles,
        "INVERSE": inverse,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_PIXELS": config.block_pixels,
    }
    run_launches([Launch(whiten_kernel, (programs,), args, compiler_options(config.num_warps, 1))], z.device)


def work(
    *,
    z: TensorLike,
    mean: TensorLike,
    out: TensorLike,
    rstd: TensorLike | None = None,
    std: TensorLike | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `whiten` (with rstd) or `dewhiten` (with std) called with these arguments."""
    return Work(2 * prod(z.shape), nbytes_of(z, mean, rstd, std, out))


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> WhitenConfig:
    """2048 elements for 128 threads: two 16-byte loads of bfloat16 in flight in each."""
    pixels = min(1024, max(16, next_power_of_2(shape["pixels"])))
    return WhitenConfig(block_rows=max(1, 2048 // pixels), block_pixels=pixels, num_warps=4)


def _suits(config: WhitenConfig, shape: Shape) -> bool:
    return config.block_pixels <= max(16, next_power_of_2(shape["pixels"]))


register(Family("whiten", WhitenConfig, (), ("pixels",), _default, _suits))
