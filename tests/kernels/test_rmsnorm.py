"""RMSNorm with weight and bias against float64: shapes, dtypes, sums, in place, bad inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, assert_close, assert_same_bits, guarded_input, guarded_output, randn, tolerance

from capacitor_kernels import reference, rmsnorm
from capacitor_kernels.ops.rmsnorm import RmsnormConfig


def inputs_of(tokens: int, dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "x": guarded_input(randn(tokens, dim, seed=1, heavy=True) * 3, dtype),
        "weight": guarded_input(1 + randn(dim, seed=2)),
        "bias": guarded_input(randn(dim, seed=3)),
    }


def check(tokens: int, dim: int, dtype: torch.dtype, config: RmsnormConfig | None = None) -> None:
    inputs = inputs_of(tokens, dim, dtype)
    out, sumsq = guarded_output(tokens, dim, dtype=dtype), guarded_output(tokens, 1, dtype=torch.float32)
    rmsnorm(**inputs, out=out.tensor, sumsq=sumsq.tensor, config=config)
    out.check()
    sumsq.check()
    truth = reference.rmsnorm(*(t.double() for t in inputs.values()))
    assert_close("out", out.tensor, truth, reference.rmsnorm(*inputs.values()), **tolerance(dtype))
    # of what was not rounded yet
    assert_close("sumsq", sumsq.tensor, reference.row_squares(truth), floor=1e-6, max_ratio=3e-5)
    alone = guarded_output(tokens, 1, dtype=torch.float32)
    rmsnorm(inputs["x"], sumsq=alone.tensor, config=config)
    alone.check()
    assert_close("sums", alone.tensor, reference.row_squares(inputs["x"].double()), floor=1e-6, max_ratio=3e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (5, 40), (70, 136), (64, 256), (9, 896)])
def test_matches_float64(tokens, dim, dtype):
    check(tokens, dim, dtype)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from([1, 2, 8]))
def test_any_shape(tokens, dim, rows):
    check(tokens, dim, torch.float32, RmsnormConfig(rows, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype):
    inputs = inputs_of(33, 72, dtype)
    apart = guarded_output(33, 72, dtype=dtype)
    rmsnorm(**inputs, out=apart.tensor)
    rmsnorm(**inputs, out=inputs["x"])
    assert_same_bits("out", inputs["x"], apart.tensor)


def test_a_row_does_not_see_the_others():
    inputs = inputs_of(21, 100, torch.float32)
    out = guarded_output(21, 100, dtype=torch.float32)
    rmsnorm(**inputs, out=out.tensor)
    alone = guarded_output(1, 100, dtype=torch.float32)
    rmsnorm(guarded_input(inputs["x"][13:14]), inputs["weight"], inputs["bias"], alone.tensor)
    assert_same_bits("row 13", out.tensor[13:14], alone.tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4)}, "x has shape"),
        ({"x": torch.zeros(0, 8), "out": torch.zeros(0, 8)}, "at least one token and channel"),
        ({"bias": None}, "bias missing: pass weight, bias and out together"),
        ({"weight": None, "bias": None, "out": None}, "neither out nor sumsq is given"),
        ({"out": torch.zeros(4, 8, dtype=torch.float16)}, "out is fp16, expected fp32"),
        ({"weight": torch.zeros(7)}, "weight has shape"),
        ({"sumsq": torch.zeros(4, 2)}, "sumsq has shape"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {"x": torch.zeros(4, 8), "weight": torch.ones(8), "bias": torch.zeros(8), "out": torch.zeros(4, 8)}
    with pytest.raises((ValueError, TypeError), match=message):
        rmsnorm(**arguments | changes)
