"""`capacitor-rt cache` and `capacitor-rt verify`: options, what they say, exit codes."""

from __future__ import annotations

import json
import os

import pytest
import torch
import typer
from cache_cases import flip_byte, pixels, snapshot, write_images
from models import random_model
from PIL import Image
from typer.testing import CliRunner

from capacitor_rt.cache import LatentDataset
from capacitor_rt.cli.cache import cache
from capacitor_rt.cli.verify import verify
from capacitor_rt.errors import CacheError, CheckpointError, InputError


@pytest.fixture
def cli(tmp_path):
    """Run a command in a folder with images in `src` and a checkpoint in `model`."""
    app = typer.Typer()
    app.command()(cache)
    app.command()(verify)
    write_images(tmp_path / "src", 6, sizes=((64, 64), (32, 128)))
    random_model().save_pretrained(tmp_path / "model")

    def invoke(*args):
        return CliRunner().invoke(app, [str(a) for a in args])

    return invoke


def options(tmp_path, *more):
    return tmp_path / "src", tmp_path / "out", "--model", tmp_path / "model", "--device", "cpu", *more


def test_caches_verifies_and_does_nothing_the_second_time(cli, tmp_path, monkeypatch):
    # on a slow machine too
    monkeypatch.setattr("capacitor_rt.cache.meters.ADVICE_SECONDS", float("inf"))
    args = options(tmp_path, "--area", 64, "--dtype", "fp16", "--posterior", "--flip", "--batch", 2, "--task-inputs", 2)
    first = cli("cache", *args, "--workers", 2)
    assert first.exit_code == 0, first.output
    assert "cached 6 of 6 images in 3 tasks" in first.stdout
    for word in ("images/s", "read", "decode", "of 1 worker,", "encode", "write", "too short a run"):
        assert word in first.stdout
    assert "img/s" in first.stderr or "6/6" in first.stderr
    rows = LatentDataset(tmp_path / "out", verify=True)
    assert rows[0]["latents_flip"].dtype == torch.float16
    again = cli("cache", *args)
    assert again.exit_code == 0
    assert again.stdout.startswith("nothing to do")
    checked = cli("verify", tmp_path / "out")
    assert checked.exit_code == 0
    assert "6 rows of 6 inputs, 3 tasks" in checked.stdout and "no damage" in checked.stdout


def test_dry_run_counts_and_writes_nothing(cli, tmp_path):
    (tmp_path / "src" / "bad.png").write_text("no image")
    (tmp_path / "src" / "notes.txt").write_text("")
    result = cli("cache", *options(tmp_path, "--area", 64, "--task-inputs", 2, "--dry-run"))
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["64x64", "3"] in lines and ["32x128", "3"] in lines
    assert ["quarantined:", "not_an_image", "1"] in lines
    # 6 rows of 8 channels, 16 positions, 2 bytes
    assert "4 tasks of at most 2 images, 1.536 kB of latents in all" in result.stdout
    assert "left out, as they have no image's extension: .txt 1" in result.stderr
    assert not (tmp_path / "out").exists()


def test_quarantine_ends_with_3_each_time(cli, tmp_path):
    (tmp_path / "src" / "bad.png").write_text("no image")
    for _ in range(2):
        result = cli("cache", *options(tmp_path, "--size", 64))
        assert result.exit_code == 3
        assert "1 quarantined (not_an_image 1): see" in result.stderr
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "bad.png"
    assert cli("verify", tmp_path / "out").exit_code == 0


def test_background_is_that_of_the_option(cli, tmp_path):
    picture = Image.fromarray(pixels(64, 64)).convert("RGBA")
    picture.putalpha(0)
    picture.save(tmp_path / "src" / "clear.png")
    assert cli("cache", *options(tmp_path, "--size", 64, "--dtype", "fp32", "--background", "#102030")).exit_code == 0
    rows = LatentDataset(tmp_path / "out")
    row = next(r for r in (rows[i] for i in range(len(rows))) if r["id"] == "clear.png")
    flat = torch.tensor([16, 32, 48], dtype=torch.uint8).expand(1, 64, 64, 3)
    torch.testing.assert_close(row["latents"], random_model().encode(flat)[0])


def test_names_that_are_not_utf8_can_be_told(cli, tmp_path):
    with open(os.path.join(os.fsencode(tmp_path / "src"), b"x\xff.png"), "wb") as f:
        f.write(b"no image")
    result = cli("cache", *options(tmp_path, "--size", 64))
    assert result.exit_code == 3
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "x\\xff.png"
    (tmp_path / "src" / "000.png").unlink()
    os.unlink(os.path.join(os.fsencode(tmp_path / "src"), b"x\xff.png"))
    error = cli("cache", *options(tmp_path, "--size", 64)).exception
    assert "2 removed: '000.png', 'x\\\\xff.png'" in str(error)


