"""`python -m bench gpu` within its minutes: shares, stages that end by themselves, what is left out, the summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bench_lines import GPU, call, ceilings, check, write
from waiting import HANG_SECONDS, runs, until

from bench import _processes, gpu
from bench._records import append_line, read_lines

OK = ("-c", "import sys; print(*sys.argv[1:])")
SLOW = ("-c", f"import time; time.sleep({HANG_SECONDS})")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run given stages; gives (exit code, outcomes by stage)."""

    def run(*stages: gpu.Stage, minutes: float = 8.0) -> tuple[int, dict[str, dict]]:
        monkeypatch.setattr(gpu, "stages", lambda *_: stages)
        code = gpu.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", str(minutes)])
        return code, {outcome["stage"]: outcome for outcome in json.loads((tmp_path / "summary.json").read_text())}

    return run


def test_a_paced_stage_is_told_its_minutes(run, monkeypatch):
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 1000.0)
    code, found = run(gpu.Stage("model", OK, "m.log", 600, share=3, pace=0.75), gpu.Stage("cache", OK, "c.log", 600))
    flag, minutes = found["model"]["detail"].split()
    # three quarters of eight minutes, and of these what the stage may begin in
    assert code == 0 and flag == "--minutes" and float(minutes) == pytest.approx(0.75 * 6, rel=0.01)
    assert found["cache"]["detail"] == ""


def test_unused_time_goes_to_later_stages(run, monkeypatch):
    # however long the first takes to start and to end
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 1000.0)
    stages = [gpu.Stage(name, OK, f"{name}.log", 600, pace=0.75) for name in ("model", "flux2")]
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


def test_a_disagreement_is_told_first_and_stops_nothing(run, tmp_path, capsys):
    rows = [check("expand 2x16x16"), check("grn 2x16x16", ok=False, problem="the error is 31 times its bound")]
    write(tmp_path / "correctness.jsonl", *rows)
    failing = gpu.Stage("correctness", ("-c", "print('1 of 2 checks disagree'); raise SystemExit(1)"), "c.log", 600)
    code, found = run(failing, gpu.Stage("model", OK, "m.log", 600))
    assert code == 1 and found["correctness"]["status"] == "failed" and found["model"]["status"] == "ok"
    assert found["correctness"]["rows"][1] == {
        "name": "grn 2x16x16",
        "dtype": "bfloat16",
        "error": 0.3,
        "bound": 0.01,
        "ok": False,
        "problem": "the error is 31 times its bound",
    }
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("correctness failed") and first.endswith("1 of 2 checks disagree")
    assert rest[rest.index(GPU) + 1] == (
        "**Wrong: 1 of 2 checks disagree with plain torch: grn 2x16x16 in bfloat16 (the error is 31 times its bound).**"
    )


WRITES = """
import subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from bench._records import append_line
append_line(Path({out!r}), {line!r})
with open({out!r}, "a") as file:
    file.write('{{"bench": "mod')
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path({pid!r}).write_text(str(child.pid))
time.sleep(600)
"""


def test_a_stage_that_is_ended_leaves_readable_files_and_no_processes(run, tmp_path, monkeypatch):
    out, pid = tmp_path / "model.jsonl", tmp_path / "pid"

    def wait(command, seconds: float) -> int | None:
        # its time is up as soon as it has written all that it will, and not before
        if not pid.exists() or not pid.read_text():
            until(lambda: command.poll() is not None or (pid.exists() and pid.read_text()))
            seconds = 0.01
        return waited(command, seconds)

    waited = _processes.Command.wait
    monkeypatch.setattr(_processes.Command, "wait", wait)
    line = call("model", "ours", 7.25)
    program = WRITES.format(root=str(gpu.Path(gpu.__file__).parents[1]), out=str(out), line=line, pid=str(pid))
    code, found = run(gpu.Stage("model", ("-c", program), "m.log", 600))
    assert (code, found["model"]["status"]) == (0, "timeout")
    # the half line is no line, and the next one does not stick to it
    assert out.read_text().endswith('{"bench": "mod') and read_lines(out) == [line]
    append_line(out, line | {"ms": 8.0})
    assert [x["ms"] for x in read_lines(out)] == [7.25, 8.0]
    until(lambda: not runs(int(pid.read_text())))


@pytest.mark.parametrize("how", ["os.abort()", "os.kill(os.getpid(), 9)"])
def test_a_stage_that_crashes_loses_no_other(run, how):
    crash = gpu.Stage("kernels", ("-c", f"import os; print('row'); {how}"), "k.log", 600)
    code, found = run(crash, gpu.Stage("model", OK, "m.log", 600))
    assert code == 1 and found["model"]["status"] == "ok"
    assert found["kernels"]["status"] == "failed" and "ended by signal" in found["kernels"]["detail"]


def test_a_benchmark_without_its_package_is_skipped(run):
    says = "print('caching not measured: pillow not installed')"
    code, found = run(
        gpu.Stage("cache", ("-c", says), "c.log", 600), gpu.Stage("model", ("-c", "import nope"), "m.log", 600)
    )
    assert (found["cache"]["status"], found["cache"]["detail"]) == (
        "skipped",
        "caching not measured: pillow not installed",
    )
    # the runtime's own have all they need, or there is nothing to measure
    assert code == 1 and found["model"]["status"] == "failed" and "nope" in found["model"]["detail"]


def test_the_command_ends_what_it_started_when_it_is_asked_to_end(tmp_path):
    pid, stage = tmp_path / "pid", tmp_path / "stage.py"
    stage.write_text(f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n")
    program = (
        "import sys\n"
        "from bench import gpu\n"
        f"gpu.stages = lambda *_: (gpu.Stage('model', ({str(stage)!r},), 'm.log', 600),)\n"
        f"sys.exit(gpu.main(['--out', {str(tmp_path)!r}, '--device', 'cpu']))"
    )
    command = subprocess.Popen([sys.executable, "-c", program], cwd=Path(gpu.__file__).parents[1])
    until(lambda: command.poll() is not None or (pid.is_file() and pid.read_text()))
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait(HANG_SECONDS) == 128 + signal.SIGTERM
    until(lambda: not runs(int(pid.read_text())))


def test_stages_are_in_order_of_value(tmp_path):
    short, long = (gpu.stages(tmp_path, "cuda", minutes) for minutes in (8, 60))
    names = ["correctness", "tests", "ceilings", "kernels", "model", "flux2", "cache", "sanitizer"]
    assert [s.name for s in short] == names
    compiled = [dict(zip(s.arguments, s.arguments[1:], strict=False)).get("--compile") for s in short]
    # the best form of the baseline is what the speed-up is over, so it is compiled in a short run too
    assert compiled == [None, None, None, "none", "first", "named", None, None]
    assert dict(zip(long[4].arguments, long[4].arguments[1:], strict=False))["--compile"] == "named"
    for stage in short[3:7]:
        assert stage.arguments[stage.arguments.index("--out") + 1] == str(tmp_path / f"{stage.name}.jsonl")
