"""The README's table "I train X": its commands run as they stand, on a cache made as the table says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from calibrations import document
from export_cases import make_cache, rows_by_id
from safetensors.torch import save_file
from typer.testing import CliRunner

from capacitor_rt import LatentDataset
from capacitor_rt.cache.export import wds
from capacitor_rt.cache.export.request import FORMATS
from capacitor_rt.cli.app import app

README = (Path(__file__).parents[2] / "README.md").read_text()
TABLE = README.partition("## I train X, what do I do?")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"`capacitor-rt (export [^`]*)`", TABLE)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`latents/` of the images in `photos/`, and the files that commands name."""
    folder = tmp_path_factory.mktemp("home")
    cache = make_cache(folder, each=1, side=256, flip=True, posterior=True, distinct=True)
    cache.rename(folder / "latents")
    (folder / "src").rename(folder / "photos")
    rows = rows_by_id(folder / "latents")
    (folder / "captions.json").write_text(json.dumps({row["id"]: f"a {row['id']}" for row in rows}))
    save_file({row["id"]: torch.randn(3, 4).half() for row in rows}, folder / "text.safetensors")
    space = LatentDataset(folder / "latents").latent_space
    (folder / "calibration.json").write_text(json.dumps(document(8, latent_space=space)))
    return folder


def test_every_format_is_in_the_table():
    assert {re.search(r"-f (\w+)", command)[1] for command in COMMANDS} == set(FORMATS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_table_runs(home, monkeypatch, command):
    if "-f repae" in command:
        pytest.importorskip("h5py")
    # its preparation takes seconds, and has a test of its own
    installed = wds.is_installed
    monkeypatch.setattr(wds, "is_installed", lambda name: name != "megatron.energon" and installed(name))
    monkeypatch.chdir(home)
    for option, file in (("captions", "captions.json"), ("text-latents", "text.safetensors"), ("calibration", None)):
        command = command.replace(f"--{option} FILE", f"--{option} {file or 'calibration.json'}")
    arguments = shlex.split(command)
    # formats that differ by a preset alone have the same folder in the table
    arguments[2] = f"{arguments[2].rstrip('/')}-{abs(hash(command))}"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "exported 3 rows in " in result.output and "compared with the cache, row by row" in result.output
