"""`verify --decode N`: a sample of rows against the images that they were made of."""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import capacitor_rt.sample
from capacitor_rt.cache import CacheRequest, RunOptions, cache_images
from capacitor_rt.cache.encoder import BatchEncoder
from capacitor_rt.cache.model_source import Checkpoint
from capacitor_rt.cli.app import _run
from capacitor_rt.cli.verify_decode import decode_sample, stratified
from capacitor_rt.errors import CacheError

PHOTOS = Path(capacitor_rt.sample.__file__).parent / "photos"
REQUEST = CacheRequest(64, area=True, task_inputs=2)


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decode") / "src"
    folder.mkdir()
    for i, path in enumerate(sorted(PHOTOS.glob("*.[jp]*g"))[:6]):
        image = Image.open(path).convert("RGB")
        image.thumbnail((160, 160))
        if i % 2:
            image = image.crop((0, 0, image.width, image.height * 2 // 3))
        image.save(folder / f"{path.stem}.png")
    return folder


def make(src: Path, out: Path, request: CacheRequest = REQUEST) -> Path:
    cache_images(src, out, Checkpoint("sample"), request, options=RunOptions(workers=0, progress=False))
    return out


@pytest.fixture(scope="module")
def out(src) -> Path:
    return make(src, src.parent / "out")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", *map(str, args)])
        try:
            code = _run()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_a_good_cache(src, out, run, tmp_path):
    code, text, err = run("verify", out, "--decode", 4, "--images", src, "--sheet", tmp_path / "worst.png", "-q")
    assert code == 0, err
    assert "4 rows of 3 buckets and 3 tasks decoded: PSNR median" in text or "4 rows of 2 buckets" in text
    assert f"the worst 4 rows: {tmp_path / 'worst.png'}" in text
    assert Image.open(tmp_path / "worst.png").width > 3 * 48
    found = decode_sample(out, 6, str(src), Checkpoint("sample"))
    # bfloat16 costs next to nothing, and the sample model is far better than noise
    assert all(abs(row.cached - row.anew) < 0.1 and row.cached > 18 for row in found.compared)
    assert [row.cached - row.anew for row in found.compared] == sorted(row.cached - row.anew for row in found.compared)


def test_latents_that_are_not_of_the_images_are_poor(src, run, tmp_path, monkeypatch):
    """Every hash is right, and what was stored is not what the model says of the images."""
    original = BatchEncoder._encode

    def noisy(self, pixels, suffix):
        tensors = original(self, pixels, suffix)
        return {
            name: t + torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) for name, t in tensors.items()
        }

    with monkeypatch.context() as patch:
        patch.setattr(BatchEncoder, "_encode", noisy)
        bad = make(src, tmp_path / "bad")
    assert run("verify", bad, "-q")[0] == 0
    code, _, err = run("verify", bad, "--decode", 3, "--images", src, "-q")
    assert code == 1
    assert "3 of 3 rows decode more than 1 dB worse than their images encoded anew" in err and err.count("poor: ") == 3
    assert run("verify", bad, "--decode", 3, "--images", src, "--tolerance", 60, "-q")[0] == 0


def test_images_that_are_gone_or_changed(src, out, run, tmp_path):
    copy = Path(shutil.copytree(src, tmp_path / "copy"))
    names = sorted(path.name for path in copy.iterdir())
    (copy / names[0]).unlink()
    shutil.copy(copy / names[2], copy / names[1])
    code, text, err = run("verify", out, "--decode", 6, "--images", copy, "-q")
    assert code == 3 and "4 rows of" in text
    assert f"not compared: {names[0]}: changed: it is not there any more" in err
    assert f"not compared: {names[1]}: changed: it has other bytes than when it was cached" in err
    for name in names[2:]:
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(copy / name)
    code, _, err = run("verify", out, "--decode", 6, "--images", copy, "-q")
    assert (
        code == 1 and "none of the images of the 6 rows is there as it was cached: give the source by --images" in err
    )
    code, _, err = run("verify", out, "--decode", 6, "--images", tmp_path / "nowhere", "-q")
    assert code == 1 and "nowhere" in err and "Traceback" not in err


def test_another_model_is_refused(src, out, run, tmp_path):
    from models import random_model

    random_model().save_pretrained(tmp_path / "model")
    code, _, err = run("verify", out, "--decode", 1, "--images", src, "--model", tmp_path / "model", "-q")
    assert code == 1 and "has other weights" in err and "--model" in err


def test_a_tar_file_and_an_updated_cache(src, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for path in sorted(src.iterdir())[:3]:
            file.add(path, path.name)
    make(tmp_path / "x.tar", tmp_path / "out")
    with tarfile.open(tmp_path / "x.tar", "a") as file:
        for path in sorted(src.iterdir())[3:5]:
            file.add(path, path.name)
    options = RunOptions(workers=0, progress=False, update=True)
    cache_images(tmp_path / "x.tar", tmp_path / "out", Checkpoint("sample"), REQUEST, options=options)
    found = decode_sample(tmp_path / "out", 9, str(tmp_path / "x.tar"), Checkpoint("sample"))
    assert len(found.compared) == 5 and not found.missing and not any(row.is_poor(0.2) for row in found.compared)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--images", "x"), "are for --decode N: add it"),
        (("--decode", 3), "give what was cached by --images"),
        (("--decode", 0, "--images", "x"), "'--decode'"),
    ],
)
def test_wrong_usage(out, run, args, message):
    code, _, err = run("verify", out, *args)
    assert code == 2 and message in err


def test_a_sheet_that_cannot_be_written(src, out, run, tmp_path):
    code, _, err = run("verify", out, "--decode", 1, "--images", src, "--sheet", tmp_path / "worst.xyz", "-q")
    assert code == 2 and "give a file name that ends in .png" in err


def test_a_damaged_cache_is_not_decoded(src, out, run, tmp_path):
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    path = next((copy / "tasks").iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, text, err = run("verify", copy, "--decode", 1, "--images", src, "-q")
    assert code == 1 and "damaged:" in err and "decoded" not in text


def test_the_sample_is_spread(out):
    buckets = np.array([0] * 50 + [1] * 3 + [2] * 40 + [0] * 50 + [3])
    for seed in range(5):
        chosen = stratified(buckets, 16, seed)
        assert len(set(chosen)) == 16 and chosen == sorted(chosen)
        counts = np.bincount(buckets[chosen])
        assert counts.min() >= 1 and 8 <= counts[0] <= 11 and 3 <= counts[2] <= 6
        # both halves of the largest
        assert sum(i < 50 for i in chosen if buckets[i] == 0) in (counts[0] // 2, counts[0] - counts[0] // 2)
    assert set(buckets[stratified(buckets, 2, 0)]) == {0, 2}
    assert stratified(buckets, 1000, 0) == list(range(len(buckets)))
    with pytest.raises(CacheError):
        decode_sample(Path("nowhere"), 1, "x", Checkpoint("sample"))
