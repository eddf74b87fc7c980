"""Project: GRN's scaling, the 1x1 convolution F -> D, bias and residual, in one GEMM.

    out = (h * (1 + gain[image])) @ w2 + b2 + residual        [T, D]

The gain scales K, so it must touch an operand in registers: each tile of h becomes fma(h, gain, h) on its way to the
tensor cores, one HFMA2 for two elements. A takes no stage of shared memory then, and two CTAs fit an SM. Layer scale or
gate, and GRN's beta, are folded into w2 and b2 at load. A tile never mixes images, since each has its own gain row.

Transposed, for sm_90: out^T = (w2^T * (1 + gain)) @ h^T. The gain meets the weights in registers, and h is the B
operand as it lies in memory. There shared memory limits a product more than the tensor cores do, and wgmma reads its B
operand once for a whole warpgroup: the wider that is, the better, and 256 divides tokens where it does not divide 896
columns.

DiCo blocks multiply h by the gain itself, their channel attention (a factor below one has no place in 1 + gain), or
take h as it is; and they leave sums of squares of each row of out, or of out times a scale, for the RMSNorm behind it:

    sumsq[t, i] = sum of out[t, d]^2 over column tile i, from the float32 values

Few tokens (one image): `split_k` > 1 gives each slice of K its own programs, which leave float32 sums in a workspace; a
second launch adds them in order, with bias and residual. What was tried besides is in kernels/NOTES.md.

`_project_configs.py` has the launch parameters of each GPU.

FLOPs 2*T*F*D; bytes (T*F + F*D + 2*T*D + B*F) * itemsize + D * itemsize(b2), and 8*split_k*T*D for the workspace, which
is written and read.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..config_rows import register
from ..gemm import GemmConfig
from ..jit import grouped_tile, image_tile, load_tile, release_next, scaled, wait_for_previous
from ..launch import (
    FLOATS,
    Launch,
    TensorLike,
    Work,
    cdiv,
    check_int32,
    check_rows,
    check_tensor,
    check_tma,
    compiler_options,
    compute_capability,
    dot_precision,
    nbytes_of,
    next_power_of_2,
    run_launches,
)
from ..tuning import lookup
from ._project_configs import FAMILY

REDUCE_BLOCK = 1024


@triton.jit(do_not_specialize=["tiles_m"])
def project_kernel(
    h_ptr,
    gain_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    workspace_ptr,
    scale_ptr,
    sumsq_ptr,
    scaled_sumsq_ptr,
    tokens,
    tokens_per_image,
    tiles_per_image,
    tiles_m,
    HIDDEN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GAIN: tl.constexpr,
    SUMSQ: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr = False,
):
    # a slice is a whole number of K blocks
    SLICE: tl.constexpr = (HIDDEN + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    EVEN_N: tl.constexpr = DIM % BLOCK_N == 0
    EVEN_K: tl.constexpr = HIDDEN % SLICE == 0
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tl.cdiv(DIM, BLOCK_N), GROUP_M)
    image, first, left = image_tile(pid_m, tokens_per_image, tiles_per_image, BLOCK_M)
    pid_k = tl.program_id(1)
    k_first = pid_k * SLICE
    offs_m = tl.arange(0, BLOCK_M)
    # rows past the image read its last row again: no mask in the loop, and the epilogue drops them
    rows = offs_m if EVEN_M else tl.minimum(offs_m, left - 1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k_first + tl.arange(0, BLOCK_K)

    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    h_ptrs = h_ptr if TMA else h_ptr + first * HIDDEN + rows[:, None] * HIDDEN + offs_k[None, :]
    w_ptrs = w_ptr if TMA else w_ptr + offs_k[:, None] * DIM + offs_n[None, :]
    if GAIN != "none":
        gain_ptrs = gain_ptr if TMA else gain_ptr + image.to(tl.int64) * HIDDEN + offs_k
    for k in range(0, SLICE, BLOCK_K):
        if TMA:
            h = h_ptr.load([first.to(tl.int32), k_first + k])
            w = w_ptr.load([k_first + k, pid_n * BLOCK_N])
            if GAIN != "none":
                gain = gain_ptr.load([image, k_first + k])  # [1, BLOCK_K]
        else:
            h = load_tile(h_ptrs, offs_k[None, :] < HIDDEN - k, EVEN_K)
            w = load_tile(w_ptrs, (offs_k[:, None] < HIDDEN - k) & (offs_n[None, :] < DIM), EVEN_K and EVEN_N)
            h_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * DIM
            if GAIN != "none":
                gain = load_tile(gain_ptrs, offs_k < HIDDEN - k, EVEN_K)[None, :]
                gain_ptrs += BLOCK_K
        if TRANSPOSED:
            a = tl.trans(w)
            if GAIN != "none":
                a = scaled(a, gain, GAIN)
            acc = tl.dot(a, tl.trans(h), acc, input_precision=PRECISION)
        else:
            if GAIN != "none":
                h = scaled(h, gain, GAIN)
            acc = tl.dot(h, w, acc, input_precision=PRECISION)
    release_next(PDL)
    if TRANSPOSED:
        acc = tl.trans(acc)  # [BLOCK_M, BLOCK_N]

    inside = (offs_m[:, None] < left) & (offs_n[None, :] < DIM)
    at = first * DIM + offs_m[:, None] * DIM + offs_n[None, :]
    if SPLIT_K > 1:
        slice_at = pid_k.to(tl.int64) * tokens * DIM
        tl.store(workspace_ptr + slice_at + at, acc, mask=inside)
    else:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < DIM, other=0.0).to(tl.float32)[None, :]
        # rows past the image read its last row again here too
        residual_at = first * DIM + rows[:, None] * DIM + offs_n[None, :]
        acc += load_tile(residual_ptr + residual_at, offs_n[None, :] < DIM, EVEN_N).to(tl.float32)
        if EVEN_M and EVEN_N:
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty))
        else:
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
        if SUMSQ:
            # columns past the last are zero: no weight, bias or residual
            TILES_N: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
            sums_at = offs_m * TILES_N + pid_n
            tl.store(sumsq_ptr + first * TILES_N + sums_at, tl.sum(acc * acc, axis=1), mask=offs_m < left)
            if SCALED:
                scale = tl.load(scale_ptr + offs_n, mask=offs_n < DIM, other=0.0)[None, :]
                scaled_sums = tl.sum(acc * acc * (scale * scale), axis=1)
                tl.store(scaled_sumsq_ptr + first * TILES_N + sums_at, scaled_sums, mask=offs_m < left)


@triton.jit
def project_reduce_kernel(
    workspace_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    count,
    DIM: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT_K):
        acc += tl.load(workspace_ptr + part * count.to(tl.int64) + at, mask=inside, other=0.0)
    acc += tl.load(bias_ptr + at % DIM, mask=inside, other=0.0).to(tl.float32)
    acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    release_next(PDL)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def project_reduce_rows_kernel(
    workspace_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    scale_ptr,
    sumsq_ptr,
    scaled_sumsq_ptr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr = False,
):
    # as project_reduce_kernel, a row per program, which also leaves its sums of squares
    row = tl.program_id(0)
    columns = tl.arange(0, PADDED)
    inside = columns < DIM
    at = row.to(tl.int64) * DIM + columns
    slice_size = tl.num_programs(0).to(tl.int64) * DIM
    wait_for_previous(PDL)
    acc = tl.zeros((PADDED,), dtype=tl.float32)
    for part in tl.static_range(SPLIT_K):
        acc += tl.load(workspace_ptr + part * slice_size + at, mask=inside, other=0.0)
    acc += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    release_next(PDL)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(sumsq_ptr + row, tl.sum(acc * acc, axis=0))
    if SCALED:
        scale = tl.load(scale_ptr + columns, mask=inside, other=0.0)
        tl.store(scaled_sumsq_ptr + row, tl.sum(acc * acc * (scale * scale), axis=0))


def project_sumsq_shape(tokens: int, dim: int, config: GemmConfig) -> tuple[int, int]:
    """Shape [T, column tiles] of the float32 sums of squares that `project` writes with this config."""
    return tokens, cdiv(dim, config.block_n) if config.split_k == 1 else 1


def project_workspace_shape(tokens: int, dim: int, config: GemmConfig) -> tuple[int, int, int] | None:
    """Shape [split_k, T, D] of the float32 workspace that `project` needs with this config; None for none."""
    return (config.split_k, tokens, dim) if config.split_k > 1 else None


def project(
    h: torch.Tensor,
    gain: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    *,
    tokens_per_image: int,
    multiply: bool = False,
    sumsq: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    scaled_sumsq: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> None:
    """out = (h * (1 + gain)) @ w2 + b2 + residual.

    Args:
        h: [T, F] bf16, fp16 or fp32 hidden activations, T = images * tokens_per_image.
        gain: [images, F] from `grn`, dtype of h; None takes h as it is.
        w2: [F, D], dtype of h.
        b2: [D], fp32 or the dtype of h.
        residual: [T, D], dtype of h.
        out: [T, D] output, dtype of h; may be `residual` itself, which is then updated in place.
        multiply: h * gain in the place of h * (1 + gain), for a gain from `channel_attention`.
        sumsq: fp32 output of shape `project_sumsq_shape(...)`, sums of squares of out; not computed when None.
        scale, scaled_sumsq: [D] fp32, and an fp32 output as `sumsq` for out * scale; both or neither, beside sumsq.
        workspace: fp32 of shape `project_workspace_shape(...)`, where the config splits K.
        config: launch parameters; looked up by the shape of one image when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    check_tensor("h", h, shape=(None, None), dtypes=FLOATS)
    tokens, hidden = h.shape
    batch = check_rows("h", tokens, tokens_per_image)
    if gain is not None:
        check_tensor("gain", gain, shape=(batch, hidden), dtypes=h.dtype, like=h)
    elif multiply:
        raise ValueError("multiply needs a gain: pass it, or leave both out")
    check_tensor("w2", w2, shape=(hidden, None), dtypes=h.dtype, like=h)
    dim = w2.shape[1]
    check_tensor("b2", b2, shape=(dim,), dtypes=(torch.float32, h.dtype), like=h)
    check_tensor("residual", residual, shape=(tokens, dim), dtypes=h.dtype, like=h)
    check_tensor("out", out, shape=(tokens, dim), dtypes=h.dtype, like=h)
    if config is None:
        key = {"tokens_per_image": tokens_per_image, "hidden": hidden, "dim": dim}
        config = lookup("project", compute_capability(h), key, h.dtype)
    _check_sums(h, dim, config, sumsq, scale, scaled_sumsq)
    needed = project_workspace_shape(tokens, dim, config)
    if needed is not None:
        if workspace is None:
            raise ValueError(f"workspace is missing: split_k {config.split_k} needs float32 of shape {list(needed)}")
        check_tensor("workspace", workspace, shape=needed, dtypes=torch.float32, like=h)
        check_int32("elements of a split projection", tokens * dim)
    check_tma(config.tma, h=h, w2=w2, **({} if gain is None else {"gain": gain}))
    tiles_per_image = cdiv(tokens_per_image, config.block_m)
    tiles_m = batch * tiles_per_image
    programs = tiles_m * cdiv(dim, config.block_n)
    check_int32("number of tiles", programs)
    # the workspace is never touched without a split; a tensor keeps the signature one and the same
    ends = {"bias_ptr": b2, "residual_ptr": residual, "out_ptr": out, "workspace_ptr": workspace if needed else out}
    by_descriptors = config.tma and gain is not None
    sums = {"scale_ptr": scale, "sumsq_ptr": sumsq, "scaled_sumsq_ptr": scaled_sumsq}
    # with slices of K the second launch takes them
    whole = sums if needed is None else dict.fromkeys(sums)
    args = (
        ends
        | whole
        | {
            "h_ptr": TensorDescriptor.from_tensor(h, [config.block_m, config.block_k]) if config.tma else h,
            "gain_ptr": TensorDescriptor.from_tensor(gain, [1, config.block_k]) if by_descriptors else gain,
            "w_ptr": TensorDescriptor.from_tensor(w2, [config.block_k, config.block_n]) if config.tma else w2,
            "tokens": tokens,
            "tokens_per_image": tokens_per_image,
            "tiles_per_image": tiles_per_image,
            "tiles_m": tiles_m,
            "HIDDEN": hidden,
            "DIM": dim,
            "SPLIT_K": config.split_k,
            "EVEN_M": tokens_per_image % config.block_m == 0,
            "TMA": config.tma,
            "TRANSPOSED": config.transposed,
            "GAIN": "none" if gain is None else "multiply" if multiply else "add",
            "SUMSQ": whole["sumsq_ptr"] is not None,
            "SCALED": whole["scaled_sumsq_ptr"] is not None,
            "PRECISION": dot_precision(h.dtype),
            **config.tile(),
        }
    )
    launches = [Launch(project_kernel, (programs, config.split_k), args, config.options())]
    if needed is not None and sumsq is None:
        count = tokens * dim
        reduce = ends | {"count": count, "DIM": dim, "SPLIT_K": config.split_k, "BLOCK": REDUCE_BLOCK}
        grid = (cdiv(count, REDUCE_BLOCK),)
        launches.append(Launch(project_reduce_kernel, grid, reduce, compiler_options(4, 1)))
    elif needed is not None:
        reduce = ends | sums | {"DIM": dim, "PADDED": next_power_of_2(dim), "SPLIT_K": config.split_k}
        reduce["SCALED"] = scaled_sumsq is not None
        launches.append(Launch(project_reduce_rows_kernel, (tokens,), reduce, compiler_options(4, 1)))
    run_launches(launches, h.device)


