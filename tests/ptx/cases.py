"""One call of an op at one shape: inputs, outputs, and the same in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import capacitor_kernels as ck
from capacitor_kernels import reference
from capacitor_kernels.pictures import between_bytes
from capacitor_kernels.tuning import lookup
from capacitor_rt.runtime.pictures import table, tent_weights

Tensors = dict[str, Tensor]
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "uint8": torch.uint8}
DTYPES["e4m3"] = torch.float8_e4m3fn
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Case:
    """What one op is called with.

    Attributes:
        images: tensors whose first dimension is a multiple of the batch.
        weights: tensors that all images share.
        outputs: shapes and dtypes of what the op writes, by batch; the first dimension is a multiple of the batch.
        call: runs the op on (images, weights, outputs, batch).
        reference: what `results` are to be, from (images, weights, batch) of one dtype, in plain torch.
        results: what is compared, from outputs and batch.
        relative: results that are compared by their relative rms error alone, with its limit.
        batch_free: whether the bits of an image may not depend on the images beside it.
        filled: outputs that `call` writes before the op runs.
    """

    op: str
    name: str
    cc: int
    dtype: torch.dtype
    batch: int
    images: Tensors
    weights: Tensors
    outputs: Callable[[int], Specs]
    call: Callable[[Tensors, Tensors, Tensors, int], None]
    reference: Callable[[Tensors, Tensors, int], Tensors]
    results: Callable[[Tensors, int], Tensors] = lambda outputs, batch: outputs
    relative: Mapping[str, float] = field(default_factory=dict)
    batch_free: bool = True
    filled: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Form:
    """How an op is called: for which GPU, in which dtype, by which config (looked up by shape when None)."""

    cc: int
    dtype: torch.dtype = torch.bfloat16
    config: Any = None
    label: str = ""
    batch_free: bool = True

    def config_for(self, op: str, **shape: int) -> Any:
        return self.config or lookup(op, self.cc, shape, self.dtype)

    def case(self, op: str, name: str, batch: int, images: Tensors, weights: Tensors, **rest: Any) -> Case:
        name = f"{name} {self.label}".strip()
        return Case(op, name, self.cc, self.dtype, batch, images, weights, batch_free=self.batch_free, **rest)


def randn(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded normal values."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _pixels(size: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return randn(*size, seed=seed, dtype=dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As a kernel stores it; the truth in float64 stays."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def expand(
    form: Form,
    batch: int,
    tokens: int,
    dim: int,
    hidden: int,
    gelu: str = "fit",
    bias: str = "fp32",
    sms: int = 132,
) -> Case:
    """`sms` is how many programs share the tiles where the config's form is persistent."""
    dtype, total = form.dtype, batch * tokens
    config = form.config_for("expand", tokens_per_image=tokens, dim=dim, hidden=hidden)
    y = randn(total, dim, seed=1, dtype=dtype)
    squares = torch.nn.functional.pad(y.float().square(), (0, -dim % 128)).view(total, -1, 128).sum(2)
    w1 = randn(dim, hidden, seed=2, scale=dim**-0.5, dtype=dtype)

    def outputs(batch: int) -> Specs:
        partials = ck.expand_partials_shape(batch, tokens, hidden, config)
        return {"h": ((batch * tokens, hidden), dtype), "partials": (partials, torch.float32)}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        with patch.object(import_module("capacitor_kernels.ops._expand_hopper"), "SMS", sms):
            ck.expand(**images, **weights, **outs, tokens_per_image=tokens, gelu=gelu, config=form.config)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        # the fit is further from the exact GELU than float32 rounds; in two bytes it is judged against erf
        kind = "fit" if gelu == "fit" and dtype == torch.float32 else "erf"
        h, sums = reference.expand(**images, **weights, tokens_per_image=tokens, gelu=kind)
        return {"h": h, "sums": sums}

    return form.case(
        "expand",
        f"B{batch} T{tokens} D{dim} F{hidden} {gelu} bias {bias}",
        batch,
        {"y": y, "sumsq": squares},
        {"w1": w1, "b1": randn(hidden, seed=3, scale=0.1, dtype=DTYPES[bias])},
        outputs=outputs,
        call=call,
        reference=truth,
        results=lambda outs, batch: {"h": outs["h"], "sums": outs["partials"].sum(1)},
        relative={"sums": 2e-4},
    )


