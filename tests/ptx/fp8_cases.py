"""Cases of encoders in e4m3. What a kernel rounds may fall to the neighbouring number where a sum is on the edge."""

from __future__ import annotations

import torch

import capacitor_kernels as ck
from capacitor_kernels import reference

from .cases import Case, Form, Specs, Tensors, randn

E4M3 = torch.float8_e4m3fn
# of values that lie so near the middle of two numbers that the order of a sum decides
_ON_EDGE = 2e-3


def _edges(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """`[1]`: one, and the share of values that are not the rounded ones over what may be; those far off count 1000.

    Empty for an image of them alone, which is compared by its bits.
    """
    if got.shape != exact.shape:
        return torch.ones(0)
    wanted = reference.e4m3(exact).double()
    differ = got.double() != wanted
    nearest = (wanted - exact.double()).abs()
    far = (got.double() - exact.double()).abs() > nearest * (1 + 1e-3) + 1e-3 * exact.double().abs() + 1e-7
    return 1 + (differ.double() + 1000 * (far & differ).double()).mean()[None] / _ON_EDGE


def expand(form: Form, batch: int, tokens: int, dim: int, hidden: int) -> Case:
    total = batch * tokens
    shape = {"tokens_per_image": tokens, "dim": dim, "hidden": hidden}
    config = form.config or ck.lookup("expand_fp8", form.cc, shape, E4M3)
    y = randn(total, dim, seed=1)
    weights = {
        "w1": reference.e4m3(randn(hidden, dim, seed=2, scale=100)),
        "scale": randn(hidden, seed=3).abs() + 0.5,
        "b1": randn(hidden, seed=4, scale=0.1),
        "h_inverse": randn(hidden, seed=5).abs() * 30 + 10,
    }
    weights["scale"] /= 3000 * dim**0.5
    images = {"y": reference.e4m3(y * 30), "sumsq": y.square().sum(1, keepdim=True)}
    exact = reference.expand_fp8(
        **{name: t.double() for name, t in (images | weights).items()}, tokens_per_image=tokens
    )

    def outputs(batch: int) -> Specs:
        partials = ck.expand_fp8_partials_shape(batch, tokens, hidden, config)
        return {"h": ((batch * tokens, hidden), E4M3), "partials": (partials, torch.float32)}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.expand_fp8(**images, **weights, **outs, tokens_per_image=tokens, config=form.config)

    def results(outs: Tensors, batch: int) -> Tensors:
        return {"h": outs["h"].float(), "sums": outs["partials"].sum(1), "edges": _edges(outs["h"], exact[0])}

    def truth(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        h, sums = exact
        return {"h": reference.e4m3(h).double(), "sums": sums, "edges": torch.ones(1)}

    return form.case(
        "expand_fp8",
        f"B{batch} T{tokens} D{dim} F{hidden}",
        batch,
        images,
        weights,
        outputs=outputs,
        call=call,
        reference=truth,
        results=results,
        relative={"h": 5e-3, "sums": 1e-5, "edges": 1.0},
    )


def project(form: Form, batch: int, tokens: int, hidden: int, dim: int, in_place: bool = False) -> Case:
    total, shape = batch * tokens, {"tokens_per_image": tokens, "hidden": hidden, "dim": dim}
    config = form.config or ck.lookup("project_fp8", form.cc, shape, E4M3)
    images = {
        "h": reference.e4m3(torch.nn.functional.gelu(randn(total, hidden, seed=6)) * 60),
        "gain": randn(batch, hidden, seed=7, scale=0.4, dtype=torch.float16),
        "residual": randn(total, dim, seed=8, dtype=form.dtype),
    }
    weights = {
        "w2": randn(dim, hidden, seed=9, scale=50, dtype=torch.float16),
        "w2_scale": (randn(dim, seed=10).abs() + 0.5) / (3000 * hidden**0.5),
        "b2": randn(dim, seed=11, scale=0.1),
    }

    def outputs(batch: int) -> Specs:
        specs: Specs = {"out": ((batch * tokens, dim), form.dtype)}
        workspace = ck.project_workspace_shape(batch * tokens, dim, config)
        return specs if workspace is None else specs | {"workspace": (workspace, torch.float32)}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        if in_place:
            outs["out"].copy_(images["residual"])
            images = images | {"residual": outs["out"]}
        ck.project_fp8(**images, **weights, **outs, tokens_per_image=tokens, config=form.config)

    def plain(images: Tensors, weights: Tensors, batch: int) -> Tensors:
        exact = images["residual"].dtype == torch.float64
        # the weights' rounding belongs to what is computed, so operands of it stay as they are
        operands = {name: t.to(kind) for name, t, kind in (
            ("h", images["h"], E4M3), ("gain", images["gain"], torch.float16), ("w2", weights["w2"], torch.float16)
        )}  # fmt: skip
        rest = {name: weights[name] for name in ("w2_scale", "b2")} | {"residual": images["residual"]}
        out = reference.project_fp8(**operands, **rest, tokens_per_image=tokens)
        return {"out": out if exact else out.to(form.dtype)}

    return form.case(
        "project_fp8",
        f"B{batch} T{tokens} F{hidden} D{dim}" + (" in place" if in_place else ""),
        batch,
        images,
        weights,
        outputs=outputs,
        call=call,
        reference=plain,
        results=lambda outs, batch: {"out": outs["out"]},
        filled=frozenset({"out"} if in_place else ()),
    )


def dwconv(form: Form, batch: int, height: int, width: int, dim: int) -> Case:
    size, inverse = {"height": height, "width": width}, torch.tensor([7.0])
    config = form.config_for("dwconv", dim=dim, **size)
    tokens = batch * height * width
    images = {"x": randn(tokens, dim, seed=12, dtype=form.dtype)}
    weights = {"w": randn(49, dim, seed=13, scale=1 / 7), "b": randn(dim, seed=14), "y_inverse": inverse}
    wide = {name: t.double() for name, t in (images | weights).items() if name != "y_inverse"}
    exact, exact_sums = reference.dwconv(**wide, batch=batch, **size)

    def outputs(batch: int) -> Specs:
        count = batch * height * width
        return {"y": ((count, dim), E4M3), "sumsq": (ck.dwconv_sumsq_shape(count, dim, config), torch.float32)}

    def call(images: Tensors, weights: Tensors, outs: Tensors, batch: int) -> None:
        ck.dwconv(**images, **weights, **outs, batch=batch, config=form.config, **size)

    def results(outs: Tensors, batch: int) -> Tensors:
        sums = outs["sumsq"].sum(1, keepdim=True)
        return {"y": outs["y"].float(), "sums": sums, "edges": _edges(outs["y"], exact * 7)}

    return form.case(
        "dwconv",
        f"in e4m3 B{batch} {height}x{width} C{dim}",
        batch,
        images,
        weights,
        outputs=outputs,
        call=call,
        reference=lambda images, weights, batch: {
            "y": reference.e4m3(exact * 7).double(),
            "sums": exact_sums,
            "edges": torch.ones(1),
        },
        results=results,
        relative={"y": 5e-3, "sums": 1e-5, "edges": 1.0},
    )
