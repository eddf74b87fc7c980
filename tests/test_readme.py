"""What the README promises a newcomer: its examples run. Its links and commands are checked in test_docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from capacitor_rt.cli.app import main

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON, DIFFUSERS, READING = re.findall(r"```python\n(.*?)```", README, re.S)


def test_python_example_runs():
    names: dict = {}
    exec(PYTHON, names)
    assert names["latents"].shape == (1, 128, 16, 24) and names["back"].shape == (1, 3, 256, 384)
    assert names["raw"].dtype == torch.float32
    assert len([line for line in PYTHON.splitlines() if line.strip() and not line.startswith("#")]) <= 10


def test_diffusers_example_runs():
    names: dict = {}
    exec(DIFFUSERS, names)
    assert names["latents"].shape == (1, 32, 32, 32) and names["picture"].shape == (1, 3, 256, 256)


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


def test_imports_in_the_text_work():
    imports = re.findall(r"`(from \w+ import [\w, ]+)`", README)
    assert any("capacitor_kernels" in line for line in imports) and any("capacitor_rt" in line for line in imports)
    for line in imports:
        names: dict = {}
        exec(line, names)
        assert all(callable(names[name]) for name in line.partition(" import ")[2].split(", ")), line


def test_ten_commands_at_most_are_shown():
    assert 6 <= len(set(re.findall(r"^capacitor-rt (\w+)", README, re.M))) <= 10
