"""`view`: from images and from a cache to a page, and every refusal before the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from cache_cases import write_images
from models import random_model
from PIL import Image
from typer.testing import CliRunner

from capacitor_rt.cache.dataset import LatentDataset
from capacitor_rt.cache.model_source import Checkpoint
from capacitor_rt.cache.request import CacheRequest
from capacitor_rt.cache.run import cache_images
from capacitor_rt.cli import view_run
from capacitor_rt.cli.view import view
from capacitor_rt.config import FullCapacitorInferenceConfig
from capacitor_rt.errors import CheckpointError, InputError
from capacitor_rt.evaluation.metrics import psnr
from capacitor_rt.evaluation.view import perceptual
from capacitor_rt.images.frames import to_uint8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of images and files that are none, two models, and the cache of the first."""
    root = tmp_path_factory.mktemp("world")
    write_images(root / "photos", 5, sizes=((64, 96), (96, 64)))
    (root / "photos/broken.jpg").write_bytes(b"no picture")
    cut = root / "photos/cut.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-4000])
    model = random_model(seed=1)
    model.save_pretrained(root / "a")
    random_model(seed=2).save_pretrained(root / "b")
    request = CacheRequest(96, area=True, posterior=True)
    cache_images(root / "photos", root / "cache", Checkpoint(str(root / "a")), request, progress=False)
    return root, model


def run(*args):
    app = typer.Typer()
    app.command()(view)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def data_of(folder: Path) -> dict:
    return json.loads((folder / "data.js").read_text().split(" = ", 1)[1].removesuffix(";\n"))


def test_images_by_two_models(world, tmp_path):
    root, model = world
    out = tmp_path / "page"
    result = run(root / "photos", "-m", root / "a", "--against", root / "b", "--area", 96, "-o", out)
    # two files are no images
    assert result.exit_code == 3, result.output
    data = data_of(out)
    assert data["images"]["name"] == [f"{i:03d}.png" for i in range(5)]
    assert [m["name"] for m in data["models"]] == ["a", "b"]
    size = (data["images"]["height"][0], data["images"]["width"][0])
    with Image.open(out / "images/000000-original.webp") as image:
        original = np.asarray(image)
    assert original.shape == (*size, 3)
    inference = FullCapacitorInferenceConfig(seed=0)
    pixels = torch.from_numpy(original.copy())[None]
    decoded = to_uint8(model.reconstruct(pixels, inference_config=inference)[0])
    assert data["measures"]["psnr"][0][0] == pytest.approx(psnr(original, decoded), abs=0.05)
    z = model.encode(pixels)
    assert data["cosines"][0]["a"] == "a" and len(data["cosines"][0]["channels"]) == z.shape[1]
    html = (out / "index.html").read_text()
    assert "broken.jpg" in html and "not_an_image" in html and 'src="left-out/000001.webp"' in html
    assert str(out / "index.html") in result.stdout and "PSNR dB, 5 images" in result.stdout


def test_a_cache_with_its_images(world, tmp_path):
    root, model = world
    out = tmp_path / "page"
    result = run(root / "cache", "-m", root / "a", "--images", root / "photos", "--against", root / "b", "-o", out)
    assert result.exit_code == 3, result.output
    data, dataset = data_of(out), LatentDataset(root / "cache")
    row = dataset[0]
    decoded = model.decode(row["latents"][None].float(), inference_config=FullCapacitorInferenceConfig(seed=0))
    with Image.open(out / "images/000000-0.webp") as image:
        shown = np.asarray(image).astype(int)
    assert np.abs(shown - to_uint8(decoded[0])).max() <= 1
    assert data["images"]["latentBytes"][0][0] == row["latents"].numel() * 2
    html = (out / "index.html").read_text()
    assert dataset.plan.id in html and dataset.latent_space in html and "made by other weights" not in html
    for bucket in dataset.buckets:
        assert f"{bucket.height}&times;{bucket.width}" in html
    assert "not_an_image" in html and "truncated" in html
    assert len(list((out / "left-out").iterdir())) == 1


def test_a_cache_alone_has_no_originals(world, tmp_path):
    root, _ = world
    result = run(root / "cache", "-m", root / "a", "-o", tmp_path / "page")
    assert result.exit_code == 3, result.output
    assert data_of(tmp_path / "page")["hasOriginals"] is False


def test_other_weights_are_said(world, tmp_path):
    root, _ = world
    result = run(root / "cache", "-m", root / "b", "-o", tmp_path / "page")
    assert "made by other weights" in result.stderr
    assert "made by other weights" in (tmp_path / "page/index.html").read_text()


def test_an_original_that_is_gone_is_left_out(world, tmp_path):
    root, _ = world
    (tmp_path / "photos").mkdir()
    for i in (0, 2, 3, 4):
        os.link(root / f"photos/{i:03d}.png", tmp_path / f"photos/{i:03d}.png")
    result = run(root / "cache", "-m", root / "a", "--images", tmp_path / "photos", "-o", tmp_path / "page")
    assert result.exit_code == 3 and "unreadable" in result.stderr
    assert data_of(tmp_path / "page")["images"]["name"] == ["000.png", "002.png", "003.png", "004.png"]


