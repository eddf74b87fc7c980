"""Launch parameters of project by GPU and shape: its default, which rows suit a shape, and what few images take.

Where a GPU takes something else than `gemm_default`, that spilled registers or left one CTA on an SM; kernels/NOTES.md
has the figures.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config_rows import Family, Shape
from ..gemm import LATENCY_PROGRAMS, GemmConfig, gemm_default, narrowed, product_bits, suits_image
from ..launch import cdiv

# rows of the transposed form's tile where images are whole tiles of it
WIDE_ROWS = 256
_FORMS = tuple(GemmConfig(rows, 128, 64, 8, 8, 3, tma=True, transposed=True) for rows in (WIDE_ROWS, 128))


def _default(cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    config = gemm_default(cc, shape["tokens_per_image"], shape["dim"], shape["hidden"], dtype)
    if cc == 80:
        config = _for_sm_80(config, shape)
    elif cc == 89:
        config = _for_sm_89(config, shape)
    elif cc == 90 and config.num_warps == 8:
        config = _for_sm_90(config, shape, use)
    elif cc == 100 and config.num_warps == 8:
        config = _for_sm_100(config, shape)
    return config if use == "throughput" else _in_slices(config, cc, shape)


def _for_sm_80(config: GemmConfig, shape: Shape) -> GemmConfig:
    if not _is_masked_square(config, shape):
        return config
    config = replace(config, block_n=min(config.block_n, 64))
    if config.block_m < 128:
        return config
    # by steps of 64 there would be a CTA less on an SM
    return replace(config, block_k=min(config.block_k, 32), num_stages=4)


def _for_sm_89(config: GemmConfig, shape: Shape) -> GemmConfig:
    if config.num_warps != 4 or config.block_n != 128 or not _is_masked(config, shape):
        return config
    # masked tiles of 128 x 128 spill
    return replace(config, block_n=64, block_k=min(64, 2 * config.block_k), num_stages=3)


def _for_sm_90(config: GemmConfig, shape: Shape, use: str) -> GemmConfig:
    # rows of 16 bytes are what tensor descriptors need
    if shape["dim"] % 8 or shape["hidden"] % 8:
        # for two CTAs on an SM
        return replace(config, maxnreg=128)
    tokens = shape["tokens_per_image"]
    wide = tokens % WIDE_ROWS == 0 and (use == "throughput" or tokens >= 4096)
    rows = WIDE_ROWS if wide else config.block_m
    return replace(config, block_m=rows, num_stages=3, tma=True, transposed=True)


def _for_sm_100(config: GemmConfig, shape: Shape) -> GemmConfig:
    config = replace(config, block_k=min(config.block_k, 32), num_warps=4, num_stages=4)
    if not _is_square(shape):
        return config
    # 128 columns and two sums of squares spill
    return replace(config, block_n=64, block_k=2 * config.block_k, num_stages=3)


def _in_slices(config: GemmConfig, cc: int, shape: Shape) -> GemmConfig:
    """K cut into slices for one image, until there is a program for most SMs."""
    spills = config.block_m == 64 if cc in (89, 120) else cc == 80 and _is_masked(config, shape)
    if spills and config.block_n == 128:
        # left to itself, ptxas makes room for CTAs that shared memory has none for, and with Triton 3.7.1 spills
        config = replace(config, block_n=64, num_stages=4, maxnreg=None if cc == 80 else 128)
    programs = cdiv(shape["tokens_per_image"], config.block_m) * cdiv(shape["dim"], config.block_n)
    most = max(1, shape["hidden"] // (4 * config.block_k))
    return replace(config, split_k=min(8, most, max(1, LATENCY_PROGRAMS // programs)))


def _is_masked(config: GemmConfig, shape: Shape) -> bool:
    return shape["tokens_per_image"] % config.block_m != 0


def _is_square(shape: Shape) -> bool:
    """Whether this is D -> D, the product by a factor, which leaves sums of squares."""
    return shape["hidden"] <= shape["dim"]


def _is_masked_square(config: GemmConfig, shape: Shape) -> bool:
    """Whether D -> D masks its last tile: 128 columns spill 24 bytes on sm_80 there."""
    return _is_square(shape) and _is_masked(config, shape)


def _suits(config: GemmConfig, shape: Shape) -> bool:
    """Whether a row pads images of this shape little enough; tiles of 256 rows are for images that fill them."""
    if not config.transposed and _is_masked_square(config, shape):
        return False
    return suits_image(config, shape) and not (config.block_m >= WIDE_ROWS and _is_masked(config, shape))


def _choose(config: GemmConfig, cc: int, shape: Shape, dtype: torch.dtype, use: str) -> GemmConfig:
    """The found config, but with half the columns on sm_100 where the last tile is masked: four warps spill there."""
    large = config.num_warps == 4 and config.block_m * config.block_n >= 128 * 128
    if cc == 100 and large and _is_masked(config, shape):
        return replace(config, block_n=64, block_k=64, num_stages=3)
    return config


def _few(config: GemmConfig, cc: int, shape: Shape, dtype: torch.dtype, images: int) -> GemmConfig:
    def programs(rows: int, columns: int) -> int:
        return images * cdiv(shape["tokens_per_image"], rows) * cdiv(shape["dim"], columns)

    def keeps(tile: GemmConfig) -> bool:
        return product_bits(tile, cc, dtype) == product_bits(config, cc, dtype)

    return narrowed(config, cc, shape["hidden"], dtype.itemsize, programs, keeps)


FAMILY = Family(
    "project",
    GemmConfig,
    exact=("hidden", "dim"),
    near=("tokens_per_image",),
    default=_default,
    accepts=_suits,
    choose=_choose,
    bits=product_bits,
    few=_few,
    forms=_FORMS,
)
