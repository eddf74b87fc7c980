"""The FLUX.2 baseline: normalised as its pipeline does it, and absent with one clear line."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from capacitor_rt import CheckpointError, InputError
from capacitor_rt.evaluation.flux2 import CONFIG, Flux2, missing

TINY = CONFIG | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
needs_diffusers = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class LinearVae(nn.Module):
    """Stride 8, 32 channels, the interface of diffusers: what `Flux2` adds around it can be told apart."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 32, 8, stride=8)
        self.up = nn.ConvTranspose2d(32, 3, 8, stride=8)
        self.bn = nn.BatchNorm2d(128, eps=1e-4, affine=False)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2.0)

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: self.down(x)))

    def decode(self, z, return_dict=True):
        return (self.up(z),)


def pipeline_latents(vae: LinearVae, image: torch.Tensor) -> torch.Tensor:
    """As the FLUX.2 pipeline writes it: 2x2 pixels to channels by view and permute, then the batch norm."""
    z = vae.down(image)
    b, c, h, w = z.shape
    z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
    return vae.bn(z)


@pytest.fixture
def wrapped():
    return Flux2(LinearVae())


def test_latents_are_normalised_as_the_pipeline_does(wrapped):
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    latents = wrapped.encode(image)
    assert latents.shape == (2, 128, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(latents, pipeline_latents(wrapped.vae, image), rtol=1e-5, atol=1e-5)


def test_decode_undoes_the_normalisation(wrapped):
    image = torch.rand(1, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        want = wrapped.vae.up(wrapped.vae.down(image))
    torch.testing.assert_close(wrapped.reconstruct(image), want, rtol=1e-4, atol=1e-5)


def test_uint8_images_are_the_floats_they_stand_for(wrapped):
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    floats = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(wrapped.encode(pixels), wrapped.encode(floats))


def test_absence_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    line = "diffusers is not installed: pip install '.[bench]'"
    assert missing() == line
    with pytest.raises(InputError, match="needs diffusers"):
        Flux2.random()


@needs_diffusers
def test_the_published_architecture():
    # 34.42 M and 49.62 M parameters, as counted from the published configuration
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        vae = AutoencoderKLFlux2(**CONFIG)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in vae.named_children()}
    assert round(count["encoder"] / 1e4) == 3442 and round(count["decoder"] / 1e4) == 4962


@needs_diffusers
def test_saved_weights_load_from_either_folder(tmp_path):
    made = Flux2.random(TINY)
    made.vae.save_pretrained(tmp_path / "pipeline" / "vae")
    image = torch.rand(1, 3, 32, 32)
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        torch.testing.assert_close(Flux2.from_pretrained(str(folder)).encode(image), made.encode(image))


@needs_diffusers
def test_a_hub_that_cannot_be_reached_is_not_asked_again(monkeypatch, caplog):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(CheckpointError, match=r"no FLUX\.2 VAE at nobody/nothing \(127\.0\.0\.1 cannot be reached"):
        Flux2.from_pretrained("nobody/nothing")
    assert "Retrying" not in caplog.text
