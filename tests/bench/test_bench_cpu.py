"""The benchmarks themselves, tried out on the CPU: what they write, and when they fail."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import _cases as cases
from bench import _timing as timing
from bench import gpu, kernels

ROOT = Path(__file__).parents[2]
OPS = cases.builders()
CPU = torch.device("cpu")
CEILINGS = timing.Ceilings(tflops=100.0, gbs=1000.0, matmul_size=1, matmul_dtype="float32")


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_summary_takes_median_and_percentiles():
    found = timing.summarise([5.0, 1.0, 2.0, 100.0, 3.0, 4.0])
    assert (found.us, found.p20, found.p80, found.replays) == (3.5, 2.0, 5.0, 6)


def test_copies_exceed_three_caches():
    assert timing.copies_for(nbytes=10, l2_bytes=100) == 30
    assert timing.copies_for(nbytes=7, l2_bytes=100) * 7 >= 300
    assert timing.copies_for(nbytes=10**9, l2_bytes=100) == 2


def test_floor_is_the_slower_of_compute_and_copy():
    # 100 TFLOP/s: 1e8 FLOPs a microsecond; 1000 GB/s: 1e6 bytes a microsecond
    assert CEILINGS.floor_us(flops=3e8, nbytes=1e6) == pytest.approx(3.0)
    assert CEILINGS.floor_us(flops=1e8, nbytes=5e6) == pytest.approx(5.0)


def test_variants_are_interleaved():
    order = []
    variants = [timing.Variant(name, lambda name=name: lambda: order.append(name), 1) for name in "ab"]
    timed = timing.time_variants(variants, CPU, replays=4)
    assert order == ["a", "b"] + ["a", "b"] * 4
    assert set(timed) == {"a", "b"} and all(t.us > 0 and t.replays == 4 for t in timed.values())


def test_environment_names_its_source():
    facts = timing.environment(CPU)
    assert facts["torch"] == torch.__version__ and facts["triton"] and facts["date"].endswith("Z")
    assert facts["gpu"] is None and facts["cores"] == os.cpu_count()


@pytest.mark.parametrize("op", OPS)
def test_every_case_agrees_with_plain_torch(op):
    for size in cases.TINY_SIZES:
        case = OPS[op](size, torch.float32)
        assert case.flops > 0 and case.nbytes > 0
        assert kernels.difference(case, CPU) <= kernels.AGREEMENT["float32"]


def test_a_wrong_launch_gets_no_time():
    case = OPS["grn"](cases.TINY_SIZES[0], torch.float32)
    wrong = dataclasses.replace(case, plain=lambda *args: 1.01 * case.plain(*args))
    line = kernels.measure(wrong, CPU, CEILINGS, compiled=False, replays=1)
    assert "us" not in line and "differs from eager torch by 9" in line["refused"]
    assert "refused" in kernels.format_line(line)


def test_a_right_launch_gets_every_figure():
    case = OPS["project"](cases.TINY_SIZES[0], torch.float32)
    line = kernels.measure(case, CPU, CEILINGS, compiled=False, replays=2)
    assert line["tflops"] == pytest.approx(case.flops / line["us"] / 1e6)
    assert line["gbs"] == pytest.approx(case.nbytes / line["us"] / 1e3)
    assert line["x_eager"] == pytest.approx(line["eager_us"] / line["us"])
    assert line["percent_of_floor"] == pytest.approx(100 * CEILINGS.floor_us(case.flops, case.nbytes) / line["us"])


def test_kernels_command_writes_one_line_a_figure(tmp_path):
    out = tmp_path / "kernels.jsonl"
    done = run("kernels", "--device", "cpu", "--op", "grn", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "these times say nothing" in done.stdout
    ceilings, *lines = map(json.loads, out.read_text().splitlines())
    assert ceilings["bench"] == "ceilings" and ceilings["tflops"] > 0 and ceilings["gbs"] > 0
    assert [line["images"] for line in lines] == [str(size) for size in cases.TINY_SIZES]
    for line in lines:
        assert {"op", "dtype", "us", "p20", "p80", "tflops", "gbs", "x_eager", "commit", "date", "triton"} <= set(line)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "no CUDA GPU here"),
        (("--device", "cpu", "--op", "sort"), 1, "--op sort unknown: choose from dwconv"),
        (("--device", "cpu", "--size", "12"), 1, "--size 12 is not BATCHxPIXELS"),
        (("--device", "cpu", "--size", "2x100"), 1, "100 a positive multiple of 16"),
    ],
)
def test_kernels_command_refuses(arguments, code, message):
    done = run("kernels", *arguments)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


def test_gpu_command_saves_as_it_goes(tmp_path):
    done = run("gpu", "--out", str(tmp_path), "--device", "cpu", "--only", "ceilings")
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["step"], summary["status"]) == ("ceilings", "ok")
    assert json.loads((tmp_path / "ceilings.jsonl").read_text())["tflops"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--only", "tests,naps"), "--only naps unknown: choose from tests,ceilings"), ((), "no CUDA GPU here")],
)
def test_gpu_command_refuses(tmp_path, arguments, message):
    done = run("gpu", "--out", str(tmp_path), *arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("program", "limit", "status", "code"),
    [("pass", 60, "ok", 0), ("raise SystemExit(3)", 60, "failed", 1), ("import time; time.sleep(60)", 1, "timeout", 1)],
)
def test_gpu_command_reports_how_steps_end(tmp_path, monkeypatch, program, limit, status, code):
    step = gpu.Step("tests", ("-c", program), "tests.log", limit)
    monkeypatch.setattr(gpu, "steps", lambda *_: (step,))
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu"]) == code
    assert json.loads((tmp_path / "summary.json").read_text())[0]["status"] == status


def test_a_missing_tool_is_said(tmp_path):
    step = gpu.Step("sanitizer", ("-c", "pass"), "sanitizer.log", 60, before=("no-such-tool",))
    outcome = gpu.run_step(step, tmp_path)
    assert (outcome.status, outcome.detail) == ("skipped", "no-such-tool is not installed")