def _check_sums(
    h: torch.Tensor,
    dim: int,
    config: GemmConfig,
    sumsq: torch.Tensor | None,
    scale: torch.Tensor | None,
    scaled_sumsq: torch.Tensor | None,
) -> None:
    if (scale is None) != (scaled_sumsq is None) or (scale is not None and sumsq is None):
        raise ValueError("pass scale and scaled_sumsq both, and beside sumsq, or neither")
    shape = project_sumsq_shape(h.shape[0], dim, config)
    for name, t, expected in (("sumsq", sumsq, shape), ("scale", scale, (dim,)), ("scaled_sumsq", scaled_sumsq, shape)):
        if t is not None:
            check_tensor(name, t, shape=expected, dtypes=torch.float32, like=h)


def work(
    *,
    h: TensorLike,
    gain: TensorLike | None = None,
    w2: TensorLike,
    b2: TensorLike,
    residual: TensorLike,
    out: TensorLike,
    sumsq: TensorLike | None = None,
    scale: TensorLike | None = None,
    scaled_sumsq: TensorLike | None = None,
    workspace: TensorLike | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `project` called with these arguments; the workspace is written and read."""
    ends = nbytes_of(b2, residual, out, sumsq, scale, scaled_sumsq)
    nbytes = nbytes_of(h, gain, w2) + ends + 2 * nbytes_of(workspace)
    return Work(2 * h.shape[0] * prod(w2.shape), nbytes)


register(FAMILY)
