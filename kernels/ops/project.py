"""Project: GRN's scaling, the 1x1 convolution F -> D, bias and residual, in one GEMM.

    out = (h * (1 + gain[image])) @ w2 + b2 + residual        [T, D]

The gain scales K, so it must touch the A operand: each tile of h becomes fma(h, gain, h) in registers on
its way to the tensor cores, one HFMA2 for two elements. Layer scale or gate, and GRN's beta, are folded
into w2 and b2 at load. A tile never mixes images, since each has its own gain row.

Few tokens (one image): `split_k` > 1 gives each slice of K its own programs, which leave float32 sums in
a workspace; a second launch adds them in order, with bias and residual.

FLOPs 2*T*F*D; bytes (T*F + F*D + 2*T*D + B*F) * itemsize, and 8*split_k*T*D for the workspace.

Measured facts: GPU timings not measured yet. Compiled, Triton 3.6.0, F 3584, D 896, bf16, 2026-11-23, as
registers / stack bytes / CTAs per SM (`python -m bench.aot` for the rows that ship):
- sm_90: 128x128x64, 8 warps: 128/0/2 with 3 and with 4 stages (115 KB), because A goes through registers and takes
  no stage of its own; wgmma reads it there. By tensor descriptors the same. 128x256x64 spills 152 to 176 bytes.
- sm_100: 128x128x64 at 4 warps spills 48 bytes by pointers and, with Triton 3.9, 32 by descriptors; 128x128x32 by
  pointers is 255/0/2 with both, and ships.
- sm_120: 128x128x32, 4 warps, 4 stages 219/0/2 by pointers; by descriptors 234/8/2; 128x128x64 with 8 warps held
  to 128 registers spills 32 bytes and still has one CTA.
- 896 columns are seven tiles of 128; a tile of 256 would waste an eighth of the products.
- programmatic dependent launch, as in `expand`: 128/0/2 on sm_90, 186/0/2 on sm_100, 219/0/2 on sm_120; not shipped.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..jit import add_scaled, grouped_tile, image_tile
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

REDUCE_BLOCK = 1024


@triton.jit
def project_kernel(
    h_ptr,
    gain_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    workspace_ptr,
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
    PRECISION: tl.constexpr,
):
    # a slice is a whole number of K blocks
    SLICE: tl.constexpr = (HIDDEN + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    EVEN_N: tl.constexpr = DIM % BLOCK_N == 0
    EVEN_K: tl.constexpr = HIDDEN % SLICE == 0
    tiles_n = tl.cdiv(DIM, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    image, first, left = image_tile(tile_m, tokens_per_image, tiles_per_image, BLOCK_M)
    k_first = tl.program_id(1) * SLICE
    rm = tl.arange(0, BLOCK_M)
    # rows past the image read its last row again: no mask in the loop, and the epilogue drops them
    rows = rm if EVEN_M else tl.minimum(rm, left - 1)
    rn = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = k_first + tl.arange(0, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    h_ptrs = h_ptr if TMA else h_ptr + first * HIDDEN + rows[:, None] * HIDDEN + rk[None, :]
    w_ptrs = w_ptr if TMA else w_ptr + rk[:, None] * DIM + rn[None, :]
    gain_ptrs = gain_ptr + image.to(tl.int64) * HIDDEN + rk
    for k in range(0, SLICE, BLOCK_K):
        if TMA:
            h = h_ptr.load([first.to(tl.int32), k_first + k])
            w = w_ptr.load([k_first + k, tile_n * BLOCK_N])
        else:
            h = tl.load(h_ptrs) if EVEN_K else tl.load(h_ptrs, mask=rk[None, :] < HIDDEN - k, other=0.0)
            if EVEN_K and EVEN_N:
                w = tl.load(w_ptrs)
            else:
                w = tl.load(w_ptrs, mask=(rk[:, None] < HIDDEN - k) & (rn[None, :] < DIM), other=0.0)
            h_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * DIM
        gain = tl.load(gain_ptrs) if EVEN_K else tl.load(gain_ptrs, mask=rk < HIDDEN - k, other=0.0)
        gain_ptrs += BLOCK_K
        h = add_scaled(h, gain[None, :])
        acc = tl.dot(h, w, acc, input_precision=PRECISION)

    inside = (rm[:, None] < left) & (rn[None, :] < DIM)
    at = first * DIM + rm[:, None] * DIM + rn[None, :]
    if SPLIT_K > 1:
        slice_at = tl.program_id(1).to(tl.int64) * tokens * DIM
        tl.store(workspace_ptr + slice_at + at, acc, mask=inside)
    else:
        acc += tl.load(bias_ptr + rn, mask=rn < DIM, other=0.0).to(tl.float32)[None, :]
        if EVEN_M and EVEN_N:
            acc += tl.load(residual_ptr + at).to(tl.float32)
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty))
        else:
            acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


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
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT_K):
        acc += tl.load(workspace_ptr + part * count.to(tl.int64) + at, mask=inside, other=0.0)
    acc += tl.load(bias_ptr + at % DIM, mask=inside, other=0.0).to(tl.float32)
    acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def project_workspace_shape(tokens: int, dim: int, config: GemmConfig) -> tuple[int, int, int] | None:
    """Shape [split_k, T, D] of the float32 workspace that `project` needs with this config; None for none."""
    return (config.split_k, tokens, dim) if config.split_k > 1 else None


def project(
    h: torch.Tensor,
    gain: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    *,
    tokens_per_image: int,
    workspace: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> None:
    """out = (h * (1 + gain)) @ w2 + b2 + residual.

    Args:
        h: [T, F] bf16, fp16 or fp32 hidden activations, T = images * tokens_per_image.
        gain: [images, F] from `grn`, dtype of h.
        w2: [F, D], dtype of h.
        b2: [D], fp32 or the dtype of h.
        residual: [T, D], dtype of h.
        out: [T, D] output, dtype of h; may be `residual` itself, which is then updated in place.
        workspace: fp32 of shape `project_workspace_shape(...)`, where the config splits K.
        config: launch parameters; looked up by the shape of one image when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take.
    """
    check_tensor("h", h, shape=(None, None), dtypes=FLOATS)
    tokens, hidden = h.shape
    batch = check_rows("h", tokens, tokens_per_image)
    check_tensor("gain", gain, shape=(batch, hidden), dtypes=h.dtype, like=h)
    check_tensor("w2", w2, shape=(hidden, None), dtypes=h.dtype, like=h)
    dim = w2.shape[1]
    check_tensor("b2", b2, shape=(dim,), dtypes=(torch.float32, h.dtype), like=h)
    check_tensor("residual", residual, shape=(tokens, dim), dtypes=h.dtype, like=h)
    check_tensor("out", out, shape=(tokens, dim), dtypes=h.dtype, like=h)
    if config is None:
        shape = {"tokens_per_image": tokens_per_image, "hidden": hidden, "dim": dim}
        config = lookup("project", compute_capability(h), shape, h.dtype)
    needed = project_workspace_shape(tokens, dim, config)
    if needed is not None:
        if workspace is None:
            raise ValueError(f"workspace is missing: split_k {config.split_k} needs float32 of shape {list(needed)}")
        check_tensor("workspace", workspace, shape=needed, dtypes=torch.float32, like=h)
    check_tma(config.tma, h=h, w2=w2)
    run_launches(_launches(h, gain, w2, b2, residual, out, tokens_per_image, workspace, config), h.device)


def _launches(
    h: torch.Tensor,
    gain: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    tokens_per_image: int,
    workspace: torch.Tensor | None,
    config: GemmConfig,
) -> list[Launch]:
    (tokens, hidden), dim = h.shape, w2.shape[1]
    tiles_per_image = cdiv(tokens_per_image, config.block_m)
    tiles_m = tokens // tokens_per_image * tiles_per_image
    programs = tiles_m * cdiv(dim, config.block_n)
    check_int32("number of tiles", programs)
    a, b = h, w2
    if config.tma:
        a = TensorDescriptor.from_tensor(h, [config.block_m, config.block_k])
        b = TensorDescriptor.from_tensor(w2, [config.block_k, config.block_n])
    args = {
        "h_ptr": a,
        "gain_ptr": gain,
        "w_ptr": b,
        "bias_ptr": b2,
        "residual_ptr": residual,
        "out_ptr": out,
        # never touched without a split; a tensor keeps the signature one and the same
        "workspace_ptr": out if config.split_k == 1 else workspace,
        "tokens": tokens,
        "tokens_per_image": tokens_per_image,
        "tiles_per_image": tiles_per_image,
        "tiles_m": tiles_m,
        "HIDDEN": hidden,
        "DIM": dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "SPLIT_K": config.split_k,
        "EVEN_M": tokens_per_image % config.block_m == 0,
        "TMA": config.tma,
        "PRECISION": dot_precision(h.dtype),
    }
    options = compiler_options(config.num_warps, config.num_stages, config.maxnreg)
    main = Launch(project_kernel, (programs, config.split_k), args, options)
    if config.split_k == 1:
        return [main]
    count = tokens * dim
    reduce_args = {
        "workspace_ptr": workspace,
        "bias_ptr": b2,
        "residual_ptr": residual,
        "out_ptr": out,
        "count": count,
        "DIM": dim,
        "SPLIT_K": config.split_k,
        "BLOCK": REDUCE_BLOCK,
    }
    check_int32("elements of a split projection", count)
    grid = (cdiv(count, REDUCE_BLOCK),)
    return [main, Launch(project_reduce_kernel, grid, reduce_args, compiler_options(4, 1))]


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    tokens_per_image, hidden, dim = shape["tokens_per_image"], shape["hidden"], shape["dim"]
    config = gemm_default(cc, tokens_per_image, dim, hidden, dtype)
    if use == "throughput":
        return config
    # one image at a time: slices of K until there is a program for each of some hundred SMs
    programs = cdiv(tokens_per_image, config.block_m) * cdiv(dim, config.block_n)
    most = max(1, hidden // (4 * config.block_k))
    return replace(config, split_k=min(8, most, max(1, 128 // programs)))


def _example(shape: Shape, dtype: torch.dtype, config: GemmConfig) -> list[Launch]:
    images, tokens_per_image, hidden, dim = 2, shape["tokens_per_image"], shape["hidden"], shape["dim"]
    tokens = images * tokens_per_image

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    needed = project_workspace_shape(tokens, dim, config)
    workspace = None if needed is None else empty(*needed, of=torch.float32)
    h, gain, w2 = empty(tokens, hidden), empty(images, hidden), empty(hidden, dim)
    residual, out, b2 = empty(tokens, dim), empty(tokens, dim), empty(dim, of=torch.float32)
    return _launches(h, gain, w2, b2, residual, out, tokens_per_image, workspace, config)


register(Family("project", GemmConfig, ("hidden", "dim"), ("tokens_per_image",), _default, _example, suits_image))
