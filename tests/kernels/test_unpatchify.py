"""Unpatchify against float64: pixel order, noise, image types, odd grids, determinism, bad inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
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
from capacitor_kernels.ops.unpatchify import unpatchify
from capacitor_kernels.tuning import lookup

DIM, PATCH = 72, 8
CONFIG = GemmConfig(128, 128, 64, group_m=4, num_warps=4, num_stages=2)
GRIDS = [(1, 1), (2, 6), (7, 5), (14, 14), (16, 16)]
SCALES = (0.9999319019, 0.25)


@dataclass
class Case:
    """Inputs of one call and its output between guard bands."""

    tokens: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor
    image: Guarded
    noise: torch.Tensor | None
    patch: int
    scale_x0: float
    scale_noise: float
    config: GemmConfig | None

    def options(self) -> dict:
        scales = {"scale_x0": self.scale_x0, "scale_noise": self.scale_noise}
        return {"patch": self.patch, "noise": self.noise} | scales

    def run(self) -> torch.Tensor:
        unpatchify(self.tokens, self.w, self.b, self.image.tensor, **self.options(), config=self.config)
        self.image.check()
        return self.image.tensor

    def reference(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        grid = (self.image.tensor.shape[2] // self.patch, self.image.tensor.shape[3] // self.patch)
        return reference.unpatchify(self.tokens.to(dtype), self.w, self.b, grid=grid, **self.options())


def make_case(
    batch: int,
    grid: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    out: torch.dtype | None = None,
    noise: torch.dtype | None = torch.float32,
    patch: int = PATCH,
    dim: int = DIM,
    config: GemmConfig | None = CONFIG,
    heavy: bool = False,
) -> Case:
    shape = (batch, 3, grid[0] * patch, grid[1] * patch)
    depth = 3 * patch * patch
    return Case(
        guarded_input(randn(batch * grid[0] * grid[1], dim, seed=0, heavy=heavy), dtype),
        guarded_input(randn(dim, depth, seed=1, scale=0.5 * dim**-0.5), dtype),
        guarded_input(randn(depth, seed=2, scale=0.1)),
        guarded_output(*shape, dtype=out or dtype),
        guarded_input(randn(*shape, seed=3), noise) if noise else None,
        patch,
        SCALES[0] if noise else 1.0,
        SCALES[1] if noise else 0.0,
        config,
    )


def check_case(case: Case, dtype: torch.dtype) -> None:
    baseline = case.reference(dtype).to(case.image.tensor.dtype)
    assert_close("image", case.run(), case.reference(), baseline, **tolerance(dtype))


@pytest.mark.parametrize("noise", [None, torch.float32], ids=["x0", "axpy"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_matches_float64(grid, batch, noise):
    check_case(make_case(batch, grid, noise=noise), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_and_heavy_tails(dtype):
    check_case(make_case(2, (7, 5), dtype, heavy=True), dtype)


def test_dtypes_of_tokens_noise_and_image_are_free():
    for noise in (torch.float16, torch.bfloat16):
        check_case(make_case(2, (3, 5), torch.float32, noise=noise), torch.float32)
    check_case(make_case(2, (3, 5), torch.float16, out=torch.float32), torch.float16)


@pytest.mark.parametrize("noise", [None, torch.float32], ids=["x0", "axpy"])
def test_bytes_are_rounded_and_clamped(noise):
    case = make_case(2, (7, 5), out=torch.uint8, noise=noise)
    case.tokens *= 2.0
    got, exact = case.run(), case.reference()
    expected = reference.pixels_to_bytes(exact)
    assert (expected == 0).any() and (expected == 255).any(), "the case does not reach the clamp"
    # a float32 sum may fall on the other side of a half: only there, and only by one
    differs = got != expected
    close_to_half = ((exact * 127.5 + 128.0) - (exact * 127.5 + 128.0).round()).abs() < 1e-3
    assert not (differs & ~close_to_half).any()
    assert (got.int() - expected.int()).abs().max() <= 1


def test_is_pixel_shuffle():
    # one token, one column of w set: exactly one pixel of its patch lights up
    case = make_case(1, (2, 3), noise=None)
    case.w.zero_()
    case.b.zero_()
    channel, row, column = 2, 5, 3
    case.w[:, channel * PATCH * PATCH + row * PATCH + column] = 1.0
    case.tokens.zero_()
    case.tokens[4, 0] = 7.0
    image = case.run()
    assert image[0, channel, PATCH + row, PATCH + column] == 7.0
    assert image.count_nonzero() == 1


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    patch=st.sampled_from([1, 2, 3, 5, 16]),
    dim=st.integers(1, 90),
)
def test_any_shape(batch, grid, patch, dim):
    config = GemmConfig(32, 128, 64, 2, 4, 2)
    check_case(make_case(batch, grid, patch=patch, dim=dim, config=config), torch.float32)


def test_an_image_does_not_see_its_batch_and_runs_repeat():
    whole = exact(make_case(3, (7, 5)))
    image = whole.run().clone()
    assert_same_bits("second run", image, whole.run())
    for i in range(3):
        alone = exact(make_case(1, (7, 5)))
        alone.tokens = guarded_input(whole.tokens[i * 35 : (i + 1) * 35])
        alone.noise = guarded_input(whole.noise[i : i + 1])
        assert_same_bits(f"image {i}", image[i : i + 1], alone.run())


@pytest.mark.parametrize("use", ["throughput", "latency"])
def test_config_is_looked_up_by_the_shape_of_one_image(use):
    key = {"tokens_per_image": 15, "dim": DIM, "depth": 3 * PATCH * PATCH}
    config = lookup("unpatchify", compute_capability(DEVICE), key, torch.float32, use)
    check_case(make_case(2, (3, 5), config=None if use == "throughput" else config), torch.float32)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


DEPTH = 3 * PATCH * PATCH
BAD = {
    "tokens dtype": ({"tokens": _zeros(30, DIM, dtype=torch.float64)}, TypeError, "tokens is float64"),
    "tokens rows": ({"tokens": _zeros(29, DIM)}, ValueError, "tokens has shape .* dimension 0 is 29, not 30"),
    "w size": ({"w": _zeros(DIM, DEPTH - 1)}, ValueError, "w has shape .* dimension 1 is 191, not 192"),
    "w dtype": ({"w": _zeros(DIM, DEPTH, dtype=torch.float16)}, TypeError, "w is fp16, expected fp32"),
    "b size": ({"b": _zeros(DEPTH + 4)}, ValueError, "b has shape"),
    "noise shape": ({"noise": _zeros(2, 3, 40, 24)}, ValueError, "noise has shape"),
    "noise dtype": ({"noise": _zeros(2, 3, 24, 40, dtype=torch.uint8)}, TypeError, "noise is uint8"),
    "noise missing": ({"noise": None}, ValueError, "noise is missing and scale_noise is 0.25"),
    "noise unused": ({"scale_noise": 0.0}, ValueError, "noise is given and scale_noise is 0.0"),
    "patch": ({"patch": 0}, ValueError, "patch is 0"),
    "height": ({"patch": 16}, ValueError, "height 24 of image is not a multiple of 16: use 16 or 32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, error, message = BAD[name]
    case = replace(make_case(2, (3, 5)), **changes)
    with pytest.raises(error, match=message):
        case.run()
    assert case.image.tensor.isnan().all(), "refused after the launch"


def test_bad_images_are_named():
    case = make_case(2, (3, 5))
    with pytest.raises(TypeError, match="image is int32"):
        replace(case, image=guarded_output(2, 3, 24, 40, dtype=torch.int32)).run()
    with pytest.raises(ValueError, match=r"image has shape .* dimension 1 is 4, not 3"):
        replace(case, image=guarded_output(2, 4, 24, 40, dtype=torch.float32)).run()


@pytest.mark.slow
def test_real_size_under_the_interpreter():
    config = lookup("unpatchify", 90, {"tokens_per_image": 256, "dim": 896, "depth": 768}, torch.bfloat16)
    check_case(make_case(1, (16, 16), patch=16, dim=896, config=config), torch.float32)


@needs_gpu
@pytest.mark.parametrize(("batch", "grid"), [(128, (16, 16)), (3, (14, 14)), (1, (128, 128)), (2, (2, 6))])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
def test_bf16_at_real_size(batch, grid, out):
    key = {"tokens_per_image": grid[0] * grid[1], "dim": 896, "depth": 768}
    config = lookup("unpatchify", compute_capability(DEVICE), key, torch.bfloat16)
    case = make_case(batch, grid, torch.bfloat16, out=out, patch=16, dim=896, config=config)
    baseline = case.reference(torch.bfloat16).to(out)
    assert_close("image", case.run(), case.reference(), baseline, max_ratio=0.1)
    first = case.run().clone()
    assert_same_bits("second run", first, case.run())
