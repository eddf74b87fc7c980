"""Cases of the ops and forms that models with channel attention add; see `cases.py`."""

from __future__ import annotations

import math
from typing import Any

import torch

import capacitor_kernels as ck
from capacitor_kernels import reference

from .cases import Case, Form, Specs, Tensors, randn


def channel_attention(form: Form, batch: int, tiles: int, dim: int) -> Case:
    config = form.config_for("channel_attention", tiles=tiles, dim=dim)
    tokens = 64 * tiles

    def outputs(batch: int) -> Specs:
        sums = ck.channel_attention_sums_shape(batch, dim, config)
        factor: Specs = {"factor": ((batch, dim), form.dtype)}
        return factor if sums is None else factor | {"sums": (sums, torch.float32)}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.channel_attention(**images, **weights, **outs, tokens_per_image=tokens, config=form.config)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        sums = images["partials"].sum(1)
        return {"factor": reference.channel_attention(sums, weights["w"], weights["b"], tokens_per_image=tokens)}

    return form.case(
        "channel_attention",
        f"B{batch} tiles {tiles} D{dim}",
        batch,
        {"partials": 64 * randn(batch, tiles, dim, seed=40)},
        {"w": randn(dim, dim, seed=41, scale=dim**-0.5, dtype=form.dtype), "b": randn(dim, seed=42)},
        outputs=outputs,
        call=call,
        reference=truth,
        results=lambda outs, batch: {"factor": outs["factor"]},
    )


def rmsnorm(form: Form, batch: int, tokens: int, dim: int, norm: bool = True, sums: bool = True) -> Case:
    total = batch * tokens
    weights = {"weight": 1 + randn(dim, seed=44), "bias": randn(dim, seed=45)} if norm else {}

    def outputs(batch: int) -> Specs:
        specs: Specs = {"out": ((batch * tokens, dim), form.dtype)} if norm else {}
        return specs | ({"sumsq": ((batch * tokens, 1), torch.float32)} if sums else {})

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.rmsnorm(**images, **weights, **outs, config=form.config)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        found = {"out": reference.rmsnorm(**images, **weights)} if norm else {}
        return found | ({"sumsq": reference.row_squares(found.get("out", images["x"]))} if sums else {})

    return form.case(
        "rmsnorm",
        f"B{batch} T{tokens} D{dim}" + (" norm" if norm else "") + (" sums" if sums else ""),
        batch,
        {"x": randn(total, dim, seed=43, scale=3, dtype=form.dtype)},
        weights,
        outputs=outputs,
        call=call,
        reference=truth,
        # of values that were not rounded yet; the yardstick's were
        relative={"sumsq": 2e-5} if sums else {},
    )


def expand(form: Form, batch: int, tokens: int, dim: int, hidden: int, norms: str = "one") -> Case:
    """Without GELU behind one norm, or with it behind two; "scaled" has a scale between them."""
    total, dtype = batch * tokens, form.dtype
    y = randn(total, dim, seed=1, dtype=dtype)
    images = {"y": y, "sumsq": reference.row_squares(y) * torch.tensor([[0.25, 0.75]])}
    if norms != "one":
        images["scaled_sumsq"] = images["sumsq"] * (1.5 if norms == "scaled" else 1.0)
    gelu = "none" if norms == "one" else "fit"

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.expand(**images, **weights, **outs, tokens_per_image=tokens, gelu=gelu, config=form.config)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        kind = "erf" if gelu == "fit" and dtype != torch.float32 else gelu
        return {"h": reference.expand(**images, **weights, tokens_per_image=tokens, gelu=kind)[0]}

    return form.case(
        "expand",
        f"B{batch} T{tokens} D{dim} F{hidden} norms {norms}",
        batch,
        images,
        {"w1": randn(dim, hidden, seed=2, scale=dim**-0.5, dtype=dtype), "b1": randn(hidden, seed=3, scale=0.1)},
        outputs=lambda batch: {"h": ((batch * tokens, hidden), dtype)},
        call=call,
        reference=truth,
    )


