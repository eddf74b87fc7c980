"""Expand: RMSNorm, the 1x1 convolution D -> F, GELU, and the sums of squares that GRN needs, in one GEMM.

    rstd[t] = rsqrt(sum_c y[t, c]^2 / D + eps)
    h       = gelu(rstd * (y @ w1) + b1)                      [T, F]
    partials[b, i, f] = sum of h[t, f]^2 over the i-th 64 tokens of image b

DiCo blocks take it without GELU for their first 1x1, and for their MLP behind two norms, `s` being what w1 has folded
in between them: rstd * rsqrt(rstd^2 * sum_c (s[c] y[t, c])^2 / D + eps). Neither asks for partials.

RMSNorm has no weight, so it is a row scale and commutes with the product: it moves to the epilogue and costs no pass
over memory. The squares are summed in float32 before h is rounded. A tile never mixes images. D and F are constexprs,
and GELU is a fit, so that a tile of 128x128 leaves room for two CTAs on an SM: one's epilogue hides under the other's
products. What was tried besides is in kernels/NOTES.md.

sm_90 has a second form, a persistent kernel of specialised warps (`_expand_hopper.py`), for bf16 and fp16, images of
whole tiles, and the fitted GELU. No GPU has compared both yet: CAPACITOR_EXPAND=gluon, or `gluon` in a config, asks for
it.

FLOPs 2*T*D*F; bytes (T*D + D*F + T*F) * itemsize + F * itemsize(b1) + 4*T*n + 4*B*tiles*F, sumsq being [T, n].
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import replace
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..config_rows import Family, Shape, register
from ..gemm import GemmConfig, gemm_default, narrowed, product_bits, suits_image
from ..gpu_limits import base_cc
from ..jit import gelu, group_sums, grouped_tile, image_tile, load_tile, release_next, wait_for_previous
from ..launch import (
    FLOATS,
    INTERPRETED,
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
    dtype_name,
    nbytes_of,
    run_launches,
)
from ..tuning import lookup

GELU_KINDS = ("fit", "erf", "none")
GROUP_ROWS = 64
# the form of specialised warps: rows of one of the two consumers, and what each tile takes
HOPPER_ROWS = 64
HOPPER = GemmConfig(2 * HOPPER_ROWS, 256, 64, group_m=8, num_warps=4, num_stages=4, tma=True, gluon=True)


@triton.jit(do_not_specialize=["tiles_m"])
def expand_kernel(
    y_ptr,
    w_ptr,
    bias_ptr,
    sumsq_ptr,
    scaled_sumsq_ptr,
    h_ptr,
    partials_ptr,
    tokens_per_image,
    tiles_per_image,
    tiles_m,
    eps,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    SUMSQ_TILES: tl.constexpr,
    SCALED_TILES: tl.constexpr,
    PARTIALS: tl.constexpr,
    GELU: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    ROWS_IN_WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_M: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
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
    w_ptrs = w_ptr if TMA else w_ptr + offs_k[:, None] * HIDDEN + offs_n[None, :]
    for k in range(0, DIM, BLOCK_K):
        if TMA:
            y = y_ptr.load([first.to(tl.int32), k])
            w = w_ptr.load([k, pid_n * BLOCK_N])
        else:
            y = load_tile(y_ptrs, offs_k[None, :] < DIM - k, EVEN_K)
            w = load_tile(w_ptrs, (offs_k[:, None] < DIM - k) & (offs_n[None, :] < HIDDEN), EVEN_K and EVEN_N)
            y_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * HIDDEN
        acc = tl.dot(y, w, acc, input_precision=PRECISION)

    release_next(PDL)
    sumsq = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for tile in tl.static_range(SUMSQ_TILES):
        sumsq += tl.load(sumsq_ptr + first * SUMSQ_TILES + rows * SUMSQ_TILES + tile)
    rstd = tl.rsqrt(sumsq / DIM + eps)
    if SCALED_TILES > 0:
        scaled = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for tile in tl.static_range(SCALED_TILES):
            scaled += tl.load(scaled_sumsq_ptr + first * SCALED_TILES + rows * SCALED_TILES + tile)
        rstd *= tl.rsqrt(rstd * rstd * (scaled / DIM) + eps)
    in_n = offs_n < HIDDEN
    bias = tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
    h = gelu(acc * rstd[:, None] + bias[None, :], GELU)  # [BLOCK_M, BLOCK_N]

    h_ptrs = h_ptr + first * HIDDEN + offs_m[:, None] * HIDDEN + offs_n[None, :]
    stored = h.to(h_ptr.dtype.element_ty)
    if EVEN_M and EVEN_N:
        tl.store(h_ptrs, stored)
    else:
        tl.store(h_ptrs, stored, mask=(offs_m[:, None] < left) & in_n[None, :])
    if PARTIALS:
        squares = h * h
        if not EVEN_M:
            squares = tl.where(offs_m[:, None] < left, squares, 0.0)
        groups_per_image = tl.cdiv(tokens_per_image, GROUP_ROWS)
        group = pid_m % tiles_per_image * (BLOCK_M // GROUP_ROWS) + tl.arange(0, BLOCK_M // GROUP_ROWS)
        at = (image.to(tl.int64) * groups_per_image + group)[:, None] * HIDDEN + offs_n[None, :]
        inside = in_n[None, :] if EVEN_M else (group < groups_per_image)[:, None] & in_n[None, :]
        tl.store(partials_ptr + at, group_sums(squares, GROUP_ROWS, ROWS_IN_WARPS), mask=inside)


def expand_partials_shape(batch: int, tokens_per_image: int, hidden: int, config: GemmConfig) -> tuple[int, int, int]:
    """Shape [B, groups of tokens, F] of the float32 partials that `expand` writes with this config."""
    return batch, cdiv(tokens_per_image, group_rows(config)), hidden


def group_rows(config: GemmConfig) -> int:
    """Tokens to a partial sum: 64 whatever the tile, so that the order of GRN's sums does not hang on it, or all of a
    smaller tile's."""
    return min(GROUP_ROWS, config.block_m)


