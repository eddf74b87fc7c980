"""Calibration against FLUX.2: a map that is known is found again, a poor one is refused, nothing is overwritten."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cache_cases import write_images
from models import random_model, randomise
from torch import nn
from typer.testing import CliRunner

from capacitor_rt import FullCapacitor, InputError
from capacitor_rt.checkpoint import tensors_sha256
from capacitor_rt.cli.app import app
from capacitor_rt.evaluation.calibrate import calibrate, save
from capacitor_rt.evaluation.flux2 import CONFIG, Flux2, missing
from capacitor_rt.flux2_space import Flux2Calibration, PoorCalibrationError, to_flux2
from capacitor_rt.images.frames import Framing

needs_diffusers = pytest.mark.skipif(missing() is not None, reason=str(missing()))
FRAMING = Framing(size=64)
ORDER = [3, 1, 0, 2, 7, 6, 5, 4]


def certain_model(bias: float = 9.0) -> FullCapacitor:
    """With log-SNRs about `bias`, as trained models have them at 9: alpha is nearly 1."""
    model = random_model()
    with torch.no_grad():
        model.encoder.to_bottleneck.bias[8:] += bias
    return model


class Twin(nn.Module):
    """An autoencoder whose latents are known lines through a model's, plus noise: the interface of diffusers."""

    def __init__(self, model, order=None, noise=0.0, kind="mean"):
        super().__init__()
        self.model, self.order, self.noise, self.kind = model, order or list(range(8)), noise, kind
        generator = torch.Generator().manual_seed(3)
        self.a, self.b = torch.rand(2, 8, generator=generator) + torch.tensor([[0.5], [-3.0]])
        self.bn = nn.BatchNorm2d(8, eps=1e-4, affine=False)
        self.bn.running_mean.copy_(torch.randn(8, generator=generator))
        self.bn.running_var.copy_(torch.rand(8, generator=generator) + 1)

    def encode(self, x):
        mean, logsnr = self.model.encode_posterior(x)
        raw = mean if self.kind == "mean" else torch.sigmoid(logsnr).sqrt() * mean
        raw = raw[:, self.order] * self.a[:, None, None] + self.b[:, None, None]
        raw = raw + self.noise * raw.std() * torch.randn(raw.shape, generator=torch.Generator().manual_seed(len(x)))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: F.pixel_shuffle(raw, 2)))


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", 30, ((80, 64), (64, 100)))


def measure(photos, model, twin, **options):
    return calibrate(photos, model, Flux2(twin), FRAMING, least_images=10, **options)


