"""Fuse a skip connection: a 1x1 convolution of two token arrays side by side, without making the copy.

    out = [s, m] @ w + b = s @ w[:D] + m @ w[D:] + b          s, m [T, D], w [2D, N]

K runs over the first source, then over the second. Rows of a tile may belong to several images.

FLOPs 4*T*D*N; bytes (2*T*D + 2*D*N + T*N) * itemsize.

Measured facts: GPU timings not measured yet. Compiled, Triton 3.6.0, D = N = 896, bf16, 2026-11-23: two
loops, each with its own pipeline, in 122 registers on sm_90 (128x128x64, 8 warps, two CTAs an SM) and 230 to
236 on sm_80, 89, 120 (128x128x32, 4 warps, two CTAs), no spills.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..jit import grouped_tile
from ..launch import (
    FLOATS,
    Launch,
    cdiv,
    check_int32,
    check_rows,
    check_tensor,
    compiler_options,
    compute_capability,
    dot_precision,
    run_launches,
)
from ..tuning import Family, GemmConfig, Shape, flat_gemm_default, lookup, register


@triton.jit
def fuse_skip_kernel(
    s_ptr,
    m_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    tiles_m,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EVEN_K: tl.constexpr = DIM % BLOCK_K == 0
    EVEN_N: tl.constexpr = WIDTH % BLOCK_N == 0
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(WIDTH, BLOCK_N), GROUP_M)
    rm = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    in_n = rn < WIDTH
    # rows past the end read the last token again and are dropped at the store
    rows = tl.minimum(rm, tokens - 1).to(tl.int64)[:, None] * DIM + rk[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for source in tl.static_range(2):
        a_ptrs = (s_ptr if source == 0 else m_ptr) + rows
        w_ptrs = w_ptr + (source * DIM + rk[:, None]) * WIDTH + rn[None, :]
        for k in range(0, DIM, BLOCK_K):
            a = tl.load(a_ptrs) if EVEN_K else tl.load(a_ptrs, mask=rk[None, :] < DIM - k, other=0.0)
            if EVEN_K and EVEN_N:
                w = tl.load(w_ptrs)
            else:
                w = tl.load(w_ptrs, mask=(rk[:, None] < DIM - k) & in_n[None, :], other=0.0)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
            a_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * WIDTH

    bias = tl.load(bias_ptr + rn, mask=in_n, other=0.0).to(tl.float32)
    out = (acc + bias[None, :]).to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + rm.to(tl.int64)[:, None] * WIDTH + rn[None, :]
    tl.store(out_ptrs, out, mask=(rm < tokens)[:, None] & in_n[None, :])


def fuse_skip(
    s: torch.Tensor,
    m: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    *,
    tokens_per_image: int,
    config: GemmConfig | None = None,
) -> None:
    """out = s @ w[:D] + m @ w[D:] + b.

    Args:
        s, m: [T, D] bf16, fp16 or fp32 tokens: the skip and the main path, in the weight's order.
        w: [2D, N], dtype of s. b: [N], fp32 or the dtype of s. out: [T, N] output, dtype of s, apart from s
        and m. tokens_per_image: T is a multiple of it; the config is looked up by it when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    check_tensor("s", s, shape=(None, None), dtypes=FLOATS)
    tokens, dim = s.shape
    check_rows("s", tokens, tokens_per_image)
    check_tensor("m", m, shape=(tokens, dim), dtypes=s.dtype, like=s)
    check_tensor("w", w, shape=(2 * dim, None), dtypes=s.dtype, like=s)
    width = w.shape[1]
    check_tensor("b", b, shape=(width,), dtypes=(torch.float32, s.dtype), like=s)
    check_tensor("out", out, shape=(tokens, width), dtypes=s.dtype, like=s)
    for name, source in (("s", s), ("m", m)):
        if out.data_ptr() == source.data_ptr():
            raise ValueError(f"out shares its memory with {name}, which other tiles still read: pass another buffer")
    if config is None:
        shape = {"tokens_per_image": tokens_per_image, "dim": dim, "width": width}
        config = lookup("fuse_skip", compute_capability(s), shape, s.dtype)
    run_launches(_launches(s, m, w, b, out, config), s.device)


def _launches(
    s: torch.Tensor, m: torch.Tensor, w: torch.Tensor, b: torch.Tensor, out: torch.Tensor, config: GemmConfig
) -> list[Launch]:
    tokens, width = out.shape
    check_int32("number of tokens", tokens + config.block_m)
    tiles_m = cdiv(tokens, config.block_m)
    programs = tiles_m * cdiv(width, config.block_n)
    check_int32("number of tiles", programs)
    args = {
        "s_ptr": s,
        "m_ptr": m,
        "w_ptr": w,
        "bias_ptr": b,
        "out_ptr": out,
        "tokens": tokens,
        "tiles_m": tiles_m,
        "DIM": s.shape[1],
        "WIDTH": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PRECISION": dot_precision(s.dtype),
    }
    options = compiler_options(config.num_warps, config.num_stages, config.maxnreg)
    return [Launch(fuse_skip_kernel, (programs,), args, options)]


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    return flat_gemm_default(cc, shape["tokens_per_image"], shape["width"], 2 * shape["dim"], dtype, use)


def _example(shape: Shape, dtype: torch.dtype, config: GemmConfig) -> list[Launch]:
    tokens, dim, width = 2 * shape["tokens_per_image"], shape["dim"], shape["width"]

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    s, m, out = empty(tokens, dim), empty(tokens, dim), empty(tokens, width)
    return _launches(s, m, empty(2 * dim, width), empty(width, of=torch.float32), out, config)


register(Family("fuse_skip", GemmConfig, ("dim", "width"), ("tokens_per_image",), _default, _example))