def grn(form: Form, batch: int, tiles: int, hidden: int) -> Case:
    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.grn(**images, **weights, **outs, config=form.config)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        sums = images["partials"].sum(1)
        return {"gain": _rounded(reference.grn(sums, weights["gamma"]), form.dtype), "norms": sums.sqrt()}

    return form.case(
        "grn",
        f"B{batch} tiles {tiles} F{hidden}",
        batch,
        {"partials": randn(batch, tiles, hidden, seed=4).square() * 50},
        {"gamma": randn(hidden, seed=5)},
        outputs=lambda batch: {"gain": ((batch, hidden), form.dtype), "norms": ((batch, hidden), torch.float32)},
        call=call,
        reference=truth,
        relative={"norms": 1e-6},
    )


def project(form: Form, batch: int, tokens: int, hidden: int, dim: int, in_place: bool = False) -> Case:
    dtype, total = form.dtype, batch * tokens
    config = form.config_for("project", tokens_per_image=tokens, hidden=hidden, dim=dim)
    images = {
        "h": randn(total, hidden, seed=6, dtype=dtype),
        "gain": randn(batch, hidden, seed=7, scale=0.5, dtype=dtype),
        "residual": randn(total, dim, seed=8, dtype=dtype),
    }

    def outputs(batch: int) -> Specs:
        specs: Specs = {"out": ((batch * tokens, dim), dtype)}
        workspace = ck.project_workspace_shape(batch * tokens, dim, config)
        return specs if workspace is None else specs | {"workspace": (workspace, torch.float32)}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        if in_place:
            outs["out"].copy_(images["residual"])
            images = images | {"residual": outs["out"]}
        ck.project(**images, **weights, **outs, tokens_per_image=tokens, config=form.config)

    return form.case(
        "project",
        f"B{batch} T{tokens} F{hidden} D{dim}" + (" in place" if in_place else ""),
        batch,
        images,
        {"w2": randn(hidden, dim, seed=9, scale=hidden**-0.5, dtype=dtype), "b2": randn(dim, seed=10, scale=0.1)},
        outputs=outputs,
        call=call,
        reference=lambda images, weights, batch: {
            "out": reference.project(**images, **weights, tokens_per_image=tokens)
        },
        results=lambda outs, batch: {"out": outs["out"]},
        filled=frozenset({"out"} if in_place else ()),
    )


def dwconv(form: Form, batch: int, height: int, width: int, dim: int, taps: str = "fp32") -> Case:
    dtype, size = form.dtype, {"height": height, "width": width}
    config = form.config_for("dwconv", dim=dim, **size)
    # values that the working dtype holds, so that the yardstick sees the same weights
    weights = {
        "w": randn(49, dim, seed=12, scale=1 / 7, dtype=dtype).to(DTYPES[taps]),
        "b": randn(dim, seed=13, dtype=dtype).to(DTYPES[taps]),
    }

    def outputs(batch: int) -> Specs:
        tokens = batch * height * width
        return {"y": ((tokens, dim), dtype), "sumsq": (ck.dwconv_sumsq_shape(tokens, dim, config), torch.float32)}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.dwconv(**images, **weights, **outs, batch=batch, config=form.config, **size)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        y, sums = reference.dwconv(**images, **weights, batch=batch, **size)
        return {"y": y, "sums": sums}

    return form.case(
        "dwconv",
        f"B{batch} {height}x{width} C{dim} taps {taps}",
        batch,
        {"x": randn(batch * height * width, dim, seed=11, dtype=dtype)},
        weights,
        outputs=outputs,
        call=call,
        reference=truth,
        results=lambda outs, batch: {"y": outs["y"], "sums": outs["sumsq"].sum(1, keepdim=True)},
        relative={"sums": 1e-5},
    )


