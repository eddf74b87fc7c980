"""Resize and crop: uint8 pictures of any sizes to the uint8 pixels of a batch, bit for bit as on a CPU.

    between[b, a] = clip((sum_k taps_a[k, a] * source[b, first_a[a] + k] + half) >> precision_a)   [rows read, columns]
    out[b, a]     = clip((sum_k taps_b[k, b] * between[first_b[b] + k, a] + half) >> precision_b)  [rows, columns]

with half = 1 << precision >> 1, clip to 0..255, sums in int32 and uint8 between the two: the arithmetic that torch has
on a CPU and `capacitor_rt.images.resample` defines, whose `axis_weights` are the tables here. Along a picture's first
axis a (its width, but its height where it is to be turned by 90 degrees) everything that the second pass reads is
resampled, nothing more; steps in bytes, negative ones too, say where a picture lies and which way up it is written. A
launch takes pictures of any sizes, and writes each to the image of the batch that its row names.

Each pass has a program for a tile of each picture; the grid is that of the largest picture, and programs beyond a
smaller one end at once. A thread reads a byte and multiplies, at most a weight's 16 bits by 8: what bounds the passes
are these loads, out of L1, not memory.

FLOPs 6 * sum over pictures of (rows read * columns * taps_a + rows * columns * taps_b), integer ones; bytes of the
sources, of the weights, of what lies between twice, and of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..config_rows import Family, Shape, register
from ..launch import (
    Launch,
    TensorLike,
    Work,
    check_int32,
    check_tensor,
    compiler_options,
    compute_capability,
    nbytes_of,
    run_launches,
)
from ..pictures import Field, check_sizes, columns
from ..tuning import lookup

FIELDS = tl.constexpr(len(Field))
# for the kernels, in the order of `Field`
SOURCE, ORIGIN, STEP_A, STEP_B, LENGTH_A, LENGTH_B, COUNT_A, COUNT_B, TAPS_A, TAPS_B = map(tl.constexpr, range(10))
WEIGHTS_A, WEIGHTS_B, PRECISION_A, PRECISION_B, BETWEEN, IMAGE, OUT, OUT_A, OUT_B = map(tl.constexpr, range(10, 19))
UNROLL = tl.constexpr(4)


@triton.jit
def _rounded(acc, precision):
    return tl.minimum(tl.maximum(acc >> precision, 0), 255).to(tl.uint8)


@triton.jit
def resize_first_kernel(
    source_ptr,
    weights_ptr,
    images_ptr,
    between_ptr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    row = images_ptr + tl.program_id(1) * FIELDS
    length_a, length_b, count = tl.load(row + LENGTH_A), tl.load(row + LENGTH_B), tl.load(row + COUNT_A)
    across = tl.cdiv(3 * count, BLOCK_VALUES)
    tile = tl.program_id(0)
    if tile < across * tl.cdiv(length_b, BLOCK_ROWS):
        source = source_ptr + tl.load(row + SOURCE).to(tl.int64) * 16 + tl.load(row + ORIGIN)
        step_a, step_b = tl.load(row + STEP_A), tl.load(row + STEP_B)
        taps, precision = tl.load(row + TAPS_A), tl.load(row + PRECISION_A)
        table = weights_ptr + tl.load(row + WEIGHTS_A).to(tl.int64)
        offs_b = tile // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offs = tile % across * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
        # pixels past the end are those at the end, and are dropped at the store
        rows = tl.minimum(offs_b, length_b - 1) * step_b
        column = tl.minimum(offs // 3, count - 1)
        first = tl.load(table + column)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_VALUES), dtype=tl.int32) + (1 << precision >> 1)
        w_ptrs = table + count + column
        k = tl.full((), 0, tl.int32)
        while k < taps:
            for ahead in tl.static_range(UNROLL):
                last = tl.where(k + ahead < taps, count, 0)
                w = tl.load(w_ptrs + (k + ahead) * count, mask=column < last, other=0)
                # behind the end of a filter weights are zero, and what they meet is any pixel
                at = tl.maximum(tl.minimum(first + (k + ahead), length_a - 1), 0) * step_a + offs % 3
                acc += tl.load(source + (rows[:, None] + at[None, :])).to(tl.int32) * w[None, :]
            k += UNROLL
        between = between_ptr + tl.load(row + BETWEEN).to(tl.int64) * 16
        mask = (offs_b < length_b)[:, None] & (offs < 3 * count)[None, :]
        tl.store(between + (offs_b[:, None] * (3 * count) + offs[None, :]), _rounded(acc, precision), mask=mask)


@triton.jit
def resize_second_kernel(
    between_ptr,
    weights_ptr,
    images_ptr,
    out_ptr,
    image_bytes,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    row = images_ptr + tl.program_id(1) * FIELDS
    length, width, count = tl.load(row + LENGTH_B), 3 * tl.load(row + COUNT_A), tl.load(row + COUNT_B)
    across = tl.cdiv(width, BLOCK_VALUES)
    tile = tl.program_id(0)
    if tile < across * tl.cdiv(count, BLOCK_ROWS):
        taps, precision = tl.load(row + TAPS_B), tl.load(row + PRECISION_B)
        table = weights_ptr + tl.load(row + WEIGHTS_B).to(tl.int64)
        between = between_ptr + tl.load(row + BETWEEN).to(tl.int64) * 16
        offs_b = tile // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        offs = tile % across * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
        rows = tl.minimum(offs_b, count - 1)
        values = tl.minimum(offs, width - 1)
        first = tl.load(table + rows)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_VALUES), dtype=tl.int32) + (1 << precision >> 1)
        w_ptrs = table + count + rows
        k = tl.full((), 0, tl.int32)
        while k < taps:
            for ahead in tl.static_range(UNROLL):
                last = tl.where(k + ahead < taps, count, 0)
                w = tl.load(w_ptrs + (k + ahead) * count, mask=rows < last, other=0)
                at = tl.maximum(tl.minimum(first + (k + ahead), length - 1), 0) * width
                acc += tl.load(between + (at[:, None] + values[None, :])).to(tl.int32) * w[:, None]
            k += UNROLL
        out = out_ptr + tl.load(row + IMAGE).to(tl.int64) * image_bytes + tl.load(row + OUT)
        at_a, at_b = offs // 3 * tl.load(row + OUT_A) + offs % 3, offs_b * tl.load(row + OUT_B)
        mask = (offs_b < count)[:, None] & (offs < width)[None, :]
        tl.store(out + (at_b[:, None] + at_a[None, :]), _rounded(acc, precision), mask=mask)


@dataclass(frozen=True)
class ResizeConfig:
    """Tiles of both passes: `rows` pixels along the second axis, `values` bytes along the first."""

    block_rows: int
    block_values: int
    num_warps: int


def resize(
    source: torch.Tensor,
    weights: torch.Tensor,
    images: torch.Tensor,
    workspace: torch.Tensor,
    out: torch.Tensor,
    *,
    sizes: torch.Tensor,
    config: ResizeConfig | None = None,
) -> None:
    """out[image of picture i] = picture i, resampled along both axes and cropped.

    Args:
        source: [S] uint8, the pictures' pixels, three bytes each.
        weights: [K] int32, tables as `pictures.Field` describes them; they may lie in the memory of `source`.
        images: [N, FIELDS] int32, a row for each picture.
        workspace: [W] uint8, of each picture `between_bytes`; its contents do not matter.
        out: [B, H, W, 3] uint8 output; images that no picture names are left as they are.
        sizes: `images` on the CPU, where it is checked.
        config: launch parameters; looked up by the size of `out` when None.

    Raises:
        TypeError, ValueError: an argument that the kernels cannot take.
    """
    check_tensor("source", source, shape=(None,), dtypes=torch.uint8)
    check_tensor("weights", weights, shape=(None,), dtypes=torch.int32, like=source)
    check_tensor("images", images, shape=(None, len(Field)), dtypes=torch.int32, like=source)
    check_tensor("workspace", workspace, shape=(None,), dtypes=torch.uint8, like=source)
    check_tensor("out", out, shape=(None, None, None, 3), dtypes=torch.uint8, like=source)
    t = check_sizes(sizes, source.numel(), weights.numel(), workspace.numel(), tuple(out.shape))
    if sizes.shape != images.shape:
        raise ValueError(f"sizes has shape {list(sizes.shape)}, images {list(images.shape)}: pass the same table")
    if config is None:
        key = {"pixels": out.shape[1] * out.shape[2]}
        config = lookup("resize", compute_capability(source), key, torch.uint8)
    tile = {"BLOCK_ROWS": config.block_rows, "BLOCK_VALUES": config.block_values}
    tables = {"weights_ptr": weights, "images_ptr": images}
    options = compiler_options(config.num_warps, 1)
    first, second = (_most_tiles(t[rows], t[Field.COUNT_A], config) for rows in (Field.LENGTH_B, Field.COUNT_B))
    args = {"source_ptr": source, "between_ptr": workspace, **tables, **tile}
    launches = [Launch(resize_first_kernel, (first, len(sizes)), args, options)]
    args = {"between_ptr": workspace, "out_ptr": out, "image_bytes": out[0].numel(), **tables, **tile}
    launches.append(Launch(resize_second_kernel, (second, len(sizes)), args, options))
    run_launches(launches, source.device)


def _most_tiles(rows: Any, columns: Any, config: ResizeConfig) -> int:
    tall = (rows + config.block_rows - 1) // config.block_rows
    wide = (3 * columns + config.block_values - 1) // config.block_values
    most = int((tall * wide).max())
    check_int32("number of tiles of one picture", most)
    return most


def work(
    *,
    source: TensorLike,
    weights: TensorLike,
    images: TensorLike,
    workspace: TensorLike,
    out: TensorLike,
    sizes: torch.Tensor,
    **options: Any,
) -> Work:
    """FLOPs, all of whole numbers, and bytes of `resize` called with these arguments."""
    t = columns(sizes)
    first = t[Field.LENGTH_B] * t[Field.COUNT_A] * t[Field.TAPS_A]
    second = t[Field.COUNT_B] * t[Field.COUNT_A] * t[Field.TAPS_B]
    nbytes = nbytes_of(source, weights, images, workspace, workspace, out)
    return Work(6 * int((first + second).sum()), nbytes)


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> ResizeConfig:
    """16 sums for each thread of one warp, whose weights and places serve eight rows.

    They change their layout by shared memory at every step of the first pass: among more warps that takes barriers.
    """
    return ResizeConfig(block_rows=8, block_values=64, num_warps=1)


register(Family("resize", ResizeConfig, (), ("pixels",), _default))
