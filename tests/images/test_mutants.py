"""Mutants of image files that once were findings, and a few new ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fuzz(*args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", "--surface", "images", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_what_once_was_a_finding():
    done = fuzz("--replay")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_mutants():
    done = fuzz("--mutants", "200", "--seed", "14")
    assert done.returncode == 0 and "200 mutants" in done.stdout, done.stdout + done.stderr