def test_failures_are_typed_and_change_nothing(cli, tmp_path):
    cli("cache", *options(tmp_path, "--size", 64))
    before = snapshot(tmp_path / "out")
    for more, kind, message in (
        (("--size", 96), CacheError, "geometry.side 64 -> 96"),
        (("--size", 64, "--compute-dtype", "bf16"), CacheError, "model.compute_dtype float32 -> bfloat16"),
        (("--size", 64, "--background", "red"), InputError, "'red' is not a colour"),
        ((), InputError, "one of --size N"),
        (("--size", 64, "--area", 64), InputError, "one of --size N"),
    ):
        result = cli("cache", *options(tmp_path, *more))
        assert isinstance(result.exception, kind) and message in str(result.exception)
    missing = cli("cache", tmp_path / "src", tmp_path / "new", "--model", tmp_path / "nowhere", "--size", 64)
    assert isinstance(missing.exception, CheckpointError)
    assert cli("cache", *options(tmp_path, "--size", 64, "--dtype", "int3")).exit_code == 2
    assert snapshot(tmp_path / "out") == before and not (tmp_path / "new").exists()


def test_damage_ends_verify_with_1_and_is_named(cli, tmp_path):
    cli("cache", *options(tmp_path, "--size", 64))
    (data,) = (tmp_path / "out" / "tasks").iterdir()
    flip_byte(data, -1)
    result = cli("verify", tmp_path / "out")
    assert result.exit_code == 1
    assert f"damaged: {data} is damaged: 1 of 6 rows" in result.stderr
    flip_byte(data, -1)
    (tmp_path / "out" / "commits.jsonl").write_text("")
    result = cli("verify", tmp_path / "out")
    assert result.exit_code == 1
    assert "unfinished: 1 task still" in result.stderr


class TestViews:
    def test_several_sizes_from_one_decode(self, cli, tmp_path):
        for path in (tmp_path / "src").iterdir():
            os.utime(path, (1_600_000_000, 1_600_000_000))
        args = options(tmp_path, "--view", "32,64@flip", "--view", "64@area+int8", "--batch", 2, "--task-inputs", 4)
        first = cli("cache", *args, "-q", "--workers", 0)
        assert first.exit_code == 0, first.output
        lines = first.stdout.splitlines()
        assert lines[0].startswith("6 inputs read at ")
        names = ["32", "64-flip", "64-area-int8"]
        assert [line.partition(":")[0] for line in lines[1:]] == names
        assert all("cached 6 of 6 images in 2 tasks" in line for line in lines[1:])
        assert "note: 64-area-int8: what storing costs, measured on 4 of these images:" in first.stderr
        checked = cli("verify", tmp_path / "out")
        assert checked.exit_code == 0
        assert [line.split(":")[0] for line in checked.stdout.splitlines()] == sorted(names)
        again = cli("cache", *args)
        assert again.exit_code == 0 and again.stdout.count("0 inputs in this run") == 3
        (tmp_path / "src" / "zz.png").write_bytes((tmp_path / "src" / "000.png").read_bytes())
        updated = cli("cache", *args, "--update", "-q")
        assert updated.exit_code == 0, updated.output
        assert updated.stdout.count("cached 7 of 7 images") == 3 and updated.stdout.startswith("1 input read at ")
        assert updated.stdout.count("7 rows reused for generation 1; 1 input in this run") == 3

    def test_the_worst_exit_code_counts_and_says_where(self, cli, tmp_path):
        (tmp_path / "src" / "bad.png").write_text("no image")
        result = cli("cache", *options(tmp_path, "--view", "32,64"), "-q", "--workers", 0)
        assert result.exit_code == 3
        for name in ("32", "64"):
            assert (
                f"1 quarantined (not_an_image 1): see {tmp_path / 'out' / name / 'quarantine.jsonl'}" in result.stderr
            )

    def test_dry_run(self, cli, tmp_path):
        result = cli("cache", *options(tmp_path, "--view", "32,64@area", "--dry-run"))
        assert result.exit_code == 0 and not (tmp_path / "out").exists()
        assert result.stdout.count("1 task of at most") == 2
        assert "32:" in result.stdout.splitlines() and "64-area:" in result.stdout.splitlines()

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--view", "32", "--size", "32"), "give one of --size N"),
            (("--view", "32@x"), "unknown option 'x'"),
            (("--view", "32,64", "--resize", "tpu"), "resize 'tpu' is unknown"),
        ],
    )
    def test_wrong_usage(self, cli, tmp_path, more, said):
        result = cli("cache", *options(tmp_path, *more))
        assert isinstance(result.exception, InputError) and said in str(result.exception)


@pytest.mark.parametrize("what", [("--size", 32), ("--view", "32,64")])
def test_workers_get_ready_while_the_command_imports(cli, tmp_path, monkeypatch, what):
    from capacitor_rt.cache.decoding import helper as module

    started = []

    class Counted(module.Helper):
        def __init__(self):
            super().__init__()
            started.append(self)

    monkeypatch.setattr(module, "Helper", Counted)
    for where in ("capacitor_rt.cache.run.Helper", "capacitor_rt.cache.decoding.coordinator.Helper"):
        monkeypatch.setattr(where, lambda: pytest.fail("another was started"))
    args = options(tmp_path, *what)
    assert cli("cache", *args, "--dry-run").exit_code == 0 and not started
    assert cli("cache", *args).exit_code == 0 and len(started) == 1
    # it has served the run, and ended with it
    assert started[0].returncode == 0
    assert cli("cache", *args).exit_code == 0 and len(started) == 1
