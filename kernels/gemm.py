"""Launch parameters of the GEMM kernels, and what they are by default: from limits and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .gpu_limits import SMEM_RESERVED_PER_CTA, limits
from .launch import cdiv, check_int32, compiler_options, next_power_of_2

# one image at a time: tiles shrink, or K is cut into slices, until there is a program for each of some hundred SMs
LATENCY_PROGRAMS = 128


@dataclass(frozen=True)
class GemmConfig:
    """Tile and launch shape of a GEMM kernel.

    `tma` loads operands through host-made tensor descriptors (sm_90 and later). Of project alone: `split_k` > 1 sums
    that many slices of K in a second launch, in order; `transposed` multiplies the transposes, so that the weights
    instead of the activations go through registers. Of expand alone: `gluon` is the kernel of specialised warps.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    tma: bool = False
    split_k: int = 1
    transposed: bool = False
    gluon: bool = False

    def tile(self) -> dict[str, int]:
        """The kernel arguments that are the tile."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP_M": self.group_m}

    def options(self) -> dict[str, Any]:
        """Compiler options of a launch."""
        return compiler_options(self.num_warps, self.num_stages, self.maxnreg)


def gemm_smem(config: GemmConfig, itemsize: int, buffers: int | None = None) -> int:
    """Bytes of shared memory that the operand stages of a GEMM take."""
    stages = config.num_stages - 1 if buffers is None else buffers
    return stages * (config.block_m + config.block_n) * config.block_k * itemsize


def pick_block_m(tokens_per_image: int, candidates: tuple[int, ...] = (128, 64, 32, 16)) -> int:
    """The largest row tile that pads an image by at most 15 % more than the least padding candidate does."""
    least = min(_padded(tokens_per_image, block) for block in candidates)
    return max(block for block in candidates if _padded(tokens_per_image, block) <= 1.15 * least)


def _padded(tokens_per_image: int, block: int) -> int:
    return cdiv(tokens_per_image, block) * block


def suits_image(config: GemmConfig, shape: Mapping[str, int]) -> bool:
    """Whether a row's tile pads images of this shape little enough; the `accepts` of GEMM families."""
    tokens_per_image = shape["tokens_per_image"]
    least = _padded(tokens_per_image, pick_block_m(tokens_per_image, (128, 64, 32)))
    return _padded(tokens_per_image, config.block_m) <= 1.15 * least


def gemm_default(cc: int, tokens_per_image: int, n: int, k: int, dtype: torch.dtype) -> GemmConfig:
    """A GEMM config from the limits alone.

    Tiles of 128 columns where N has them; rows by least padding; the depth of the pipeline such that two
    CTAs share an SM, so that the epilogue of one hides under the products of the other. float32 products
    run on CUDA cores: small tiles.
    """
    top = 64 if dtype == torch.float32 else 128
    itemsize = torch.finfo(dtype).bits // 8
    # wgmma and tcgen05 take 64 rows at least; fewer rows than half of that are not worth the padding
    rows = (128, 64) if cc in (90, 100) and tokens_per_image > 32 else (128, 64, 32, 16)
    block_m = min(pick_block_m(tokens_per_image, rows), top)
    block_n = min(top, max(16, next_power_of_2(n)))
    # wgmma (sm_90) and tcgen05 (sm_100) hold a 128 x 128 tile in eight warps; the others do best with
    # four and a shallow k
    big = block_m * block_n >= 128 * 128
    block_k = 32 if (big and cc not in (90, 100)) or dtype == torch.float32 else 64
    block_k = min(block_k, max(16, next_power_of_2(k)))
    warps = 8 if big and cc in (90, 100) else 4
    stages = 2
    half = limits(cc).smem_per_sm // 2 - SMEM_RESERVED_PER_CTA
    while stages < 4:
        deeper = GemmConfig(block_m, block_n, block_k, 8, warps, stages + 1)
        if gemm_smem(deeper, itemsize, buffers=stages + 1) > half:
            break
        stages += 1
    return GemmConfig(block_m, block_n, block_k, group_m=8, num_warps=warps, num_stages=stages)


def flat_gemm_default(cc: int, tokens_per_image: int, n: int, k: int, dtype: torch.dtype, use: str) -> GemmConfig:
    """A GEMM config for kernels whose tiles may mix images, so that only the last tile of a batch is padded.

    One image at a time, where large tiles would leave SMs idle, gets tiles of 64 x 64.
    """
    config = gemm_default(cc, 1024, n, k, dtype)
    programs = cdiv(tokens_per_image, config.block_m) * cdiv(n, config.block_n)
    if use == "latency" and programs < LATENCY_PROGRAMS:
        block_m, block_n = min(config.block_m, 64), min(config.block_n, 64)
        return replace(config, block_m=block_m, block_n=block_n, num_warps=4, num_stages=3)
    return config


def flat_tiles(tokens: int, columns: int, config: GemmConfig) -> tuple[int, int]:
    """(row tiles, programs) of a kernel whose tiles may mix images; refuses counts that 32 bits do not hold."""
    check_int32("number of tokens", tokens + config.block_m)
    tiles_m = cdiv(tokens, config.block_m)
    programs = tiles_m * cdiv(columns, config.block_n)
    check_int32("number of tiles", programs)
    return tiles_m, programs
