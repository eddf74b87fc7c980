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
from bench_contenders import DyingOpBench
from waiting import HANG_SECONDS

from bench import _cases as cases
from bench import _correctness, _timing, gpu, kernels
from bench import _records as records
from bench.__main__ import main
from bench._contenders import TINY
from capacitor_kernels import OPS
from capacitor_kernels import reference as kernel_reference
from capacitor_rt.runtime import timing
from capacitor_rt.runtime.forecast import Ceilings
from capacitor_rt.runtime.plan import PlanKey, make_plan

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CEILINGS = Ceilings(tflops=100.0, gbps=1000.0, source="for the tests")


def case_of(op: str, images: cases.Images = cases.TINY_IMAGES[0]) -> cases.Case:
    return cases.make_case(op, images, TINY, torch.float32, 90)


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "bench", command, *arguments]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=2 * HANG_SECONDS)


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Exit code of a command that refuses its arguments, and the last line that it says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def refusal(*line: str) -> tuple[int, str]:
        try:
            code = main(line)
        except SystemExit as end:
            code = end.code
        output = capsys.readouterr()
        assert not output.out
        # an interpreter that is left with words says them, and ends with 1
        said = [*output.err.splitlines(), *(str(code).splitlines() if isinstance(code, str) else [])]
        return 1 if isinstance(code, str) else code, said[-1]

    return refusal


def test_summary_takes_median_and_percentiles():
    found = timing.summarise([5.0, 1.0, 2.0, 100.0, 3.0, 4.0])
    assert (found.us, found.p20, found.p80, found.replays) == (3.5, 2.0, 5.0, 6)


def test_copies_exceed_three_caches():
    assert timing.copies_for(nbytes=10, l2_bytes=100) == 30
    assert timing.copies_for(nbytes=7, l2_bytes=100) * 7 >= 300
    assert timing.copies_for(nbytes=10**9, l2_bytes=100) == 2


def test_floor_is_the_slower_of_compute_and_copy():
    # 100 TFLOP/s: 1e8 FLOPs a microsecond; 1000 GB/s: 1e6 bytes a microsecond
    assert _timing.floor_us(CEILINGS, flops=3e8, nbytes=1e6) == pytest.approx(3.0)
    assert _timing.floor_us(CEILINGS, flops=1e8, nbytes=5e6) == pytest.approx(5.0)


def test_variants_are_interleaved():
    order = []
    variants = [timing.Variant(name, lambda name=name: lambda: order.append(name), 1) for name in "ab"]
    timed = timing.time_variants(variants, CPU, replays=4)
    assert order == ["a", "b"] + ["a", "b"] * 4
    assert set(timed) == {"a", "b"} and all(t.us > 0 and t.replays == 4 for t in timed.values())


def test_environment_names_its_source():
    facts = _timing.environment(CPU)
    assert facts["torch"] == torch.__version__ and facts["triton"] and facts["date"].endswith("Z")
    assert facts["gpu"] is None and facts["cores"] == os.cpu_count()


@pytest.mark.parametrize("op", OPS)
def test_every_case_agrees_with_plain_torch(op):
    for images in cases.TINY_IMAGES:
        case = case_of(op, images)
        assert case.step.flops > 0 and case.step.nbytes > 0
        assert kernels.difference(case, CPU) <= kernels.AGREEMENT["float32"]


@pytest.mark.parametrize("op", [op for op in OPS if op not in cases.BY_HAND])
def test_a_case_is_a_step_of_the_runtimes_plan(op):
    case = case_of(op)
    keys = [
        PlanKey(direction, 2, 64, 64, torch.float32, image_dtype, "nchw", 90, precision=precision)
        for direction, image_dtype, precision in (
            ("encode", torch.uint8, None),
            ("encode", torch.uint8, "fp8"),
            ("decode", torch.float32, None),
        )
        # siblings have no launches in fp8
        if precision is None or case.model.dico is None
    ]
    assert case.step in [step for key in keys for step in make_plan(case.model, key).steps]
    prepared = case.prepare(CPU)
    again = case.prepare(CPU)
    assert any(not torch.equal(a, b) for a, b in zip(prepared.plain_args, again.plain_args, strict=True))
    assert all(torch.isfinite(t.float()).all() for t in prepared.plain_args)


