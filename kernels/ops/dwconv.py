"""Depthwise 7x7 convolution, stride 1, zero padding 3, bias, with the sums of squares that RMSNorm needs.

    y[t, c]     = b[c] + sum_{dy, dx} w[7*dy + dx, c] * x[t shifted by (dy - 3, dx - 3), c]
    sumsq[t, i] = sum of y[t, c]^2 over channel tile i, from the float32 values before y is rounded

A thread owns `cols` neighbouring pixels of one row and four channels. For each of the seven input rows it loads
`cols + 6` pixels and seven weights once, and every loaded pixel feeds up to seven accumulators: the six pixels of
overlap are the only ones that are loaded twice. Pairs of bfloat16 travel as one 32-bit word and widen by a shift and a
mask, an instruction each. A CTA stacks `strips_y` rows, so that the seven readings of a row hit L1. Rows outside the
image are read from its edge and weighted zero; where the tiles cover the width exactly only the halo columns are
masked, and where one tile is the whole width they are not even loaded. Taps are added in the order dy, dx whatever the
config, so the bits of y depend on nothing but the pixel's neighbourhood. Other forms lost: kernels/NOTES.md.

DiCo blocks take y = silu(...) and, for their channel attention, the sums of y over the pixels of each tile instead:

    partials[b, i, c] = sum of y[t, c] over tile i of image b, from the float32 values

For `expand_fp8` y is stored as e4m3(y * y_inverse), to the nearest even and cut off at 448; the sums of squares are of
what it was before.

FLOPs 2*49*T*C; bytes T*C * (itemsize(x) + itemsize(y)) + 50*C * itemsize(w) + 4*T*ceil(C/block_c).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from ..config_rows import Family, Shape, register
from ..jit import load_tile, release_next, silu, to_e4m3, wait_for_previous
from ..launch import (
    E4M3,
    FLOATS,
    Launch,
    TensorLike,
    Work,
    cdiv,
    check_e4m3,
    check_int32,
    check_rows,
    check_tensor,
    compiler_options,
    compute_capability,
    nbytes_of,
    next_power_of_2,
    run_launches,
)
from ..tuning import lookup

SILU_REGISTERS = 168
# strips that many images have at least; fewer get shorter, so that there are programs for most SMs
FEW_STRIPS = 1024


@dataclass(frozen=True)
class DwconvConfig:
    """A CTA covers `strips_y` rows of `strips_x` strips of `cols` pixels, and `block_c` channels.

    `strips_x * strips_y` is a power of two; with 32 * num_warps threads each has
    `strips_x * strips_y * block_c / (32 * num_warps)` channels of `cols` pixels, four at best.
    """

    cols: int
    strips_x: int
    strips_y: int
    block_c: int
    num_warps: int
    maxnreg: int | None = None


@triton.jit
def _load_pairs(pointers, mask, SHAPE: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr):
    """Even and odd channels of a pixel as float32; PACKED pointers are to words of two bfloat16."""
    values = load_tile(pointers, mask, EVEN)
    if PACKED:
        return (values << 16).to(tl.float32, bitcast=True), (values & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return tl.split(tl.reshape(values.to(tl.float32), SHAPE))


@triton.jit
def dwconv_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    y_inverse_ptr,
    sumsq_ptr,
    partials_ptr,
    height,
    width,
    row_tiles,
    col_tiles,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLS: tl.constexpr,
    PADDED_COLS: tl.constexpr,
    STRIPS_X: tl.constexpr,
    STRIPS_Y: tl.constexpr,
    EVEN_W: tl.constexpr,
    FULL_W: tl.constexpr,
    PACKED: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr = False,
):
    EVEN_C: tl.constexpr = CHANNELS % BLOCK_C == 0
    CHANNEL_TILES: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    STRIPS: tl.constexpr = STRIPS_Y * STRIPS_X
    # even and odd channels are split apart and joined again within a thread's registers
    PAIRS: tl.constexpr = (STRIPS, BLOCK_C // 2, 2)
    WORD: tl.constexpr = 2 if PACKED else 1
    # without a halo the first and last three columns of the window do not exist
    LEFT: tl.constexpr = 3 if FULL_W else 0
    RIGHT: tl.constexpr = COLS + 3 if FULL_W else COLS + 6
    pid = tl.program_id(0)
    pid_c = pid % CHANNEL_TILES
    tile = pid // CHANNEL_TILES
    image = tile // (row_tiles * col_tiles)
    tile_y = tile // col_tiles % row_tiles
    strip = tl.arange(0, STRIPS)[:, None]
    h = tile_y * STRIPS_Y + strip // STRIPS_X
    w0 = tile % col_tiles * (STRIPS_X * COLS) + strip % STRIPS_X * COLS
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    offs_word = pid_c * (BLOCK_C // WORD) + tl.arange(0, BLOCK_C // WORD)[None, :]
    in_c = offs_c < CHANNELS
    in_word = offs_word < CHANNELS // WORD
    first = image.to(tl.int64) * height * width
    # one unsigned comparison checks both ends; a size of 1 arrives as a constexpr and has no dtype of its own
    limit_h = (h * 0 + height).to(tl.uint32)
    limit_w = (h * 0 + width).to(tl.uint32)

    wait_for_previous(PDL)
    bias = tl.load(bias_ptr + offs_c, mask=in_c, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(bias + tl.zeros([STRIPS, BLOCK_C], tl.float32), PAIRS))
    acc = (even, odd) * COLS

    x_ptrs = x_ptr.to(tl.pointer_type(tl.uint32)) if PACKED else x_ptr
    x_ptrs += first * (CHANNELS // WORD) + offs_word
    w_ptrs = w_ptr + offs_c
    for dy in tl.range(0, 7):
        row = h + (dy - 3)
        in_h = row.to(tl.uint32) < limit_h
        # a row outside the image is read from the nearest one, which is in the window anyway, and weighs zero
        row = tl.minimum(tl.maximum(row, 0), height - 1)
        p_row = x_ptrs + (row * width + (w0 - 3)) * (CHANNELS // WORD)
        weights = ()
        for dx in tl.static_range(7):
            in_tap = in_h if EVEN_C else in_h & in_c
            w = tl.load(w_ptrs + dx * CHANNELS, mask=in_tap, other=0.0).to(tl.float32)  # [STRIPS, BLOCK_C]
            weights += tl.split(tl.reshape(w, PAIRS))
        pixels = ()
        for c in tl.static_range(LEFT, RIGHT):
            in_x = (w0 + (c - 3)).to(tl.uint32) < limit_w
            in_x = in_x if EVEN_C else in_x & in_word
            p_x = p_row + c * (CHANNELS // WORD)
            inside = EVEN_C and EVEN_W and c >= 3 and c < COLS + 3
            pixels += _load_pairs(p_x, in_x, PAIRS, inside, PACKED)
        for s in tl.static_range(COLS):
            # a pixel's two sums leave the tuple in front and come back at its end
            even = acc[0]
            odd = acc[1]
            acc = acc[2:]
            for dx in tl.static_range(7):
                if s + dx >= LEFT and s + dx < RIGHT:
                    even = tl.fma(pixels[2 * (s + dx - LEFT)], weights[2 * dx], even)
                    odd = tl.fma(pixels[2 * (s + dx - LEFT) + 1], weights[2 * dx + 1], odd)
            acc += (even, odd)
        w_ptrs += 7 * CHANNELS

    release_next(PDL)
    if y_inverse_ptr is not None:
        y_inverse = tl.load(y_inverse_ptr)
    if SILU:
        sums = tl.zeros([STRIPS, BLOCK_C], tl.float32)
    # every lane gets the sum of squares of every pixel; the one that keeps it stores it
    columns = tl.arange(0, PADDED_COLS)[None, :]
    squares = tl.zeros([STRIPS, PADDED_COLS], tl.float32)
    y_ptrs = y_ptr + first * CHANNELS + (h * width + w0) * CHANNELS + offs_c
    left = tl.where(h < height, width, 0) - w0
    for s in tl.static_range(COLS):
        even = acc[2 * s]
        odd = acc[2 * s + 1]
        y = tl.reshape(tl.join(even, odd), [STRIPS, BLOCK_C])
        if SILU:
            y = silu(y)
        in_y = s < left if EVEN_C else (s < left) & in_c
        if y_inverse_ptr is not None:
            tl.store(y_ptrs + s * CHANNELS, to_e4m3(y * y_inverse), mask=in_y)
        else:
            tl.store(y_ptrs + s * CHANNELS, y.to(y_ptr.dtype.element_ty), mask=in_y)
        if SILU:
            sums += tl.where(in_y, y, 0.0)
        else:
            squares = tl.where(columns == s, tl.sum(even * even + odd * odd, axis=1, keep_dims=True), squares)
    if SILU:
        # [1, BLOCK_C]
        total = tl.sum(sums, axis=0, keep_dims=True)
        tl.store(partials_ptr + tile.to(tl.int64) * CHANNELS + offs_c, total, mask=in_c)
    else:
        sumsq_ptrs = sumsq_ptr + (first + h * width + w0 + columns) * CHANNEL_TILES + pid_c
        tl.store(sumsq_ptrs, squares, mask=(columns < left) & (columns < COLS))


def dwconv_sumsq_shape(tokens: int, channels: int, config: DwconvConfig) -> tuple[int, int]:
    """Shape [T, channel tiles] of the float32 sums of squares that `dwconv` writes with this config."""
    return tokens, cdiv(channels, config.block_c)


def dwconv_partials_shape(
    batch: int, height: int, width: int, channels: int, config: DwconvConfig
) -> tuple[int, int, int]:
    """Shape [B, tiles of pixels, C] of the float32 sums that `dwconv` with SiLU writes with this config."""
    return batch, cdiv(height, config.strips_y) * cdiv(width, config.strips_x * config.cols), channels


def dwconv(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    y: torch.Tensor,
    sumsq: torch.Tensor | None = None,
    *,
    batch: int,
    height: int,
    width: int,
    partials: torch.Tensor | None = None,
    y_inverse: torch.Tensor | None = None,
    config: DwconvConfig | None = None,
) -> None:
    """y = depthwise 7x7 of x plus b, and the sums of squares of y over tiles of channels.

    With `partials` in the place of `sumsq` it is y = silu(depthwise 7x7 of x plus b), and the sums of y over tiles of
    pixels.

    Args:
        x: [T, C] bf16, fp16 or fp32 tokens, T = batch * height * width, row by row.
        w: [49, C] taps in the order dy, dx; bf16, fp16 or fp32 (fp32 is read as fast, and rounds nothing).
        b: [C], dtype of w.
        y: [T, C] output, bf16, fp16 or fp32; e4m3 with `y_inverse`.
        sumsq: output of shape `dwconv_sumsq_shape(...)`, fp32.
        batch, height, width: images and their grid in tokens.
        partials: output of shape `dwconv_partials_shape(...)`, fp32; asks for SiLU.
        y_inverse: [1] fp32, reciprocal of the scale of y in e4m3.
        config: launch parameters; looked up by the grid when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take, or e4m3 on a GPU without it.
    """
    check_tensor("x", x, shape=(None, None), dtypes=FLOATS)
    tokens, channels = x.shape
    for name, size in (("batch", batch), ("height", height), ("width", width), ("channels of x", channels)):
        if size < 1:
            raise ValueError(f"{name} is {size}, expected at least 1")
    if check_rows("x", tokens, height * width) != batch:
        raise ValueError(
            f"x has {tokens} rows, expected batch {batch} x height {height} x width {width} = "
            f"{batch * height * width}: pass one row for each token of the grid"
        )
    check_tensor("w", w, shape=(49, channels), dtypes=FLOATS, like=x)
    check_tensor("b", b, shape=(channels,), dtypes=w.dtype, like=x)
    check_tensor("y", y, shape=(tokens, channels), dtypes=FLOATS if y_inverse is None else E4M3, like=x)
    if config is None:
        key = {"height": height, "width": width, "dim": channels}
        config = lookup("dwconv", compute_capability(x), key, x.dtype)
    if (sumsq is None) == (partials is None):
        raise ValueError("pass sumsq, or partials for the form with SiLU: one of them")
    if sumsq is not None:
        check_tensor("sumsq", sumsq, shape=dwconv_sumsq_shape(tokens, channels, config), dtypes=torch.float32, like=x)
    if partials is not None:
        shape = dwconv_partials_shape(batch, height, width, channels, config)
        check_tensor("partials", partials, shape=shape, dtypes=torch.float32, like=x)
    if y_inverse is not None:
        check_tensor("y_inverse", y_inverse, shape=(1,), dtypes=torch.float32, like=x)
        check_e4m3(compute_capability(x))
        if partials is not None:
            raise ValueError("y_inverse is for y that RMSNorm follows: the form with SiLU has no e4m3")
    # a tile's pixels are indexed in 32 bits from its image's first, rows below the image included
    check_int32("elements of one image", (height + config.strips_y) * (width + config.cols) * channels)
    row_tiles = cdiv(height, config.strips_y)
    col_tiles = cdiv(width, config.strips_x * config.cols)
    programs = batch * row_tiles * col_tiles * cdiv(channels, config.block_c)
    check_int32("number of programs", programs)
    args = {
        "x_ptr": x,
        "w_ptr": w,
        "bias_ptr": b,
        "y_ptr": y,
        "y_inverse_ptr": y_inverse,
        "sumsq_ptr": sumsq,
        "partials_ptr": partials,
        "height": height,
        "width": width,
        "row_tiles": row_tiles,
        "col_tiles": col_tiles,
        "CHANNELS": channels,
        "BLOCK_C": config.block_c,
        "COLS": config.cols,
        "PADDED_COLS": next_power_of_2(config.cols),
        "STRIPS_X": config.strips_x,
        "STRIPS_Y": config.strips_y,
        "EVEN_W": width % (config.strips_x * config.cols) == 0,
        "FULL_W": config.strips_x == 1 and width == config.cols,
        "PACKED": x.dtype == torch.bfloat16 and channels % 2 == 0,
        "SILU": partials is not None,
    }
    # the sums of SiLU take registers beside those that rows are cut to
    maxnreg = config.maxnreg if partials is None or config.maxnreg is None else max(config.maxnreg, SILU_REGISTERS)
    options = compiler_options(config.num_warps, 1, maxnreg)
    run_launches([Launch(dwconv_kernel, (programs,), args, options)], x.device)


def work(
    *,
    x: TensorLike,
    w: TensorLike,
    b: TensorLike,
    y: TensorLike,
    sumsq: TensorLike | None = None,
    partials: TensorLike | None = None,
    y_inverse: TensorLike | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `dwconv` called with these arguments."""
    return Work(2 * 49 * prod(x.shape), nbytes_of(x, w, b, y, sumsq, partials, y_inverse))


