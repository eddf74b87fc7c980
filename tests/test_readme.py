"""What the README promises a newcomer."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from capacitor_rt.cli.app import app, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON, READING = re.findall(r"```python\n(.*?)```", README, re.S)


def test_python_example_runs():
    names: dict = {}
    exec(PYTHON, names)
    assert names["latents"].shape == (1, 128, 16, 24) and names["back"].shape == (1, 3, 256, 384)
    assert names["raw"].dtype == torch.float32


def test_cache_example_runs(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["capacitor-rt", "cache", "photos", "latents", "--model", "sample", "--size", "64", "-q"]
    )
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code
    names: dict = {}
    exec(READING, names)
    (batch,) = names["loader"]
    assert batch["latents"].shape == (1, 128, 4, 4) and batch["id"] == ["a.png"]


def test_commands_exist():
    shown = set(re.findall(r"^capacitor-rt (\w+)", README, re.M))
    registered = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert shown <= registered and len(shown) >= 6


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([\w-]+)", README)) <= targets