def test_an_original_that_changed_is_left_out(world, tmp_path):
    root, _ = world
    write_images(tmp_path / "photos", 5, sizes=((64, 96), (96, 64)))
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(tmp_path / "photos/002.png")
    result = run(root / "cache", "-m", root / "a", "--images", tmp_path / "photos", "-o", tmp_path / "page")
    assert result.exit_code == 3 and "002.png has other bytes than when it was cached" in result.stderr
    assert data_of(tmp_path / "page")["images"]["name"] == ["000.png", "001.png", "003.png", "004.png"]


def test_a_limit_is_spread_evenly(world, tmp_path):
    root, _ = world
    result = run(root / "cache", "-m", root / "a", "-o", tmp_path / "page", "--limit", 2)
    assert data_of(tmp_path / "page")["images"]["name"] == ["000.png", "004.png"], result.output
    assert "2 of 5 rows, spread evenly" in (tmp_path / "page/index.html").read_text()
    assert view_run.spread(range(100), 4) == [0, 33, 66, 99] and view_run.spread([7, 8], 2) == [7, 8]


def test_a_page_among_the_images_is_not_shown(world, tmp_path):
    root, _ = world
    folder = tmp_path / "photos"
    write_images(folder, 2, sizes=((64, 64),))
    for _ in range(2):
        result = run(folder, "-m", root / "a", "-o", folder / "page")
        assert result.exit_code == 0, result.output
        assert data_of(folder / "page")["images"]["name"] == ["000.png", "001.png"]


def test_an_interrupted_run_makes_the_page_of_what_was_done(world, tmp_path, monkeypatch):
    root, _ = world
    real = view_run.reconstruct

    def interrupted(*args, **kwargs):
        for i, made in enumerate(real(*args, **kwargs)):
            if i == 3:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(view_run, "reconstruct", interrupted)
    result = run(root / "photos", "-m", root / "a", "-o", tmp_path / "page", "--size", 64, "--batch", 1)
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert len(data_of(tmp_path / "page")["images"]["name"]) == 3
    assert "Interrupted: 3 of 7" in (tmp_path / "page/index.html").read_text()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("absent",), InputError, "'absent' does not exist"),
        (("{root}/photos", "--against", "absent"), CheckpointError, "absent"),
        (("{root}/photos", "--images", "{root}/photos"), InputError, "--images is for a cache"),
        (("{root}/photos", "-o", "{root}/photos"), InputError, "give another --out"),
        (("{root}/cache", "{root}/photos"), InputError, "one cache, or of images"),
        (("{root}/cache", "--area", "64"), InputError, "--size and --area are for images"),
        (("{root}/cache", "--against", "sample"), InputError, "--against needs the images"),
        (("{root}/cache", "--images", "absent"), InputError, "'absent' for --images is not a folder"),
        (("{root}/cache", "-m", "sample"), InputError, "give the model that made it"),
        (("{root}/photos", "--size", "64", "--area", "64"), InputError, "exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals_come_before_the_work(world, tmp_path, monkeypatch, args, error, message):
    root, _ = world
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(view_run, "reconstruct", lambda *a, **k: pytest.fail("began to work"))
    words = [arg.format(root=root) for arg in args]
    raised = run(*words, *(() if "-m" in words else ("-m", root / "a"))).exception
    assert isinstance(raised, error) and message in str(raised), raised
    assert list(tmp_path.iterdir()) == []


def test_serving_ends_with_an_interrupt(world, tmp_path):
    root, _ = world
    assert run(root / "cache", "-m", root / "a", "-o", tmp_path / "page").exit_code == 3
    code = "from capacitor_rt.cli import main; main()"
    command = [sys.executable, "-c", code, "view", str(tmp_path / "page"), "--serve"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = process.stderr.readline().split()[0]
            with urllib.request.urlopen(url, timeout=600) as answer:
                assert b"capacitor_rt" in answer.read()
        finally:
            process.send_signal(signal.SIGINT)
            end = threading.Timer(600, process.kill)
            end.start()
        assert process.wait() == 0
        end.cancel()
    assert "is a page already" in str(run(tmp_path / "page").exception)


class TestLpips:
    def test_without_the_package_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr(perceptual, "is_installed", lambda name: False)
        assert perceptual.lpips_distance() == (None, "LPIPS is left out: pip install lpips torchvision")

    def test_weights_that_cannot_be_had_are_no_failure(self, monkeypatch):
        class Package:
            @staticmethod
            def LPIPS(**_):
                raise OSError("no network\nat all")

        monkeypatch.setattr(perceptual, "is_installed", lambda name: True)
        monkeypatch.setitem(sys.modules, "lpips", Package)
        assert perceptual.lpips_distance()[1].endswith("cannot be loaded (no network)")

    def test_images_reach_the_network_in_its_own_range(self, monkeypatch):
        seen = []

        class Network(torch.nn.Module):
            def __init__(self, net, verbose):
                super().__init__()
                assert net == "alex"

            def forward(self, a, b):
                seen.extend((a, b))
                return (a - b).abs().mean().reshape(1, 1, 1, 1)

        monkeypatch.setattr(perceptual, "is_installed", lambda name: True)
        monkeypatch.setitem(sys.modules, "lpips", type("Package", (), {"LPIPS": Network}))
        distance, reason = perceptual.lpips_distance()
        black, white = np.zeros((8, 9, 3), np.uint8), np.full((8, 9, 3), 255, np.uint8)
        assert distance(black, white) == 2 and reason == ""
        assert [t.shape for t in seen] == [(1, 3, 8, 9)] * 2 and seen[0].min() == -1 and seen[1].max() == 1
