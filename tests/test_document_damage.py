"""Damaged and hostile small files: calibrations, config rows, adapters' arguments, latents, logs of exports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capacitor_rt.cache.export.files import locked, open_own, read_own, remove_stale
from capacitor_rt.cache.export.pieces import PieceLog
from capacitor_rt.errors import CacheError

ROOT = Path(__file__).parents[1]


def fuzz(*args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", "--surface", "documents", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_what_once_was_a_finding():
    done = fuzz("--replay")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_mutants():
    done = fuzz("--mutants", "80", "--seed", "14")
    assert done.returncode == 0 and "80 mutants" in done.stdout, done.stdout + done.stderr


def test_an_export_writes_through_no_link_and_waits_for_no_pipe(tmp_path):
    out, mine = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    mine.write_text("mine")
    for name, open_it in (("capacitor.jsonl", PieceLog), (".lock", lambda out: locked(out).__enter__())):
        (out / name).symlink_to(mine)
        with pytest.raises(CacheError, match="is a link or no regular file"):
            open_it(out)
        (out / name).unlink()
        os.mkfifo(out / name)
        with pytest.raises(CacheError, match="is a link or no regular file"):
            open_it(out)
        (out / name).unlink()
    os.link(mine, out / "capacitor.jsonl")
    with pytest.raises(CacheError, match="is a link or no regular file"):
        open_own(out / "capacitor.jsonl", os.O_WRONLY)
    assert mine.read_text() == "mine"


def test_an_export_reads_no_more_than_a_log_can_have(tmp_path):
    path = tmp_path / "capacitor.jsonl"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(CacheError, match="has 1099511627776 bytes, and 1000 is the most"):
        read_own(path, 1000)


def test_an_export_removes_its_own_temporary_files_alone(tmp_path):
    own, others = tmp_path / f"a.tmp-{'0' * 32}", tmp_path / "notes.tmp-mine"
    own.touch()
    others.touch()
    remove_stale(tmp_path)
    assert not own.exists() and others.exists()
