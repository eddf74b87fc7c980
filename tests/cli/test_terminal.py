"""Whatever files are called and say, a terminal only shows it: no control character of theirs reaches it."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from cache_cases import flip_byte
from golden_cases import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capacitor_rt.cli import main
from capacitor_rt.cli.terminal import echo, note_error, printable
from capacitor_rt.errors import CacheError, CheckpointError

P16 = str(GOLDEN / "p16")
# a colour, a title, one in C1, a line of its own, a direction, a byte that is not UTF-8
EVIL = "\x1b[31m\x1b]0;t\x07\x9b5mZ\nerror\u202egnp\udcff\x7f"
SHOWN = r"\x1b[31m\x1b]0;t\x07\x9b5mZ\nerror\u202egnp\xff\x7f"
# libraries that read a file by its path take UTF-8 only
EVIL_UTF8, SHOWN_UTF8 = EVIL.replace("\udcff", ""), SHOWN.replace(r"\xff", "")
# a line may end, and nothing else
UNSAFE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Call the command in a folder of its own; gives (exit code, stdout, stderr), which are safe."""
    monkeypatch.chdir(tmp_path)

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        for text in (out, err):
            assert not UNSAFE.search(text), ascii(text)
            # a line break in a name makes no line
            assert not any(
                line.startswith("error\u202e") or line.startswith("error\\u202e") for line in text.split("\n")
            )
        assert "Traceback" not in err
        return exit.value.code or 0, out, err

    return run


@pytest.fixture
def photos(tmp_path):
    """A folder of a hostile name with a picture and a file that is none, of hostile names."""
    folder = tmp_path / f"photos{EVIL}"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    with open(folder / f"good{EVIL}.png", "wb") as file:
        Image.fromarray(pixels).save(file, format="PNG")
    (folder / f"bad{EVIL}.png").write_text("no image")
    (folder / f"left out.{EVIL}").write_text("")
    return folder


def test_encode_and_decode(run, photos, tmp_path):
    out = tmp_path / f"enc{EVIL}"
    code, text, err = run("encode", photos, "-o", out, "-m", P16)
    assert code == 3 and SHOWN in text and SHOWN in err
    latents = tmp_path / f"latents{EVIL_UTF8}.safetensors"
    next(out.iterdir()).rename(latents)
    code, text, _ = run("decode", latents, "-o", tmp_path / f"dec{EVIL}", "-m", P16)
    assert code == 0 and SHOWN in text
    code, _, err = run("decode", latents, "-o", tmp_path / f"dec{EVIL}", "-m", P16)
    assert code == 2 and SHOWN in err
    latents = latents.rename(tmp_path / f"text{EVIL}.safetensors")
    latents.write_text("no latents")
    code, _, err = run("decode", latents, "-o", "dec", "-m", P16)
    assert code == 3 and SHOWN in err
    code, _, err = run("encode", f"gone{EVIL}", "-o", out)
    assert code == 2 and "\\x1b[31m" in err


def test_latents_in_a_hostile_space(run, tmp_path):
    header = {
        "__metadata__": {"latent_space": "space \x1b[31m\n\u202e"},
        "latents": {"dtype": "F32", "shape": [1, 16, 1, 1], "data_offsets": [0, 64]},
        "\x1b[5m": {"dtype": "F32", "shape": [1], "data_offsets": [64, 68]},
    }
    data = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(68))
    code, _, err = run("decode", "a.safetensors", "-o", "dec", "-m", P16)
    assert code == 3 and "space \\x1b[31m\\n\\u202e" in err
    header["\x1b[6m"] = header.pop("latents")
    data = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(68))
    code, _, err = run("decode", "a.safetensors", "-o", "dec", "-m", P16)
    assert code == 3 and "\\x1b[6m" in err


