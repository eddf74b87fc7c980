"""What the adapters' latents are: the model's own, in the layout and scale that each interface has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from calibrations import document
from golden_cases import GOLDEN, golden_io
from measures import relative_error
from models import SMALL, random_model
from torch import nn

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig, InputError, ModelConfig
from capacitor_rt.adapters import CapacitorFlux2VAE, CapacitorVAE, outputs
from capacitor_rt.flux2_space import Flux2Calibration, to_flux2

SEED_0 = FullCapacitorInferenceConfig(seed=0)
BOTH = pytest.mark.parametrize("make", [CapacitorVAE, CapacitorFlux2VAE])


@pytest.fixture
def model() -> FullCapacitor:
    return random_model()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96) * 2 - 1


def posterior_of(model, image):
    """Mean and deviation of the whitened posterior, by the formulas, in float64."""
    mean, logsnr = (t.double() for t in model.encode_posterior(image))
    bn_mean, bn_var = model.latent_norm_running_mean.double(), model.latent_norm_running_var.double()
    std = (bn_var + 1e-4).sqrt()[:, None, None]
    mode = (torch.sigmoid(logsnr).sqrt() * mean - bn_mean[:, None, None]) / std
    return mode, torch.sigmoid(-logsnr).sqrt() / std


def test_whitened_latents(model, image, either_outputs):
    vae = CapacitorVAE(model)
    dist = vae.encode(image).latent_dist
    mode, sigma = posterior_of(model, image)
    assert dist.mode().shape == (2, 8, 4, 6)
    assert torch.equal(dist.mode(), model.encode(image)) and torch.equal(dist.mean, dist.mode())
    assert relative_error(dist.mean, mode) < 1e-6
    assert relative_error(dist.std, sigma) < 1e-6
    assert relative_error(dist.logvar, 2 * sigma.log()) < 1e-6
    assert torch.equal(dist.parameters, torch.cat([dist.mean, dist.logvar], 1))
    want = model.decode(dist.mode(), inference_config=SEED_0)
    assert torch.equal(vae.decode(dist.mode()).sample, want)
    assert torch.equal(vae.decode(dist.mode(), return_dict=False)[0], want)
    assert torch.equal(vae.encode(image, return_dict=False)[0].mode(), dist.mode())
    assert torch.equal(vae.encode(image)[0].mode(), dist.mode())
    assert torch.equal(vae(image).sample, want) and torch.equal(vae(image, return_dict=False)[0], want)


def test_unpatchified_raw_latents(model, image, either_outputs):
    vae = CapacitorFlux2VAE(model)
    dist = vae.encode(image).latent_dist
    mode, sigma = posterior_of(model, image)
    std = (model.latent_norm_running_var.double() + 1e-4).sqrt()[:, None, None]
    raw = mode * std + model.latent_norm_running_mean.double()[:, None, None]
    assert dist.mode().shape == (2, 2, 8, 12)
    assert relative_error(dist.mode(), F.pixel_shuffle(raw, 2)) < 1e-6
    assert relative_error(dist.std, F.pixel_shuffle(sigma * std, 2)) < 1e-6
    want = model.decode(model.encode(image), inference_config=SEED_0)
    torch.testing.assert_close(vae.decode(dist.mode()).sample, want, rtol=1e-4, atol=1e-5)
    # FLUX.2's own normalisation gives the model's whitened latents
    torch.testing.assert_close(vae.bn(F.pixel_unshuffle(dist.mode(), 2)), model.encode(image), rtol=1e-5, atol=1e-5)


@BOTH
def test_samples_have_the_deviation_of_the_posterior(model, image, make, either_outputs):
    vae = make(model)
    dist = vae.encode(image[:1]).latent_dist
    generator = torch.Generator().manual_seed(0)
    samples = torch.cat([dist.sample(generator) for _ in range(64)])
    ratio = ((samples - dist.mean) / dist.std).square().mean().sqrt()
    assert abs(ratio.item() - 1) < 0.02
    again = dist.sample(torch.Generator().manual_seed(0))
    assert torch.equal(again, samples[:1]) and not torch.equal(again, dist.mode())


def test_own_outputs_agree_with_those_of_diffusers():
    pytest.importorskip("diffusers")
    parameters, other = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    theirs = outputs.output_classes().distribution
    for deterministic in (False, True):
        a, b = theirs(parameters, deterministic), outputs.DiagonalGaussian(parameters, deterministic)
        for name in ("mean", "std", "var", "logvar"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        torch.testing.assert_close(a.kl(), b.kl())
        torch.testing.assert_close(a.kl(theirs(other)), b.kl(outputs.DiagonalGaussian(other)))
        torch.testing.assert_close(a.nll(a.mean + 1), b.nll(b.mean + 1))
        assert torch.equal(a.sample(torch.Generator().manual_seed(1)), b.sample(torch.Generator().manual_seed(1)))
        one, two = ([torch.Generator().manual_seed(seed) for seed in (1, 2)] for _ in range(2))
        assert torch.equal(a.sample(one), b.sample(two))
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        b.sample([torch.Generator()] * 3)


def test_a_loop_that_multiplies_by_its_own_constant(model, image):
    vae = CapacitorVAE(model, latent_scale=0.18215)
    x = vae.encode(image).latent_dist.mode().mul_(0.18215)
    torch.testing.assert_close(x, model.encode(image), rtol=1e-5, atol=1e-6)
    assert vae.config.scaling_factor == 0.18215
    want = model.decode(model.encode(image), inference_config=SEED_0)
    torch.testing.assert_close(vae.decode(x / 0.18215).sample, want, rtol=1e-4, atol=1e-5)
    _, sigma = posterior_of(model, image)
    assert relative_error(vae.encode(image).latent_dist.std * 0.18215, sigma) < 1e-6
    with pytest.raises(InputError, match="latent_scale 0 is not positive"):
        CapacitorVAE(model, latent_scale=0)


@pytest.mark.parametrize("name", ["p16", "p8"])
def test_the_family_s_own_vectors(name):
    io, vae = golden_io(name), CapacitorVAE.from_pretrained(GOLDEN / name)
    assert relative_error(vae.encode(io["image"]).latent_dist.mode(), io["latents"]) < 1e-5


def test_latents_that_were_2x2_patched_by_the_model():
    model = random_model(latent_patch=2, patch_size=8)
    image = torch.rand(1, 3, 64, 96) * 2 - 1
    dist = CapacitorFlux2VAE(model).encode(image).latent_dist
    mean, logsnr = model.encode_posterior(image)
    # patched before whitening, and back: what comes out is the bottleneck itself
    torch.testing.assert_close(dist.mean, torch.sigmoid(logsnr).sqrt() * mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dist.std, torch.sigmoid(-logsnr).sqrt(), rtol=1e-4, atol=1e-5)


@BOTH
def test_a_deterministic_posterior(make, image, either_outputs):
    model = random_model(bottleneck_posterior_kind="deterministic")
    dist = make(model).encode(image).latent_dist
    assert torch.equal(dist.sample(), dist.mode()) and not dist.std.any()
    assert dist.mean.isfinite().all() and dist.logvar.max() <= -30


def calibration_of(model, order) -> Flux2Calibration:
    statistics = model.statistics()
    whitening = {"mean": statistics[0].tolist(), "std": statistics[1].tolist()}
    return Flux2Calibration.from_dict(document(model.latent_channels, channels=order, whitening=whitening))


def test_flux2_s_space_by_calibration(model, image):
    calibration = calibration_of(model, [3, 1, 0, 2, 7, 6, 5, 4])
    vae = CapacitorFlux2VAE(model, calibration=calibration)
    dist = vae.encode(image).latent_dist
    want = to_flux2(model.encode(image), calibration, normalised=False)
    torch.testing.assert_close(F.pixel_unshuffle(dist.mode(), 2), want, rtol=1e-4, atol=1e-5)
    normalised = to_flux2(model.encode(image), calibration)
    torch.testing.assert_close(vae.bn(F.pixel_unshuffle(dist.mode(), 2)), normalised, rtol=1e-4, atol=1e-5)
    decoded = model.decode(model.encode(image), inference_config=SEED_0)
    torch.testing.assert_close(vae.decode(dist.mode()).sample, decoded, rtol=1e-3, atol=1e-4)
    # a deviation of the mode moves the latent by |a| of it
    _, sigma = posterior_of(model, image)
    slope = torch.tensor(calibration.mode.a).abs()[:, None, None]
    raw = sigma * model.statistics()[1][:, None, None]
    assert relative_error(F.pixel_unshuffle(dist.std, 2), raw[:, list(calibration.channels)] * slope) < 1e-5


def test_a_calibration_of_another_model_is_refused():
    model = FullCapacitor.from_pretrained(GOLDEN / "p16")
    count = model.latent_channels
    calibration = calibration_of(model, list(range(count)))
    with pytest.raises(InputError, match="is of small/whitened@abc, and the latents are of p16/whitened@sha256"):
        CapacitorFlux2VAE(model, calibration=calibration)


def test_a_decoder_only_model_decodes_flux2_s_latents():
    config = ModelConfig(**{**SMALL.to_dict(), "encoder_depth": 0})
    model = random_model(config)
    with pytest.raises(InputError, match="pass bn="):
        CapacitorFlux2VAE(model)
    bn = nn.BatchNorm2d(8, eps=1e-4, affine=False).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    vae = CapacitorFlux2VAE(model, bn=bn)
    flux2 = torch.randn(1, 2, 8, 12)
    want = model.decode(bn(F.pixel_unshuffle(flux2, 2)), inference_config=SEED_0)
    torch.testing.assert_close(vae.decode(flux2).sample, want, rtol=1e-4, atol=1e-5)
    assert vae.encoder is None
    with pytest.raises(InputError, match="decoder only"):
        vae.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="bn has 4 channels"):
        CapacitorFlux2VAE(model, bn=nn.BatchNorm2d(4))


def test_what_cannot_be_unfolded_is_refused(model, image):
    with pytest.raises(InputError, match="cannot be unfolded"):
        CapacitorFlux2VAE(random_model(bottleneck_dim=6))
    with pytest.raises(InputError, match="powers of 2"):
        CapacitorVAE(random_model(patch_size=12))
    vae = CapacitorFlux2VAE(model)
    with pytest.raises(InputError, match=r"\[1, 8, 4, 4\]: expected \[B,2,h,w\]"):
        vae.decode(torch.zeros(1, 8, 4, 4))
    with pytest.raises(InputError, match="multiples of 2"):
        vae.decode(torch.zeros(1, 2, 5, 4))
    with pytest.raises(InputError, match=r"height 80 is not a multiple of 32: .* strict_size=False"):
        vae.encode(torch.zeros(1, 3, 80, 64))