def dwconv(form: Form, batch: int, height: int, width: int, dim: int) -> Case:
    """With SiLU, and sums over each image."""
    dtype, size = form.dtype, {"height": height, "width": width}
    config = form.config_for("dwconv", dim=dim, **size)

    def outputs(batch: int) -> Specs:
        partials = ck.dwconv_partials_shape(batch, height, width, dim, config)
        return {"y": ((batch * height * width, dim), dtype), "partials": (partials, torch.float32)}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.dwconv(**images, **weights, **outs, batch=batch, config=form.config, **size)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        y, sums = reference.dwconv_silu(**images, **weights, batch=batch, **size)
        return {"y": y, "sums": sums}

    return form.case(
        "dwconv",
        f"B{batch} {height}x{width} C{dim} SiLU",
        batch,
        {"x": randn(batch * height * width, dim, seed=11, dtype=dtype)},
        {"w": randn(49, dim, seed=12, scale=1 / 7, dtype=dtype).float(), "b": randn(dim, seed=13, dtype=dtype).float()},
        outputs=outputs,
        call=call,
        reference=truth,
        results=lambda outs, batch: {"y": outs["y"], "sums": outs["partials"].sum(1)},
        relative={"sums": 1e-5},
    )


def project(
    form: Form, batch: int, tokens: int, hidden: int, dim: int, multiply: bool = True, sums: str = "scaled"
) -> Case:
    """By a factor or plain, in place, with the sums of squares that `sums` names: none, plain or scaled."""
    dtype, total = form.dtype, batch * tokens
    config = form.config_for("project", tokens_per_image=tokens, hidden=hidden, dim=dim)
    images = {"h": randn(total, hidden, seed=6, dtype=dtype), "residual": randn(total, dim, seed=8, dtype=dtype)}
    if multiply:
        images["gain"] = torch.sigmoid(randn(batch, hidden, seed=7)).to(dtype)
    weights = {"w2": randn(hidden, dim, seed=9, scale=hidden**-0.5, dtype=dtype), "b2": randn(dim, seed=10, scale=0.1)}
    if sums == "scaled":
        weights["scale"] = 1 + randn(dim, seed=46, scale=0.3)
    names = {"none": (), "plain": ("sumsq",), "scaled": ("sumsq", "scaled_sumsq")}[sums]
    options: dict[str, Any] = {"tokens_per_image": tokens, "multiply": multiply}

    def outputs(batch: int) -> Specs:
        rows = batch * tokens
        specs: Specs = {"out": ((rows, dim), dtype)}
        specs |= dict.fromkeys(names, (ck.project_sumsq_shape(rows, dim, config), torch.float32))
        workspace = ck.project_workspace_shape(rows, dim, config)
        return specs if workspace is None else specs | {"workspace": (workspace, torch.float32)}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        outs["out"].copy_(images["residual"])
        operands = {"gain": None} | images | {"residual": outs["out"]}
        ck.project(**operands, **weights, **outs, **options, config=form.config)

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        w = {name: t for name, t in weights.items() if name != "scale"}
        out = reference.project(**({"gain": None} | images), **w, **options)
        found = {"out": out, "sumsq": reference.row_squares(out)}
        if sums == "scaled":
            found["scaled_sumsq"] = reference.row_squares(out, weights["scale"])
        return {name: found[name] for name in ("out", *names)}

    def results(outs: Tensors, batch: int) -> Tensors:
        return {"out": outs["out"]} | {name: outs[name].sum(1, keepdim=True) for name in names}

    return form.case(
        "project",
        f"B{batch} T{tokens} F{hidden} D{dim} {'times' if multiply else 'plain'} sums {sums} in place",
        batch,
        images,
        weights,
        outputs=outputs,
        call=call,
        reference=truth,
        results=results,
        # a product by a factor is rounded on its way to the tensor cores
        relative=dict.fromkeys(names, 4e-3 if multiply else 1e-4),
        filled=frozenset({"out"}),
    )


def latents_up(form: Form, batch: int, grid: tuple[int, int], channels: int, dim: int) -> Case:
    """Patchify without an image."""

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.patchify(None, **images, **weights, **outs, patch=16, config=form.config)

    return form.case(
        "patchify",
        f"B{batch} {grid[0]}x{grid[1]} D{dim} Z{channels} alone",
        batch,
        {"latents": randn(batch, channels, *grid, seed=15)},
        {
            "w": randn(channels, dim, seed=16, scale=channels**-0.5, dtype=form.dtype),
            "b": randn(dim, seed=17, scale=0.1),
        },
        outputs=lambda batch: {"tokens": ((batch * math.prod(grid), dim), form.dtype)},
        call=call,
        reference=lambda images, weights, batch: {"tokens": reference.patchify(None, **images, **weights, patch=16)},
    )
