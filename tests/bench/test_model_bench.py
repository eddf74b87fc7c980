"""The end-to-end benchmarks on the CPU: what gets a time, what gets a reason, and that a run survives both."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time

import pytest
import torch

from bench import _contenders as contenders
from bench import _device as device
from bench import _endtoend as endtoend
from bench import cache, model
from bench._contenders import CAPACITOR, CAPACITORS, EAGER, OURS, TINY, TINY_FLUX2, Contender, Setting, Shape
from capacitor_rt import ModelConfig
from capacitor_rt.errors import InputError
from capacitor_rt.runtime.forecast import Ceilings

CPU = torch.device("cpu")
CEILINGS = Ceilings(tflops=100.0, gbps=1000.0, source="for the tests")
ENCODE, DECODE = Shape("encode", 1, 32), Shape("decode", 2, 32)


@pytest.fixture(scope="module")
def setting():
    return Setting(CPU, torch.float32, TINY, TINY_FLUX2)


@pytest.fixture
def bench(setting, tmp_path):
    return endtoend.Bench(setting, CEILINGS, {"gpu": None}, tmp_path / "out.jsonl", "model", rounds=1)


def raising(error: BaseException, name: str = "ours") -> Contender:
    def build(*_):
        raise error

    return Contender(CAPACITOR, name, build)


def wrong(name: str) -> Contender:
    def build(setting, shape, example):
        run = EAGER.build(setting, shape, example)
        return lambda x: 1.01 * run(x)

    return Contender(CAPACITOR, name, build)


def test_random_weights_keep_activations_of_order_one():
    config = ModelConfig(model_dim=32, bottleneck_dim=16, mlp_ratio=2.0, adaln_low_rank_rank=4)
    net = contenders.random_model(config)
    latents = net.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
    for out in (latents, net.decode(latents)):
        assert 0.2 < out.std() < 5
    again = contenders.random_model(config)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("shape", [ENCODE, DECODE], ids=str)
def test_the_truth_of_the_first_images_is_that_of_the_batch(setting, shape):
    (x,) = endtoend.make_inputs(setting, CAPACITOR, shape)[:1]
    whole = contenders.truth_of(setting, CAPACITOR, shape, x, shape.batch, seed=3)
    first = contenders.truth_of(setting, CAPACITOR, shape, x, 1, seed=3)
    torch.testing.assert_close(first, whole[:1], rtol=1e-4, atol=1e-5)
    torch.manual_seed(3)
    torch.testing.assert_close(whole, EAGER.build(setting, shape, x)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [ENCODE, DECODE], ids=str)
def test_the_compiled_baseline_has_no_graph_breaks(setting, shape):
    call = contenders.call_of(contenders._place(setting, CAPACITOR), shape.direction)
    x = endtoend.make_inputs(setting, CAPACITOR, shape)[0]
    torch.compile(call, backend="eager", fullgraph=True, dynamic=False)(x)


def test_a_right_contender_gets_every_figure(bench, setting):
    ours, eager = bench.measure(ENCODE, [OURS, EAGER])
    for line in (ours, eager):
        assert line["images_per_s"] == pytest.approx(1e3 / line["ms"])
        assert line["flops"] == setting.flops(CAPACITOR, ENCODE) > 0
        assert line["tflops"] == pytest.approx(line["flops"] / line["ms"] / 1e9)
        assert line["percent_of_floor"] == pytest.approx(line["tflops"])
        assert line["latency_ms"] > 0 and line["error"] < 2e-4
    assert ours["speedup_over"]["full_capacitor/eager"] == pytest.approx(eager["ms"] / ours["ms"])
    assert bench.broken == 0


@pytest.mark.parametrize(("name", "broken"), [("ours", 1), ("torch.compile", 0)])
def test_a_wrong_result_gets_no_time(bench, name, broken):
    line, eager = bench.measure(ENCODE, [wrong(name), EAGER])
    assert "ms" not in line and "differs from float32 by 1.0" in line["refused"]
    assert eager["ms"] > 0 and eager["speedup_over"] == {}
    assert bench.broken == broken
    assert "refused" in endtoend.format_line(line)


@pytest.mark.parametrize(
    ("error", "reason", "broken"),
    [
        (torch.OutOfMemoryError("3 GiB\nmore"), "out of memory: 3 GiB", 0),
        (InputError("compute capability 7.5"), "InputError: compute capability 7.5", 0),
        (RuntimeError("launch failed"), "RuntimeError: launch failed", 1),
    ],
)
def test_a_failure_is_a_reason_in_its_row(bench, error, reason, broken):
    line, eager = bench.measure(ENCODE, [raising(error), EAGER])
    assert line["missing"] == reason and "ms" not in line and eager["ms"] > 0
    assert bench.broken == broken


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("2 GiB"), "out of memory: 2 GiB"), (RuntimeError("gone"), "RuntimeError: gone")],
)
def test_what_fails_while_timed_is_dropped(error, reason):
    calls = {"a": lambda i: None, "b": lambda i: (_ for _ in ()).throw(error)}
    timed = endtoend.time_calls(calls, CPU, rounds=3)
    assert timed["a"].replays == 3 and timed["b"] == reason


def stats_after_a_call(setting: Setting, contender: Contender, shape: Shape):
    (x,) = endtoend.make_inputs(setting, CAPACITOR, shape)[:1]
    call = contender.build(setting, shape, x)
    call(x)
    return call.__self__.stats()


def test_ours_is_the_runtime_and_eager_is_not(setting):
    ours, eager = (stats_after_a_call(setting, contender, ENCODE) for contender in (OURS, EAGER))
    assert ours.eager + ours.replays == 1 and eager.eager + eager.replays == 0


@pytest.mark.gpu
def test_only_ours_without_graphs_captures_nothing():
    setting = Setting(torch.device("cuda"), torch.bfloat16, dataclasses.replace(TINY, model_dim=128), TINY_FLUX2)
    without = next(contender for contender in CAPACITORS if contender.name == "ours, no graphs")
    assert stats_after_a_call(setting, OURS, Shape("encode", 3, 64)).captures > 0
    found = stats_after_a_call(setting, without, Shape("encode", 3, 64))
    assert found.captures == 0 and found.eager > 0


def test_calls_are_interleaved_over_their_inputs():
    order = []
    calls = {name: lambda i, name=name: order.append((name, i)) or time.sleep(0.015) for name in "ab"}
    endtoend.time_calls(calls, CPU, rounds=2)
    assert order == [(name, i) for i in range(3) for name in "ab"]


def test_rows_after_the_deadline_say_so(bench, capsys):
    bench.run([(ENCODE, [EAGER])], deadline=time.monotonic() - 1)
    (line,) = map(json.loads, bench.out.read_text().splitlines())
    assert line["missing"].startswith("out of time") and line["variant"] == "eager"
    assert "out of time" in capsys.readouterr().out


def test_jobs_are_in_order_of_value():
    rows, sweep = [Shape(*row) for row in model.NAMED], model._sweep([Shape(*row) for row in model.NAMED])
    jobs = model.plan_jobs(CAPACITORS, rows, sweep, "first")
    assert [shape for shape, _ in jobs[:5]] == rows
    assert all(c.compiles == "no" for _, group in jobs[:5] for c in group)
    assert [[c.name for c in group] for shape, group in jobs[5:7]] == [
        ["ours", "eager", "torch.compile"],
        ["ours", "eager", "torch.compile max-autotune"],
    ]
    assert jobs[5][0] == jobs[6][0] == rows[0]
    # every size and batch of both directions once, the smallest first
    assert len({(s.direction, s.batch, s.size) for s in (*rows, *sweep)}) == len(rows) + len(sweep) == 4 * 4 * 2
    assert [shape for shape, _ in jobs[7:]] == sweep == sorted(sweep, key=lambda s: s.pixels)
    assert not any(c.compiles != "no" for _, group in model.plan_jobs(CAPACITORS, rows, sweep, "none") for c in group)


def test_inputs_are_random_and_rotated(setting):
    images = endtoend.make_inputs(setting, CAPACITOR, ENCODE)
    assert len(images) >= 2 and not torch.equal(images[0], images[1])
    assert images[0].shape == (1, 3, 32, 32) and images[0].min() >= -1 and images[0].max() <= 1 and images[0].min() < 0
    assert endtoend.make_inputs(setting, CAPACITOR, DECODE)[0].shape == (2, TINY.bottleneck_dim, 2, 2)


def test_model_command_writes_one_line_per_contender(tmp_path, capsys):
    out = tmp_path / "model.jsonl"
    options = ["--device", "cpu", "--shape", "encode:1x32", "--compile", "none", "--out", str(out)]
    assert model.main(options) == 0
    ceilings, *lines = map(json.loads, out.read_text().splitlines())
    assert ceilings["bench"] == "ceilings" and ceilings["tflops"] > 0
    assert [line["variant"] for line in lines] == ["ours", "eager", "eager, channels_last"]
    for line in lines:
        assert {"ms", "p20", "p80", "error", "weights", "commit", "date", "torch", "triton", "busy"} <= set(line)
    assert "these times say nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [("encode", "is not DIRECTION:BATCHxSIZE"), ("sort:1x32", "e.g. encode:8x512"), ("encode:1x40", "multiple of 32")],
)
def test_model_command_refuses(text, message):
    with pytest.raises(SystemExit, match=message):
        model.parse_shape(text)


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model.main([]) == cache.main([]) == 2
    assert capsys.readouterr().err.count("no CUDA GPU here") == 2


@pytest.mark.parametrize(
    ("state", "warning"), [("0, 12", None), ("97, 12", "97 % busy"), ("0, 30000", "30000 MiB taken"), ("n/a", None)]
)
def test_a_busy_gpu_is_recorded(monkeypatch, state, warning):
    done = subprocess.CompletedProcess([], 0, stdout=f"{state}\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    found = device.busy(torch.device("cuda"))
    assert found is None if warning is None else warning in found


def test_without_the_drivers_tool_nothing_is_claimed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    gpu = torch.device("cuda")
    assert device.nvidia_smi(gpu, "clocks.sm") == device.clocks(gpu) == {} and device.busy(gpu) is None


def test_clocks_are_numbers(monkeypatch):
    done = subprocess.CompletedProcess([], 0, stdout="1755, 41, 312.60\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    assert device.clocks(torch.device("cuda")) == {"clock_mhz": 1755, "celsius": 41, "watts": 313}


def test_caching_throughput(tmp_path, capsys):
    out = tmp_path / "cache.jsonl"
    assert cache.main(["--device", "cpu", "--images", "3", "--out", str(out), "--folder", str(tmp_path)]) == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["images"] == 3 and line["quarantined"] == 0 and line["images_per_s"] > 0
    assert line["limited_by"] in line["occupancy"] and 0 <= line["device_waiting_percent"] <= 100
    assert "images/s" in capsys.readouterr().out
    # nothing is left behind
    assert [path.name for path in tmp_path.iterdir()] == ["cache.jsonl"]


def test_jpeg_files_differ(tmp_path):
    nbytes = cache.write_jpegs(tmp_path / "files", 3, 64, workers=1)
    files = [path.read_bytes() for path in sorted((tmp_path / "files").iterdir())]
    assert len(set(files)) == 3 and sum(map(len, files)) == nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape("encode", 3, 64), Shape("decode", 1, 64)], ids=str)
def test_every_contender_on_a_gpu(tmp_path, shape):
    setting = Setting(torch.device("cuda"), torch.bfloat16, dataclasses.replace(TINY, model_dim=128), TINY_FLUX2)
    bench = endtoend.Bench(setting, CEILINGS, {"gpu": "test"}, tmp_path / "out.jsonl", "model", rounds=3)
    lines = bench.measure(shape, [c for c in CAPACITORS if c.compiles == "no"])
    for line in lines:
        assert "missing" not in line and "refused" not in line, line
        assert line["peak_bytes"] > 0 and line["device_bytes"] >= 0 and line["ms"] > 0
