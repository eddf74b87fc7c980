"""The forms of expand, dwconv, project and patchify that DiCo blocks take, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    Guarded,
    assert_close,
    assert_same_bits,
    guarded_input,
    guarded_output,
    randn,
    tolerance,
)

from capacitor_kernels import (
    dwconv,
    dwconv_partials_shape,
    expand,
    patchify,
    project,
    project_sumsq_shape,
    project_workspace_shape,
    reference,
)
from capacitor_kernels.gemm import GemmConfig
from capacitor_kernels.ops.dwconv import DwconvConfig
from capacitor_kernels.tuning import lookup

DIM, HIDDEN = 72, 200
GEMM = GemmConfig(64, 64, 32, group_m=4, num_warps=4, num_stages=2)
SPLIT = replace(GEMM, split_k=3)
SUMS = {"floor": 1e-5, "max_ratio": 1e-4}


def cast(tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: t.to(dtype) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}


# expand


def expand_inputs(tokens: int, dtype: torch.dtype, scale: torch.Tensor | None) -> dict[str, torch.Tensor]:
    y = randn(tokens, DIM, seed=1, heavy=True).to(dtype)
    w1 = randn(DIM, HIDDEN, seed=2, scale=DIM**-0.5)
    squares = [reference.row_squares(y), reference.row_squares(y, scale)]
    parts = [s * torch.tensor([[0.25, 0.75]]) for s in squares]
    return {
        "y": guarded_input(y, dtype),
        "w1": guarded_input(w1 if scale is None else w1 * scale[:, None], dtype),
        "b1": guarded_input(randn(HIDDEN, seed=3, scale=0.1)),
        "sumsq": guarded_input(parts[0]),
        "scaled_sumsq": guarded_input(parts[1]),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_image", [1, 35, 64])
@pytest.mark.parametrize("form", ["plain", "double", "scaled"])
def test_expand(form, per_image, dtype):
    scale = 1 + 0.5 * randn(DIM, seed=9) if form == "scaled" else None
    inputs: dict[str, Any] = expand_inputs(2 * per_image, dtype, scale)
    if form == "plain":
        del inputs["scaled_sumsq"]
    gelu = "none" if form == "plain" else "erf"
    h = guarded_output(2 * per_image, HIDDEN, dtype=dtype)
    expand(**inputs, h=h.tensor, tokens_per_image=per_image, gelu=gelu, config=GEMM)
    h.check()
    truth, _ = reference.expand(**cast(inputs, torch.float64), tokens_per_image=per_image, gelu=gelu)
    eager, _ = reference.expand(**inputs, tokens_per_image=per_image, gelu=gelu)
    assert_close("h", h.tensor, truth, eager, **tolerance(dtype))


def test_expand_takes_the_norms_one_after_the_other():
    """What the sums of squares stand for: rmsnorm, a scale, rmsnorm."""
    scale = 1 + 0.5 * randn(DIM, seed=9)
    inputs = expand_inputs(70, torch.float32, scale)
    y, w1 = inputs["y"].double(), inputs["w1"].double() / scale.double()[:, None]
    one, zero = torch.ones(DIM).double(), torch.zeros(DIM).double()
    normed = reference.rmsnorm(reference.rmsnorm(y, one, zero) * scale.double(), one, zero)
    h = guarded_output(70, HIDDEN, dtype=torch.float32)
    expand(**inputs, h=h.tensor, tokens_per_image=35, gelu="none", config=GEMM)
    assert_close("h", h.tensor, normed @ w1 + inputs["b1"].double(), floor=2e-6, max_ratio=3e-5)


# dwconv


def dwconv_case(batch: int, height: int, width: int, dim: int, dtype: torch.dtype, config: DwconvConfig, seed: int = 0):
    inputs = {
        "x": guarded_input(randn(batch * height * width, dim, seed=seed), dtype),
        "w": guarded_input(randn(49, dim, seed=seed + 1, scale=1 / 7)),
        "b": guarded_input(randn(dim, seed=seed + 2)),
    }
    y = guarded_output(batch * height * width, dim, dtype=dtype)
    partials = guarded_output(*dwconv_partials_shape(batch, height, width, dim, config), dtype=torch.float32)
    size = {"batch": batch, "height": height, "width": width}
    dwconv(**inputs, y=y.tensor, partials=partials.tensor, **size, config=config)
    y.check()
    partials.check()
    return inputs, y.tensor, partials.tensor, size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (16, 16)])
def test_dwconv_silu(height, width, dtype):
    config = lookup("dwconv", 90, {"height": height, "width": width, "dim": 40}, dtype)
    inputs, y, partials, size = dwconv_case(2, height, width, 40, dtype, config)
    truth, sums = reference.dwconv_silu(**cast(inputs, torch.float64), **size)
    eager, _ = reference.dwconv_silu(**inputs, **size)
    assert_close("y", y, truth, eager, **tolerance(dtype))
    # from what was not rounded yet
    assert_close("sums", partials.sum(1), sums, floor=2e-6, max_ratio=3e-5)


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 2]))
def test_dwconv_silu_of_any_shape(batch, height, width, dim, strips_x):
    config = DwconvConfig(cols=4, strips_x=strips_x, strips_y=2, block_c=32, num_warps=1)
    inputs, y, partials, size = dwconv_case(batch, height, width, dim, torch.float32, config)
    truth, sums = reference.dwconv_silu(**cast(inputs, torch.float64), **size)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(partials.double().sum(1), sums, rtol=1e-5, atol=1e-5 * height * width)


def test_dwconv_silu_does_not_see_the_batch():
    config = DwconvConfig(cols=4, strips_x=1, strips_y=4, block_c=32, num_warps=1)
    inputs, y, partials, _ = dwconv_case(3, 7, 5, 40, torch.float32, config)
    for image in range(3):
        rows = slice(image * 35, (image + 1) * 35)
        alone = guarded_output(35, 40, dtype=torch.float32)
        sums = guarded_output(*partials[:1].shape, dtype=torch.float32)
        x = guarded_input(inputs["x"][rows])
        dwconv(
            x, inputs["w"], inputs["b"], alone.tensor, partials=sums.tensor, batch=1, height=7, width=5, config=config
        )
        assert_same_bits("y", y[rows], alone.tensor)
        assert_same_bits("partials", partials[image : image + 1], sums.tensor)


# project


def project_case(
    form: str,
    sums: str,
    per_image: int,
    dtype: torch.dtype,
    config: GemmConfig = GEMM,
    batch: int = 2,
    dim: int = DIM,
    in_place: bool = False,
) -> tuple[dict[str, Any], dict[str, Guarded], torch.Tensor]:
    """(inputs, outputs, the residual as it was) of a call."""
    tokens = batch * per_image
    inputs: dict[str, Any] = {
        "h": guarded_input(randn(tokens, HIDDEN, seed=1), dtype),
        "gain": guarded_input(torch.sigmoid(randn(batch, HIDDEN, seed=2)), dtype) if form == "multiply" else None,
        "w2": guarded_input(randn(HIDDEN, dim, seed=3, scale=HIDDEN**-0.5), dtype),
        "b2": guarded_input(randn(dim, seed=4, scale=0.1)),
        "residual": guarded_input(randn(tokens, dim, seed=5), dtype),
        "multiply": form == "multiply",
    }
    outputs = {"out": guarded_output(tokens, dim, dtype=dtype)}
    if sums != "none":
        outputs["sumsq"] = guarded_output(*project_sumsq_shape(tokens, dim, config), dtype=torch.float32)
    if sums == "scaled":
        inputs["scale"] = guarded_input(1 + 0.5 * randn(dim, seed=6))
        outputs["scaled_sumsq"] = guarded_output(*project_sumsq_shape(tokens, dim, config), dtype=torch.float32)
    needed = project_workspace_shape(tokens, dim, config)
    if needed is not None:
        outputs["workspace"] = guarded_output(*needed, dtype=torch.float32)
    residual = inputs["residual"].clone()
    if in_place:
        outputs["out"] = Guarded((tokens, dim), dtype, residual)
        inputs["residual"] = outputs["out"].tensor
    project(**inputs, **{n: g.tensor for n, g in outputs.items()}, tokens_per_image=per_image, config=config)
    for guarded in outputs.values():
        guarded.check()
    return inputs, outputs, residual


def check_project(form: str, sums: str, per_image: int, dtype: torch.dtype, **rest: Any) -> None:
    inputs, outputs, residual = project_case(form, sums, per_image, dtype, **rest)
    plain = {name: inputs[name] for name in ("h", "gain", "w2", "b2")} | {"residual": residual}
    options = {"tokens_per_image": per_image, "multiply": inputs["multiply"]}
    truth = reference.project(**cast(plain, torch.float64), **options)
    assert_close("out", outputs["out"].tensor, truth, reference.project(**plain, **options), **tolerance(dtype))
    # sums of what was not rounded yet; a product in float16 is, on its way to the matrix units
    limits = SUMS if dtype == torch.float32 or form == "none" else {"floor": 1e-3, "max_ratio": 5e-3}
    if sums != "none":
        assert_close("sumsq", outputs["sumsq"].tensor.sum(1, keepdim=True), reference.row_squares(truth), **limits)
    if sums == "scaled":
        expected = reference.row_squares(truth, inputs["scale"].double())
        assert_close("scaled", outputs["scaled_sumsq"].tensor.sum(1, keepdim=True), expected, **limits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_image", [35, 64])
@pytest.mark.parametrize("config", [GEMM, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("sums", ["none", "sums", "scaled"])
@pytest.mark.parametrize("form", ["multiply", "none"])
def test_project(form, sums, config, per_image, dtype):
    check_project(form, sums, per_image, dtype, config=config)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 140), st.sampled_from([1, 2]))
def test_project_of_any_shape(batch, per_image, dim, split_k):
    config = replace(GEMM, split_k=split_k)
    check_project("multiply", "scaled", per_image, torch.float32, batch=batch, dim=dim, config=config)


@pytest.mark.parametrize("config", [GEMM, SPLIT], ids=["whole", "split"])
def test_project_in_place(config):
    _, apart, _ = project_case("multiply", "scaled", 35, torch.float32, config)
    _, within, _ = project_case("multiply", "scaled", 35, torch.float32, config, in_place=True)
    for name in ("out", "sumsq", "scaled_sumsq"):
        assert_same_bits(name, apart[name].tensor, within[name].tensor)


def test_a_small_factor_is_no_gain():
    """A factor near zero keeps its digits, which 1 + (factor - 1) would lose."""
    form = {"tokens_per_image": 16, "config": GEMM}
    h, w2 = torch.ones(16, 32), torch.eye(32)
    factor = torch.full((1, 32), 2.0**-20).half()
    out = torch.zeros(16, 32).half()
    project(h.half(), factor, w2.half(), torch.zeros(32), torch.zeros(16, 32).half(), out, multiply=True, **form)
    assert (out == 2.0**-20).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gain": None, "multiply": True}, "multiply needs a gain"),
        ({"scale": torch.ones(64)}, "pass scale and scaled_sumsq both, and beside sumsq"),
        ({"scale": torch.ones(64), "scaled_sumsq": torch.zeros(32, 1)}, "and beside sumsq"),
        ({"sumsq": torch.zeros(32, 2)}, "sumsq has shape"),
    ],
)
def test_bad_arguments_of_project(changes, message):
    arguments: dict[str, Any] = {
        "h": torch.zeros(32, 48),
        "gain": torch.zeros(1, 48),
        "w2": torch.zeros(48, 64),
        "b2": torch.zeros(64),
        "residual": torch.zeros(32, 64),
        "out": torch.zeros(32, 64),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        project(**arguments | changes, tokens_per_image=32, config=GEMM)


def test_dwconv_takes_one_kind_of_sums():
    arguments = {"x": torch.zeros(4, 8), "w": torch.zeros(49, 8), "b": torch.zeros(8), "y": torch.zeros(4, 8)}
    for sums in ({}, {"sumsq": torch.zeros(4, 1), "partials": torch.zeros(1, 1, 8)}):
        with pytest.raises(ValueError, match="pass sumsq, or partials for the form with SiLU"):
            dwconv(**arguments, **sums, batch=1, height=2, width=2)


# patchify


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "grid", "channels"), [(1, (4, 4), 16), (3, (3, 5), 12), (2, (16, 16), 40)])
def test_patchify_of_latents_alone(batch, grid, channels, dtype):
    inputs = {
        "latents": guarded_input(randn(batch, channels, *grid, seed=1)),
        "w": guarded_input(randn(channels, DIM, seed=2, scale=channels**-0.5), dtype),
        "b": guarded_input(randn(DIM, seed=3)),
    }
    tokens = guarded_output(batch * grid[0] * grid[1], DIM, dtype=dtype)
    patchify(None, inputs["w"], inputs["b"], tokens.tensor, patch=8, latents=inputs["latents"], config=GEMM)
    tokens.check()
    truth = reference.patchify(None, **cast(inputs, torch.float64), patch=8)
    assert_close("tokens", tokens.tensor, truth, reference.patchify(None, **inputs, patch=8), **tolerance(dtype))


def test_patchify_needs_something():
    with pytest.raises(ValueError, match="neither image nor latents are given"):
        patchify(None, torch.zeros(8, 8), torch.zeros(8), torch.zeros(4, 8), patch=8)
    with pytest.raises(ValueError, match="at least one image, channel and pixel"):
        patchify(None, torch.zeros(8, 8), torch.zeros(8), torch.zeros(4, 8), patch=8, latents=torch.zeros(1, 8, 0, 1))
