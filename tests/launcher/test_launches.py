"""A few launches through Triton's own launcher, in a process without the interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc"))), reason="Triton's launcher needs a C compiler"
)
# maps of two and of one row, two launches, every type of pointer, the kernel of specialised warps
FEW = ("project 2x16x16 tma", "project_fp8 2x16x16 tma", "grn 1x64x64 split", "resize", "expand by specialised warps")


def run(*options: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.launcher", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@needs_compiler
def test_the_driver_is_handed_what_the_launches_say():
    found = run("--only", *FEW)
    assert found.count("ok ") == len(FEW) and "expand_hopper_kernel" in found
    # the launches that start early are kernels of their own
    assert "project_kernel, project_kernel" in found


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("cc", ["80", "89", "90", "100", "120"])
def test_so_it_is_with_every_launch(cc):
    run("--cc", cc)


WRONG = """
import os, sys, tempfile
from copy import copy
from dataclasses import replace
from pathlib import Path
os.environ.pop("TRITON_INTERPRET", None)
import torch
from capacitor_kernels.launch import Launch
from capacitor_rt.runtime.launch_cases import FULL, cases
from tests.launcher.launching import Machine, WrongLaunch, launches_of

with tempfile.TemporaryDirectory() as folder:
    machine = Machine(90, Path(folder))
    case = next(case for case in cases(FULL, torch.bfloat16, 90) if case.name == "project 2x16x16 tma")
    (launch,) = launches_of(case, 90)
    assert machine.launch(launch) > 20

    def refused(text, **changes):
        try:
            machine.launch(replace(launch, **changes))
        except (RuntimeError, WrongLaunch) as error:
            assert text in str(error), error
            return
        raise SystemExit(f"not noticed: {text}")

    refused("a grid of", grid=(8, 1 << 17))
    # past Triton's own check
    odd = copy(launch.args["h_ptr"])
    odd.base = torch.empty(512 * 3584 + 1, dtype=torch.bfloat16)[1:].view(512, 3584)
    refused("is not on 16 bytes", args={**launch.args, "h_ptr": odd})
    # what the kernel is handed is not what the launch says
    kernel = launch.kernel
    class Other:
        params, __name__ = kernel.params, kernel.__name__
        def __getitem__(self, grid):
            return lambda **given: kernel[grid](**{**given, "tokens": 7})
    refused("tokens is 07000000", kernel=Other())
"""


@needs_compiler
def test_what_is_wrong_is_noticed():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", WRONG], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