def expand(
    y: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    sumsq: torch.Tensor,
    h: torch.Tensor,
    partials: torch.Tensor | None = None,
    *,
    tokens_per_image: int,
    scaled_sumsq: torch.Tensor | None = None,
    eps: float = 1e-6,
    gelu: str = "fit",
    config: GemmConfig | None = None,
) -> None:
    """h = gelu(rstd * (y @ w1) + b1), and the column sums of h^2 of every row tile.

    Args:
        y: [T, D] bf16, fp16 or fp32 tokens, T = images * tokens_per_image.
        w1: [D, F], dtype of y.
        b1: [F], fp32 or the dtype of y.
        sumsq: [T, n] fp32 partial sums over channels of y^2; their sum over n divided by D is the mean square.
        h: [T, F] output, dtype of y.
        partials: output of shape `expand_partials_shape(...)`, fp32; not computed when None.
        scaled_sumsq: [T, m] fp32 partial sums of squares of y times the scale that w1 has folded in, for a second norm
            behind the first and that scale; `sumsq` itself where there is no scale. One norm when None.
        eps: added to the mean squares.
        gelu: "fit" (within 2.54e-5 of exact), "erf", or "none" for no activation.
        config: launch parameters; looked up by the shape of one image when None. CAPACITOR_EXPAND=gluon makes that the
            form of specialised warps wherever it can serve, CAPACITOR_EXPAND=plain never.

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
    key = {"tokens_per_image": tokens_per_image, "dim": dim, "hidden": hidden}
    if config is None:
        config = lookup("expand", compute_capability(y), key, y.dtype)
    if config.gluon and (partials is None or scaled_sumsq is not None):
        # what DiCo blocks take is the plain kernel's alone
        config = _default(compute_capability(y), key, y.dtype, "throughput")
    check_tensor("b1", b1, shape=(hidden,), dtypes=(torch.float32, y.dtype), like=y)
    check_tensor("sumsq", sumsq, shape=(tokens, None), dtypes=torch.float32, like=y)
    check_tensor("h", h, shape=(tokens, hidden), dtypes=y.dtype, like=y)
    if scaled_sumsq is not None:
        check_tensor("scaled_sumsq", scaled_sumsq, shape=(tokens, None), dtypes=torch.float32, like=y)
    partials_shape = expand_partials_shape(batch, tokens_per_image, hidden, config)
    if partials is not None:
        check_tensor("partials", partials, shape=partials_shape, dtypes=torch.float32, like=y)
    check_tma(config.tma, y=y, w1=w1)
    if config.gluon:
        _check_hopper(config, compute_capability(y), tokens_per_image, dim, hidden, y.dtype, gelu)
        launch = _hopper().launch(y, w1, b1, sumsq, h, partials, eps, config, config.options())
        return run_launches([launch], y.device)
    tiles_per_image = cdiv(tokens_per_image, config.block_m)
    tiles_m = batch * tiles_per_image
    programs = tiles_m * cdiv(hidden, config.block_n)
    check_int32("number of tiles", programs)
    args = {
        "y_ptr": TensorDescriptor.from_tensor(y, [config.block_m, config.block_k]) if config.tma else y,
        "w_ptr": TensorDescriptor.from_tensor(w1, [config.block_k, config.block_n]) if config.tma else w1,
        "bias_ptr": b1,
        "sumsq_ptr": sumsq,
        "scaled_sumsq_ptr": scaled_sumsq,
        "h_ptr": h,
        "partials_ptr": partials,
        "tokens_per_image": tokens_per_image,
        "tiles_per_image": tiles_per_image,
        "tiles_m": tiles_m,
        "eps": eps,
        "DIM": dim,
        "HIDDEN": hidden,
        "SUMSQ_TILES": sumsq.shape[1],
        "SCALED_TILES": 0 if scaled_sumsq is None else scaled_sumsq.shape[1],
        "PARTIALS": partials is not None,
        "GELU": gelu,
        "GROUP_ROWS": group_rows(config),
        # tcgen05 leaves a row in each thread
        "ROWS_IN_WARPS": base_cc(compute_capability(y)) != 100,
        "EVEN_M": tokens_per_image % config.block_m == 0,
        "TMA": config.tma,
        "PRECISION": dot_precision(y.dtype),
        **config.tile(),
    }
    # rows cap registers where the fit stays under the cap; erf would spill, and so would two norms in fp16 where masked
    capped = gelu != "erf" and (scaled_sumsq is None or args["EVEN_M"])
    maxnreg = config.maxnreg if capped else None
    options = compiler_options(config.num_warps, config.num_stages, maxnreg)
    run_launches([Launch(expand_kernel, (programs,), args, options)], y.device)


def work(
    *,
    y: TensorLike,
    w1: TensorLike,
    b1: TensorLike,
    sumsq: TensorLike,
    h: TensorLike,
    partials: TensorLike | None = None,
    scaled_sumsq: TensorLike | None = None,
    **options: Any,
) -> Work:
    """FLOPs and bytes of `expand` called with these arguments."""
    return Work(2 * y.shape[0] * prod(w1.shape), nbytes_of(y, w1, b1, sumsq, scaled_sumsq, h, partials))


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    config = gemm_default(cc, shape["tokens_per_image"], shape["hidden"], shape["dim"], dtype)
    # for two CTAs on an SM
    if cc == 90 and config.num_warps == 8:
        return replace(config, maxnreg=128)
    if cc == 100 and config.num_warps == 8:
        return replace(config, block_n=64, num_warps=4, num_stages=4)
    return config


@cache
def _hopper() -> Any:
    """The module of the kernel in Gluon; None where this Triton has no such interface."""
    try:
        return import_module("._expand_hopper", __package__)
    except (ImportError, AttributeError):
        return None


def _hopper_lacks(cc: int, tokens_per_image: int, dim: int, hidden: int, dtype: torch.dtype) -> str:
    """Why the form of specialised warps cannot serve; empty where it can."""
    if cc != 90:
        return f"it is for sm_90, not for sm_{cc}"
    if INTERPRETED or _hopper() is None:
        return "Triton's interpreter does not run Gluon" if INTERPRETED else "this Triton's Gluon has another interface"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it is for bf16 and fp16, not for {dtype_name(dtype)}"
    sizes = ((tokens_per_image, HOPPER.block_m), (dim, HOPPER.block_k), (hidden, HOPPER.block_n))
    uneven = [f"{size} is no multiple of {block}" for size, block in sizes if size % block]
    return ", ".join(uneven)


def _check_hopper(
    config: GemmConfig, cc: int, tokens_per_image: int, dim: int, hidden: int, dtype: torch.dtype, gelu: str
) -> None:
    lacks = _hopper_lacks(cc, tokens_per_image, dim, hidden, dtype)
    if gelu != "fit":
        lacks = lacks or f"it has the fitted GELU, not {gelu!r}"
    if (config.block_m, config.block_n, config.block_k, config.num_warps) != (128, 256, 64, 4):
        lacks = lacks or "its tile is 128x256x64 with 4 warps to a part"
    if lacks:
        raise ValueError(f"expand cannot take its form in Gluon: {lacks}: use a config with gluon=False")


def _choose(config: GemmConfig, cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    """The form in Gluon where CAPACITOR_EXPAND=gluon asks for it, the plain one where it cannot serve.

    Raises:
        ValueError: another value of CAPACITOR_EXPAND.
    """
    asked = os.environ.get("CAPACITOR_EXPAND", "")
    if asked not in ("", "gluon", "plain"):
        raise ValueError(f"CAPACITOR_EXPAND is {asked!r}, expected gluon or plain, or unset it")
    wanted = {"gluon": use == "throughput", "plain": False}.get(asked, config.gluon)
    sizes = shape["tokens_per_image"], shape["dim"], shape["hidden"]
    if wanted and not _hopper_lacks(cc, *sizes, dtype):
        return config if config.gluon else HOPPER
    return _default(cc, shape, dtype, use) if config.gluon else config


def _suits(config: GemmConfig, shape: Shape) -> bool:
    """Whether a row pads images of this shape little enough; the one by descriptors on sm_100 spills where masked."""
    masked = shape["tokens_per_image"] % config.block_m != 0
    return suits_image(config, shape) and not (config.tma and masked)


def bits(config: GemmConfig, cc: int, dtype: torch.dtype) -> Hashable:
    """The sums of the product, and of squares; with tcgen05 a tile's rows decide which thread has which."""
    rows = config.block_m if base_cc(cc) == 100 else 0
    return product_bits(config, cc, dtype), group_rows(config), rows


def few(
    config: GemmConfig, cc: int, shape: Shape, dtype: torch.dtype, images: int, wanted: int | None = None
) -> GemmConfig:
    """The config with narrower tiles of the same bits where few images would fill few SMs."""

    def programs(rows: int, columns: int) -> int:
        return images * cdiv(shape["tokens_per_image"], rows) * cdiv(shape["hidden"], columns)

    def keeps(tile: GemmConfig) -> bool:
        return bits(tile, cc, dtype) == bits(config, cc, dtype)

    return narrowed(config, cc, shape["dim"], dtype.itemsize, programs, keeps, wanted)


register(
    Family(
        "expand",
        GemmConfig,
        exact=("dim", "hidden"),
        near=("tokens_per_image",),
        default=_default,
        accepts=_suits,
        choose=_choose,
        bits=bits,
        few=few,
        forms=(HOPPER,),
    )
)
