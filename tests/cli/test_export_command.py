"""`capacitor-rt export`: what it says, and its exit codes."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import pytest
from export_cases import make_cache

from capacitor_rt.cli.app import _run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("export_command"), each=2, flip=True)


@pytest.fixture
def run(monkeypatch, capfd):
    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", "export", *map(str, args)])
        code = _run()
        return code, *capfd.readouterr()

    return run


def test_says_what_it_wrote_and_what_to_tell_the_trainer(run, cache, tmp_path):
    code, out, err = run(cache, tmp_path / "out", "--format", "lightningdit", "--labels", "folder", "-q")
    assert code == 0 and err == ""
    assert "exported 6 rows in 1 file, " in out
    assert "read back by safetensors and compared with the cache, row by row: no value rounded" in out
    assert "  in_chans: 8" in out.splitlines() and "  downsample_ratio: 16" in out.splitlines()
    code, out, _ = run(cache, tmp_path / "out", "-f", "lightningdit", "--labels", "folder", "-q")
    assert code == 0 and out.startswith("nothing to do: ")


def test_a_dry_run_checks_and_counts_and_writes_nothing(run, cache, tmp_path):
    args = (cache, tmp_path / "out", "-f", "lightningdit", "--labels", "folder", "--shard-rows", 4, "-q")
    code, out, err = run(*args, "--dry-run")
    # two views of 8x4x4 bfloat16 for each row
    assert (code, err) == (0, "") and "6 rows would be in 2 files with 3.072 kB of tensors; 0 are there" in out
    assert not (tmp_path / "out").exists()
    assert run(*args)[0] == 0 and "2 are there" in run(*args, "--dry-run")[1]
    code, _, err = run(cache, tmp_path / "out", "-f", "wds", "--dry-run")
    assert code == 2 and "was exported otherwise" in err


def test_says_when_the_disk_is_too_small(run, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, _, err = run(cache, tmp_path / "out", "-f", "wds", "--dry-run")
    assert code == 0 and "note: 6.144e-06 GB of tensors are to be written, and 1e-06 GB are free" in err


def test_says_what_becomes_of_the_values(run, cache, tmp_path):
    _, out, _ = run(cache, tmp_path / "mar", "-f", "mar", "--labels", "folder", "-q")
    assert "multiplied by 4.30108 (1 / 0.2325 for MAR's loop) in float32, no value rounded" in out


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("-f", "lightningdit"), 2, "reads a label per row"),
        (("-f", "mds", "--layout", "patchified"), 2, "would misread --layout patchified"),
        (("-f", "nope"), 2, "'nope' is not one of"),
        ((), 2, "Missing option '--format'"),
        (("-f", "musubi", "--space", "flux2", "--calibration", "nope.json"), 2, "'nope.json' is not a file"),
        (("-f", "lightningdit", "--labels", "folder", "--shard-rows", "0"), 2, "greater than or equal to 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(run, cache, tmp_path, args, code, message):
    found, out, err = run(cache, tmp_path / "out", *args)
    assert found == code and message in err and out == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_cache_ends_in_1(run, tmp_path):
    code, _, err = run(tmp_path, tmp_path / "out", "-f", "wds")
    assert code == 1 and "is no latent cache" in err