def patchify(
    form: Form,
    batch: int,
    grid: tuple[int, int],
    patch: int,
    dim: int,
    image: str = "bf16",
    layout: str = "nchw",
    latents: int = 0,
    latents_dtype: str = "fp32",
) -> Case:
    height, width = grid[0] * patch, grid[1] * patch
    size = (batch, 3, height, width) if layout == "nchw" else (batch, height, width, 3)
    images = {"image": _pixels(size, DTYPES[image], 14)}
    if latents:
        images["latents"] = randn(batch, latents, *grid, seed=15, dtype=DTYPES[latents_dtype])
    depth = 3 * patch * patch + latents
    options = {"patch": patch, "layout": layout}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.patchify(**images, **weights, **outs, config=form.config, **options)

    return form.case(
        "patchify",
        f"B{batch} {grid[0]}x{grid[1]} p{patch} D{dim} {image} {layout}"
        + (f" Z{latents} {latents_dtype}" if latents else ""),
        batch,
        images,
        {"w": randn(depth, dim, seed=16, scale=depth**-0.5, dtype=form.dtype), "b": randn(dim, seed=17, scale=0.1)},
        outputs=lambda batch: {"tokens": ((batch * math.prod(grid), dim), form.dtype)},
        call=call,
        reference=lambda images, weights, batch: {"tokens": reference.patchify(**images, **weights, **options)},
    )


def head(
    form: Form,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    channels: int,
    posterior: bool = True,
    whiten: bool = True,
    norm: bool = False,
    raw: bool = False,
    out: str = "fp32",
) -> Case:
    columns = 2 * channels if posterior else channels
    weights = {
        "w": randn(dim, columns, seed=19, scale=dim**-0.5, dtype=form.dtype),
        "b": randn(columns, seed=20, scale=0.3),
    }
    if whiten:
        weights["whiten_mean"] = randn(channels, seed=21, scale=0.2)
        weights["whiten_rstd"] = randn(channels, seed=22).abs() + 0.5
    names = ["mean", "logsnr"] if posterior else ["mean"]

    def outputs(batch: int) -> Specs:
        size = (batch, channels, *grid)
        return {"latents": (size, DTYPES[out])} | {name: (size, torch.float32) for name in names if raw}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.head(**images, **weights, **outs, norm=norm, config=form.config)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        z, *both = reference.head(**images, **weights, grid=grid, channels=channels, norm=norm)
        return {"latents": _rounded(z, DTYPES[out])} | (dict(zip(names, both, strict=False)) if raw else {})

    chosen = {"posterior": posterior, "whiten": whiten, "norm": norm, "raw": raw}
    return form.case(
        "head",
        f"B{batch} {grid[0]}x{grid[1]} D{dim} Z{channels} " + " ".join(k for k, on in chosen.items() if on) + f" {out}",
        batch,
        {"x": randn(batch * math.prod(grid), dim, seed=18, dtype=form.dtype)},
        weights,
        outputs=outputs,
        call=call,
        reference=truth,
    )


def fuse_skip(form: Form, batch: int, tokens: int, dim: int, width: int) -> Case:
    total, dtype = batch * tokens, form.dtype

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.fuse_skip(**images, **weights, **outs, tokens_per_image=tokens, config=form.config)

    return form.case(
        "fuse_skip",
        f"B{batch} T{tokens} D{dim} N{width}",
        batch,
        {"s": randn(total, dim, seed=23, dtype=dtype), "m": randn(total, dim, seed=24, dtype=dtype)},
        {
            "w": randn(2 * dim, width, seed=25, scale=(2 * dim) ** -0.5, dtype=dtype),
            "b": randn(width, seed=26, scale=0.1),
        },
        outputs=lambda batch: {"out": ((batch * tokens, width), dtype)},
        call=call,
        reference=lambda images, weights, batch: {"out": reference.fuse_skip(**images, **weights)},
    )


