"""Schedule and samplers against their formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capacitor_rt import FullCapacitorInferenceConfig, ModelConfig
from capacitor_rt.diffusion import noise_level, sample, time_grid, unit_noise
from capacitor_rt.errors import ConfigError

MODEL = ModelConfig()


@given(st.floats(0, 1))
def test_schedule_is_variance_preserving(t):
    level = noise_level(t, -10.0, 10.0)
    assert math.isclose(level.alpha**2 + level.sigma**2, 1.0, rel_tol=1e-12)
    assert math.isclose(level.half_logsnr, math.log(level.alpha / level.sigma), rel_tol=1e-9, abs_tol=1e-9)
    assert -5.0 - 1e-9 <= level.half_logsnr <= 5.0 + 1e-9


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_time_grid_falls_from_one_to_zero(schedule, steps):
    grid = time_grid(steps, schedule)
    assert len(grid) == steps + 1 and grid[0] == 1.0 and abs(grid[-1]) < 1e-15
    assert all(a > b for a, b in pairwise(grid))


def test_one_step_is_the_published_axpy():
    noise, x0 = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    out = sample(lambda x, t: x0, noise, MODEL, FullCapacitorInferenceConfig())
    torch.testing.assert_close(out, 0.9999319019 * x0 + 0.0037596891 * noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_a_perfect_predictor_is_recovered(sampler, schedule, steps):
    """With x0 predicted exactly, every sampler must land on alpha(0) x0 + sigma(0) eps for a constant x0."""
    x0, noise = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    inference = FullCapacitorInferenceConfig(num_steps=steps, sampler=sampler, schedule=schedule)
    times = []

    def predict(x, t):
        times.append(t)
        return x0

    out = sample(predict, noise, MODEL, inference)
    end, start = noise_level(0.0, -10, 10), noise_level(1.0, -10, 10)
    eps = noise * MODEL.pixel_noise_std - start.alpha / start.sigma * x0
    torch.testing.assert_close(out, end.alpha * x0 + end.sigma * eps, rtol=1e-5, atol=1e-5)
    assert times == time_grid(steps, schedule)[:-1]


def test_seed_gives_the_same_noise_for_any_global_state():
    torch.manual_seed(1)
    a = unit_noise((2, 3, 4, 4), 5, torch.device("cpu"))
    torch.manual_seed(2)
    b = unit_noise((2, 3, 4, 4), 5, torch.device("cpu"))
    assert torch.equal(a, b)
    assert not torch.equal(a, unit_noise((2, 3, 4, 4), 6, torch.device("cpu")))
    assert not torch.equal(*(unit_noise((2, 3, 4, 4), None, torch.device("cpu")) for _ in range(2)))


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"num_steps": 1.5}, {"sampler": "euler"}, {"schedule": "karras"}])
def test_bad_inference_settings_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        FullCapacitorInferenceConfig(**bad)
