"""The FLUX.2 baseline: normalised as its pipeline does it, and absent with one clear line."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import _contenders as contenders
from bench import _endtoend as endtoend
from bench import flux2, model
from bench._contenders import FLUX2, FLUX2_EAGER, TINY, TINY_FLUX2, Setting, Shape
from bench._timing import Ceilings
from capacitor_rt import InputError
from capacitor_rt.evaluation.flux2 import CONFIG, Flux2, missing

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


def test_absence_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    line = "diffusers is not installed: pip install 'capacitor-rt[bench]'"
    assert missing() == line
    assert flux2.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"FLUX.2 not measured: {line}\n"
    with pytest.raises(InputError, match="needs diffusers"):
        Flux2.random()


@needs_diffusers
def test_the_published_architecture():
    # 34.42 M and 49.62 M parameters, 273.3 and 622.5 GFLOP at 256x256, as counted from the published configuration
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        vae = AutoencoderKLFlux2(**CONFIG)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in vae.named_children()}
    assert round(count["encoder"] / 1e4) == 3442 and round(count["decoder"] / 1e4) == 4962
    flops = [contenders._flux2_flops(CONFIG, Shape(direction, 1, 256)) / 1e9 for direction in ("encode", "decode")]
    assert flops == pytest.approx([273.26, 622.45], rel=1e-3)


@needs_diffusers
def test_saved_weights_load_from_either_folder(tmp_path):
    made = Flux2.random(TINY_FLUX2)
    made.vae.save_pretrained(tmp_path / "pipeline" / "vae")
    image = torch.rand(1, 3, 32, 32)
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        torch.testing.assert_close(Flux2.from_pretrained(str(folder)).encode(image), made.encode(image))


@needs_diffusers
def test_flux2_is_timed_beside_this_model(tmp_path):
    setting = Setting(torch.device("cpu"), torch.float32, TINY, TINY_FLUX2)
    bench = endtoend.Bench(setting, Ceilings(100.0, 1000.0, 1, "float32"), {}, tmp_path / "f.jsonl", "flux2", rounds=1)
    theirs, ours = bench.measure(Shape("decode", 1, 32), [FLUX2_EAGER, contenders.EAGER])
    assert theirs["model"] == FLUX2 and theirs["flops"] == setting.flops(FLUX2, Shape("decode", 1, 32)) > ours["flops"]
    assert ours["speedup_over"]["flux2/eager"] == pytest.approx(theirs["ms"] / ours["ms"])


@needs_diffusers
def test_flux2_command(tmp_path):
    out = tmp_path / "flux2.jsonl"
    options = ["--device", "cpu", "--shape", "encode:1x32", "--compile", "none", "--out", str(out)]
    assert flux2.main(options) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()][1:]
    assert [(line["model"], line["variant"]) for line in lines][:2] == [("full_capacitor", "ours"), (FLUX2, "eager")]
    assert all("diffusers" in line and line["ms"] > 0 for line in lines)


def test_rows_are_those_of_the_model_benchmark():
    assert [c.name for c in contenders.FLUX2S[:3]] == ["ours", "eager", "eager"]
    jobs = model.plan_jobs(contenders.FLUX2S, [Shape("encode", 1, 32)], [Shape("encode", 2, 32)], "none")
    # what the sweep compares is this runtime and FLUX.2
    assert [c.model for c in jobs[-1][1]] == ["full_capacitor", FLUX2]
