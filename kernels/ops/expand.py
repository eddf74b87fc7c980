"""Expand: RMSNorm, the 1x1 convolution D -> F, GELU, and the sums of squares that GRN needs, in one GEMM.

    rstd[t] = rsqrt(sum_c y[t, c]^2 / D + eps)
    h       = gelu(rstd * (y @ w1) + b1)                      [T, F]
    partials[b, i, f] = sum of h[t, f]^2 over tile i of image b

RMSNorm has no weight, so it is a row scale and commutes with the product: it moves to the epilogue and
costs no pass over memory. The squares are summed in float32 before h is rounded. A tile never mixes
images.

FLOPs 2*T*D*F; bytes (T*D + D*F + T*F) * itemsize + 4*T*sumsq_tiles + 4*F*row_tiles.

Measured facts: GPU timings not measured yet. Compiled, Triton 3.6.0, D 896, F 3584, bf16, 2026-11-23, as
registers / stack bytes / CTAs per SM (`python -m bench.aot` for the rows that ship):
- D and F as constexprs: 128x128x64, 8 warps, 3 stages takes 100/0/2 on sm_90 (112 when they were arguments);
  held to 128 registers by `maxnreg`, Triton 3.9 spills 8 bytes.
- exact erf instead of the fit: 163/0/1 on sm_90 at that tile; 128x128 at 4 warps spills 40 to 56 bytes on every
  other GPU; 128x256 on sm_90 spills 80. 128x64x64 at 4 warps holds erf without spills everywhere.
- tensor descriptors: 128/0/2 on sm_90, no fewer registers than pointer loads, but none of the copy instructions;
  254/0/2 on sm_100, which is what ships there; 255/8/2 on sm_120, so not there.
- persistent with descriptors (flattened tile loop): 128/0/1 on sm_90 with 128 KB of shared memory, since the loop
  holds the store's buffer too; 255/0/2 on sm_100; 255/8/2 on sm_120. Not shipped: two CTAs already overlap one's
  epilogue with the other's products, and the interpreter of Triton 3.6 cannot run a flattened loop.
- 128x256x64, 8 warps: 255/0/1 on sm_90 by pointers, 247/0/1 by descriptors.
- programmatic dependent launch (`gdc_wait` before the first load, `gdc_launch_dependents` after the last product):
  128/0/2 on sm_90, 255/0/2 on sm_100 and sm_120. Registers allow it; not shipped until a GPU shows what it hides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..jit import gelu, grouped_tile, image_tile
from ..launch import (
    FLOATS,
    Launch,
    cdiv,
    check_int32,
    check_rows,
    check_tensor,
    check_tma,
    compiler_options,
    compute_capability,
    dot_precision,
    run_launches,
)
from ..tuning import Family, GemmConfig, Shape, gemm_default, lookup, register, suits_image

GELU_KINDS = ("fit", "erf")


@triton.jit
def expand_kernel(
    y_ptr,
    w_ptr,
    bias_ptr,
    sumsq_ptr,
    h_ptr,
    partials_ptr,
    tokens_per_image,
    tiles_per_image,
    tiles_m,
    eps,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    SUMSQ_TILES: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EVEN_N: tl.constexpr = HIDDEN % BLOCK_N == 0
    EVEN_K: tl.constexpr = DIM % BLOCK_K == 0
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(HIDDEN, BLOCK_N), GROUP_M)
    _, first, left = image_tile(tile_m, tokens_per_image, tiles_per_image, BLOCK_M)
    rm = tl.arange(0, BLOCK_M)
    # rows past the image read its last row again: no mask in the loop, and the epilogue drops them
    rows = rm if EVEN_M else tl.minimum(rm, left - 1)
    rn = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    y_ptrs = y_ptr if TMA else y_ptr + first * DIM + rows[:, None] * DIM + rk[None, :]
    w_ptrs = w_ptr if TMA else w_ptr + rk[:, None] * HIDDEN + rn[None, :]
    for k in range(0, DIM, BLOCK_K):
        if TMA:
            y = y_ptr.load([first.to(tl.int32), k])
            w = w_ptr.load([k, tile_n * BLOCK_N])
        else:
            y = tl.load(y_ptrs) if EVEN_K else tl.load(y_ptrs, mask=rk[None, :] < DIM - k, other=0.0)
            if EVEN_K and EVEN_N:
                w = tl.load(w_ptrs)
            else:
                w = tl.load(w_ptrs, mask=(rk[:, None] < DIM - k) & (rn[None, :] < HIDDEN), other=0.0)
            y_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * HIDDEN
        acc = tl.dot(y, w, acc, input_precision=PRECISION)

    sumsq = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for tile in tl.static_range(SUMSQ_TILES):
        sumsq += tl.load(sumsq_ptr + first * SUMSQ_TILES + rows * SUMSQ_TILES + tile)
    rstd = tl.rsqrt(sumsq / DIM + eps)
    in_n = rn < HIDDEN
    bias = tl.load(bias_ptr + rn, mask=in_n, other=0.0).to(tl.float32)
    h = gelu(acc * rstd[:, None] + bias[None, :], GELU)  # [BLOCK_M, BLOCK_N]

    h_ptrs = h_ptr + first * HIDDEN + rm[:, None] * HIDDEN + rn[None, :]
    stored = h.to(h_ptr.dtype.element_ty)
    if EVEN_M and EVEN_N:
        tl.store(h_ptrs, stored)
    else:
        tl.store(h_ptrs, stored, mask=(rm[:, None] < left) & in_n[None, :])
    squares = h * h
    if not EVEN_M:
        squares = tl.where(rm[:, None] < left, squares, 0.0)
    tl.store(partials_ptr + tile_m.to(tl.int64) * HIDDEN + rn, tl.sum(squares, axis=0), mask=in_n)


def expand_partials_shape(batch: int, tokens_per_image: int, hidden: int, config: GemmConfig) -> tuple[int, int, int]:
    """Shape [B, tiles per image, F] of the float32 partials that `expand` writes with this config."""
    return batch, cdiv(tokens_per_image, config.block_m), hidden


def expand(
    y: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    sumsq: torch.Tensor,
    h: torch.Tensor,
    partials: torch.Tensor,
    *,
    tokens_per_image: int,
    eps: float = 1e-6,
    gelu: str = "fit",
    config: GemmConfig | None = None,
) -> None:
    """h = gelu(rstd * (y @ w1) + b1), and the column sums of h^2 of every row tile.

    Args:
        y: [T, D] bf16, fp16 or fp32 tokens, T = images * tokens_per_image.
        w1: [D, F], dtype of y.
        b1: [F], fp32 or the dtype of y.
        sumsq: [T, n] fp32 partial sums over channels of y^2; their sum over n divided by D is the mean
        square. h: [T, F] output, dtype of y. partials: output of shape `expand_partials_shape(...)`,
        fp32. eps: added to the mean square. gelu: "fit" (within 2.5e-5 of exact) or "erf". config: launch
        parameters; looked up by the shape of one image when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    check_tensor("y", y, shape=(None, None), dtypes=FLOATS)
    tokens, dim = y.shape
    check_tensor("w1", w1, shape=(dim, None), dtypes=y.dtype, like=y)
    hidden = w1.shape[1]
    batch = check_rows("y", tokens, tokens_per_image)
    if gelu not in GELU_KINDS:
        raise ValueError(f"gelu is {gelu!r}, expected one of {GELU_KINDS}")
    if config is None:
        shape = {"tokens_per_image": tokens_per_image, "dim": dim, "hidden": hidden}
        config = lookup("expand", compute_capability(y), shape, y.dtype)
    check_tensor("b1", b1, shape=(hidden,), dtypes=(torch.float32, y.dtype), like=y)
    check_tensor("sumsq", sumsq, shape=(tokens, None), dtypes=torch.float32, like=y)
    check_tensor("h", h, shape=(tokens, hidden), dtypes=y.dtype, like=y)
    shape = expand_partials_shape(batch, tokens_per_image, hidden, config)
    check_tensor("partials", partials, shape=shape, dtypes=torch.float32, like=y)
    check_tma(config.tma, y=y, w1=w1)
    launches = _launches(y, w1, b1, sumsq, h, partials, tokens_per_image, eps, gelu, config)
    run_launches(launches, y.device)


