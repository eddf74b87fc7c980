"""What a newcomer meets first: version, help, completion, and mistakes that are told at once."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN
from models import random_model
from PIL import Image
from safetensors.torch import load_file, save_file

import capacitor_rt
from capacitor_rt.cache.model_source import Checkpoint
from capacitor_rt.cli import doctor, main

P16 = str(GOLDEN / "p16")


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Call the command in a folder of its own; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        return exit.value.code or 0, out, err

    return run


@pytest.fixture
def photo(tmp_path):
    """A file of random pixels, 64x96."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def module(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "capacitor_rt", *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_the_module_is_the_command():
    done = module("--version")
    assert (done.returncode, done.stdout) == (0, f"capacitor-rt {capacitor_rt.__version__}\n")
    done = module("cache", "--help")
    assert done.returncode == 0 and "Usage: capacitor-rt cache" in done.stdout


def test_no_arguments_print_the_help():
    done = module()
    assert done.returncode == 2 and "Commands" in done.stdout + done.stderr


def test_shells_complete_commands_and_options():
    words = {"COMP_WORDS": "capacitor-rt ver", "COMP_CWORD": "1"}
    assert module(_CAPACITOR_RT_COMPLETE="complete_bash", **words).stdout.split() == ["verify"]
    words = {"COMP_WORDS": "capacitor-rt cache --post", "COMP_CWORD": "2"}
    assert "--posterior" in module(_CAPACITOR_RT_COMPLETE="complete_bash", **words).stdout.split()


