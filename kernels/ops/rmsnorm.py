"""RMSNorm over the channels of each token with weight and bias, and the sums of squares that a GEMM behind it needs.

    out[t, :] = x[t, :] * rsqrt(sum_c x[t, c]^2 / D + eps) * weight + bias
    sumsq[t]  = sum_c out[t, c]^2, or of x[t, c]^2 where nothing is normed

The norms at the ends of DiCo's encoder and decoder change the residual itself, so they are a pass of their own; and the
first block of a chain needs sums that no launch has left. A program holds whole rows; all arithmetic is float32, and
out is rounded once.

FLOPs 5*T*D (2*T*D for sums alone); bytes T*D * (itemsize(x) + itemsize(out)) + 2*D * itemsize(weight) + 4*T.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from ..config_rows import Family, Shape, register
from ..jit import release_next, wait_for_previous
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
class RmsnormConfig:
    """`rows` tokens per program, each with all its channels."""

    rows: int
    num_warps: int


@triton.jit
def rmsnorm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sumsq_ptr,
    tokens,
    eps,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    SUMS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    in_row = rows < tokens
    in_x = in_row[:, None] & (columns < DIM)[None, :]
    at = rows.to(tl.int64)[:, None] * DIM + columns[None, :]
    wait_for_previous(PDL)
    x = tl.load(x_ptr + at, mask=in_x, other=0.0).to(tl.float32)  # [ROWS, PADDED]
    sumsq = tl.sum(x * x, axis=1)
    release_next(PDL)
    if NORM:
        in_w = columns < DIM
        weight = tl.load(weight_ptr + columns, mask=in_w, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + columns, mask=in_w, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(sumsq / DIM + eps)
        out = x * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=in_x)
        if SUMS:
            sumsq = tl.sum(out * out, axis=1)
    if SUMS:
        tl.store(sumsq_ptr + rows, sumsq, mask=in_row)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    sumsq: torch.Tensor | None = None,
    eps: float = 1e-6,
    config: RmsnormConfig | None = None,
) -> None:
    """out = rmsnorm(x) * weight + bias, and the sums of squares of its rows; or those of x alone.

    Args:
        x: [T, D] bf16, fp16 or fp32 tokens.
        weight, bias: [D], fp32 or the dtype of x; they and `out` all, or none for sums of x alone.
        out: [T, D] output, dtype of x; may be `x` itself, which is then normed in place.
        sumsq: [T, 1] fp32 output; not computed when None.
        eps: added to the mean square.
        config: launch parameters; looked up by the width when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    check_tensor("x", x, shape=(None, None), dtypes=FLOATS)
    tokens, dim = x.shape
    if 0 in x.shape:
        raise ValueError(f"x has shape {list(x.shape)}, expected at least one token and channel")
    norm = {"weight": weight, "bias": bias, "out": out}
    missing = [name for name, t in norm.items() if t is None]
    if missing and len(missing) < 3:
        raise ValueError(f"{' and '.join(missing)} missing: pass weight, bias and out together, or none of them")
    if missing and sumsq is None:
        raise ValueError("neither out nor sumsq is given: pass at least one output")
    for name, t in norm.items():
        if t is not None:
            shape, dtypes = ((tokens, dim), (x.dtype,)) if name == "out" else ((dim,), (torch.float32, x.dtype))
            check_tensor(name, t, shape=shape, dtypes=dtypes, like=x)
    if bias is not None and weight is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias is {bias.dtype} and weight {weight.dtype}: expected one dtype")
    if sumsq is not None:
        check_tensor("sumsq", sumsq, shape=(tokens, 1), dtypes=torch.float32, like=x)
    if config is None:
        config = lookup("rmsnorm", compute_capability(x), {"dim": dim}, x.dtype)
    check_int32("number of tokens", tokens + config.rows)
    args = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "out_ptr": out,
        "sumsq_ptr": sumsq,
        "tokens": tokens,
        "eps": eps,
        "DIM": dim,
        "PADDED": next_power_of_2(dim),
        "ROWS": config.rows,
        "NORM": not missing,
        "SUMS": sumsq is not None,
    }
    options = compiler_options(config.num_warps, 1)
    run_launches([Launch(rmsnorm_kernel, (cdiv(tokens, config.rows),), args, options)], x.device)


def work(
    *,
    x: TensorLike,
    weight: TensorLike | None = None,
    bias: TensorLike | None = None,
    out: TensorLike | None = None,
    sumsq: TensorLike | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `rmsnorm` called with these arguments."""
    return Work((2 if out is None else 5) * prod(x.shape), nbytes_of(x, weight, bias, out, sumsq))


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> RmsnormConfig:
    """Rows of about 4096 channels together, 32 of them in each thread."""
    padded = next_power_of_2(shape["dim"])
    rows = max(1, 4096 // padded)
    return RmsnormConfig(rows, max(1, min(16, rows * padded // 1024)))


register(Family("rmsnorm", RmsnormConfig, ("dim",), (), _default))
