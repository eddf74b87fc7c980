"""Channel attention against float64: tiles, dtypes, both numbers of launches, determinism, bad inputs."""

from __future__ import annotations

import dataclasses

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

from capacitor_kernels import channel_attention, channel_attention_sums_shape, reference
from capacitor_kernels.launch import recording
from capacitor_kernels.ops.channel_attention import FUSED_TILES, ChannelAttentionConfig
from capacitor_kernels.tuning import lookup

TOKENS = 96
FUSED = ChannelAttentionConfig(False, 64, 32, 32, 4, 2)
SPLIT = dataclasses.replace(FUSED, split=True)


def inputs_of(batch: int, tiles: int, dim: int, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    # sums over an image whose mean differs by channel
    partials = (randn(batch, tiles, dim, seed=seed) + 2 * randn(1, 1, dim, seed=seed + 1)) * (TOKENS / tiles)
    return {
        "partials": guarded_input(partials),
        "w": guarded_input(randn(dim, dim, seed=seed + 2, scale=dim**-0.5), dtype),
        "b": guarded_input(randn(dim, seed=seed + 3)),
    }


def run(inputs: dict[str, torch.Tensor], config: ChannelAttentionConfig | None) -> torch.Tensor:
    batch, tiles, dim = inputs["partials"].shape
    chosen = config or lookup("channel_attention", 90, {"tiles": tiles, "dim": dim}, inputs["w"].dtype)
    factor = guarded_output(batch, dim, dtype=inputs["w"].dtype)
    needed = channel_attention_sums_shape(batch, dim, chosen)
    sums = None if needed is None else guarded_output(*needed, dtype=torch.float32)
    channel_attention(
        **inputs,
        factor=factor.tensor,
        tokens_per_image=TOKENS,
        sums=None if sums is None else sums.tensor,
        config=config,
    )
    for written in (factor, sums):
        if isinstance(written, Guarded):
            written.check()
    return factor.tensor


def check(inputs: dict[str, torch.Tensor], config: ChannelAttentionConfig | None) -> None:
    dtype = inputs["w"].dtype
    got = run(inputs, config)
    sums = inputs["partials"].double().sum(1)
    truth = reference.channel_attention(sums, inputs["w"].double(), inputs["b"].double(), tokens_per_image=TOKENS)
    eager = reference.channel_attention(sums.float(), inputs["w"], inputs["b"], tokens_per_image=TOKENS)
    assert_close("factor", got, truth, eager, **tolerance(dtype))
    assert truth.std() > 0.2 and ((got > 0) & (got < 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tiles", "dim"), [(1, 1, 64), (3, 4, 72), (17, 2, 40), (2, 40, 136)])
@pytest.mark.parametrize("config", [None, FUSED, SPLIT], ids=["lookup", "fused", "split"])
def test_matches_float64(config, batch, tiles, dim, dtype):
    check(inputs_of(batch, tiles, dim, dtype), config)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 18), st.integers(1, 20), st.integers(1, 80), st.booleans())
def test_any_shape(batch, tiles, dim, split):
    # few products, and those of one sign: the yardstick is float32's rounding
    inputs = inputs_of(batch, tiles, dim, torch.float32)
    got = run(inputs, dataclasses.replace(FUSED, split=split))
    sums = inputs["partials"].double().sum(1)
    truth = reference.channel_attention(sums, inputs["w"].double(), inputs["b"].double(), tokens_per_image=TOKENS)
    torch.testing.assert_close(got.double(), truth, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("config", [FUSED, SPLIT], ids=["fused", "split"])
def test_an_image_does_not_see_its_batch(config):
    # whole sixteenths, so that the order in which numpy adds does not matter
    inputs = inputs_of(19, 3, 64, torch.float32)
    inputs["partials"].copy_((inputs["partials"] / TOKENS).round() * TOKENS)
    inputs["w"].copy_((inputs["w"] * 16).round() / 16)
    whole = run(inputs, config)
    for image in (0, 7, 18):
        alone = run(inputs | {"partials": guarded_input(inputs["partials"][image : image + 1])}, config)
        assert_same_bits(f"image {image}", whole[image : image + 1], alone)


def test_many_tiles_take_two_launches():
    for tiles in (1, FUSED_TILES, FUSED_TILES + 1, 512):
        config = lookup("channel_attention", 90, {"tiles": tiles, "dim": 896}, torch.bfloat16)
        meta = {
            "partials": torch.empty(2, tiles, 896, device="meta"),
            "w": torch.empty(896, 896, device="meta", dtype=torch.bfloat16),
            "b": torch.empty(896, device="meta"),
            "factor": torch.empty(2, 896, device="meta", dtype=torch.bfloat16),
        }
        needed = channel_attention_sums_shape(2, 896, config)
        sums = None if needed is None else torch.empty(needed, device="meta")
        with recording(90) as launches:
            channel_attention(**meta, tokens_per_image=256, sums=sums)
        assert len(launches) == (1 if tiles <= FUSED_TILES else 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partials": torch.zeros(2, 64)}, "partials has shape"),
        ({"partials": torch.zeros(2, 0, 64)}, "at least one image, tile, channel"),
        ({"w": torch.zeros(64, 32)}, "w has shape"),
        ({"b": torch.zeros(64, dtype=torch.bfloat16)}, "b is bf16, expected fp32"),
        ({"factor": torch.zeros(2, 64, dtype=torch.float16)}, "factor is fp16, expected fp32"),
        ({"tokens_per_image": 0}, "tokens_per_image is 0"),
        ({"config": SPLIT}, r"sums is missing: a config that splits needs float32 of shape \[2, 1, 64\]"),
    ],
)
def test_bad_arguments(changes, message):
    arguments = {
        "partials": torch.zeros(2, 3, 64),
        "w": torch.zeros(64, 64),
        "b": torch.zeros(64),
        "factor": torch.zeros(2, 64),
        "tokens_per_image": 8,
        "config": FUSED,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        channel_attention(**arguments | changes)