def test_another_config_changes_what_depends_on_it():
    case = case_of("expand")
    present = case.step.options["config"]
    other = case.with_config(dataclasses.replace(present, block_m=present.block_m // 2))
    assert other.specs["partials"].shape[1] >= case.specs["partials"].shape[1]
    assert kernels.difference(other, CPU) <= kernels.AGREEMENT["float32"]
    assert [launch.args["BLOCK_M"] for launch in other.launches()] == [present.block_m // 2]


def test_a_call_can_be_repeated():
    # the runtime projects onto its own residual, which a second call would add to again
    case = case_of("project")
    prepared = case.prepare(CPU)
    prepared.call()
    first = [t.clone() for t in prepared.outputs()]
    prepared.call()
    assert all(torch.equal(a, b) for a, b in zip(first, prepared.outputs(), strict=True))


def test_a_wrong_launch_gets_no_time():
    case = case_of("grn")
    wrong = dataclasses.replace(case, plain=lambda *args: [1.01 * t for t in case.plain(*args)])
    line = kernels.measure(wrong, CPU, CEILINGS, compiled=False, replays=1)
    assert "us" not in line and "differs from eager torch by 9" in line["refused"]
    assert "refused" in kernels.format_line(line)


def test_a_right_launch_gets_every_figure():
    case = case_of("project")
    line = kernels.measure(case, CPU, CEILINGS, compiled=False, replays=2)
    assert line["tflops"] == pytest.approx(case.step.flops / line["us"] / 1e6)
    assert line["gbps"] == pytest.approx(case.step.nbytes / line["us"] / 1e3)
    assert line["x_eager"] == pytest.approx(line["eager_us"] / line["us"])
    assert line["percent_of_floor"] == pytest.approx(
        100 * _timing.floor_us(CEILINGS, case.step.flops, case.step.nbytes) / line["us"]
    )


def test_an_op_that_kills_its_process_loses_one_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "OpBench", DyingOpBench)
    out = tmp_path / "kernels.jsonl"
    assert kernels.main(["--device", "cpu", "--op", "grn", "--op", "whiten", "--out", str(out)]) == 1
    _, *lines = map(json.loads, out.read_text().splitlines())
    lost, *rest = lines
    assert (lost["op"], lost["missing"]) == ("grn", "its process was ended by SIGABRT") and len(rest) == 3
    assert all(line["us"] > 0 for line in rest)
    # a row without figures is a row of the same key
    assert records.key_of(lost) == records.key_of(lost | {"us": 1.0}) and None not in records.key_of(lost)[2:]
    assert "missing: its process" in capsys.readouterr().out


def test_the_self_check_writes_its_rows(tmp_path):
    done = run("gpu", "--out", str(tmp_path), "--device", "cpu", "--only", "correctness")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = records.read_lines(tmp_path / "correctness.jsonl")
    names = [line["name"] for line in lines]
    assert {name.split()[0] for name in names} >= {*OPS, "encode", "decode"} and len(set(names)) == len(names)
    assert all(line["ok"] and line["error"] <= line["bound"] and line["date"] for line in lines)
    (summary,) = json.loads((tmp_path / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == names and "agree with plain torch" in summary["detail"]


def test_a_wrong_launch_fails_the_self_check(tmp_path, monkeypatch, capsys):
    def off(**tensors):
        return tuple(1.01 * t for t in expand(**tensors))

    expand = kernel_reference.expand
    monkeypatch.setattr(kernel_reference, "expand", off)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _correctness.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    wrong = [line for line in records.read_lines(tmp_path / "correctness.jsonl") if not line["ok"]]
    assert wrong and {line["name"].split()[0] for line in wrong} == {"expand"} and all(w["problem"] for w in wrong)
    assert f"{len(wrong)} of " in capsys.readouterr().out.splitlines()[-1]


def test_kernels_command_writes_one_line_per_figure(tmp_path):
    out = tmp_path / "kernels.jsonl"
    done = run("kernels", "--device", "cpu", "--op", "grn", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "these times say nothing" in done.stdout
    ceilings, *lines = map(json.loads, out.read_text().splitlines())
    assert ceilings["bench"] == "ceilings" and ceilings["tflops"] > 0 and ceilings["gbps"] > 0
    assert [line["images"] for line in lines] == [str(images) for images in cases.TINY_IMAGES]
    for line in lines:
        assert {"op", "dtype", "us", "p20", "p80", "tflops", "gbps", "x_eager", "commit", "date", "triton"} <= set(line)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "no CUDA GPU here"),
        (("--device", "cpu", "--op", "sort"), 1, "--op sort unknown: choose from patchify"),
        (("--device", "cpu", "--size", "12"), 1, "--size 12 is not BATCHxPIXELS"),
        (("--device", "cpu", "--size", "2x100"), 1, "100 a positive multiple of 16"),
    ],
)
def test_kernels_command_refuses(refusal, arguments, code, message):
    found, said = refusal("kernels", *arguments)
    assert found == code and message in said


def test_gpu_command_saves_as_it_goes(tmp_path):
    done = run("gpu", "--out", str(tmp_path), "--device", "cpu", "--only", "ceilings")
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["stage"], summary["status"]) == ("ceilings", "ok")
    assert json.loads((tmp_path / "ceilings.jsonl").read_text())["tflops"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "tests,naps"), "--only naps unknown: choose from correctness,tests,ceilings"),
        ((), "no CUDA GPU here"),
    ],
)
def test_gpu_command_refuses(refusal, tmp_path, arguments, message):
    found, said = refusal("gpu", "--out", str(tmp_path), *arguments)
    assert found == 2 and message in said


@pytest.mark.parametrize(
    ("program", "limit", "status", "code"),
    [
        ("pass", 600, "ok", 0),
        ("raise SystemExit(3)", 600, "failed", 1),
        ("import time; time.sleep(600)", 1, "timeout", 1),
    ],
)
def test_gpu_command_reports_how_stages_end(tmp_path, monkeypatch, program, limit, status, code):
    stage = gpu.Stage("tests", ("-c", program), "tests.log", limit)
    monkeypatch.setattr(gpu, "stages", lambda *_: (stage,))
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "60"]) == code
    assert json.loads((tmp_path / "summary.json").read_text())[0]["status"] == status


def test_a_missing_tool_is_said(tmp_path):
    stage = gpu.Stage("sanitizer", ("-c", "pass"), "sanitizer.log", 60, before=("no-such-tool",))
    outcome = gpu.run_stage(stage, tmp_path)
    assert (outcome.status, outcome.detail) == ("skipped", "no-such-tool is not installed")