def timed(script: str, *args: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """A program that has ended, and the seconds of the processor that it took: a busy machine takes nothing away."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def torch_seconds(tmp_path_factory) -> float:
    """What importing torch takes on this machine, however fast it is."""
    return timed("import torch", cwd=tmp_path_factory.mktemp("torch"))[1]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["encode", "--frob"], 2, "No such option: --frob"),
        (["encode", "gone.png", "-o", "x"], 2, "'gone.png' does not exist"),
        (["encode", "photo.png"], 2, "Missing option"),
        (["encode", "photo.png", "-o", "x", "--size", "100"], 2, "size 100 is not a multiple of 32: use 96 or 128"),
        (["encode", "photo.png", "-o", "x", "--area", "20"], 2, "area side 20 is below 32"),
        (["encode", "photo.png", "-o", "x", "--size", "64", "--area", "64"], 2, "exclude each other"),
        (["encode", "photo.png", "-o", "x", "--background", "blue"], 2, "write it as RRGGBB"),
        (["encode", "photo.png", "-o", "x", "--device", "warp"], 2, "device 'warp' is unknown"),
        (["encode", "photo.png", "-o", "x", "--backend", "magic"], 2, "backend 'magic' is unknown"),
        (["encode", "photo.png", "-o", "x", "--dtype", "int3"], 2, "'int3'"),
        (["encode", "photo.png", "-o", "x", "-m", "./nope"], 1, "'./nope' is neither a folder"),
        (["decode", "gone.safetensors", "-o", "x"], 2, "'gone.safetensors' does not exist"),
        (["cache", "gone", "x", "-m", "sample", "--size", "64"], 2, "'gone' does not exist"),
        (["cache", "photo.png", "x", "-m", "sample"], 2, "give one of --size"),
        (["verify", "gone"], 1, "'gone' is not a folder"),
        (["psnr", "gone"], 2, "'gone' does not exist"),
        (["psnr", "photo.png", "--against", "./nope"], 1, "'./nope' is neither a folder"),
        (["psnr", "photo.png", "--json", "gone/x.json"], 2, "gone for --json does not exist"),
        (["inspect", "/nowhere"], 1, "neither a folder"),
        (["plan", "--size", "100"], 2, "height 100 is not a multiple of 16: use 96 or 112"),
        (["plan", "--size", "64", "--direction", "up"], 2, "direction 'up' is none of this model's"),
        (["plan", "--size", "64", "--sampler", "magic"], 1, "sampler 'magic' is unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_torch_is_imported(tmp_path, torch_seconds, args, code, message):
    (tmp_path / "photo.png").touch()
    script = (
        "import sys\nfrom capacitor_rt.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, flush=True)\n"
    )
    done, seconds = timed(script, *args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "False\n"), done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert seconds < 0.7 * torch_seconds


def test_a_device_that_is_not_there_is_one_line(run, photo):
    if torch.backends.mps.is_available():
        pytest.skip("this machine has an mps device")
    code, _, err = run("encode", photo, "-o", "x", "-m", P16, "--device", "mps")
    assert code == 2 and err == "error: device 'mps' cannot be used here: use e.g. 'cpu' or 'cuda:0'\n"


def test_cache_has_a_backend_that_is_no_part_of_the_plan(run, photo, tmp_path):
    args = ("cache", photo, "out", "-m", P16, "--size", 64, "--device", "cpu", "--quiet")
    assert run(*args, "--backend", "torch")[0] == 0
    code, out, _ = run(*args)
    assert code == 0 and out.startswith("nothing to do")
    source = Checkpoint(P16, backend="torch")
    assert source.identity() == Checkpoint(P16).identity()
    assert source.load(source.identity()).backend == "torch"
    code, _, err = run("cache", photo, "new", "-m", P16, "--size", 64, "--backend", "magic")
    assert code == 2 and "backend 'magic' is unknown: use one of 'auto', 'torch', 'triton'" in err


def test_pictures_are_named_after_the_images(run, photo, tmp_path):
    Image.open(photo).save(tmp_path / "a.bmp")
    assert run("encode", "a.png", "a.bmp", "-o", "enc", "-m", P16)[0] == 0
    assert run("decode", "enc/a.png.safetensors", "enc/a.bmp.safetensors", "-o", "dec", "-m", P16)[0] == 0
    assert sorted(os.listdir(tmp_path / "dec")) == ["a.bmp.png", "a.png"]


def test_decode_never_overwrites_a_picture(run, photo, tmp_path):
    before = photo.read_bytes()
    assert run("encode", "a.png", "-o", "enc", "-m", P16)[0] == 0
    code, _, err = run("decode", "enc/a.png.safetensors", "-o", ".", "-m", P16)
    assert code == 2 and "a.png exists: move it away, or give another --out" in err
    assert photo.read_bytes() == before


def test_latents_that_do_not_name_their_space_are_noted(run, photo, tmp_path):
    assert run("encode", "a.png", "-o", "enc", "-m", P16)[0] == 0
    save_file(load_file(tmp_path / "enc" / "a.png.safetensors"), tmp_path / "bare.safetensors")
    code, _, err = run("decode", "bare.safetensors", "enc/a.png.safetensors", "-o", "dec", "-m", P16)
    (line,) = err.splitlines()
    assert code == 0
    assert line.startswith("note: bare.safetensors does not name the space of its latents: they are taken for p16/")


def test_what_the_library_logs_is_shown(run, photo, monkeypatch):
    """A note of library code reaches the terminal once, and as a note."""
    import logging

    from capacitor_rt.cli import options

    real = options.list_images

    def logging_too(inputs):
        logging.getLogger("capacitor_rt.images").info("said by the library")
        logging.getLogger("capacitor_rt").warning("odd \x1b[31m")
        return real(inputs)

    monkeypatch.setattr("capacitor_rt.cli.latent_files.list_images", logging_too)
    _, _, err = run("encode", photo, "-o", "enc", "-m", P16)
    assert err.splitlines() == ["note: said by the library", "warning: odd \\x1b[31m"]


def test_what_measures_is_there(tmp_path):
    """An installed package has no bench to advise."""
    assert doctor.how_to_measure(doctor.BENCH).startswith("python -m bench gpu")
    assert doctor.how_to_measure(tmp_path).startswith("capacitor-rt cache IMAGES OUT")


def test_a_model_is_found_by_a_relative_folder(run, photo, tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    code, out, _ = run("inspect", "./model", "--json")
    assert code == 0 and json.loads(out)["problems"] == []
