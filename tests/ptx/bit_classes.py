"""Whether the narrower tiles that few images take leave the bits of the tiles of many: executed, per op and GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from capacitor_kernels.config_rows import get_family
from capacitor_kernels.launch import E4M3, E4M3_COMPUTE_CAPABILITY
from capacitor_kernels.tuning import lookup

from . import cases, fp8_cases
from .cases import Case, Form

# configs are those of the published sizes; what is executed is smaller, but of as many tokens
_DIM, _HIDDEN, _DEPTH, _CHANNELS = 896, 3584, 768, 128
_IMAGES = (1, 4)


class Pair(NamedTuple):
    """An op at one shape, by the tiles of many images and by those of few."""

    text: str
    many: Case
    few: Case


def pairs(cc: int, grids: tuple[tuple[int, int], ...] = ((16, 16), (14, 14))) -> Iterator[Pair]:
    """Every pair of configs of a bit class that `lookup` chooses between at these grids of patches."""
    for height, width in grids:
        tokens, grid = height * width, (height, width)
        dims = {"tokens_per_image": tokens, "dim": _DIM}
        ops: tuple[tuple[str, dict[str, int], Callable[[Form], Case]], ...] = (
            ("expand", {**dims, "hidden": _HIDDEN}, lambda form, t=tokens: cases.expand(form, 1, t, 192, 256)),
            ("project", {**dims, "hidden": _HIDDEN}, lambda form, t=tokens: cases.project(form, 1, t, 320, 128)),
            (
                "dwconv",
                {"height": height, "width": width, "dim": _DIM},
                lambda form, g=grid: cases.dwconv(form, 1, *g, 128),
            ),
            ("patchify", {**dims, "depth": _DEPTH}, partial(_patchify, grid, 0)),
            ("patchify", {**dims, "depth": _DEPTH + _CHANNELS}, partial(_patchify, grid, 64)),
            ("head", {**dims, "channels": _CHANNELS}, lambda form, g=grid: cases.head(form, 1, g, 128, 128)),
            ("fuse_skip", {**dims, "width": _DIM}, lambda form, t=tokens: cases.fuse_skip(form, 1, t, 128, 128)),
            ("unpatchify", {**dims, "depth": _DEPTH}, partial(_unpatchify, grid)),
        )
        if cc >= E4M3_COMPUTE_CAPABILITY:
            ops += (
                (
                    "expand_fp8",
                    {**dims, "hidden": _HIDDEN},
                    lambda form, t=tokens: fp8_cases.expand(form, 1, t, 192, 256),
                ),
                (
                    "project_fp8",
                    {**dims, "hidden": _HIDDEN},
                    lambda form, t=tokens: fp8_cases.project(form, 1, t, 320, 128),
                ),
            )
        for op, shape, make in ops:
            dtype = E4M3 if op.endswith("_fp8") else torch.bfloat16
            many = lookup(op, cc, shape, dtype)
            for few in dict.fromkeys(lookup(op, cc, shape, dtype, images=n) for n in _IMAGES):
                if few != many:
                    form = partial(Form, cc)
                    text = f"{op} {height}x{width} by {_tile(few)} and {_tile(many)}"
                    yield Pair(text, make(form(config=many)), make(form(config=few)))


def foreign(cc: int) -> Pair:
    """Two configs of project that are of different classes, since one cuts K in slices: their bits differ."""
    shape = {"tokens_per_image": 256, "dim": _DIM, "hidden": _HIDDEN}
    many = lookup("project", cc, shape, torch.bfloat16)
    sliced = lookup("project", cc, shape, torch.bfloat16, use="latency")
    assert not get_family("project").same_bits(many, sliced, cc, torch.bfloat16)
    made = (cases.project(Form(cc, config=config), 1, 256, 640, 128) for config in (many, sliced))
    return Pair("project in slices and whole", *made)


def _patchify(grid: tuple[int, int], latents: int, form: Form) -> Case:
    return cases.patchify(form, 1, grid, 8, 128, "uint8", latents=latents)


def _unpatchify(grid: tuple[int, int], form: Form) -> Case:
    return cases.unpatchify(form, 1, grid, 8, 128, "fp32", "fp32")


def _tile(config: Any) -> str:
    fields = vars(config)
    names = ("block_m", "block_n", "block_k") if "block_m" in fields else ("cols", "strips_x", "strips_y")
    return "x".join(str(fields[name]) for name in names)
