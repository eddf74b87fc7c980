"""Expand for sm_90 by specialised warps, in Gluon: persistent, one warp copies, two warpgroups multiply.

Each consumer owns 64 of a tile's 128 rows and all of its 256 columns, and runs free of the other: only the barriers of
the ring tie them to the copies, so that one's epilogue overlaps the other's products, and the copies for the next tile
are under way meanwhile. Sums of squares are per 64 rows. Each accumulator is split in halves of 128 columns for the
epilogue, which keeps registers under the 240 that `setmaxnreg` leaves a consumer.

The plain kernel of `expand` serves every other shape, dtype and GPU, is what the interpreter runs, and what this one is
compared with. Which of both is faster no GPU has said yet, so this one is asked for: see `expand`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..gemm import GemmConfig
from ..launch import Launch

# the copy's name changed in Triton 3.8
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# of an H100 or H200; a device that is at hand says its own
SMS = 132
_CONSUMER_REGISTERS, _COPY_REGISTERS = 240, 24


@gluon.jit
def _gelu_fit(x):
    """As `jit.gelu_fit`, whose polynomial and approximations these are."""
    x2 = gl.minimum(x * x, 60.0)
    p = x * (x2 * (0.0010142632 * x2 - 0.10677573) - 2.3011214)
    e = gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [p], dtype=gl.float32, is_pure=True, pack=1)
    d = 1.0 + e
    r = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=gl.float32, is_pure=True, pack=1)
    return x * r


@gluon.jit
def _grouped_tile(tile, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """As `jit.grouped_tile`."""
    per_group = GROUP_M * tiles_n
    first = tile // per_group * GROUP_M
    rows = gl.minimum(tiles_m - first, GROUP_M)
    inside = tile % per_group
    return first + inside % rows, inside // rows


@gluon.jit
def _copies(
    y_ptr,
    w_ptr,
    ys,
    ws,
    full,
    empty,
    tiles_m,
    programs,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    step = 0
    for tile in range(gl.program_id(0), tiles_m * (HIDDEN // BLOCK_N), programs):
        tile_m, tile_n = _grouped_tile(tile, tiles_m, HIDDEN // BLOCK_N, GROUP_M)
        for k in range(0, DIM, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            _copy(y_ptr, [tile_m * BLOCK_M, k], full.index(stage), ys.index(stage))
            _copy(w_ptr, [k, tile_n * BLOCK_N], full.index(stage), ws.index(stage))
            step += 1


@gluon.jit
def _products(
    HALF: gl.constexpr,
    ys,
    ws,
    full,
    empty,
    bias_ptr,
    sumsq_ptr,
    h_ptr,
    partials_ptr,
    tiles_m,
    programs,
    eps,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    SUMSQ_TILES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    ROWS: gl.constexpr = BLOCK_M // 2
    COLUMNS: gl.constexpr = BLOCK_N // 2
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    # a warp stores two rows of 256 bytes
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    step = 0
    for tile in range(gl.program_id(0), tiles_m * (HIDDEN // BLOCK_N), programs):
        tile_m, tile_n = _grouped_tile(tile, tiles_m, HIDDEN // BLOCK_N, GROUP_M)
        acc = gl.zeros((ROWS, BLOCK_N), gl.float32, whole)
        for k in range(0, DIM, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            y = ys.index(stage).slice(HALF * ROWS, ROWS)
            acc = warpgroup_mma(y, ws.index(stage), acc, is_async=True)
            # the products of the stage before are done: it goes back
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)

        first = (tile_m * BLOCK_M + HALF * ROWS).to(gl.int64)
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, half))
        sumsq = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, half))
        for i in gl.static_range(SUMSQ_TILES):
            sumsq += gl.load(sumsq_ptr + (first + rows) * SUMSQ_TILES + i)
        rstd = gl.rsqrt(sumsq / DIM + eps)
        left, right = gl.split(gl.permute(gl.reshape(acc, (ROWS, 2, COLUMNS)), (0, 2, 1)))
        out_rows = gl.arange(0, ROWS, gl.SliceLayout(1, stored))
        for part in gl.static_range(2):
            x = gl.convert_layout(left if part == 0 else right, half, assert_trivial=True)
            columns = tile_n * BLOCK_N + part * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, half))
            bias = gl.load(bias_ptr + columns).to(gl.float32)
            h = _gelu_fit(x * rstd[:, None] + bias[None, :])
            gl.store(partials_ptr + (tile_m * 2 + HALF).to(gl.int64) * HIDDEN + columns, gl.sum(h * h, 0))
            out = gl.convert_layout(h.to(h_ptr.dtype.element_ty), stored)
            out_columns = tile_n * BLOCK_N + part * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, stored))
            gl.store(h_ptr + (first + out_rows)[:, None] * HIDDEN + out_columns[None, :], out)


@gluon.jit(do_not_specialize=["tiles_m", "programs"])
def expand_hopper_kernel(
    y_ptr,
    w_ptr,
    bias_ptr,
    sumsq_ptr,
    h_ptr,
    partials_ptr,
    tiles_m,
    programs,
    eps,
    DIM: gl.constexpr,
    HIDDEN: gl.constexpr,
    SUMSQ_TILES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):
    ys = gl.allocate_shared_memory(y_ptr.dtype, [STAGES, BLOCK_M, BLOCK_K], y_ptr.layout)
    ws = gl.allocate_shared_memory(w_ptr.dtype, [STAGES, BLOCK_K, BLOCK_N], w_ptr.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    # constexprs that a variable holds are none any more, so the arguments are written out
    # fmt: off
    gl.warp_specialize(
        [
            (_products, (0, ys, ws, full, empty, bias_ptr, sumsq_ptr, h_ptr, partials_ptr, tiles_m, programs, eps,
                         DIM, HIDDEN, SUMSQ_TILES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES)),
            (_products, (1, ys, ws, full, empty, bias_ptr, sumsq_ptr, h_ptr, partials_ptr, tiles_m, programs, eps,
                         DIM, HIDDEN, SUMSQ_TILES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES)),
            (_copies, (y_ptr, w_ptr, ys, ws, full, empty, tiles_m, programs,
                       DIM, HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, COPY_REGISTERS],
    )
    # fmt: on


def launch(
    y: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    sumsq: torch.Tensor,
    h: torch.Tensor,
    partials: torch.Tensor,
    eps: float,
    config: GemmConfig,
    options: dict[str, Any],
) -> Launch:
    """The launch of arguments that `expand` has checked, and of which tiles cut nothing."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tiles_m = y.shape[0] // config.block_m
    on_gpu = y.device.type == "cuda"
    sms = torch.cuda.get_device_properties(y.device).multi_processor_count if on_gpu else SMS
    programs = min(sms, tiles_m * (w1.shape[1] // config.block_n))
    args = {
        "y_ptr": TensorDescriptor.from_tensor(y, [config.block_m, config.block_k], layout),
        "w_ptr": TensorDescriptor.from_tensor(w1, [config.block_k, config.block_n], layout),
        "bias_ptr": b1,
        "sumsq_ptr": sumsq,
        "h_ptr": h,
        "partials_ptr": partials,
        "tiles_m": tiles_m,
        "programs": programs,
        "eps": eps,
        "DIM": y.shape[1],
        "HIDDEN": w1.shape[1],
        "SUMSQ_TILES": sumsq.shape[1],
        "STAGES": config.num_stages,
        "CONSUMER_REGISTERS": _CONSUMER_REGISTERS,
        "COPY_REGISTERS": _COPY_REGISTERS,
        **config.tile(),
    }
    return Launch(expand_hopper_kernel, (programs,), args, options)