def _cost(shape: Shape, config: DwconvConfig) -> float:
    """Relative work of a grid in pixels: padding counts in full, the overlap of neighbouring strips in half."""
    tile_w = config.strips_x * config.cols
    columns = cdiv(shape["width"], tile_w) * tile_w
    halo = 0 if shape["width"] == config.cols else 3 * columns // config.cols
    return cdiv(shape["height"], config.strips_y) * config.strips_y * (columns + halo)


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> DwconvConfig:
    """Longest strips that pad little: registers of 16 pixels x 4 channels still leave three CTAs on an SM.

    For one image at a time the strips get shorter, since a 16x16 grid has only 112 of full length.
    """
    width, tokens = shape["width"], shape["height"] * shape["width"]
    block_c = min(128, max(32, next_power_of_2(shape["dim"])))

    def make(cols: int, strips_x: int, strips_y: int) -> DwconvConfig:
        warps = max(1, strips_x * strips_y * block_c // 128)
        registers = 168 if cols > 8 else 128 if cols > 4 else 80
        return DwconvConfig(cols, strips_x, strips_y, block_c, warps, maxnreg=registers)

    if use == "latency" and 16 <= tokens <= 2048:
        return make(4 if tokens <= 1024 else 8, 2, 2)
    if width <= 16:
        return make(width, 1, 4)
    return min((make(cols, 1, 4) for cols in range(16, 7, -1)), key=lambda config: _cost(shape, config))


def _suits(config: DwconvConfig, shape: Shape) -> bool:
    """Whether a row's tile serves this grid about as well as the default one would."""
    return _cost(shape, config) <= 1.1 * _cost(shape, _default(80, shape, torch.bfloat16, "throughput"))


def _bits(config: DwconvConfig, cc: int, dtype: torch.dtype) -> Hashable:
    """Taps are added in one order whatever the config, squares by tiles of channels and within one by threads."""
    return config.block_c, config.strips_x * config.strips_y * config.block_c // (32 * config.num_warps)


def _few(config: DwconvConfig, cc: int, shape: Shape, dtype: torch.dtype, images: int) -> DwconvConfig:
    """Short strips, as for one image at a time, by the pixels of all images."""
    strips = images * cdiv(shape["width"], config.cols) * shape["height"]
    if strips * cdiv(shape["dim"], config.block_c) >= FEW_STRIPS:
        return config
    return _default(cc, shape, dtype, "latency")


register(
    Family(
        "dwconv",
        DwconvConfig,
        exact=("dim",),
        near=("height", "width"),
        default=_default,
        accepts=_suits,
        bits=_bits,
        few=_few,
    )
)