@pytest.mark.parametrize("order", [None, ORDER], ids=["in order", "in another order"])
@pytest.mark.parametrize("kind", ["mean", "mode"])
def test_known_lines_are_recovered(photos, order, kind):
    # so uncertain that mean and mode differ
    model = certain_model(1.0)
    twin = Twin(model, order, kind=kind)
    found = measure(photos, model, twin)
    assert found.channels == tuple(twin.order)
    lines = getattr(found, kind)
    torch.testing.assert_close(torch.tensor(lines.a), twin.a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(lines.b), twin.b, rtol=1e-4, atol=1e-4)
    assert min(lines.r2) > 1 - 1e-6 and min(lines.cosine) > 1 - 1e-6
    assert lines.mean_cosine > 1 - 1e-6 and lines.overall_cosine > 1 - 1e-6
    other = found.mode if kind == "mean" else found.mean
    assert other.mean_cosine < lines.mean_cosine
    assert found.images["fit"] == 27 and found.images["held_out"] == 3 and found.images["failed"] == 0
    # latents of a new image, as a cache holds them
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = model.encode(image)
    logsnr = model.encode_posterior(image).logsnr if kind == "mean" else None
    want = Flux2(twin).encode(image)
    torch.testing.assert_close(to_flux2(latents, found, logsnr=logsnr), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(to_flux2(latents, found, twin.bn, logsnr=logsnr), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["before", "after"])
def test_the_side_of_the_batch_norm_is_found(photos, side):
    model = certain_model()
    twin = Twin(model)
    if side == "before":
        twin.a.fill_(1.0), twin.b.fill_(0.0)
    else:
        # what the batch norm undoes
        twin.a.copy_((twin.bn.running_var + 1e-4).sqrt()), twin.b.copy_(twin.bn.running_mean)
    found = measure(photos, model, twin)
    assert found.side == side
    other = "after" if side == "before" else "before"
    assert found.side_error[side] < 1e-3 < 0.1 < found.side_error[other]


def test_scores_are_of_images_that_were_not_fitted(photos):
    """With noise in the truth, R^2 is its share of the variance, within what 3 images tell."""
    model = certain_model()
    found = measure(photos, model, Twin(model, noise=0.2))
    assert 0.9 < found.mean.mean_cosine < 0.9999
    for r2, cosine in zip(found.mean.r2, found.mean.cosine, strict=True):
        assert -0.5 < r2 < 0.9999 and r2 - 0.05 <= cosine
    # the same images in other batches are the same measurement
    again = measure(photos, model, Twin(model), batch=3)
    assert again.images["sha256"] == found.images["sha256"]


def test_provenance(photos, tmp_path):
    model = certain_model()
    twin = Twin(model)
    found = measure(photos, model, twin, flux2_name="some/vae")
    assert found.flux2 == {"id": "some/vae", "sha256": tensors_sha256(twin.state_dict())}
    digest = tensors_sha256(model.state_dict())
    assert found.model == {"id": "memory", "revision": None, "sha256": digest}
    assert found.latent_space == f"full_capacitor/whitened@sha256:{digest[:16]}"
    model.save_pretrained(tmp_path / "capacitor")
    loaded = FullCapacitor.from_pretrained(tmp_path / "capacitor")
    found = measure(photos, loaded, twin)
    assert found.latent_space == loaded.source.latent_space and found.model["sha256"] == loaded.source.sha256
    save(found, tmp_path / "c.json")
    assert Flux2Calibration.read(tmp_path / "c.json") == Flux2Calibration.from_dict(
        json.loads(json.dumps(found.to_dict()))
    )
    assert json.loads((tmp_path / "c.json").read_text())["approximate"] is True
    before = (tmp_path / "c.json").read_bytes()
    with pytest.raises(InputError, match="exists"):
        save(found, tmp_path / "c.json")
    assert (tmp_path / "c.json").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp-*"))


def test_what_is_refused(photos):
    model = certain_model()
    with pytest.raises(InputError, match="30 images could be decoded, and a calibration needs 1000"):
        calibrate(photos, model, Flux2(Twin(model)), FRAMING)
    with pytest.raises(InputError, match="channels and stride"):
        measure(photos, random_model(bottleneck_dim=4), Twin(model))
    with pytest.raises(InputError, match="channels and stride"):
        measure(photos, random_model(patch_size=8), Twin(model))
    with torch.no_grad():
        model.encoder.to_bottleneck.weight[5] = 0
    with pytest.raises(InputError, match=r"channels \[5\] of the latents are the same everywhere"):
        measure(photos, model, Twin(model))


def test_strangers_are_poor(photos):
    model = certain_model()
    stranger = randomise(random_model(), seed=7)
    found = measure(photos, model, Twin(stranger))
    with pytest.raises(PoorCalibrationError, match=r"below 0.9.*keep to the model's own space"):
        found.check_quality()


@needs_diffusers
def test_the_command(tmp_path, photos):
    """A small autoencoder of diffusers with random weights is no twin: measured, shown, refused, not written."""
    model = certain_model()
    model.save_pretrained(tmp_path / "capacitor")
    small = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 2}
    Flux2.random(CONFIG | small).vae.save_pretrained(tmp_path / "flux2")
    (tmp_path / "photos" / "bad.png").write_text("no picture")
    out = tmp_path / "out.json"

    def run(*args):
        arguments = ["calibrate", tmp_path / "photos", "--model", tmp_path / "capacitor", "--flux2", tmp_path / "flux2"]
        return CliRunner().invoke(app, [str(a) for a in (*arguments, "--size", 64, "--out", out, *args)])

    result = run("--least-images", 10)
    assert isinstance(result.exception, PoorCalibrationError) and not out.exists()
    assert "27 images fitted, 3 scored" in result.stdout and "R^2" in result.stdout
    assert "batch norm" in result.stdout and "not_an_image" in result.stderr
    result = run()
    assert isinstance(result.exception, InputError) and "31 images are too few: give 1000" in str(result.exception)
    out.write_text("kept")
    result = run("--least-images", 10)
    assert isinstance(result.exception, InputError) and "exists" in str(result.exception)
    assert out.read_text() == "kept"


def test_the_command_writes_what_it_measured(tmp_path, photos, monkeypatch):
    model = certain_model()
    model.save_pretrained(tmp_path / "capacitor")
    twin = Flux2(Twin(model))
    monkeypatch.setattr("capacitor_rt.evaluation.flux2.require", lambda: None)
    monkeypatch.setattr(Flux2, "from_pretrained", classmethod(lambda cls, name, **options: twin))
    arguments = ["calibrate", tmp_path / "photos", "--model", tmp_path / "capacitor", "--flux2", "some/vae"]
    out = tmp_path / "out.json"
    arguments += ["--size", 64, "--least-images", 10, "--out", out]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert "channels are in FLUX.2's order" in result.stdout and f"written to {out}" in result.stdout
    found = Flux2Calibration.read(out)
    torch.testing.assert_close(torch.tensor(found.mean.a), twin.vae.a, rtol=1e-4, atol=1e-5)
    assert found.images["size"] == 64 and found.flux2["id"] == "some/vae"
