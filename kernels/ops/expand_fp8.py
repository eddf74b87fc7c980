"""Expand in e4m3: `expand` with 8-bit operands and result, and one more vector for their scales.

    rstd[t]   = rsqrt(sum_c y[t, c]^2 / D + eps)                 of y as it was before it was scaled and rounded
    h[t, f]   = gelu(rstd[t] * scale[f] * (y8 @ w1^T)[t, f] + b1[f])
    h8[t, f]  = e4m3(h[t, f] * h_inverse[f])                     [T, F]
    partials[b, i, f] = sum of h[t, f]^2 over the i-th 64 tokens of image b

`scale` undoes the scales by which y and the columns of w1 were brought into e4m3's range; `h_inverse` brings each
hidden channel there, and `project_fp8` has its reciprocal in w2. All of them are static, from a calibration, so nothing
waits for a maximum. Sums and the epilogue are float32; squares are of h before it is rounded; e4m3 rounds to the
nearest even and is cut off at 448.

w1 is [F, D]: 8-bit products take both operands with K innermost. How they add is a matter of the GPU, see `dot_e4m3`.

FLOPs 2*T*D*F; bytes T*D + D*F + T*F + 12*F + 4*T*n + 4*B*tiles*F, sumsq being [T, n].
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..config_rows import Family, Shape, register
from ..gemm import FEW_PROGRAMS_E4M3, LATENCY_PROGRAMS, GemmConfig, pick_block_m, suits_image
from ..gpu_limits import base_cc
from ..jit import (
    dot_e4m3,
    gelu,
    group_sums,
    grouped_tile,
    image_tile,
    load_tile,
    release_next,
    to_e4m3,
    wait_for_previous,
)
from ..launch import (
    ALIGNMENT,
    E4M3,
    Launch,
    TensorLike,
    Work,
    cdiv,
    check_e4m3,
    check_int32,
    check_rows,
    check_tensor,
    check_tma,
    compute_capability,
    e4m3_products,
    nbytes_of,
    next_power_of_2,
    run_launches,
)
from ..tuning import lookup
from .expand import bits, few, group_rows


@triton.jit(do_not_specialize=["tiles_m"])
def expand_fp8_kernel(
    y_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    sumsq_ptr,
    h_ptr,
    h_inverse_ptr,
    partials_ptr,
    tokens_per_image,
    tiles_per_image,
    tiles_m,
    eps,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    SUMSQ_TILES: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    ROWS_IN_WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    EVEN_N: tl.constexpr = HIDDEN % BLOCK_N == 0
    EVEN_K: tl.constexpr = DIM % BLOCK_K == 0
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(HIDDEN, BLOCK_N), GROUP_M)
    image, first, left = image_tile(pid_m, tokens_per_image, tiles_per_image, BLOCK_M)
    offs_m = tl.arange(0, BLOCK_M)
    # rows past the image read its last row again: no mask in the loop, and the epilogue drops them
    rows = offs_m if EVEN_M else tl.minimum(offs_m, left - 1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    y_ptrs = y_ptr if TMA else y_ptr + first * DIM + rows[:, None] * DIM + offs_k[None, :]
    w_ptrs = w_ptr if TMA else w_ptr + offs_n[:, None] * DIM + offs_k[None, :]
    for k in range(0, DIM, BLOCK_K):
        if TMA:
            y = y_ptr.load([first.to(tl.int32), k])
            w = w_ptr.load([pid_n * BLOCK_N, k])
        else:
            y = load_tile(y_ptrs, offs_k[None, :] < DIM - k, EVEN_K)
            w = load_tile(w_ptrs, (offs_k[None, :] < DIM - k) & (offs_n[:, None] < HIDDEN), EVEN_K and EVEN_N)
            y_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
        acc = dot_e4m3(y, tl.trans(w), acc, PRODUCTS)

    release_next(PDL)
    sumsq = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for tile in tl.static_range(SUMSQ_TILES):
        sumsq += tl.load(sumsq_ptr + first * SUMSQ_TILES + rows * SUMSQ_TILES + tile)
    rstd = tl.rsqrt(sumsq / DIM + eps)
    in_n = offs_n < HIDDEN
    scale = tl.load(scale_ptr + offs_n, mask=in_n, other=0.0)
    bias = tl.load(bias_ptr + offs_n, mask=in_n, other=0.0)
    h = gelu(acc * rstd[:, None] * scale[None, :] + bias[None, :], "fit")  # [BLOCK_M, BLOCK_N]

    squares = h * h
    h_ptrs = h_ptr + first * HIDDEN + offs_m[:, None] * HIDDEN + offs_n[None, :]
    stored = to_e4m3(h * tl.load(h_inverse_ptr + offs_n, mask=in_n, other=0.0)[None, :])
    if EVEN_M and EVEN_N:
        tl.store(h_ptrs, stored)
    else:
        tl.store(h_ptrs, stored, mask=(offs_m[:, None] < left) & in_n[None, :])
    if not EVEN_M:
        squares = tl.where(offs_m[:, None] < left, squares, 0.0)
    groups_per_image = tl.cdiv(tokens_per_image, GROUP_ROWS)
    group = pid_m % tiles_per_image * (BLOCK_M // GROUP_ROWS) + tl.arange(0, BLOCK_M // GROUP_ROWS)
    at = (image.to(tl.int64) * groups_per_image + group)[:, None] * HIDDEN + offs_n[None, :]
    inside = in_n[None, :] if EVEN_M else (group < groups_per_image)[:, None] & in_n[None, :]
    tl.store(partials_ptr + at, group_sums(squares, GROUP_ROWS, ROWS_IN_WARPS), mask=inside)


def expand_fp8_partials_shape(
    batch: int, tokens_per_image: int, hidden: int, config: GemmConfig
) -> tuple[int, int, int]:
    """Shape [B, groups of tokens, F] of the float32 partials that `expand_fp8` writes with this config."""
    return batch, cdiv(tokens_per_image, group_rows(config)), hidden


def expand_fp8(
    y: torch.Tensor,
    w1: torch.Tensor,
    scale: torch.Tensor,
    b1: torch.Tensor,
    sumsq: torch.Tensor,
    h: torch.Tensor,
    h_inverse: torch.Tensor,
    partials: torch.Tensor,
    *,
    tokens_per_image: int,
    eps: float = 1e-6,
    config: GemmConfig | None = None,
) -> None:
    """h = e4m3(gelu(rstd * scale * (y @ w1^T) + b1) * h_inverse), and the column sums of h^2 of every 64 tokens.

    Args:
        y: [T, D] e4m3 tokens, T = images * tokens_per_image.
        w1: [F, D] e4m3.
        scale: [F] fp32, of y times that of each row of w1.
        b1: [F] fp32.
        sumsq: [T, n] fp32 partial sums over channels of y^2 before y was scaled.
        h: [T, F] e4m3 output.
        h_inverse: [F] fp32, reciprocals of the scales of h.
        partials: fp32 output of shape `expand_fp8_partials_shape(...)`, of h before it is scaled.
        eps: added to the mean square.
        config: launch parameters; looked up by the shape of one image when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take, or a GPU without e4m3.
    """
    check_tensor("y", y, shape=(None, None), dtypes=E4M3)
    tokens, dim = y.shape
    check_tensor("w1", w1, shape=(None, dim), dtypes=E4M3, like=y)
    hidden = w1.shape[0]
    batch = check_rows("y", tokens, tokens_per_image)
    cc = compute_capability(y)
    check_e4m3(cc)
    if config is None:
        config = lookup("expand_fp8", cc, {"tokens_per_image": tokens_per_image, "dim": dim, "hidden": hidden}, E4M3)
    for name, t in (("scale", scale), ("b1", b1), ("h_inverse", h_inverse)):
        check_tensor(name, t, shape=(hidden,), dtypes=torch.float32, like=y)
    check_tensor("sumsq", sumsq, shape=(tokens, None), dtypes=torch.float32, like=y)
    check_tensor("h", h, shape=(tokens, hidden), dtypes=E4M3, like=y)
    partials_shape = expand_fp8_partials_shape(batch, tokens_per_image, hidden, config)
    check_tensor("partials", partials, shape=partials_shape, dtypes=torch.float32, like=y)
    check_tma(config.tma, y=y, w1=w1)
    tiles_per_image = cdiv(tokens_per_image, config.block_m)
    tiles_m = batch * tiles_per_image
    programs = tiles_m * cdiv(hidden, config.block_n)
    check_int32("number of tiles", programs)
    args = {
        "y_ptr": TensorDescriptor.from_tensor(y, [config.block_m, config.block_k]) if config.tma else y,
        "w_ptr": TensorDescriptor.from_tensor(w1, [config.block_n, config.block_k]) if config.tma else w1,
        "scale_ptr": scale,
        "bias_ptr": b1,
        "sumsq_ptr": sumsq,
        "h_ptr": h,
        "h_inverse_ptr": h_inverse,
        "partials_ptr": partials,
        "tokens_per_image": tokens_per_image,
        "tiles_per_image": tiles_per_image,
        "tiles_m": tiles_m,
        "eps": eps,
        "DIM": dim,
        "HIDDEN": hidden,
        "SUMSQ_TILES": sumsq.shape[1],
        "GROUP_ROWS": group_rows(config),
        # tcgen05 leaves a row in each thread
        "ROWS_IN_WARPS": base_cc(cc) != 100,
        "EVEN_M": tokens_per_image % config.block_m == 0,
        "TMA": config.tma,
        "PRODUCTS": e4m3_products(cc),
        **config.tile(),
    }
    run_launches([Launch(expand_fp8_kernel, (programs,), args, config.options())], y.device)


def work(
    *,
    y: TensorLike,
    w1: TensorLike,
    scale: TensorLike,
    b1: TensorLike,
    sumsq: TensorLike,
    h: TensorLike,
    h_inverse: TensorLike,
    partials: TensorLike,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `expand_fp8` called with these arguments."""
    nbytes = nbytes_of(y, w1, scale, b1, sumsq, h, h_inverse, partials)
    return Work(2 * y.shape[0] * prod(w1.shape), nbytes)


