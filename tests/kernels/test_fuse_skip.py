"""Fuse skip against float64: shapes, dtypes, stray accesses, determinism, bad inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    GRIDS,
    Guarded,
    assert_close,
    assert_same_bits,
    exact,
    grid_id,
    guarded_input,
    guarded_output,
    needs_gpu,
    randn,
    tolerance,
)

from capacitor_kernels import reference
from capacitor_kernels.gemm import GemmConfig
from capacitor_kernels.launch import compute_capability
from capacitor_kernels.ops.fuse_skip import fuse_skip
from capacitor_kernels.tuning import lookup

DIM, WIDTH = 72, 100
CONFIG = GemmConfig(128, 128, 64, group_m=4, num_warps=4, num_stages=2)


@dataclass
class Case:
    """Inputs of one call and its output between guard bands."""

    s: torch.Tensor
    m: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor
    out: Guarded
    tokens_per_image: int
    config: GemmConfig | None

    def run(self) -> torch.Tensor:
        inputs = (self.s, self.m, self.w, self.b)
        fuse_skip(*inputs, self.out.tensor, tokens_per_image=self.tokens_per_image, config=self.config)
        self.out.check()
        return self.out.tensor

    def reference(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return reference.fuse_skip(self.s.to(dtype), self.m.to(dtype), self.w, self.b)


def make_case(
    batch: int,
    tokens_per_image: int,
    dtype: torch.dtype,
    *,
    dim: int = DIM,
    width: int = WIDTH,
    config: GemmConfig | None = CONFIG,
    heavy: bool = False,
) -> Case:
    tokens = batch * tokens_per_image
    return Case(
        guarded_input(randn(tokens, dim, seed=0, heavy=heavy), dtype),
        guarded_input(randn(tokens, dim, seed=1, heavy=heavy), dtype),
        guarded_input(randn(2 * dim, width, seed=2, scale=(2 * dim) ** -0.5), dtype),
        guarded_input(randn(width, seed=3, scale=0.1)),
        guarded_output(tokens, width, dtype=dtype),
        tokens_per_image,
        config,
    )


def check_case(case: Case, dtype: torch.dtype) -> None:
    assert_close("out", case.run(), case.reference(), case.reference(dtype), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS[:-1], ids=grid_id)
def test_matches_float64(grid, batch, dtype):
    check_case(make_case(batch, grid[0] * grid[1], dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heavy_tails(dtype):
    check_case(make_case(2, 70, dtype, heavy=True), dtype)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 90),
    dim=st.integers(1, 90),
    width=st.integers(1, 150),
    block_m=st.sampled_from([16, 64]),
    group_m=st.integers(1, 5),
)
def test_any_shape(tokens, dim, width, block_m, group_m):
    config = GemmConfig(block_m, 64, 32, group_m, 4, 2)
    check_case(make_case(1, tokens, torch.float32, dim=dim, width=width, config=config), torch.float32)


def test_an_image_does_not_see_its_batch_and_runs_repeat():
    whole = exact(make_case(3, 35, torch.float32))
    out = whole.run().clone()
    assert_same_bits("second run", out, whole.run())
    for image in range(3):
        rows = slice(image * 35, (image + 1) * 35)
        alone = exact(make_case(1, 35, torch.float32))
        alone.s, alone.m = guarded_input(whole.s[rows]), guarded_input(whole.m[rows])
        assert_same_bits(f"image {image}", out[rows], alone.run())


@pytest.mark.parametrize("use", ["throughput", "latency"])
def test_config_is_looked_up_by_the_shape_of_one_image(use):
    shape = {"tokens_per_image": 35, "dim": DIM, "width": WIDTH}
    config = lookup("fuse_skip", compute_capability(DEVICE), shape, torch.float32, use)
    check_case(make_case(1, 35, torch.float32, config=None if use == "throughput" else config), torch.float32)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


BAD = {
    "s dtype": ({"s": _zeros(70, DIM, dtype=torch.float64)}, TypeError, "s is float64"),
    "s rows": ({"s": _zeros(69, DIM)}, ValueError, "s has 69 rows, not a positive multiple"),
    "m shape": ({"m": _zeros(70, DIM - 1)}, ValueError, "m has shape .* is 71, not 72"),
    "m dtype": ({"m": _zeros(70, DIM, dtype=torch.float16)}, TypeError, "m is fp16, expected fp32"),
    "w size": ({"w": _zeros(DIM, WIDTH)}, ValueError, "w has shape .* dimension 0 is 72, not 144"),
    "w stride": ({"w": _zeros(WIDTH, 2 * DIM).t()}, ValueError, "w of shape .* row-major"),
    "b size": ({"b": _zeros(WIDTH - 4)}, ValueError, "b has shape"),
    "b alignment": ({"b": _zeros(WIDTH + 1)[1:]}, ValueError, "b starts at an address 4 bytes past"),
    "tokens_per_image": ({"tokens_per_image": 0}, ValueError, "tokens_per_image is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, error, message = BAD[name]
    case = replace(make_case(2, 35, torch.float32), **changes)
    with pytest.raises(error, match=message):
        case.run()
    assert case.out.tensor.isnan().all(), "refused after the launch"


def test_bad_outputs_are_named():
    case = make_case(2, 35, torch.float32, width=DIM)
    with pytest.raises(ValueError, match="out shares its memory with m"):
        fuse_skip(case.s, case.m, case.w, case.b, case.m, tokens_per_image=35)
    with pytest.raises(TypeError, match="out is fp16, expected fp32"):
        replace(case, out=guarded_output(70, DIM, dtype=torch.float16)).run()


@pytest.mark.slow
def test_real_size_under_the_interpreter():
    config = lookup("fuse_skip", 90, {"tokens_per_image": 256, "dim": 896, "width": 896}, torch.bfloat16)
    check_case(make_case(1, 256, torch.float32, dim=896, width=896, config=config), torch.float32)


@needs_gpu
@pytest.mark.parametrize(("batch", "tokens"), [(128, 256), (3, 196), (1, 16384)])
@pytest.mark.parametrize("use", ["throughput", "latency"])
def test_bf16_at_real_size(batch, tokens, use):
    shape = {"tokens_per_image": tokens, "dim": 896, "width": 896}
    config = lookup("fuse_skip", compute_capability(DEVICE), shape, torch.bfloat16, use)
    case = make_case(batch, tokens, torch.bfloat16, dim=896, width=896, config=config)
    assert_close("out", case.run(), case.reference(), case.reference(torch.bfloat16), max_ratio=0.1)
    first = case.run().clone()
    assert_same_bits("second run", first, case.run())
