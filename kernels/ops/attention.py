"""Spatial attention with one wide head, as the FLUX.2 VAE has it in its middle: wider than torch's flash kernels take.

    out = softmax(q @ k^T * scale) @ v                        [T, D], each image by itself

Scores never leave the chip: a program holds a tile of queries and walks the keys of its image with a running maximum
and sum in float32 (online softmax). The sums of 64 rows and 512 columns fill half of an SM's registers. So the scores
walk the width in steps of BLOCK_K, in a loop of their own: Triton then lays warps out over columns in both products,
where two products in one loop give each warp whole rows, and spill. The queries are read again for every tile of keys,
out of L1. The values of a tile are loaded before its scores, whose products hide the wait.

FLOPs 4*T*tokens_per_image*D; bytes 4*T*D * itemsize, and no more memory than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Any

import torch
import triton
import triton.language as tl

from ..config_rows import Family, Shape, register
from ..jit import exp2_approx
from ..launch import (
    FLOATS,
    Launch,
    TensorLike,
    Work,
    cdiv,
    check_int32,
    check_rows,
    check_tensor,
    compiler_options,
    compute_capability,
    dot_precision,
    nbytes_of,
    next_power_of_2,
    run_launches,
    same_memory,
)
from ..tuning import lookup

MOST_COLUMNS = 512
LOG2_E = log2(2.718281828459045)


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tokens_per_image,
    scale,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EVEN_D: tl.constexpr = DIM == BLOCK_D
    tiles = tl.cdiv(tokens_per_image, BLOCK_M)
    base = (tl.program_id(0) // tiles).to(tl.int64) * tokens_per_image * DIM
    offs_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < DIM
    # rows past the image read its last row again: no mask on rows in the loops
    rows = offs_m if EVEN else tl.minimum(offs_m, tokens_per_image - 1)

    # largest score so far, sum of the weights, sum of the weighted values; scores are in units of log(2)
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    # not range(): the interpreter of Triton 3.6 cannot take its bounds from an argument under numpy 2.4
    n = 0
    while n < tokens_per_image:
        keys = n + offs_n if EVEN else tl.minimum(n + offs_n, tokens_per_image - 1)
        v_ptrs = v_ptr + base + keys[:, None] * DIM + offs_d[None, :]
        v = tl.load(v_ptrs) if EVEN_D else tl.load(v_ptrs, mask=in_d[None, :], other=0.0)
        scores = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for d in range(0, BLOCK_D, BLOCK_K):
            q_ptrs = q_ptr + base + rows[:, None] * DIM + (d + offs_k)[None, :]
            k_ptrs = k_ptr + base + keys[:, None] * DIM + (d + offs_k)[None, :]
            if EVEN_D:
                q = tl.load(q_ptrs, cache_modifier=".ca")
                k = tl.load(k_ptrs)
            else:
                in_k = (offs_k < DIM - d)[None, :]
                q = tl.load(q_ptrs, mask=in_k, other=0.0, cache_modifier=".ca")
                k = tl.load(k_ptrs, mask=in_k, other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        scores *= scale
        if not EVEN:
            scores = tl.where((offs_n < tokens_per_image - n)[None, :], scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, axis=1))
        weights = exp2_approx(scores - peak[:, None])
        before = exp2_approx(largest - peak)
        total = total * before + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * before[:, None], input_precision=PRECISION)
        largest = peak
        n += BLOCK_N

    out_ptrs = out_ptr + base + offs_m[:, None] * DIM + offs_d[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    if EVEN and EVEN_D:
        tl.store(out_ptrs, out)
    else:
        tl.store(out_ptrs, out, mask=(offs_m < tokens_per_image)[:, None] & in_d[None, :])


@dataclass(frozen=True)
class AttentionConfig:
    """Queries and keys of a tile, and columns of a step of the scores, beside the launch's options."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    *,
    tokens_per_image: int,
    scale: float | None = None,
    config: AttentionConfig | None = None,
) -> None:
    """out = softmax(q @ k^T * scale) @ v, every image by itself.

    Args:
        q, k, v: [T, D] bf16, fp16 or fp32, T = images * tokens_per_image, D at most 512.
        out: [T, D] output, dtype of q, apart from q, k and v.
        scale: of the scores; 1 / sqrt(D) when None.
        config: launch parameters; looked up by the shape of one image when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    check_tensor("q", q, shape=(None, None), dtypes=FLOATS)
    tokens, dim = q.shape
    batch = check_rows("q", tokens, tokens_per_image)
    if not 1 <= dim <= MOST_COLUMNS:
        raise ValueError(f"q has {dim} columns, expected 1 to {MOST_COLUMNS}: a tile holds the sums of a whole row")
    for name, t in (("k", k), ("v", v), ("out", out)):
        check_tensor(name, t, shape=(tokens, dim), dtypes=q.dtype, like=q)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if same_memory(out, t):
            raise ValueError(f"out shares its memory with {name}, which other tiles still read: pass another buffer")
    if config is None:
        key = {"tokens_per_image": tokens_per_image, "dim": dim}
        config = lookup("attention", compute_capability(q), key, q.dtype)
    # inside an image, offsets are of 32 bits
    longest = max(config.block_m, config.block_n)
    check_int32("elements of one image", (tokens_per_image + longest) * dim)
    programs = batch * cdiv(tokens_per_image, config.block_m)
    check_int32("number of tiles", programs)
    block_d = max(16, next_power_of_2(dim))
    args = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "tokens_per_image": tokens_per_image,
        "scale": (dim**-0.5 if scale is None else float(scale)) * LOG2_E,
        "DIM": dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": min(config.block_k, block_d),
        "BLOCK_D": block_d,
        "EVEN": tokens_per_image % longest == 0,
        "PRECISION": dot_precision(q.dtype),
    }
    options = compiler_options(config.num_warps, config.num_stages, config.maxnreg)
    run_launches([Launch(attention_kernel, (programs,), args, options)], q.device)


def work(
    *, q: TensorLike, k: TensorLike, v: TensorLike, out: TensorLike, tokens_per_image: int, **options: Any
) -> Work:
    """FLOPs (of the products) and bytes of `attention` called with these arguments."""
    return Work(4 * q.shape[0] * tokens_per_image * q.shape[1], nbytes_of(q, k, v, out))


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> AttentionConfig:
    """64 queries, whose sums are 128 registers for each of 256 threads; as many keys as spill nothing beside them.

    float32 products run on CUDA cores, and take twice the shared memory: a quarter of the tile.
    """
    if dtype == torch.float32:
        return AttentionConfig(16, 32, 32, num_warps=8, num_stages=2)
    if cc in (90, 100):
        return AttentionConfig(64, 64, 64, num_warps=8, num_stages=3)
    return AttentionConfig(64, 32, 64, num_warps=8, num_stages=4)


register(Family("attention", AttentionConfig, ("dim",), ("tokens_per_image",), _default))
