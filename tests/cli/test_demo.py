from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import random_model
from PIL import Image
from typer.testing import CliRunner

from capacitor_rt import FullCapacitorInferenceConfig
from capacitor_rt.cli.demo import app
from capacitor_rt.cli.demo_run import (
    CONTACT_SHEET,
    DIFFERENCE_GAIN,
    GAP,
    LABEL,
    LATENTS_PICTURE,
    MARGIN,
    PHOTOS,
    TOP,
    principal_colours,
    run_demo,
)
from capacitor_rt.config import ModelConfig
from capacitor_rt.errors import CacheError
from capacitor_rt.images.frames import to_uint8
from capacitor_rt.model import FullCapacitor

CONFIG = ModelConfig(
    model_dim=16,
    encoder_depth=1,
    decoder_depth=2,
    decoder_start_blocks=1,
    decoder_end_blocks=1,
    bottleneck_dim=8,
    adaln_low_rank_rank=4,
)


@pytest.fixture(scope="module")
def model() -> FullCapacitor:
    return random_model(CONFIG, seed=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, size in (("wide.png", (64, 128)), ("square.png", (96, 96))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory, model, photos):
    return run_demo(tmp_path_factory.mktemp("demo"), model, photos=photos, area=96, progress=False)


def test_figures_are_those_of_the_stored_latents(report, model):
    assert [item.name for item in report.items] == ["square.png", "wide.png"]
    assert [item.note for item in report.items] == ["96x96", "128x64"]
    for item in report.items:
        pixels = torch.from_numpy(item.original)[None]
        # the cache holds bfloat16
        latents = model.encode(pixels).bfloat16().float()
        torch.testing.assert_close(item.latents[None], latents, rtol=2**-7, atol=1e-6)
        decoded = to_uint8(model.decode(item.latents[None], inference_config=FullCapacitorInferenceConfig(seed=0))[0])
        np.testing.assert_array_equal(item.decoded, decoded)
        mse = np.mean((item.original.astype(float) - decoded) ** 2)
        assert item.psnr == pytest.approx(10 * math.log10(255**2 / mse))


def test_original_is_the_photograph(report, photos):
    item = report.items[0]
    np.testing.assert_array_equal(item.original, np.asarray(Image.open(photos / item.name)))


def test_contact_sheet_shows_the_pixels(report):
    sheet = np.asarray(Image.open(report.out / CONTACT_SHEET))
    cell = max(item.original.shape[1] for item in report.items)
    y = TOP
    for item in report.items:
        difference = np.abs(item.original.astype(int) - item.decoded) * DIFFERENCE_GAIN
        tiles = (item.original, item.decoded, difference.clip(0, 255))
        height, width = item.original.shape[:2]
        label = sheet[y : y + LABEL, MARGIN : MARGIN + 100]
        assert label.min() < 100, "no label is drawn above the row"
        for i, tile in enumerate(tiles):
            x = MARGIN + i * (cell + GAP)
            np.testing.assert_array_equal(sheet[y + LABEL : y + LABEL + height, x : x + width], tile)
        y += LABEL + height + GAP


def test_latents_picture_holds_one_block_per_position(report):
    sheet = np.asarray(Image.open(report.out / LATENTS_PICTURE))
    item = report.items[0]
    colours, _ = principal_colours([i.latents for i in report.items])
    x = MARGIN + max(i.original.shape[1] for i in report.items) + GAP
    shown = sheet[TOP + LABEL : TOP + LABEL + 96, x : x + 96]
    np.testing.assert_array_equal(shown, np.kron(colours[0], np.ones((16, 16, 1), np.uint8)))
    assert item.latents.shape == (8, 6, 6)


def test_text_names_figures_files_and_failures(report):
    text = report.render()
    for item in report.items:
        assert f"{item.psnr:.2f} dB" in text and item.name in text
    assert "left out: 1 file, not_an_image" in text and "README" not in text
    for name in (CONTACT_SHEET, LATENTS_PICTURE, "cache"):
        assert str(report.out / name) in text and (report.out / name).exists()
    assert f"{np.mean([i.psnr for i in report.items]):.2f}" in report.table.render()


def test_ends_by_naming_the_page(report):
    assert report.render().splitlines()[-1].startswith(f"open {report.out / 'page' / 'index.html'} in a browser")
    assert report.page == report.out / "page" / "index.html"
    for i, item in enumerate(report.items):
        for what, pixels in (("original", item.original), ("0", item.decoded)):
            np.testing.assert_array_equal(
                np.asarray(Image.open(report.out / f"page/images/{i:06d}-{what}.webp")), pixels
            )
    assert "not_an_image" in report.page.read_text()


def test_again_reads_the_same_cache(report, model, photos):
    before = {p: p.stat().st_mtime_ns for p in (report.out / "cache").rglob("*.safetensors")}
    again = run_demo(report.out, model, photos=photos, area=96, progress=False)
    assert before and before == {p: p.stat().st_mtime_ns for p in (report.out / "cache").rglob("*.safetensors")}
    assert [i.psnr for i in again.items] == [i.psnr for i in report.items]


def test_another_size_is_refused(report, model, photos):
    with pytest.raises(CacheError):
        run_demo(report.out, model, photos=photos, area=128, progress=False)


def test_command(tmp_path, model, photos):
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "capacitor_rt.cli.demo", "--out", tmp_path / "out", "--photos", photos]
    done = subprocess.run([*command, "--model", tmp_path / "model", "--area", "96"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "square.png" in done.stdout and "PSNR dB, 2 images" in done.stdout
    assert (tmp_path / "out" / CONTACT_SHEET).exists()


def test_failure_is_one_line(tmp_path):
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), "--model", str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error:") and str(tmp_path / "nothing") in result.stderr
    assert not (tmp_path / "out").exists()


def test_sample_model_on_its_photographs(tmp_path):
    report = run_demo(tmp_path, area=96, progress=False)
    roles = {item.name: item.role for item in report.items}
    assert roles["chelsea.png"] == roles["flower.jpg"] == roles["rocket.jpg"] == "held out"
    assert roles["astronaut.png"] == "trained on"
    assert report.cache.exit_code == 0 and len(report.items) == len(list(PHOTOS.glob("*.[jp][pn]g")))
    # far below the photographs' own size there is more detail in a patch; noise would give 8 dB
    assert all(item.psnr > 20 for item in report.items), report.render()
    held_out = np.mean([item.psnr for item in report.items if item.role == "held out"])
    assert f"{held_out:.2f} dB  mean of 3" in report.render()
    # it is another figure than the README's, and says why
    assert "measured on them whole. These are\nresized crops of the sizes above" in report.render()


class TestPrincipalColours:
    def test_finds_the_directions_of_largest_variance(self):
        g = torch.Generator().manual_seed(0)
        axes = torch.linalg.qr(torch.randn(10, 10, generator=g))[0][:, :3]
        strengths = torch.tensor([5.0, 3.0, 1.0])
        weights = torch.randn(3, 40 * 50, generator=g)
        weights -= weights.mean(1, keepdim=True)
        weights = torch.linalg.qr(weights.T)[0].T * strengths[:, None]
        latents = (axes @ weights).reshape(10, 40, 50) + 7
        colours, share = principal_colours([latents[:, :, :20], latents[:, :, 20:]])
        assert share == pytest.approx(1)
        assert [c.shape for c in colours] == [(40, 20, 3), (40, 30, 3)]
        shown = np.concatenate(colours, 1).reshape(-1, 3).T.astype(float)
        for channel, weight in zip(shown, weights.numpy(), strict=True):
            assert abs(np.corrcoef(channel, weight)[0, 1]) > 0.99

    def test_share_of_the_variance(self):
        latents = torch.zeros(6, 1, 12)
        # one impulse of each sign per channel: six orthogonal directions of equal variance
        for c in range(6):
            latents[c, 0, 2 * c], latents[c, 0, 2 * c + 1] = 1, -1
        assert principal_colours([latents])[1] == pytest.approx(0.5)

    def test_flat_latents(self):
        colours, _ = principal_colours([torch.ones(4, 2, 3)])
        assert colours[0].shape == (2, 3, 3) and (colours[0] == 0).all()
