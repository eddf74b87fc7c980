"""`capacitor-rt calibrate-fp8`: what it writes and prints, and that a damaged or foreign file is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cache_cases import write_images
from golden_cases import GOLDEN

from capacitor_rt import FullCapacitor, InputError
from capacitor_rt.cli import main
from capacitor_rt.fp8_calibration import SUFFIX, Fp8Calibration, load, places
from capacitor_rt.fp8_encoding import ranges_from
from capacitor_rt.runtime.fp8 import Fp8Encoder

SAMPLE = Path(__file__).parents[2] / "capacitor_rt" / "sample"


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Call the command; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", "calibrate-fp8", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        return exit.value.code or 0, out, err

    return run


@pytest.fixture
def folder(tmp_path):
    """A model of its own, whose folder can be written to, and images."""
    shutil.copytree(GOLDEN / "p16", tmp_path / "model")
    write_images(tmp_path / "images", 3, sizes=((64, 64), (48, 80)))
    return tmp_path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_scales_lie_beside_the_weights_with_the_hash_of_both(run, folder):
    model, images = folder / "model", folder / "images"
    code, out, err = run(model, images, "--size", 64)
    path = model / f"model{SUFFIX}"
    assert code == 0 and f"scales written to {path}" in err
    assert out.splitlines()[0] == "3 images, against the model in float32:"
    calibration = load(path, sha256(model / "model.safetensors"))
    assert calibration.model["sha256"] == sha256(model / "model.safetensors")
    assert calibration.images["count"] == 3 and len(calibration.images["sha256"]) == 64
    assert 0 < calibration.report["latent_error_16_bits"] < calibration.report["latent_error"] < 0.2
    # the file gives what was measured
    loaded = FullCapacitor.from_pretrained(model)
    encoder = Fp8Encoder(loaded, ranges_from(calibration), torch.bfloat16)
    latents = encoder.encode(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert latents.shape[0] == 1 and latents.isfinite().all()
    # and is never replaced
    code, _, err = run(model, images, "--size", 64)
    assert code == 2 and "exists: caches may have been made by it" in err


def test_other_images_give_another_hash(run, folder):
    digests = []
    for size in (64, 96):
        assert run(folder / "model", folder / "images", "--size", size, "--out", folder / f"{size}.json")[0] == 0
        digests.append(load(folder / f"{size}.json", sha256(folder / "model" / "model.safetensors")).images["sha256"])
    assert digests[0] != digests[1]


def test_the_report_on_the_sample_checkpoint(run, tmp_path):
    code, out, _ = run("sample", SAMPLE / "photos", "--json")
    report = json.loads(out)
    assert code == 0 and report["images"] == 6
    # emulated, 2026-11-25: 0.756 % where bfloat16 alone has 0.606 %, 31.594 -> 31.584 dB
    assert report["latent_error"] == pytest.approx(7.56e-3, rel=0.1)
    assert report["latent_error_16_bits"] == pytest.approx(6.06e-3, rel=0.1)
    assert report["psnr_float32"] - report["psnr"] == pytest.approx(0.010, abs=0.02) and report["cosine"] > 0.9999
    assert report["worst"]["name"] in {path.name for path in (SAMPLE / "photos").iterdir()}
    # the package is not written to
    (written,) = (tmp_path / "xdg" / "capacitor_rt" / "fp8").iterdir()
    assert report["out"] == str(written) and written.name.startswith(sha256(SAMPLE / "model.safetensors")[:32])
    assert places(SAMPLE / "model.safetensors", sha256(SAMPLE / "model.safetensors"), True) == (written,)


def test_a_dry_run_writes_nothing_and_bad_images_are_named(run, folder):
    (folder / "images" / "bad.png").write_text("no image")
    before = sorted(path.name for path in folder.rglob("*"))
    code, out, err = run(folder / "model", folder / "images", "--dry-run", "--size", 64)
    assert code == 3 and "1 of 4 images could not be decoded" in err and "latent error" in out
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compute-dtype", "fp32"], "--compute-dtype fp32 leaves nothing to gain"),
        (["--size", "64", "--area", "64"], "exclude each other"),
    ],
)
def test_mistakes_are_told_first(run, folder, options, message):
    code, _, err = run(folder / "model", folder / "images", *options)
    assert code == 2 and message in err


@pytest.fixture
def written(run, folder):
    """The fields of a calibration file, and what writes others."""
    path, weights = folder / "c.json", sha256(folder / "model" / "model.safetensors")
    run(folder / "model", folder / "images", "--size", 64, "--out", path)
    return path, weights, json.loads(path.read_text())


def test_a_calibration_of_other_weights_is_refused(written):
    path, weights, _ = written
    assert isinstance(load(path, weights), Fp8Calibration)
    with pytest.raises(InputError, match=r"is of other weights \(.*calibrate these by `capacitor-rt calibrate-fp8`"):
        load(path, "0" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("format"), "is no capacitor-fp8-calibration/1 file"),
        (lambda v: v.pop("images"), "is damaged .*images"),
        (lambda v: v["ranges"][0].update(y=v["ranges"][0]["y"] * 2), "do not match its sha256"),
        (lambda v: v["ranges"][0].update(y=-1.0), "is no magnitude"),
        (lambda v: v["ranges"][0].update(y="1"), "is no magnitude"),
        (lambda v: v["ranges"][0].pop("hidden"), "a block has"),
        (lambda v: v.update(ranges=7), "is damaged"),
    ],
)
def test_a_damaged_file_is_refused(written, change, message):
    path, weights, values = written
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"{message}.*make it anew by|.*{message}"):
        load(path, weights)


def test_what_is_no_json_is_refused(written):
    path, weights, _ = written
    path.write_text("{")
    with pytest.raises(InputError, match=r"cannot be read .*make it anew by `capacitor-rt calibrate-fp8`"):
        load(path, weights)
