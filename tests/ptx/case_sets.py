"""Which cases are run: a quick part, shapes that are no config row, every shipped row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from capacitor_kernels import config_rows
from capacitor_kernels.config_rows import ConfigRow
from capacitor_kernels.gemm import GemmConfig
from capacitor_kernels.ops.expand import HOPPER

from . import cases, dico_cases, fp8_cases
from .cases import DTYPES, NAMES, Case, Form

CCS = (80, 89, 90, 100, 120)
Make = Callable[[], Case]
_GRID = (7, 5)
_ROW_GRID = (16, 16)
_DIM, _HIDDEN, _PATCH, _CHANNELS = 896, 3584, 16, 128
# of the attention of the FLUX.2 VAE, which is executed at fewer tokens than its row is for
_WIDTH, _FEW_TOKENS = 512, 128
_LONG = 1024


def tma_config(block_m: int = 64) -> GemmConfig:
    """Operands through tensor descriptors, on every GPU that has them."""
    return GemmConfig(block_m, 64, 64, group_m=8, num_warps=4, num_stages=3, tma=True)


def transposed(block_m: int = 128, split_k: int = 1) -> GemmConfig:
    """The form of project for sm_90 whose weights go through registers."""
    return GemmConfig(
        block_m, 128, 64, group_m=8, num_warps=8, num_stages=3, tma=True, split_k=split_k, transposed=True
    )


def quick(cc: int) -> Iterator[Make]:
    """Every op on sm_90, the products elsewhere: small shapes, whole and cut tiles, pointers and descriptors."""
    form = Form(cc)
    yield partial(cases.expand, form, 2, 35, 104, 200)
    yield partial(cases.expand, form, 1, 64, 128, 256)
    yield partial(cases.project, form, 2, 35, 200, 104, in_place=True)
    yield partial(cases.project, Form(cc, config=GemmConfig(64, 64, 64, 8, 4, 3, split_k=4)), 1, 64, 512, 128)
    yield partial(cases.fuse_skip, form, 2, 35, 104, 104)
    yield partial(cases.patchify, form, 2, _GRID, 8, 104, "uint8", "nhwc")
    yield partial(cases.patchify, form, 1, _GRID, 8, 104, "bf16", latents=16, latents_dtype="bf16")
    yield partial(cases.head, form, 2, _GRID, 104, 16)
    yield partial(cases.unpatchify, form, 2, _GRID, 8, 104, "bf16", "fp32")
    yield partial(cases.attention, form, 1, 70, 512)
    yield from _fp8(form, 35, _GRID)
    if cc >= 90:
        through = Form(cc, config=tma_config(), label="descriptors")
        yield partial(cases.expand, through, 2, 70, 136, 200)
        yield partial(cases.project, through, 1, 70, 200, 136)
    if cc == 90:
        # two programs for four tiles of six steps each, on a ring of four stages
        specialised = partial(Form, cc, config=HOPPER, label="by specialised warps")
        yield partial(cases.expand, specialised(), 2, 128, 384, 512, sms=2)
        yield partial(cases.expand, specialised(torch.float16), 1, 256, 64, 256, bias="fp16", sms=1)
        turned = partial(Form, cc, label="transposed")
        yield partial(cases.project, turned(config=transposed(256)), 1, 256, 264, 136)
        yield partial(cases.project, turned(config=transposed()), 2, 70, 200, 136, in_place=True)
        yield partial(cases.project, turned(config=transposed(split_k=2)), 1, 130, 520, 136)
        yield partial(cases.project, turned(torch.float16, transposed()), 2, 35, 200, 136)
        yield partial(cases.grn, form, 2, 3, 200)
        yield from _dico(form, 35, _GRID, 104)
        yield partial(cases.dwconv, form, 2, *_GRID, 104)
        yield partial(cases.dwconv, form, 1, 16, 16, 128)
        yield partial(cases.unpatchify, form, 1, _GRID, 8, 104, "uint8")
        yield partial(cases.whiten, form, 2, _GRID, 16)
        yield partial(cases.whiten, form, 2, _GRID, 16, inverse=True, out="fp32")
        yield partial(cases.attention, form, 2, 35, 72)
        yield partial(cases.resize, Form(cc, torch.uint8), [(30, 41), (9, 100)], 12, 16)


def _fp8(form: Form, tokens: int, grid: tuple[int, int]) -> Iterator[Make]:
    """What encoders in e4m3 launch: whole tiles and cut ones, and the other form of project."""
    if form.cc < 89:
        return
    yield partial(fp8_cases.dwconv, form, 2, *grid, 104)
    yield partial(fp8_cases.expand, form, 2, tokens, 104, 200)
    yield partial(fp8_cases.expand, form, 1, 64, 128, 256)
    yield partial(fp8_cases.project, form, 2, tokens, 200, 104, in_place=True)
    yield partial(fp8_cases.project, form, 1, 64, 256, 128)
    other = GemmConfig(64, 64, 64, 8, 4, 3, split_k=3, transposed=form.cc not in (90, 100))
    yield partial(fp8_cases.project, replace(form, config=other, label="other form, split"), 1, 64, 520, 128)


def _dico(form: Form, tokens: int, grid: tuple[int, int], dim: int) -> Iterator[Make]:
    """What models with channel attention add."""
    yield partial(dico_cases.expand, form, 2, tokens, dim, dim)
    yield partial(dico_cases.expand, form, 2, tokens, dim, 2 * dim, "scaled")
    yield partial(dico_cases.dwconv, form, 2, *grid, dim)
    yield partial(dico_cases.channel_attention, form, 3, 3, dim)
    yield partial(dico_cases.project, form, 2, tokens, dim, dim)
    yield partial(dico_cases.project, form, 2, tokens, 2 * dim, dim, multiply=False, sums="plain")
    split = replace(form, config=GemmConfig(64, 64, 64, 8, 4, 3, split_k=2), label="split")
    yield partial(dico_cases.project, split, 1, tokens, 4 * dim, dim)
    if form.cc == 90 and form.dtype != torch.float32:
        turned = replace(form, config=transposed(), label="transposed")
        yield partial(dico_cases.project, turned, 2, 2 * tokens, 200, 136)
        yield partial(dico_cases.project, turned, 2, 2 * tokens, 200, 136, multiply=False, sums="plain")
    yield partial(dico_cases.rmsnorm, form, 2, tokens, dim)
    yield partial(dico_cases.latents_up, form, 2, grid, 16, dim)


def odd(cc: int, dtype: torch.dtype) -> Iterator[Make]:
    """Shapes that are no row, through `lookup`: odd grids and batches, channels that are no multiple of a tile or 8."""
    form, name = Form(cc, dtype), NAMES[dtype]
    for batch, height, width in ((3, 7, 5), (1, 1, 1), (3, 1, 1), (2, 2, 6), (1, 14, 14), (2, 12, 20)):
        grid, tokens = (height, width), height * width
        yield partial(cases.expand, form, batch, tokens, _DIM, _HIDDEN)
        yield partial(cases.project, form, batch, tokens, _HIDDEN, _DIM, in_place=True)
        yield partial(cases.dwconv, form, batch, height, width, _DIM)
        yield partial(cases.patchify, form, batch, grid, _PATCH, _DIM, "uint8", "nhwc")
        yield partial(cases.patchify, form, batch, grid, _PATCH, _DIM, name, latents=_CHANNELS, latents_dtype=name)
        yield partial(cases.head, form, batch, grid, _DIM, _CHANNELS, norm=True, out=name)
        yield partial(cases.fuse_skip, form, batch, tokens, _DIM, _DIM)
        yield partial(cases.unpatchify, form, batch, grid, _PATCH, _DIM, "uint8", "fp32")
        yield partial(cases.whiten, form, batch, grid, _CHANNELS, out="fp32")
        yield partial(cases.attention, form, batch, tokens, _WIDTH)
    for dim, hidden in ((104, 200), (90, 99), (33, 65)):
        yield partial(cases.expand, form, 3, 35, dim, hidden, gelu="erf")
        yield partial(cases.project, form, 3, 35, hidden, dim)
        yield partial(cases.fuse_skip, form, 3, 35, dim, hidden)
        yield partial(cases.dwconv, form, 2, *_GRID, dim, taps=name)
        yield partial(cases.head, form, 3, _GRID, dim, hidden // 5, raw=True)
        yield partial(cases.grn, form, 3, 1 + dim % 7, hidden)
        yield partial(cases.whiten, form, 3, _GRID, dim, inverse=True)
        yield partial(cases.attention, form, 3, 35, dim)
    # sides below, above and of the size wanted, rows of more values than a tile and of one pixel
    yield partial(cases.resize, Form(cc, torch.uint8), [(16, 7), (1, 1), (40, 33), (16, 90)], 16, 90)
    yield partial(cases.resize, Form(cc, torch.uint8), [(23, 3), (5, 64)], 7, 1)
    for batch, tokens, grid, dim in ((3, 35, _GRID, 90), (2, 144, (12, 12), _DIM), (1, 1, (1, 1), 33)):
        yield from _dico(form, tokens, grid, dim)
        yield partial(dico_cases.expand, form, batch, tokens, dim, dim, "two")
        yield partial(dico_cases.project, form, batch, tokens, dim, dim, multiply=False, sums="none")
        yield partial(dico_cases.channel_attention, form, 17, 20, dim)
        yield partial(dico_cases.rmsnorm, form, batch, tokens, dim, norm=False)
        yield partial(dico_cases.rmsnorm, form, batch, tokens, dim, sums=False)
    if dtype != torch.float32:
        yield from _fp8(form, 35, (12, 20))
        if cc >= 89:
            yield partial(fp8_cases.expand, form, 2, 250, _DIM, _HIDDEN)
            yield partial(fp8_cases.project, form, 2, 250, _HIDDEN, _DIM)
    # the rows of 256 tokens, descriptors included, with a last tile that is cut
    yield partial(cases.expand, form, 2, 250, _DIM, _HIDDEN)
    yield partial(cases.project, form, 2, 250, _HIDDEN, _DIM)
    yield partial(cases.grn, form, 1, 1, _HIDDEN)
    yield partial(cases.grn, form, 3, 5, _HIDDEN)
    yield partial(cases.expand, form, 2, 72, _DIM, _HIDDEN, gelu="erf", bias=name)
    yield partial(cases.dwconv, form, 1, 24, 40, 128)
    yield partial(cases.dwconv, form, 2, 9, 17, 257)
    for patch, dim in ((8, 104), (4, 90), (14, 99), (1, 64)):
        image, layout = ("fp32", "nchw") if patch == 4 else ("uint8", "nhwc")
        yield partial(cases.patchify, form, 3, _GRID, patch, dim, image, layout)
        yield partial(cases.patchify, form, 3, _GRID, patch, dim, "uint8", "nchw", latents=20)
        yield partial(cases.unpatchify, form, 3, _GRID, patch, dim, name, "bf16")
    yield partial(cases.head, form, 2, (6, 6), _DIM, _CHANNELS, posterior=False, whiten=False)
    yield partial(cases.head, form, 1, (4, 4), _DIM, 16, norm=True, raw=True)
    if cc >= 90 and dtype != torch.float32:
        yield partial(cases.expand, Form(cc, dtype, tma_config(128), "descriptors"), 2, 250, _DIM, 1024)
        yield partial(cases.project, Form(cc, dtype, tma_config(128), "descriptors"), 2, 250, 1024, _DIM)
    if cc == 90 and dtype != torch.float32:
        yield partial(cases.expand, Form(cc, dtype, HOPPER, "by specialised warps"), 1, 256, _DIM, _HIDDEN, sms=3)
        by_pointers = replace(transposed(256), tma=False)
        yield partial(cases.project, Form(cc, dtype, transposed(256), "transposed"), 2, 250, 1024, _DIM)
        yield partial(cases.project, Form(cc, dtype, by_pointers, "transposed by pointers"), 2, 250, 1024, _DIM)


def rows(cc: int, dtype: torch.dtype) -> Iterator[Make]:
    """Every shipped config row at its own shape, in every form that the runtime queues; those for bytes with bf16."""
    for family in config_rows.families():
        for index, row in enumerate(config_rows.rows(cc, family.name)):
            # pixels and encoders in 8 bits run beside what is in bfloat16
            kinds = (dtype, torch.uint8, DTYPES["e4m3"]) if dtype == torch.bfloat16 else (dtype,)
            if DTYPES[row.dtype] in kinds:
                latency = row.use == "latency"
                kind = dtype if row.dtype == "e4m3" else DTYPES[row.dtype]
                form = Form(cc, kind, row.config, f"row {index} {row.use}", batch_free=not latency)
                yield from _row(form, row, 1 if latency else 2)


def _row(form: Form, row: ConfigRow, batch: int) -> Iterator[Make]:
    shape: Any = row.shape
    tokens = shape.get("tokens_per_image", 0)
    one = 1 if tokens >= _LONG else batch
    if row.family == "expand":
        yield partial(cases.expand, form, one, tokens, shape["dim"], shape["hidden"])
    elif row.family == "expand_fp8":
        yield partial(fp8_cases.expand, form, one, tokens, shape["dim"], shape["hidden"])
    elif row.family == "project_fp8":
        yield partial(fp8_cases.project, form, one, tokens, shape["hidden"], shape["dim"])
    elif row.family == "grn":
        yield partial(cases.grn, form, 2, shape["tiles"], shape["hidden"])
    elif row.family == "project":
        yield partial(cases.project, form, one, tokens, shape["hidden"], shape["dim"])
    elif row.family == "dwconv":
        yield partial(cases.dwconv, form, one, shape["height"], shape["width"], shape["dim"])
        yield partial(dico_cases.dwconv, form, one, shape["height"], shape["width"], shape["dim"])
    elif row.family == "patchify":
        latents = shape["depth"] - 3 * _PATCH**2
        images = [("fp32", "nchw"), ("bf16", "nchw")]
        if not latents:
            images += [("uint8", "nhwc"), ("uint8", "nchw"), ("bf16", "nhwc")]
        for image, layout in images:
            yield partial(cases.patchify, form, 2, _ROW_GRID, _PATCH, shape["dim"], image, layout, latents)
    elif row.family == "head":
        yield partial(cases.head, form, 2, _ROW_GRID, shape["dim"], shape["channels"])
        yield partial(cases.head, form, 2, _ROW_GRID, shape["dim"], shape["channels"], raw=True, out="fp32")
    elif row.family == "fuse_skip":
        yield partial(cases.fuse_skip, form, 2, tokens, shape["dim"], shape["width"])
    elif row.family == "unpatchify":
        for image, noise in (("bf16", "fp32"), ("uint8", "bf16"), ("fp32", None)):
            yield partial(cases.unpatchify, form, 2, _ROW_GRID, _PATCH, shape["dim"], image, noise)
    elif row.family == "whiten":
        for inverse in (False, True):
            yield partial(cases.whiten, form, 2, _ROW_GRID, _CHANNELS, inverse)
    elif row.family == "channel_attention":
        yield partial(dico_cases.channel_attention, form, 2, shape["tiles"], shape["dim"])
    elif row.family == "rmsnorm":
        yield partial(dico_cases.rmsnorm, form, 2, _FEW_TOKENS, shape["dim"])
        yield partial(dico_cases.rmsnorm, form, 2, _FEW_TOKENS, shape["dim"], norm=False)
    elif row.family == "attention":
        for few in (_FEW_TOKENS, _FEW_TOKENS + 2):
            yield partial(cases.attention, form, 2, few, shape["dim"])
    elif row.family == "resize":
        # which is executed at fewer pixels than its row is for
        yield partial(cases.resize, form, [(40, 61), (33, 20)], 32, 32)
    else:
        raise ValueError(f"no cases for the family {row.family}: add them to tests/ptx/cases.py and here")
