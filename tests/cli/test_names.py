"""Names of every kind through encode, decode and psnr: one that cannot be used costs itself alone."""

from __future__ import annotations

import os
import sys

import image_files as files
import pytest
from golden_cases import GOLDEN

from capacitor_rt.cli import main

P16 = str(GOLDEN / "p16")
NAMES = {
    b"plain.png": b"plain.png",
    b"latin1-\xe9.png": b"latin1-\xe9.png",
    b"line\nbreak \x1b[31m.png": b"line\nbreak \x1b[31m.png",
    # with .safetensors just short enough, and one byte too long
    b"x" * 239 + b".png": b"x" * 239 + b".png",
    b"y" * 240 + b".png": None,
}


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", *args])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err and "\x1b" not in out + err
        return exit.value.code or 0, out, err

    return run


def test_encode_decode_psnr(run, tmp_path):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(NAMES):
        with open(os.path.join(os.fsencode(tmp_path / "in"), name), "wb") as file:
            file.write(files.encoded(files.texture(32, 32, i), "PNG"))
    code, out, err = run("encode", "in", "-o", "latents", "--model", P16)
    assert code == 3 and "4 images encoded to latents, 1 failed" in out
    assert err.count("error: ") == 1 and "its name has 256 bytes, 255 are allowed" in err
    written = [name + b".safetensors" for name in NAMES.values() if name]
    assert sorted(os.listdir(os.fsencode(tmp_path / "latents"))) == sorted(written)
    code, out, err = run("decode", "latents", "-o", "pictures", "--model", P16)
    assert code == 0 and "4 images written" in out
    assert sorted(os.listdir(os.fsencode(tmp_path / "pictures"))) == sorted(filter(None, NAMES.values()))
    code, out, err = run("psnr", "in", "--model", P16, "--csv", "scores.csv", "--json", "scores.json")
    assert code == 0 and "5 images" in out
    assert (tmp_path / "scores.csv").read_bytes().count(b"latin1-") == 1


def test_a_row_of_a_cache_whose_picture_can_have_no_name(run, tmp_path):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("plain.jpg", "z" * 251 + ".jpg")):
        (tmp_path / "in" / name).write_bytes(files.encoded(files.texture(32, 32, i), "JPEG"))
    code, out, err = run("cache", "in", "cache", "--model", P16, "--size", "32", "--workers", "0", "-q")
    assert code == 0, err
    code, out, err = run("decode", "cache", "-o", "pictures", "--model", P16)
    assert code == 3 and "1 image written to pictures, 1 failed" in out
    assert err.startswith("error: ") and ("too long" in err or "are allowed" in err)
    assert os.listdir(tmp_path / "pictures") == ["plain.jpg.png"]


def test_damaged_tiffs_leave_stderr_to_the_program(run, tmp_path):
    (tmp_path / "in").mkdir()
    good = files.encoded(files.texture(64, 64), "TIFF", compression="tiff_lzw")
    (tmp_path / "in" / "good.tif").write_bytes(good)
    damaged = bytearray(good)
    damaged[700:780] = bytes(80)
    (tmp_path / "in" / "damaged.tif").write_bytes(damaged)
    (tmp_path / "in" / "metadata.tif").write_bytes(good[:-3])
    code, out, err = run("encode", "in", "-o", "latents", "--model", P16)
    assert code == 3 and "1 image encoded" in out
    assert all(line.split(":")[0] in ("corrupt", "truncated") for line in err.splitlines()), err