def unpatchify(
    form: Form,
    batch: int,
    grid: tuple[int, int],
    patch: int,
    dim: int,
    image: str = "bf16",
    noise: str | None = None,
) -> Case:
    depth, dtype = 3 * patch * patch, form.dtype
    size = (3, grid[0] * patch, grid[1] * patch)
    images = {"tokens": randn(batch * math.prod(grid), dim, seed=27, dtype=dtype)}
    if noise:
        images["noise"] = randn(batch, *size, seed=28, dtype=DTYPES[noise])
    scales = {"scale_x0": 0.75, "scale_noise": 0.25} if noise else {}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.unpatchify(**images, **weights, **outs, patch=patch, config=form.config, **scales)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        x = reference.unpatchify(**images, **weights, patch=patch, grid=grid, **scales)
        return {"image": reference.pixels_to_bytes(x) if image == "uint8" else _rounded(x, DTYPES[image])}

    return form.case(
        "unpatchify",
        f"B{batch} {grid[0]}x{grid[1]} p{patch} D{dim} {image}" + (f" noise {noise}" if noise else ""),
        batch,
        images,
        {"w": randn(dim, depth, seed=29, scale=0.4 * dim**-0.5, dtype=dtype), "b": randn(depth, seed=30, scale=0.1)},
        outputs=lambda batch: {"image": ((batch, *size), DTYPES[image])},
        call=call,
        reference=truth,
    )


def whiten(
    form: Form, batch: int, grid: tuple[int, int], channels: int, inverse: bool = False, out: str = "bf16"
) -> Case:
    scale = "std" if inverse else "rstd"
    op = ck.dewhiten if inverse else ck.whiten
    plain = reference.dewhiten if inverse else reference.whiten

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        op(**images, **weights, **outs, config=form.config)

    return form.case(
        "whiten",
        f"{'dewhiten' if inverse else 'whiten'} B{batch} {grid[0]}x{grid[1]} Z{channels} {out}",
        batch,
        {"z": randn(batch, channels, *grid, seed=31, dtype=form.dtype)},
        {"mean": randn(channels, seed=32), scale: randn(channels, seed=33).abs() + 0.5},
        outputs=lambda batch: {"out": ((batch, channels, *grid), DTYPES[out])},
        call=call,
        reference=lambda images, weights, batch: {"out": _rounded(plain(**images, **weights), DTYPES[out])},
    )


def attention(form: Form, batch: int, tokens: int, dim: int) -> Case:
    total, dtype = batch * tokens, form.dtype
    names = ("q", "k", "v")

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.attention(**images, **outs, tokens_per_image=tokens, config=form.config)

    return form.case(
        "attention",
        f"B{batch} T{tokens} D{dim}",
        batch,
        # scores that tell keys apart
        {name: randn(total, dim, seed=34 + i, scale=1.5, dtype=dtype) for i, name in enumerate(names)},
        {},
        outputs=lambda batch: {"out": ((batch * tokens, dim), dtype)},
        call=call,
        reference=lambda images, weights, batch: {"out": reference.attention(**images, tokens_per_image=tokens)},
    )


def resize(form: Form, pictures: Sequence[tuple[int, int]], height: int, width: int) -> Case:
    """Pictures of these heights and widths, every second one turned."""
    sizes, source, _ = table(pictures, height, width)
    shape = (len(pictures), height, width, 3)
    between = int(between_bytes(sizes).sum())

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.resize(**weights, images=sizes.clone(), **outs, sizes=sizes, config=form.config)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        # as numbers: bytes may differ by one, and these may not
        return {"out": reference.resize(weights["source"], weights["weights"], sizes=sizes, shape=shape).float()}

    return form.case(
        "resize",
        f"{' '.join(f'{rows}x{columns}' for rows, columns in pictures)} to {height}x{width}",
        1,
        {},
        {"source": _pixels((source,), torch.uint8, 37), "weights": tent_weights(sizes)},
        outputs=lambda batch: {"out": (shape, torch.uint8), "workspace": ((between,), torch.uint8)},
        call=call,
        reference=truth,
        results=lambda outs, batch: {"out": outs["out"].float()},
    )
