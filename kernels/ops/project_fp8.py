"""Project in e4m3: `project` with 8-bit operands.

    out = w2_scale * (h8 @ e4m3(w2 * (1 + gain[image]))^T) + b2 + residual        [T, D]

w2 comes in float16, with the scales of the hidden channels folded in and each column brought into e4m3's range. GRN's
gain meets it in registers, fma(w2, gain, w2), one HFMA2 for two elements, and the sum is rounded to e4m3 on its way to
the tensor cores, to the nearest even and cut off at 448. Products add in float32 (see `dot_e4m3`).

w2 is [D, F]: 8-bit products take both operands with K innermost. Transposed, out^T = e4m3(w2 * (1 + gain)) @ h^T, the
rounded weights go from registers into the product and h is the B operand as it lies. A tile never mixes images, since
each has its own gain row.

Few tokens (one image): `split_k` > 1 gives each slice of K its own programs, which leave float32 sums, scaled, in a
workspace; a second launch, that of `project`, adds them in order, with bias and residual.

FLOPs 2*T*F*D; bytes T*F + 2*F*D + 2*B*F + 2*T*D*itemsize + 8*D, and 8*split_k*T*D for the workspace, there and back.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..config_rows import Family, Shape, register
from ..gemm import FEW_PROGRAMS_E4M3, LATENCY_PROGRAMS, GemmConfig, narrowed, pick_block_m, product_bits, suits_image
from ..jit import add_scaled_e4m3, dot_e4m3, grouped_tile, image_tile, load_tile, release_next, wait_for_previous
from ..launch import (
    ALIGNMENT,
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
    check_tma,
    compiler_options,
    compute_capability,
    e4m3_products,
    nbytes_of,
    next_power_of_2,
    run_launches,
)
from ..tuning import lookup
from ._project_configs import WIDE_ROWS
from .project import REDUCE_BLOCK, project_reduce_kernel, project_workspace_shape


@triton.jit(do_not_specialize=["tiles_m"])
def project_fp8_kernel(
    h_ptr,
    gain_ptr,
    w_ptr,
    scale_ptr,
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
    TRANSPOSED: tl.constexpr,
    PRODUCTS: tl.constexpr,
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
    w_ptrs = w_ptr if TMA else w_ptr + offs_n[:, None] * HIDDEN + offs_k[None, :]
    gain_ptrs = gain_ptr if TMA else gain_ptr + image.to(tl.int64) * HIDDEN + offs_k
    for k in range(0, SLICE, BLOCK_K):
        if TMA:
            h = h_ptr.load([first.to(tl.int32), k_first + k])
            w = w_ptr.load([pid_n * BLOCK_N, k_first + k])
            gain = gain_ptr.load([image, k_first + k])  # [1, BLOCK_K]
        else:
            h = load_tile(h_ptrs, offs_k[None, :] < HIDDEN - k, EVEN_K)
            w = load_tile(w_ptrs, (offs_k[None, :] < HIDDEN - k) & (offs_n[:, None] < DIM), EVEN_K and EVEN_N)
            gain = load_tile(gain_ptrs, offs_k < HIDDEN - k, EVEN_K)[None, :]
            h_ptrs += BLOCK_K
            w_ptrs += BLOCK_K
            gain_ptrs += BLOCK_K
        w8 = add_scaled_e4m3(w, gain)  # [BLOCK_N, BLOCK_K]
        acc = dot_e4m3(w8, tl.trans(h), acc, PRODUCTS) if TRANSPOSED else dot_e4m3(h, tl.trans(w8), acc, PRODUCTS)
    release_next(PDL)
    if TRANSPOSED:
        acc = tl.trans(acc)  # [BLOCK_M, BLOCK_N]
    acc *= tl.load(scale_ptr + offs_n, mask=offs_n < DIM, other=0.0)[None, :]

    inside = (offs_m[:, None] < left) & (offs_n[None, :] < DIM)
    at = first * DIM + offs_m[:, None] * DIM + offs_n[None, :]
    if SPLIT_K > 1:
        slice_at = pid_k.to(tl.int64) * tokens * DIM
        tl.store(workspace_ptr + slice_at + at, acc, mask=inside)
    else:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < DIM, other=0.0)[None, :]
        # rows past the image read its last row again here too
        residual_at = first * DIM + rows[:, None] * DIM + offs_n[None, :]
        acc += load_tile(residual_ptr + residual_at, offs_n[None, :] < DIM, EVEN_N).to(tl.float32)
        if EVEN_M and EVEN_N:
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty))
        else:
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def project_fp8(
    h: torch.Tensor,
    gain: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    b2: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    *,
    tokens_per_image: int,
    workspace: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> None:
    """out = w2_scale * (h @ e4m3(w2 * (1 + gain))^T) + b2 + residual.

    Args:
        h: [T, F] e4m3 hidden activations, T = images * tokens_per_image.
        gain: [images, F] fp16 from `grn`.
        w2: [D, F] fp16, with the scales of h folded in.
        w2_scale: [D] fp32.
        b2: [D] fp32.
        residual: [T, D] bf16, fp16 or fp32.
        out: [T, D] output, dtype of residual; may be `residual` itself, which is then updated in place.
        workspace: fp32 of shape `project_workspace_shape(...)`, where the config splits K.
        config: launch parameters; looked up by the shape of one image when None.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take, or a GPU without e4m3.
    """
    check_tensor("h", h, shape=(None, None), dtypes=E4M3)
    tokens, hidden = h.shape
    batch = check_rows("h", tokens, tokens_per_image)
    check_tensor("gain", gain, shape=(batch, hidden), dtypes=torch.float16, like=h)
    check_tensor("w2", w2, shape=(None, hidden), dtypes=torch.float16, like=h)
    dim = w2.shape[0]
    for name, t in (("w2_scale", w2_scale), ("b2", b2)):
        check_tensor(name, t, shape=(dim,), dtypes=torch.float32, like=h)
    check_tensor("residual", residual, shape=(tokens, dim), dtypes=FLOATS, like=h)
    check_tensor("out", out, shape=(tokens, dim), dtypes=residual.dtype, like=h)
    cc = compute_capability(h)
    check_e4m3(cc)
    if config is None:
        config = lookup("project_fp8", cc, {"tokens_per_image": tokens_per_image, "hidden": hidden, "dim": dim}, E4M3)
    needed = project_workspace_shape(tokens, dim, config)
    if needed is not None:
        if workspace is None:
            raise ValueError(f"workspace is missing: split_k {config.split_k} needs float32 of shape {list(needed)}")
        check_tensor("workspace", workspace, shape=needed, dtypes=torch.float32, like=h)
        check_int32("elements of a split projection", tokens * dim)
    check_tma(config.tma, h=h, w2=w2, gain=gain)
    tiles_per_image = cdiv(tokens_per_image, config.block_m)
    tiles_m = batch * tiles_per_image
    programs = tiles_m * cdiv(dim, config.block_n)
    check_int32("number of tiles", programs)
    # the workspace is never touched without a split; a tensor keeps the signature one and the same
    ends = {"bias_ptr": b2, "residual_ptr": residual, "out_ptr": out, "workspace_ptr": workspace if needed else out}
    args = ends | {
        "h_ptr": TensorDescriptor.from_tensor(h, [config.block_m, config.block_k]) if config.tma else h,
        "gain_ptr": TensorDescriptor.from_tensor(gain, [1, config.block_k]) if config.tma else gain,
        "w_ptr": TensorDescriptor.from_tensor(w2, [config.block_n, config.block_k]) if config.tma else w2,
        "scale_ptr": w2_scale,
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
        "PRODUCTS": e4m3_products(cc),
        **config.tile(),
    }
    launches = [Launch(project_fp8_kernel, (programs, config.split_k), args, config.options())]
    if needed is not None:
        count = tokens * dim
        reduce = ends | {"count": count, "DIM": dim, "SPLIT_K": config.split_k, "BLOCK": REDUCE_BLOCK}
        launches.append(Launch(project_reduce_kernel, (cdiv(count, REDUCE_BLOCK),), reduce, compiler_options(4, 1)))
    run_launches(launches, h.device)


def work(
    *,
    h: TensorLike,
    gain: TensorLike,
    w2: TensorLike,
    w2_scale: TensorLike,
    b2: TensorLike,
    residual: TensorLike,
    out: TensorLike,
    workspace: TensorLike | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `project_fp8` called with these arguments; the workspace is written and read."""
    nbytes = nbytes_of(h, gain, w2, w2_scale, b2, residual, out) + 2 * nbytes_of(workspace)
    return Work(2 * h.shape[0] * prod(w2.shape), nbytes)


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    """What compiles without spills; 256 rows for images that fill them, which halves the weights to be rounded."""
    tokens_per_image, hidden, dim = shape["tokens_per_image"], shape["hidden"], shape["dim"]
    # wgmma and tcgen05 take 64 rows of the weights at least, and tokens are columns there
    block_m, block_n = pick_block_m(tokens_per_image), min(128, max(16, next_power_of_2(dim)))
    block_k = 64 if hidden > 32 else 32
    # one image: half as many programs are too few but for the fewer SMs of sm_90
    wide = tokens_per_image % WIDE_ROWS == 0 and (use == "throughput" or (cc == 90 and tokens_per_image >= 4096))
    config = GemmConfig(block_m, block_n, block_k, group_m=8, num_warps=4, num_stages=3)
    big = block_m * block_n >= 128 * 128
    if cc in (90, 100):
        # rows of 16 bytes are what tensor descriptors need
        tma = hidden % ALIGNMENT == 0
        config = replace(config, tma=tma, transposed=True, num_warps=8 if big else 4)
        if cc == 100:
            config = replace(config, num_stages=4)
        elif hidden > 64:
            config = replace(config, block_k=128, maxnreg=128 if big else None)
        if cc == 90 and wide and block_n == 128:
            config = replace(config, block_m=WIDE_ROWS, maxnreg=None)
    elif cc == 120 and wide and block_n == 128:
        config = replace(config, block_m=WIDE_ROWS, num_warps=8)
    if use == "throughput":
        return config
    programs = cdiv(tokens_per_image, config.block_m) * cdiv(dim, config.block_n)
    if cc in (89, 120) and programs < LATENCY_PROGRAMS:
        config = replace(config, block_n=min(block_n, 64))
        programs = cdiv(tokens_per_image, config.block_m) * cdiv(dim, config.block_n)
    most = max(1, hidden // (4 * config.block_k))
    return replace(config, split_k=min(8, most, max(1, LATENCY_PROGRAMS // programs)))


def _suits(config: GemmConfig, shape: Shape) -> bool:
    """Whether a row pads images of this shape little enough; tiles of 256 rows are for images that fill them."""
    masked = shape["tokens_per_image"] % config.block_m != 0
    return suits_image(config, shape) and not (config.block_m >= WIDE_ROWS and masked)


def _few(config: GemmConfig, cc: int, shape: Shape, dtype: torch.dtype, images: int) -> GemmConfig:
    def programs(rows: int, columns: int) -> int:
        return images * cdiv(shape["tokens_per_image"], rows) * cdiv(shape["dim"], columns)

    def keeps(tile: GemmConfig) -> bool:
        return product_bits(tile, cc, dtype) == product_bits(config, cc, dtype)

    # weights of two bytes meet activations of one
    return narrowed(config, cc, shape["hidden"], 2 * dtype.itemsize, programs, keeps, FEW_PROGRAMS_E4M3)


register(
    Family(
        "project_fp8",
        GemmConfig,
        exact=("hidden", "dim"),
        near=("tokens_per_image",),
        default=_default,
        accepts=_suits,
        bits=product_bits,
        few=_few,
    )
)
