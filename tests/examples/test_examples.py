"""The examples run as a reader would run them, with few steps, and do what they say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_cases import write_images
from PIL import Image

from capacitor_rt import LatentDataset
from capacitor_rt.cache import CacheRequest, cache_images
from capacitor_rt.cache.export import ExportRequest, export_cache

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as `python examples/SCRIPT ARGS` does; the lines that it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(script: str, *args: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_train_dit(run, tmp_path):
    out = tmp_path / "out"
    lines = run("train_dit.py", "--out", out, "--side", 64, "--per-class", 4, "--steps", 3, "--batch", 4)
    assert lines[0].startswith("24 latents of [128, 4, 4], classes astronaut, chelsea")
    assert "loss" in lines[1] and "samples.png" in lines[-1]
    dataset = LatentDataset(out / "latents", verify=True)
    assert len(dataset) == 24 and dataset[0]["id"].startswith("astronaut/")
    # a row per class: one crop of the cache, which is the crop, and five samples
    sheet = np.asarray(Image.open(out / "samples.png"), np.float32)
    assert sheet.shape == (6 * 64, 6 * 64, 3)
    crop = np.asarray(Image.open(out / "crops" / "astronaut" / "0000.png"), np.float32)
    assert np.abs(sheet[:64, :64] - crop).mean() < 20
    samples = sheet[:, 64:]
    assert samples.std() > 5 and np.isfinite(samples).all()


def test_train_dit_learns(monkeypatch):
    """The loop itself: on two latents its loss falls, and samples of a class are its latent."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_dit

    torch.manual_seed(0)
    # two classes of one latent each, of unit variance
    latents = torch.randn(2, 16, 2, 2)
    labels = torch.arange(2)
    net = train_dit.DiT(16, 2, 2, width=64, depth=1)
    batch = latents.repeat(32, 1, 1, 1), labels.repeat(32)
    with torch.no_grad():
        before = train_dit.flow_loss(net, *batch).item()
    average = train_dit.train(net, *batch, steps=300, seconds=60, batch=32)
    with torch.no_grad():
        after = train_dit.flow_loss(average, *batch).item()
    assert after < before / 4
    made = train_dit.sample(average, labels, (16, 2, 2), guidance=1.0)
    errors = (made[:, None] - latents[None]).square().mean((2, 3, 4))
    assert errors.argmin(1).tolist() == [0, 1] and errors.diagonal().max() < 0.1


def test_train_online(run):
    lines = run("train_online.py", "--steps", 2, "--batch", 2, "--side", 64)
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in lines]
    assert [line.split(",")[0] for line in lines] == ["step 1", "step 2"]
    assert all(0.1 < loss < 100 for loss in losses)


def test_the_yaml_of_lightningdit(tmp_path):
    """The ten lines on the page are those that the exporter prints for such a cache."""
    page = (EXAMPLES / "lightningdit.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    for name in ("cat", "dog"):
        write_images(tmp_path / "images" / name, 2, ((256, 256),))
    cache_images(tmp_path / "images", tmp_path / "cache", "sample", CacheRequest(256, flip=True), progress=False)
    request = ExportRequest(format="lightningdit", labels="folder").resolved()
    report = export_cache(tmp_path / "cache", tmp_path / "out", request, progress=False, note=print)
    printed = "\n".join(report.advice[1:]).replace(str(tmp_path / "out"), "latents-lightningdit")
    assert printed.replace("num_classes: 2", "num_classes: 1000") == shown.rstrip()
    assert len([line for line in shown.splitlines() if not line.endswith(":")]) <= 10
    for command in re.findall(r"^capacitor-rt (\w+)", page, re.M):
        assert command in ("cache", "export")


def test_the_decoder_of_lightningdit():
    page = (EXAMPLES / "lightningdit.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    exec(code, names)
    assert names["images"].shape == (2, 256, 256, 3) and names["images"].dtype == np.uint8


def test_every_example_is_listed():
    listed = set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {p.name for p in EXAMPLES.iterdir() if p.is_file()} - {"README.md"}
