"""`capacitor-rt decode` of caches and folders: pictures have the names of what was encoded."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import torch
from cache_cases import flip_byte, write_images
from models import random_model
from PIL import Image

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig
from capacitor_rt.cache import CacheRequest, Checkpoint, LatentDataset, cache_images
from capacitor_rt.cli.app import _run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, images in two folders, and a cache of them with two image sizes."""
    folder = tmp_path_factory.mktemp("decode")
    random_model().save_pretrained(folder / "model")
    write_images(folder / "src" / "ant", 3, sizes=((40, 40), (20, 80)))
    write_images(folder / "src" / "bee", 2, sizes=((40, 40),), suffix=".webp")
    request = CacheRequest(64, area=True, shard_rows=2)
    source = Checkpoint(str(folder / "model"), device="cpu")
    cache_images(folder / "src", folder / "cache", source, request, workers=0, progress=False)
    return folder


@pytest.fixture
def run(monkeypatch, capfd, made):
    def run(*args, model=made / "model") -> tuple[int, str, str]:
        argv = ["capacitor-rt", *map(str, args), "--model", str(model), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", argv)
        code = _run()
        return code, *capfd.readouterr()

    return run


def pictures(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_cache_of_several_sizes_becomes_pictures_named_by_the_ids(run, made, tmp_path):
    code, out, _ = run("decode", made / "cache", "-o", tmp_path / "out", "--seed", 3)
    assert code == 0 and "5 images written" in out
    names = ["ant/000.png", "ant/001.png", "ant/002.png", "bee/000.webp.png", "bee/001.webp.png"]
    assert pictures(tmp_path / "out") == names
    model, rows = FullCapacitor.from_pretrained(str(made / "model"), device="cpu"), LatentDataset(made / "cache")
    for name, row in zip(names, (rows[i] for i in range(5)), strict=True):
        decoded = model.decode(row["latents"][None], inference_config=FullCapacitorInferenceConfig(seed=3))[0]
        expected = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(np.array(Image.open(tmp_path / "out" / name)), expected)
    code, _, err = run("decode", made / "cache", "-o", tmp_path / "out")
    assert code == 2 and "ant/000.png exists: move it away" in err


def test_rows_are_chosen_by_pattern_and_number(run, made, tmp_path):
    assert run("decode", made / "cache", "-o", tmp_path / "a", "--id", "*/001.*", "--limit", 9)[0] == 0
    assert pictures(tmp_path / "a") == ["ant/001.png", "bee/001.webp.png"]
    assert run("decode", made / "cache", "-o", tmp_path / "b", "--limit", 2)[0] == 0
    assert pictures(tmp_path / "b") == ["ant/000.png", "ant/001.png"]
    assert run("decode", made / "cache", "-o", tmp_path / "c", "--id", "bee/*", "--id", "ant/002.png")[0] == 0
    assert pictures(tmp_path / "c") == ["ant/002.png", "bee/000.webp.png", "bee/001.webp.png"]
    code, _, err = run("decode", made / "cache", "-o", tmp_path / "d", "--id", "cat/*")
    assert code == 2 and "no id of" in err and "matches cat/*: its first is 'ant/000.png'" in err


def test_folders_of_latents_are_searched_as_encode_does(run, made, tmp_path):
    assert run("encode", made / "src", "-o", tmp_path / "enc", "--size", 64)[0] == 0
    code, out, _ = run("decode", tmp_path / "enc", "-o", tmp_path / "out", "--limit", 4)
    assert code == 0 and "4 images written" in out
    assert pictures(tmp_path / "out") == ["ant/000.png", "ant/001.png", "ant/002.png", "bee/000.webp.png"]
    (tmp_path / "empty").mkdir()
    code, _, err = run("decode", tmp_path / "empty", "-o", tmp_path / "x")
    assert code == 2 and "holds neither a cache nor files of latents" in err
    code, _, err = run("decode", tmp_path / "enc", "-o", tmp_path / "x", "--id", "*")
    assert code == 2 and "--id chooses rows of a cache" in err
    code, _, err = run("decode", tmp_path / "enc", made / "cache", "-o", tmp_path / "x")
    assert code == 2 and "would both be written to" in err and "decode them apart" in err
    assert not (tmp_path / "x").exists()


def test_a_damaged_row_costs_one_picture(run, made, tmp_path):
    shutil.copytree(made / "cache", tmp_path / "cache")
    shard = sorted((tmp_path / "cache" / "tasks").iterdir())[0]
    flip_byte(shard, shard.stat().st_size - 5)
    code, out, err = run("decode", tmp_path / "cache", "-o", tmp_path / "out")
    assert code == 3 and "4 images written" in out and "1 failed" in out
    assert "does not match its hash" in err


def test_latents_of_another_model_are_refused_once(run, made, tmp_path):
    random_model(seed=1).save_pretrained(tmp_path / "other")
    code, out, err = run("decode", made / "cache", "-o", tmp_path / "out", model=tmp_path / "other")
    assert code == 3 and "0 images written" in out and err.count("give --model the model that made them") == 1
    assert run("decode", made / "cache", "-o", tmp_path / "out", "--any-space", model=tmp_path / "other")[0] == 0


def test_a_folder_of_views_is_none_of_them(run, made, tmp_path):
    (tmp_path / "views").mkdir()
    for name in ("32", "64-flip"):
        (tmp_path / "views" / name).symlink_to(made / "cache")
    code, _, err = run("decode", tmp_path / "views", "-o", tmp_path / "out")
    assert code == 2 and "holds the caches 32, 64-flip: give one of them" in err
    assert not (tmp_path / "out").exists()
    code, _, _ = run("decode", tmp_path / "views" / "32", "-o", tmp_path / "out", "--limit", "1")
    assert code == 0 and len(pictures(tmp_path / "out")) == 1
