"""The torch path against vectors that the family's own implementation made."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from golden_cases import DECODES, GOLDEN, NAMES, golden_io, inference_of
from measures import relative_error

from capacitor_rt import FullCapacitor
from capacitor_rt.model import Posterior

TOLERANCE = 1e-5


@cache
def load(name: str, dtype: torch.dtype = torch.float32) -> FullCapacitor:
    return FullCapacitor.from_pretrained(GOLDEN / name, dtype=dtype, strict_size=False)


@pytest.mark.parametrize("name", NAMES)
def test_encode_matches_golden(name):
    io, model = golden_io(name), load(name)
    posterior = model.encode_posterior(io["image"])
    assert relative_error(posterior.mean, io["posterior_mean"]) < TOLERANCE
    assert relative_error(posterior.logsnr, io["posterior_logsnr"]) < TOLERANCE
    assert relative_error(model.encode(io["image"]), io["latents"]) < TOLERANCE
    assert relative_error(model(io["image"]), io["latents"]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_blocks_match_golden(name):
    io, model = golden_io(name), load(name)
    x = io["block_in"]
    modulation = model.decoder.modulations(torch.ones(x.shape[0]))[0]
    assert relative_error(modulation, io["decoder_block0_modulation_t1"]) < TOLERANCE
    assert relative_error(model.encoder.blocks[0](x), io["encoder_block0_out"]) < TOLERANCE
    assert relative_error(model.decoder.start_blocks[0](x, modulation), io["decoder_block0_out"]) < TOLERANCE


@pytest.mark.parametrize(("name", "key"), DECODES)
def test_decode_matches_golden(name, key):
    io = golden_io(name)
    image = load(name).decode(io["latents"], *io[key].shape[2:], inference_of(key))
    assert image.dtype == torch.float32
    assert relative_error(image, io[key]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_close_as_the_family(name):
    io, model = golden_io(name), load(name, torch.bfloat16)
    posterior = model.encode_posterior(io["image"])
    got = {
        "posterior_mean": posterior.mean,
        "posterior_logsnr": posterior.logsnr,
        "latents": model.encode(io["image"]),
        "decode_ddim1_linear_seed7": model.decode(
            io["latents"], inference_config=inference_of("decode_ddim1_linear_seed7")
        ),
    }
    for key, value in got.items():
        assert value.dtype == torch.float32
        ours, family = relative_error(value, io[key]), relative_error(io[f"bf16_{key}"], io[key])
        print(f"{name} {key}: {ours:.3e}, family {family:.3e}")
        assert ours <= family, key


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_the_limit_of_float32(name):
    io, model = golden_io(name), load(name)
    truth = FullCapacitor.from_pretrained(GOLDEN / name, dtype=torch.float64, strict_size=False)
    assert truth.decoder.time_embed.freqs.dtype == torch.float64
    mean, _ = truth.encoder(io["image"].double())
    assert mean.dtype == torch.float64
    assert relative_error(model.encode_posterior(io["image"]).mean, mean) < 1e-6


def test_posterior_mode_and_sample():
    io, model = golden_io("p16"), load("p16")
    from capacitor_rt.reference import posterior_mode, posterior_sample

    mean, logsnr = io["posterior_mean"], io["posterior_logsnr"]
    alpha2, sigma2 = torch.sigmoid(logsnr), torch.sigmoid(-logsnr)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(posterior_mode(mean, logsnr), alpha2.sqrt() * mean)
    torch.testing.assert_close(posterior_sample(mean, logsnr, noise), alpha2.sqrt() * mean + sigma2.sqrt() * noise)
    torch.testing.assert_close(posterior_mode(mean, None), mean)
    torch.testing.assert_close(model.latents_of(Posterior(mean, logsnr)), io["latents"])


def test_posterior_is_stable_at_extreme_logsnr():
    from capacitor_rt.reference import posterior_sample

    logsnr = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0])
    out = posterior_sample(torch.ones(5), logsnr, torch.ones(5))
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, torch.tensor([1.0, 1.0, 2**0.5, 1.0, 1.0]), rtol=1e-6, atol=1e-6)
