"""Launch parameters of the GEMM kernels, and what they are by default: from limits and shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .gpu_limits import SMEM_RESERVED_PER_CTA, base_cc, limits
from .launch import cdiv, check_int32, compiler_options, next_power_of_2

# one image at a time: tiles shrink, or K is cut into slices, until there is a program for each of some hundred SMs
LATENCY_PROGRAMS = 128
# few images: tiles get narrower until there is a program for most SMs; two where products are slow beside L2, since
# small tiles lose nothing there
FEW_PROGRAMS = {80: 96, 89: 240, 90: 96, 100: 96, 120: 320}
# in e4m3 products are fast enough for tiles that are smaller still to wait for L2
FEW_PROGRAMS_E4M3 = 96
_NARROWER = ((256, 128), (128, 128), (128, 64), (64, 64), (32, 64))


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
    config = GemmConfig(block_m, block_n, block_k, group_m=8, num_warps=warps, num_stages=2)
    if cc == 80 and big and k >= 64 and tokens_per_image % block_m:
        # by steps of 32 a masked tile spills
        return replace(config, block_k=64, num_stages=3)
    return replace(config, num_stages=_deepest(config, cc, itemsize, 4))


def _deepest(config: GemmConfig, cc: int, itemsize: int, most: int) -> int:
    """Stages, at least 2 and at most `most`, with which two CTAs of a tile share an SM."""
    half = limits(cc).smem_per_sm // 2 - SMEM_RESERVED_PER_CTA
    return max([2, *(n for n in range(3, most + 1) if gemm_smem(config, itemsize, buffers=n) <= half)])


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


def product_bits(config: GemmConfig, cc: int, dtype: torch.dtype) -> Hashable:
    """What decides the bits of a product's sums beside its operands: configs with equal ones leave equal bits.

    A product adds 16 of K, 32 in e4m3, in one instruction after another, in order, into one float32 sum for each
    element; how many elements share an instruction, a loop or a warp changes nothing. What does change sums: the kind
    of instruction (`mma`, `wgmma`, `tcgen05`), which operand is which, and slices of K. That instructions of one kind
    but another width add alike is certain of `mma`, of which Triton uses one width; of wgmma and tcgen05 it is
    expected, and documented nowhere, so what depends on it compares on the GPU at hand.

    Products in float32 are no such instructions: every config is a class of its own.
    """
    if dtype == torch.float32:
        return config
    rows = config.block_n if config.transposed else config.block_m
    whole_groups = rows >= 64 and config.num_warps % 4 == 0
    kind = {90: "wgmma", 100: "tcgen05"}.get(base_cc(cc), "mma") if whole_groups else "mma"
    slices = (config.split_k, config.block_k) if config.split_k > 1 else 1
    return kind, config.transposed, slices


def narrowed(
    config: GemmConfig,
    cc: int,
    k: int,
    itemsize: int,
    programs: Callable[[int, int], int],
    keeps: Callable[[GemmConfig], bool],
    wanted: int | None = None,
) -> GemmConfig:
    """The config with the widest tile within its own that gives enough programs, else with the narrowest.

    Args:
        k: extent that is summed over.
        programs: of a grid by tiles of so many rows and columns.
        keeps: whether a config is of the bit class that it must be.
        wanted: how many programs are enough; `FEW_PROGRAMS` when None.
    """
    wanted = wanted or FEW_PROGRAMS[base_cc(cc)]
    if programs(config.block_m, config.block_n) >= wanted:
        return config
    fitting = [
        tile
        for rows, columns in _NARROWER
        if rows <= config.block_m and columns <= config.block_n and (rows, columns) != (config.block_m, config.block_n)
        # on sm_80 fewer rows lose more in shared memory than the programs bring
        if rows >= (64 if base_cc(cc) == 80 else 32)
        if keeps(tile := _narrow(config, rows, columns, base_cc(cc), k, itemsize))
    ]
    enough = [tile for tile in fitting if programs(tile.block_m, tile.block_n) >= wanted]
    return (*enough, *fitting[-1:], config)[0]


def _narrow(config: GemmConfig, rows: int, columns: int, cc: int, k: int, itemsize: int) -> GemmConfig:
    """A config with another tile, and what warps, k and stages suit it."""
    big = rows * columns >= 128 * 128
    warps = 8 if big and cc in (90, 100) else 4
    depth = 32 if big and cc not in (90, 100) else 64
    tile = replace(config, block_m=rows, block_n=columns, block_k=min(depth, max(16, next_power_of_2(k))))
    # the descriptors of the form in Gluon are that kernel's
    tile = replace(tile, num_warps=warps, tma=config.tma and not config.gluon, gluon=False)
    # two CTAs on an SM, as in the defaults
    maxnreg = 128 if warps == 8 and cc == 90 and not tile.tma else None
    return replace(tile, num_stages=_deepest(tile, cc, itemsize, 6 if tile.tma else 4), maxnreg=maxnreg)
