"""Fuse a skip connection: a 1x1 convolution of two token arrays side by side, without making the copy.

    out = [s, m] @ w + b = s @ w[:D] + m @ w[D:] + b          s, m [T, D], w [2D, N]

K runs over the first source, then over the second: two loops, each with its own pipeline. Rows of a tile may belong to
several images.

FLOPs 4*T*D*N; bytes (2*T*D + 2*D*N + T*N) * itemsize + N * itemsize(b).
"""

from __future__ import annotations

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
    check_rows,
    check_tensor,
    compute_capability,
    dot_precision,
    nbytes_of,
    run_launches,
    same_memory,
)
from ..tuning import lookup


@triton.jit(do_not_specialize=["tiles_m"])
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
    PDL: tl.constexpr = False,
):
    EVEN_K: tl.constexpr = DIM % BLOCK_K == 0
    EVEN_N: tl.constexpr = WIDTH % BLOCK_N == 0
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(WIDTH, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_n = offs_n < WIDTH
    # rows past the end read the last token again and are dropped at the store
    rows = tl.minimum(offs_m, tokens - 1).to(tl.int64)[:, None] * DIM + offs_k[None, :]

    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for source in tl.static_range(2):
        a_ptrs = (s_ptr if source == 0 else m_ptr) + rows
        w_ptrs = w_ptr + (source * DIM + offs_k[:, None]) * WIDTH + offs_n[None, :]
        for k in range(0, DIM, BLOCK_K):
            a = load_tile(a_ptrs, offs_k[None, :] < DIM - k, EVEN_K)
            w = load_tile(w_ptrs, (offs_k[:, None] < DIM - k) & in_n[None, :], EVEN_K and EVEN_N)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
            a_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * WIDTH

    release_next(PDL)
    bias = tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
    out = (acc + bias[None, :]).to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * WIDTH + offs_n[None, :]
    tl.store(out_ptrs, out, mask=(offs_m < tokens)[:, None] & in_n[None, :])


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
        w: [2D, N], dtype of s.
        b: [N], fp32 or the dtype of s.
        out: [T, N] output, dtype of s, apart from s and m.
        tokens_per_image: T is a multiple of it; the config is looked up by it when None.
        config: launch parameters; looked up by the shape of one image when None.

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
        if same_memory(out, source):
            raise ValueError(f"out shares its memory with {name}, which other tiles still read: pass another buffer")
    if config is None:
        key = {"tokens_per_image": tokens_per_image, "dim": dim, "width": width}
        config = lookup("fuse_skip", compute_capability(s), key, s.dtype)
    tiles_m, programs = flat_tiles(tokens, width, config)
    args = {
        "s_ptr": s,
        "m_ptr": m,
        "w_ptr": w,
        "bias_ptr": b,
        "out_ptr": out,
        "tokens": tokens,
        "tiles_m": tiles_m,
        "DIM": dim,
        "WIDTH": width,
        "PRECISION": dot_precision(s.dtype),
        **config.tile(),
    }
    run_launches([Launch(fuse_skip_kernel, (programs,), args, config.options())], s.device)


def work(*, s: TensorLike, m: TensorLike, w: TensorLike, b: TensorLike, out: TensorLike, **options: Any) -> Work:
    """FLOPs and bytes of `fuse_skip` called with these arguments."""
    return Work(2 * s.shape[0] * prod(w.shape), nbytes_of(s, m, w, b, out))


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    return flat_gemm_default(cc, shape["tokens_per_image"], shape["width"], 2 * shape["dim"], dtype, use)


register(flat_family("fuse_skip", ("dim", "width"), _default))