def _suits(config: GemmConfig, shape: Shape) -> bool:
    """Whether a row pads images of this shape little enough; masked, 128 x 128 by 4 warps or by descriptors spills."""
    masked = shape["tokens_per_image"] % config.block_m != 0
    spills = config.tma or (config.num_warps == 4 and config.block_m * config.block_n >= 128 * 128)
    return suits_image(config, shape) and not (masked and spills)


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    """What compiles without spills and leaves room for two CTAs on an SM: kernels/NOTES.md."""
    tokens_per_image, dim, hidden = shape["tokens_per_image"], shape["dim"], shape["hidden"]
    # wgmma and tcgen05 take 64 rows at least, and without wgmma there is no product of e4m3 on sm_90
    rows = (128, 64) if cc == 90 or (cc == 100 and tokens_per_image > 32) else (128, 64, 32, 16)
    block_m, block_n = pick_block_m(tokens_per_image, rows), min(128, max(16, next_power_of_2(hidden)))
    programs = cdiv(tokens_per_image, block_m) * cdiv(hidden, block_n)
    if use == "latency" and programs < LATENCY_PROGRAMS:
        block_m, block_n = min(block_m, 64), min(block_n, 64)
    big, masked = block_m * block_n >= 128 * 128, tokens_per_image % block_m != 0
    # one instruction multiplies 32 of K
    config = GemmConfig(block_m, block_n, 64 if dim > 32 else 32, group_m=8, num_warps=4, num_stages=3)
    if cc == 90:
        # rows of 16 bytes are what tensor descriptors need; masked, they spill
        tma = dim % ALIGNMENT == 0 and not masked
        return replace(config, num_warps=8 if big else 4, num_stages=4, maxnreg=128 if big else None, tma=tma)
    if cc == 100 and big:
        return replace(config, block_n=64, block_k=128 if dim > 64 else config.block_k)
    if cc == 89 and big and masked:
        return replace(config, block_n=64, num_stages=4)
    return config


register(
    Family(
        "expand_fp8",
        GemmConfig,
        exact=("dim", "hidden"),
        near=("tokens_per_image",),
        default=_default,
        accepts=_suits,
        bits=bits,
        few=partial(few, wanted=FEW_PROGRAMS_E4M3),
    )
)
