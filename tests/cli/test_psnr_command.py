"""`psnr` over many images: rows as they are done, memory that does not grow, latents compared from running sums."""

from __future__ import annotations

import csv
import importlib.util
import json

import numpy as np
import pytest
import torch
import typer
from golden_cases import GOLDEN
from PIL import Image
from typer.testing import CliRunner

from capacitor_rt import CheckpointError, FullCapacitor, InputError
from capacitor_rt.cli.psnr import psnr
from capacitor_rt.evaluation import evaluate
from capacitor_rt.evaluation.metrics import cosine_similarity
from capacitor_rt.images import frames
from capacitor_rt.images.frames import Framing

P16, P8 = str(GOLDEN / "p16"), str(GOLDEN / "p8")


@pytest.fixture
def photos(tmp_path):
    """Nine pictures and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "bad.jpg").write_text("not a picture")
    return folder


@pytest.fixture
def run(tmp_path):
    app = typer.Typer()
    app.command()(psnr)

    def run(*args):
        return CliRunner().invoke(app, [str(tmp_path / "photos"), "--model", P16, "--size", "32", *map(str, args)])

    return run


def test_latents_are_compared_by_their_cosine(run, photos, tmp_path):
    result = run("--against-dtype", "bf16", "--json", tmp_path / "t.json")
    assert result.exit_code == 3 and "latents of p16 and p16 bf16: cosine 1.0" in result.stdout
    found = json.loads((tmp_path / "t.json").read_text())["latent_cosine"]["p16 bf16"]
    # the same from all latents at once
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(p)) for p in sorted(photos.glob("*.png"))]))
    a, b = (FullCapacitor.from_pretrained(P16, dtype=dtype).encode(pixels) for dtype in (torch.float32, torch.bfloat16))
    want = cosine_similarity(a, b)
    assert found["overall"] == pytest.approx(want.overall, abs=1e-7) and found["overall"] < 1
    assert found["per_channel"] == pytest.approx(want.per_channel.tolist(), abs=1e-7)


def test_latents_of_other_shapes_have_no_cosine(run, photos, tmp_path):
    result = run("--against", P8, "--against", P16, "--json", tmp_path / "t.json")
    assert result.exit_code == 3
    assert list(json.loads((tmp_path / "t.json").read_text())["latent_cosine"]) == ["p16 (2)"]
    assert result.stdout.count("cosine") == 1


def test_several_models_are_compared_with_the_first(run, photos, tmp_path):
    result = run("--against", P16, "--against", P16, "--against-backend", "torch", "--json", tmp_path / "t.json")
    assert result.exit_code == 3
    table = json.loads((tmp_path / "t.json").read_text())
    assert list(table["models"]) == ["p16", "p16 torch", "p16 torch (2)"]
    assert table["deltas"]["p16 torch"]["mean"] == 0 and "p16 - p16 torch (2)" in result.stdout


def test_an_interrupted_run_keeps_its_rows(run, photos, tmp_path, monkeypatch):
    real = evaluate.evaluate

    def interrupted(*args, **kwargs):
        for count, score in enumerate(real(*args, **kwargs)):
            if count == 5:
                raise KeyboardInterrupt
            yield score

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    run("--csv", tmp_path / "t.csv", "--batch", 2)
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row["path"][-5:] for row in rows] == [f"{i}.png" for i in range(5)]
    assert all(float(row["p16"]) > 0 for row in rows)


def test_memory_does_not_grow_with_the_number_of_images(photos, monkeypatch):
    loaded = 0
    real = frames.load_frame

    def counting(*args):
        nonlocal loaded
        loaded += 1
        return real(*args)

    monkeypatch.setattr(frames, "load_frame", counting)
    paths = sorted(photos.glob("*.png")) * 4
    scores = evaluate.evaluate(paths, {"p16": FullCapacitor.from_pretrained(P16)}, Framing(32), batch=3, workers=2)
    for done, _ in enumerate(scores):
        # the batch under way and the frames that the workers hold ready
        assert loaded - done <= 3 + 2 * 2 + 1
    assert done + 1 == loaded == len(paths)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--json", "absent/t.json"), InputError, "absent for --json does not exist"),
        (("--background", "red"), InputError, "not a colour"),
        (("--against", "absent-folder"), CheckpointError, "absent-folder"),
    ],
)
def test_refusals_come_before_the_work(run, photos, monkeypatch, options, error, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: pytest.fail("began to work"))
    raised = run(*options).exception
    assert isinstance(raised, error) and message in str(raised)


def test_flux2_without_diffusers_is_one_line(run, photos, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    raised = run("--against", "flux2").exception
    assert isinstance(raised, InputError)
    assert str(raised).endswith("diffusers is not installed: pip install '.[bench]'")