def test_cache_and_verify(run, photos, tmp_path):
    out = tmp_path / f"cache{EVIL_UTF8}"
    args = ("cache", photos, out, "-m", P16, "--size", 64, "--device", "cpu", "--quiet")
    code, text, err = run(*args, "--dry-run")
    assert code == 0 and "left out" in err
    code, text, err = run(*args)
    assert code == 3 and SHOWN_UTF8 in err
    code, text, err = run(*args)
    assert code == 3 and "nothing to do" in text and SHOWN_UTF8 in text
    assert run("verify", out, "--quiet")[0] == 0
    (data,) = (out / "tasks").iterdir()
    flip_byte(data, -1)
    code, _, err = run("verify", out, "--quiet")
    assert code == 1 and SHOWN_UTF8 in err
    code, _, err = run("verify", f"gone{EVIL}")
    assert code == 1 and "\\x1b[31m" in err


def test_psnr(run, photos, tmp_path):
    model = tmp_path / f"model{EVIL_UTF8}"
    os.symlink(P16, model)
    args = ("psnr", photos, "-m", model, "--size", 64, "--against-dtype", "bf16")
    code, text, err = run(*args)
    assert code == 3 and SHOWN_UTF8 in text and SHOWN in err
    code, text, err = run(*args, "--json", "-")
    document = json.loads(text)
    assert code == 3 and next(iter(document["models"])) == f"model{SHOWN_UTF8}"


def test_inspect(run, tmp_path):
    header = {
        "decoder.\x1b[31m\x9b\u202e\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "__metadata__": {"note": "\x1b[5m"},
    }
    data = json.dumps(header).encode()
    folder = tmp_path / f"model{EVIL}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(4))
    (folder / "config.json").write_text(json.dumps({"evil\x1b]0;t\x07": "\x1b[31m", "patch_size": 16}))
    code, out, err = run("inspect", folder)
    assert code == 1 and "\\x1b[31m" in out + err
    code, out, err = run("inspect", folder, "--json")
    assert code == 1 and (out == "" or json.loads(out)["problems"])


def test_errors_keep_their_list_of_problems(run, monkeypatch):
    def refuse(*_):
        raise CheckpointError("two\nproblems", ["first \x1b[31m\nstill the first", "second"])

    monkeypatch.setattr("capacitor_rt.cli.latent_files.list_images", refuse)
    code, _, err = run("encode", P16, "-o", "x")
    assert code == 1
    assert err.split("\n") == ["error: two\\nproblems", "  first \\x1b[31m\\nstill the first", "  second", ""]


def test_arguments_that_the_parser_refuses(run):
    for args in (("encode", f"--{EVIL}"), (EVIL,), ("encode", "x", "-o", "y", "--dtype", EVIL)):
        code, out, err = run(*args)
        assert code == 2 and out == "" and "x1b[31m" in err
    # a path that holds no UTF-8 is no number either
    assert run("encode", "x", "-o", "y", "--size", EVIL)[0] == 2


def test_a_crash_quotes_nothing_raw(tmp_path):
    """A defect ends in its traceback, which may hold what a file says."""
    code = "from capacitor_rt.cli.terminal import route_messages\nroute_messages()\nraise ValueError('\x1b[31m\u202e')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and not UNSAFE.search(done.stderr)
    assert done.stderr.splitlines()[-1] == "ValueError: \\x1b[31m\\u202e"


@given(st.text(st.characters()))
def test_any_text_becomes_one_safe_line(text):
    line = printable(text)
    assert not UNSAFE.search(line) and "\n" not in line
    line.encode()
    assert printable(line) == line


def test_text_of_any_script_stays_as_it_is():
    text = "Straße 写真 фото 🙂 e\u0301 C:\\n"
    assert printable(text) == text


def test_a_terminal_that_lacks_a_letter_gets_its_escape(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    echo("写真")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u5199\\u771f\n"


def test_an_error_with_problems_is_a_line_for_each(capsys):
    note_error(CacheError("two things: mend both", ["a\nb", "c"]))
    assert capsys.readouterr().err == "error: two things: mend both\n  a\\nb\n  c\n"