def _launches(
    y: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    sumsq: torch.Tensor,
    h: torch.Tensor,
    partials: torch.Tensor,
    tokens_per_image: int,
    eps: float,
    gelu_kind: str,
    config: GemmConfig,
) -> list[Launch]:
    batch, tiles_per_image, hidden = partials.shape
    dim = y.shape[1]
    tiles_m = batch * tiles_per_image
    programs = tiles_m * cdiv(hidden, config.block_n)
    check_int32("number of tiles", programs)
    a, b = y, w1
    if config.tma:
        a = TensorDescriptor.from_tensor(y, [config.block_m, config.block_k])
        b = TensorDescriptor.from_tensor(w1, [config.block_k, config.block_n])
    args = {
        "y_ptr": a,
        "w_ptr": b,
        "bias_ptr": b1,
        "sumsq_ptr": sumsq,
        "h_ptr": h,
        "partials_ptr": partials,
        "tokens_per_image": tokens_per_image,
        "tiles_per_image": tiles_per_image,
        "tiles_m": tiles_m,
        "eps": eps,
        "DIM": dim,
        "HIDDEN": hidden,
        "SUMSQ_TILES": sumsq.shape[1],
        "GELU": gelu_kind,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "EVEN_M": tokens_per_image % config.block_m == 0,
        "TMA": config.tma,
        "PRECISION": dot_precision(y.dtype),
    }
    # rows cap registers where the fit stays under the cap; erf would spill
    maxnreg = config.maxnreg if gelu_kind == "fit" else None
    options = compiler_options(config.num_warps, config.num_stages, maxnreg)
    return [Launch(expand_kernel, (programs,), args, options)]


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    return gemm_default(cc, shape["tokens_per_image"], shape["hidden"], shape["dim"], dtype)


def _example(shape: Shape, dtype: torch.dtype, config: GemmConfig) -> list[Launch]:
    images, tokens_per_image, dim, hidden = 2, shape["tokens_per_image"], shape["dim"], shape["hidden"]
    tokens = images * tokens_per_image

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    sumsq = empty(tokens, cdiv(dim, 128), of=torch.float32)
    partials = empty(*expand_partials_shape(images, tokens_per_image, hidden, config), of=torch.float32)
    y, w1, b1, h = empty(tokens, dim), empty(dim, hidden), empty(hidden, of=torch.float32), empty(tokens, hidden)
    return _launches(y, w1, b1, sumsq, h, partials, tokens_per_image, 1e-6, "fit", config)


register(Family("expand", GemmConfig, ("dim", "hidden"), ("tokens_per_image",), _default, _example, suits_image))
