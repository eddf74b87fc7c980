"""GRN's gain against float64: one launch or two, few tiles or many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
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
from capacitor_kernels.launch import compute_capability
from capacitor_kernels.ops.grn import GrnConfig, grn
from capacitor_kernels.tuning import lookup

FUSED = GrnConfig(split=False, block_f=256, num_warps=4)
SPLIT = GrnConfig(split=True, block_f=64, num_warps=4)
CONFIGS = [FUSED, SPLIT]
IDS = ["fused", "split"]


def run(partials, gamma, dtype=torch.float32, *, eps=1e-6, config=None):
    """(gain, norms), guard bands checked."""
    batch, _, hidden = partials.shape
    gain = guarded_output(batch, hidden, dtype=dtype)
    norms = guarded_output(batch, hidden, dtype=torch.float32)
    grn(partials, gamma, gain.tensor, norms=norms.tensor, eps=eps, config=config)
    gain.check()
    norms.check()
    return gain.tensor, norms.tensor


def make_inputs(batch, tiles, hidden, *, seed=0, heavy=False):
    partials = guarded_input(randn(batch, tiles, hidden, seed=seed, heavy=heavy, scale=3).square())
    return partials, guarded_input(randn(hidden, seed=seed + 1))


def check(batch, tiles, hidden, dtype, config, **options):
    partials, gamma = make_inputs(batch, tiles, hidden, **options)
    gain, norms = run(partials, gamma, dtype, config=config)
    truth = reference.grn(partials.double().sum(1), gamma)
    baseline = reference.grn(partials.sum(1), gamma).to(dtype)
    assert_close("gain", gain, truth, baseline, **tolerance(dtype))
    assert_close("norms", norms, partials.double().sum(1).sqrt(), floor=1e-6, max_ratio=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", [1, 2, 5, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_matches_float64(batch, tiles, dtype, config):
    check(batch, tiles, 200, dtype, config)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_heavy_tails(config):
    check(2, 7, 200, torch.float32, config, heavy=True, seed=3)


def test_one_large_image():
    # 2048 x 2048 is 16384 tokens: 128 tiles of 128 rows
    check(1, 128, 1000, torch.float32, None)


def test_many_small_images():
    check(128, 2, 96, torch.float32, None)


@pytest.mark.parametrize("cc", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("hidden", [3584, 4096], ids=["rows", "default"])
def test_one_launch_up_to_eight_tiles(hidden, cc):
    split = {
        tiles: lookup("grn", cc, {"tiles": tiles, "hidden": hidden}, torch.bfloat16).split
        for tiles in (1, 2, 4, 8, 16, 32, 128)
    }
    assert split == {1: False, 2: False, 4: False, 8: False, 16: True, 32: True, 128: True}


@pytest.mark.parametrize("tiles", [15, 16, 17, 33])
def test_tiles_beyond_the_loads_in_flight(tiles):
    """Whole rounds of 8 and 16 loads, one tile less and one more: the order of the sums is that of the tiles."""
    partials, gamma = make_inputs(2, tiles, 200, heavy=True)
    ordered = torch.zeros(2, 200)
    for tile in range(tiles):
        ordered += partials[:, tile].cpu()
    for config in CONFIGS:
        _, norms = run(partials, gamma, config=config)
        torch.testing.assert_close(norms.cpu().square(), ordered, rtol=1e-6, atol=0)
        assert_same_bits("norms", norms, run(partials, gamma, config=SPLIT)[1])


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_silent_image_gets_no_gain(config):
    partials = guarded_input(torch.zeros(2, 3, 200))
    gain, norms = run(partials, guarded_input(randn(200, seed=0)), config=config)
    assert not gain.any() and not norms.any()


def test_eps_bounds_the_gain_of_a_nearly_silent_image():
    partials, gamma = make_inputs(1, 2, 200)
    gain, _ = run(partials * 1e-12, gamma, eps=1e-2, config=FUSED)
    truth = reference.grn(partials.double().sum(1) * 1e-12, gamma, eps=1e-2)
    assert_close("gain", gain, truth, floor=1e-6, max_ratio=1e-5)


def test_one_launch_and_two_give_the_same_norms():
    partials, gamma = make_inputs(2, 9, 200)
    (fused, fused_norms), (split, split_norms) = (run(partials, gamma, config=c) for c in CONFIGS)
    assert_same_bits("norms", fused_norms, split_norms)
    torch.testing.assert_close(fused, split, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_an_image_does_not_see_its_batch(config):
    partials, gamma = make_inputs(3, 6, 200)
    gain, norms = run(partials, gamma, config=config)
    for image in range(3):
        one = slice(image, image + 1)
        one_gain, one_norms = run(guarded_input(partials[one]), gamma, config=config)
        assert_same_bits("gain", gain[one], one_gain)
        assert_same_bits("norms", norms[one], one_norms)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    tiles=st.integers(1, 12),
    hidden=st.integers(1, 300),
    config=st.sampled_from(CONFIGS),
)
def test_any_shape(batch, tiles, hidden, config):
    check(batch, tiles, hidden, torch.float32, config)


def _zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"partials": _zeros(2, 96)}, ValueError, r"partials has shape \[2, 96\], expected 3 dimensions"),
        ({"partials": _zeros(2, 3, 96, dtype=torch.float16)}, TypeError, "partials is fp16, expected fp32"),
        ({"partials": _zeros(2, 0, 96)}, ValueError, "expected at least one image, tile, channel"),
        ({"gamma": _zeros(95)}, ValueError, "gamma has shape .* dimension 0 is 95, not 96"),
        ({"gain": _zeros(3, 96)}, ValueError, "gain has shape .* dimension 0 is 3, not 2"),
        ({"gain": _zeros(2, 96, dtype=torch.int32)}, TypeError, "gain is int32, expected bf16 or fp16 or fp32"),
        ({"norms": _zeros(2, 96, dtype=torch.float16)}, TypeError, "norms is fp16, expected fp32"),
        ({"norms": _zeros(96, 2).t()}, ValueError, "norms of shape .* expected row-major"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"partials": _zeros(2, 3, 96), "gamma": _zeros(96), "gain": _zeros(2, 96), "norms": _zeros(2, 96)}
    arguments |= change
    with pytest.raises(error, match=message):
        grn(arguments["partials"], arguments["gamma"], arguments["gain"], norms=arguments["norms"])


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [2, 128])
def test_real_size_under_the_interpreter(tiles):
    config = lookup("grn", 90, {"tiles": tiles, "hidden": 3584}, torch.bfloat16)
    check(1, tiles, 3584, torch.float16, config)


@needs_gpu
@pytest.mark.parametrize(("batch", "tiles"), [(128, 2), (32, 8), (1, 128)])
def test_bf16_at_real_size(batch, tiles):
    config = lookup("grn", compute_capability(DEVICE), {"tiles": tiles, "hidden": 3584}, torch.bfloat16)
    partials, gamma = make_inputs(batch, tiles, 3584)
    gain, _ = run(partials, gamma, torch.bfloat16, config=config)
    baseline = reference.grn(partials.sum(1), gamma).bfloat16()
    assert_close("gain", gain, reference.grn(partials.double().sum(1), gamma), baseline, floor=1e-5)
    assert_same_bits("gain", gain, run(partials, gamma, torch.bfloat16, config=config)[0])
