"""The runtime on a GPU that is a fake: in a process of its own, which runs Triton's own code and no interpreter.

More random sequences: `python tests/runtime/on_fake_device/random_calls.py --sequences 2000`, or
CAPACITOR_RANDOM_SEQUENCES=2000 for the test here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "on_fake_device"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_on_a_fake_device(name):
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(FOLDER / name)]
    environment = os.environ | {"CAPACITOR_FAKE_GPU": "1", "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    # plugins that no test here uses cost a second each process
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5000:]
    assert " passed" in run.stdout and " skipped" not in run.stdout
