"""`capacitor-rt tune` where it cannot measure: mistakes that are told before anything else, and rows without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from capacitor_kernels import tuning, user_rows
from capacitor_rt.cli import main

SHAPE = {"tokens_per_image": 256, "dim": 896, "hidden": 3584}
CONFIG = {"block_m": 64, "block_n": 128, "block_k": 32, "group_m": 4, "num_warps": 4, "num_stages": 3}
ROW = {"shape": SHAPE, "dtype": "bf16", "use": "throughput", "config": CONFIG, "evidence": {"gpu": "NVIDIA H200"}}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Call the command with a folder of rows of its own; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv(user_rows.VARIABLE, str(tmp_path / "rows"))
    tuning.reload()

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", "tune", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        return exit.value.code or 0, out, err

    yield run
    monkeypatch.undo()
    tuning.reload()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to tune: give --size"),
        (["--size", "256", "--low-latency"], "--low-latency is for one image at a time, and --batch is 128"),
        (["--size", "250"], "height 250 is not a multiple of 16: use 240 or 256"),
        (["--size", "256", "--direction", "up"], "direction 'up' is unknown: use one of both, encode, decode"),
        (["--size", "256", "--model", "no/such/model"], "neither a folder"),
        (["--size", "256", "--encode-precision", "int8"], "encode_precision 'int8' is unknown: use None"),
        (["--size", "256", "--encode-precision", "fp8", "--direction", "decode"], "--direction is decode: leave one"),
    ],
)
def test_mistakes_are_told_first(run, options, message):
    code, _, err = run(*options)
    assert code in (1, 2) and message in err and "Traceback" not in err


@no_gpu
def test_without_a_gpu_there_is_nothing_to_measure(run, tmp_path):
    code, _, err = run("--size", "256", "--minutes", "0.1")
    assert code == 2 and "tune measures on an NVIDIA GPU, and there is none here" in err
    assert not (tmp_path / "rows").exists()


@no_gpu
def test_rows_of_another_machine_are_exported(run, tmp_path):
    out = tmp_path / "sm_90.json"
    code, _, err = run("--export", out)
    assert code == 2 and "0 files in" in err and "export on the machine with the GPU" in err
    user_rows.write(tmp_path / "rows" / "sm_90.json", 90, {"expand": [ROW]})
    tuning.reload()
    code, _, err = run("--export", out)
    assert code == 0 and f"1 row of sm_90 written to {out}" in err
    (row,) = user_rows.read(out, 90)["expand"]
    assert row["evidence"] == ROW["evidence"] and row["config"].items() >= CONFIG.items()
    code, _, err = run("--export", out)
    assert code == 2 and f"{out} exists: give another --export" in err


def test_a_mistake_is_told_before_torch_is_imported():
    program = (
        "import sys; sys.argv = ['capacitor-rt', 'tune', '--size', '256', '--low-latency']\n"
        "from capacitor_rt.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "AssertionError" not in done.stderr and "give --batch 1" in done.stderr
