"""Damaged and hostile caches: rows are right or refused, nothing ends well over damage; `tests.fuzz` makes more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fuzz(*args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fuzz", "--surface", "caches", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_what_once_was_a_finding():
    done = fuzz("--replay")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_mutants():
    done = fuzz("--mutants", "60", "--seed", "14")
    assert done.returncode == 0 and "60 mutants" in done.stdout, done.stdout + done.stderr


def test_a_cache_that_believes_everything_is_found():
    """The mutants can fail: with stamps that vouch for any file a run ends well over wrong latents."""
    code = (
        "import sys; from capacitor_rt.cache.stamps import Stamps; Stamps.vouch = lambda *_: True\n"
        "sys.argv = ['fuzz', '--surface', 'caches', '--mutants', '15', '--seed', '5', '--first', '200']\n"
        "from tests.fuzz.__main__ import main; sys.exit(main())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "a run ended with 3 over" in done.stdout, done.stdout + done.stderr
