"""Whiten and dewhiten against float64: shapes, dtypes, round trip, stray accesses, bad inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    assert_close,
    assert_same_bits,
    guarded_input,
    guarded_output,
    needs_gpu,
    randn,
    tolerance,
)

from capacitor_kernels import reference
from capacitor_kernels.gpu_limits import COMPUTE_CAPABILITIES
from capacitor_kernels.ops.whiten import WhitenConfig, dewhiten, whiten
from capacitor_kernels.tuning import lookup

SHAPES = [(1, 5, 1, 1), (3, 24, 7, 5), (2, 40, 14, 14), (1, 16, 32, 32), (1, 3, 50, 41), (1, 128, 16, 16)]
FORMS = {"whiten": (whiten, reference.whiten), "dewhiten": (dewhiten, reference.dewhiten)}


def statistics(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, positive scale) of [channels] on the test device."""
    return guarded_input(randn(channels, seed=1)), guarded_input(randn(channels, seed=2).abs() + 0.1)


def check(form: str, z: torch.Tensor, out_dtype: torch.dtype, config: WhitenConfig | None = None) -> torch.Tensor:
    launch, truth = FORMS[form]
    mean, scale = statistics(z.shape[1])
    out = guarded_output(*z.shape, dtype=out_dtype)
    launch(z, mean, scale, out.tensor, config=config)
    out.check()
    expected = truth(z.double(), mean, scale)
    assert_close(form, out.tensor, expected, expected.to(out_dtype), **tolerance(out_dtype))
    return out.tensor


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 5, 1, 1), (3, 24, 7, 5), (2, 128, 14, 14), (1, 16, 32, 32), (1, 3, 50, 41), (1, 128, 16, 16)], ids=str
)
def test_matches_float64(form, dtype, shape):
    check(form, guarded_input(randn(*shape, seed=3, heavy=True), dtype), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_dtypes_of_input_and_output_are_free(form):
    for source, target in (
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
    ):
        check(form, guarded_input(randn(2, 24, 7, 5, seed=3), source), target)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    block_rows=st.sampled_from([8, 32]),
    block_pixels=st.sampled_from([64, 128]),
)
def test_any_shape(shape, block_rows, block_pixels):
    check("whiten", guarded_input(randn(*shape, seed=4)), torch.float32, WhitenConfig(block_rows, block_pixels, 4))


def test_dewhiten_undoes_whiten():
    z = guarded_input(randn(2, 24, 7, 5, seed=5))
    mean, std = statistics(24)
    white, back = guarded_output(*z.shape, dtype=torch.float32), guarded_output(*z.shape, dtype=torch.float32)
    whiten(z, mean, 1.0 / std, white.tensor)
    dewhiten(white.tensor, mean, std, back.tensor)
    assert (back.tensor - z).abs().max() < 2e-6


def test_in_place_and_one_image_of_a_batch_give_the_same_bits():
    z = guarded_input(randn(3, 16, 8, 8, seed=6))
    out = check("whiten", z, torch.float32)
    mean, scale = statistics(16)
    alone = guarded_output(1, 16, 8, 8, dtype=torch.float32)
    whiten(guarded_input(z[1:2]), mean, scale, alone.tensor)
    assert_same_bits("image 1", out[1:2], alone.tensor)
    whiten(z, mean, scale, z)
    assert_same_bits("in place", out, z)


@pytest.mark.parametrize("cc", COMPUTE_CAPABILITIES)
def test_every_size_gets_a_tile_that_fits_it(cc):
    for pixels in (1, 4, 196, 256, 1024, 16384):
        config = lookup("whiten", cc, {"pixels": pixels}, torch.bfloat16)
        assert config.block_rows * config.block_pixels <= 4096
        assert config.block_pixels < 2 * max(pixels, 16)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


BAD = {
    "z dtype": ({"z": _zeros(2, 24, 7, 5, dtype=torch.int32)}, TypeError, "z is int32"),
    "z rank": ({"z": _zeros(24, 7, 5)}, ValueError, "z has shape .* expected 4 dimensions"),
    "z empty": ({"z": _zeros(0, 24, 7, 5)}, ValueError, "z has shape .* at least one image"),
    "z stride": ({"z": _zeros(2, 7, 5, 24).permute(0, 3, 1, 2)}, ValueError, "z of shape .* row-major"),
    "mean size": ({"mean": _zeros(23)}, ValueError, "mean has shape .* is 23, not 24"),
    "mean dtype": ({"mean": _zeros(24, dtype=torch.float16)}, TypeError, "mean is fp16, expected fp32"),
    "scale size": ({"scale": _zeros(24, 1)}, ValueError, "(r)?std has shape"),
    "out shape": ({"out": _zeros(2, 24, 5, 7)}, ValueError, "out has shape"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(form, name):
    changes, error, message = BAD[name]
    arguments = {
        "z": _zeros(2, 24, 7, 5),
        "mean": _zeros(24),
        "scale": _zeros(24),
        "out": _zeros(2, 24, 7, 5),
    } | changes
    with pytest.raises(error, match=message):
        FORMS[form][0](*arguments.values())


@needs_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(128, 128, 16, 16), (1, 128, 128, 128), (3, 128, 14, 14)], ids=str)
def test_bf16_at_real_size(form, shape):
    z = guarded_input(randn(*shape, seed=3), torch.bfloat16)
    check(form, z, torch.bfloat16)
    check(form, z, torch.float32)
