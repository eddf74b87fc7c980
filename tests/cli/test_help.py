"""What `--help` shows, and what interruptions and errors of the system say."""

from __future__ import annotations

import re
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from capacitor_rt.cli import latent_files
from capacitor_rt.cli.app import app, main

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_word_in_brackets(name):
    """Which rich takes for its own markup, and leaves out, unless they are escaped."""
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "150", "TERMINAL_WIDTH": "150"}).output
    texts = [COMMANDS[name].help, *(param.help for param in COMMANDS[name].params)]
    words = re.findall(r"\S*\[\S*", " ".join(text or "" for text in texts).replace("\\[", "["))
    assert [word for word in words if word not in shown] == []


def test_some_help_has_brackets():
    assert any("\\[gpu-decode]" in (param.help or "") for param in COMMANDS["cache"].params)


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(latent_files, "list_images", interrupted)
    monkeypatch.setattr(sys, "argv", ["capacitor-rt", "encode", "a.png", "-o", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_encode_overwrites_nothing(tmp_path, monkeypatch, capsys):
    image, there = tmp_path / "a.png", tmp_path / "out" / "a.png.safetensors"
    there.parent.mkdir()
    image.touch()
    there.write_bytes(b"latents")
    for out, said in ((there.parent, "exists: move it away"), (image, "a.png is a file: give a folder as --out")):
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", "encode", str(image), "-o", str(out)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and said in capsys.readouterr().err
    assert there.read_bytes() == b"latents"


def test_an_error_of_the_system_is_told_without_its_number(monkeypatch, capsys):
    def failing(_):
        raise PermissionError(13, "Permission denied", b"out/\xff")

    monkeypatch.setattr(latent_files, "list_images", failing)
    monkeypatch.setattr(sys, "argv", ["capacitor-rt", "encode", "a.png", "-o", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err) == (1, "error: out/\\xff: Permission denied\n")
