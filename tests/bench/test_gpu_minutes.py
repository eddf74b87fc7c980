"""`python -m bench gpu` within its minutes: shares, stages that end by themselves, what is left out, the summary."""

from __future__ import annotations

import json

import pytest
from bench_lines import GPU, call, ceilings, write

from bench import gpu

OK = ("-c", "import sys; print(*sys.argv[1:])")
SLOW = ("-c", "import time; time.sleep(60)")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run given stages; gives (exit code, outcomes by stage)."""

    def run(*stages: gpu.Stage, minutes: float = 8.0) -> tuple[int, dict[str, dict]]:
        monkeypatch.setattr(gpu, "stages", lambda *_: stages)
        code = gpu.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", str(minutes)])
        return code, {outcome["stage"]: outcome for outcome in json.loads((tmp_path / "summary.json").read_text())}

    return run


def test_a_paced_stage_is_told_its_minutes(run):
    code, found = run(gpu.Stage("model", OK, "m.log", 600, share=3, paced=True), gpu.Stage("cache", OK, "c.log", 600))
    flag, minutes = found["model"]["detail"].split()
    # three quarters of eight minutes, and of these what the stage may begin in
    assert code == 0 and flag == "--minutes" and float(minutes) == pytest.approx(gpu.PACE * 6, rel=0.01)
    assert found["cache"]["detail"] == ""


def test_unused_time_goes_to_later_stages(run):
    stages = [gpu.Stage(name, OK, f"{name}.log", 600, paced=True) for name in ("model", "flux2")]
    _, found = run(*stages)
    first, second = (float(found[name]["detail"].split()[1]) for name in ("model", "flux2"))
    assert second == pytest.approx(2 * first, rel=0.05)


def test_a_late_benchmark_keeps_what_it_measured_and_late_tests_fail(run):
    code, found = run(gpu.Stage("kernels", SLOW, "k.log", 1))
    assert (code, found["kernels"]["status"]) == (0, "timeout")
    assert "what it measured" in found["kernels"]["detail"]
    assert run(gpu.Stage("tests", SLOW, "t.log", 1))[0] == 1


def test_without_time_a_stage_is_left_out(run):
    code, found = run(gpu.Stage("model", OK, "m.log", 600), minutes=0.001)
    assert code == 0 and found["model"]["status"] == "skipped" and "--minutes" in found["model"]["detail"]


def test_the_summary_has_the_published_rows(run, tmp_path, capsys):
    run(gpu.Stage("model", OK, "m.log", 600))
    assert capsys.readouterr().out.endswith("nothing was measured on a GPU\n")
    row = "card: encode 256x256, batch 128"
    line = call("model", "ours", 7.25, row=row, clock_mhz=1755, over={"full_capacitor/eager": 1.9})
    write(tmp_path / "model.jsonl", ceilings(), line)
    run(gpu.Stage("model", OK, "m.log", 600))
    out = capsys.readouterr().out
    assert GPU in out and f"| {row} | 7.25 |" in out and "1.90x" in out and "SM clock 1755 to 1755 MHz" in out


def test_stages_are_in_order_of_value(tmp_path):
    short, long = (gpu.stages(tmp_path, "cuda", minutes) for minutes in (8, 60))
    assert [s.name for s in short] == ["tests", "ceilings", "kernels", "model", "flux2", "cache", "sanitizer"]
    compiled = [dict(zip(s.arguments, s.arguments[1:], strict=False)).get("--compile") for s in short]
    assert compiled == [None, None, "none", "first", "first", None, None]
    assert dict(zip(long[3].arguments, long[3].arguments[1:], strict=False))["--compile"] == "named"
    for stage in short[2:6]:
        assert stage.arguments[stage.arguments.index("--out") + 1] == str(tmp_path / f"{stage.name}.jsonl")
