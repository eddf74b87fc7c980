"""The end-to-end benchmarks on the CPU: what gets a time, what gets a reason, and that a run survives both."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_contenders import dying, hang, kill_itself, raising, wrong
from waiting import HANG_SECONDS, until

from bench import _contenders as contenders
from bench import _device as device
from bench import _endtoend as endtoend
from bench import _sides as sides
from bench import cache, model
from bench._contenders import CAPACITOR, CAPACITORS, EAGER, FLUX2S, OURS, TINY, TINY_FLUX2, Contender, Setting, Shape
from bench._photos import PhotoSet
from bench._records import read_lines
from bench._workers import FAULT, LOST, MEMORY, Failure
from capacitor_rt import ModelConfig
from capacitor_rt.images.decode import decode_image
from capacitor_rt.runtime.forecast import Ceilings

CPU = torch.device("cpu")
CEILINGS = Ceilings(tflops=100.0, gbps=1000.0, source="for the tests")
ENCODE, DECODE = Shape("encode", 1, 32), Shape("decode", 2, 32)


@pytest.fixture(scope="module")
def setting():
    return Setting(CPU, torch.float32, TINY, TINY_FLUX2)


@pytest.fixture(scope="module")
def shared(setting, tmp_path_factory):
    """One for all tests: its processes take a while to start."""
    out = tmp_path_factory.mktemp("bench") / "out.jsonl"
    with endtoend.Bench(setting, CEILINGS, {"gpu": None}, out, "model", rounds=2) as made:
        yield made


@pytest.fixture
def bench(shared, tmp_path):
    shared.broken, shared.out = 0, tmp_path / "out.jsonl"
    return shared


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
    (x,) = sides.make_inputs(setting, CAPACITOR, shape, 1)
    whole = contenders.truth_of(setting, CAPACITOR, shape, x, shape.batch, seed=3)
    first = contenders.truth_of(setting, CAPACITOR, shape, x, 1, seed=3)
    torch.testing.assert_close(first, whole[:1], rtol=1e-4, atol=1e-5)
    torch.manual_seed(3)
    torch.testing.assert_close(whole, EAGER.build(setting, shape, x)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [ENCODE, DECODE], ids=str)
def test_the_compiled_baseline_has_no_graph_breaks(setting, shape):
    call = contenders.call_of(contenders._place(setting, CAPACITOR), shape.direction)
    (x,) = sides.make_inputs(setting, CAPACITOR, shape, 1)
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


def test_a_wrong_result_gets_no_time(bench):
    ours, compiled, eager = bench.measure(ENCODE, [wrong("ours, wrong"), wrong("torch.compile"), EAGER])
    for line in (ours, compiled):
        assert "ms" not in line and "differs from float32 by 1.0" in line["refused"]
        assert "refused" in endtoend.format_line(line)
    assert eager["ms"] > 0 and eager["speedup_over"] == {}
    # only ours is a fault of this project
    assert bench.broken == 1


def test_a_failure_is_a_reason_in_its_row(bench):
    reasons = {
        "memory": "out of memory: 3 GiB",
        "input": "InputError: compute capability 7.5",
        "launch": "RuntimeError: launch failed",
    }
    *lines, eager = bench.measure(ENCODE, [*(raising(which, f"ours, {which}") for which in reasons), EAGER])
    assert [line["missing"] for line in lines] == [*reasons.values()]
    assert not any("ms" in line for line in lines) and eager["ms"] > 0
    # neither memory nor a machine that cannot run it is a fault of this project
    assert bench.broken == 1


@pytest.mark.parametrize(
    ("contender", "reason", "found"),
    [
        (dying("ours, dead when checked", 0), "its process was ended by SIGABRT", ()),
        (dying("ours, dead at the first sample", 1), "its process was ended by SIGABRT", ("error",)),
        (dying("ours, killed at the last", 2 + 1, kill_itself), "its process was ended by SIGKILL", ("error",)),
    ],
    ids=["check", "first", "last"],
)
def test_a_process_that_dies_loses_one_row(bench, contender, reason, found):
    lost, eager, other = bench.measure(ENCODE, [contender, EAGER, dying("eager, lives", 1000)])
    assert lost["missing"] == reason and "ms" not in lost and all(name in lost for name in found)
    assert eager["ms"] > 0 and other["ms"] > 0 and bench.broken == 1
    # those that are left were compared with each other alone
    assert set(eager["speedup_over"]) == {other_key := "full_capacitor/eager, lives"}
    assert eager["speedup_over"][other_key] == pytest.approx(other["ms"] / eager["ms"])


def test_the_next_shape_finds_a_fresh_process(bench):
    dies_at_second_check = dying("eager, dies once", 4)
    (first,) = bench.measure(ENCODE, [dies_at_second_check])
    # two rounds, the first call and the check have been had: one more for the latency
    assert first["ms"] > 0 and first["latency_missing"] == "its process was ended by SIGABRT"
    (again,) = bench.measure(ENCODE, [dies_at_second_check])
    assert again["ms"] > 0


def test_one_that_hangs_is_given_up(bench, monkeypatch):
    # of the one that hangs alone, at its first sample: the other may be as slow as it likes
    ask = endtoend.Worker.ask

    def impatient(worker, method, *args, seconds=HANG_SECONDS):
        is_hung = method == "sample" and hanging in worker._made_of[1]
        return ask(worker, method, *args, seconds=3.0 if is_hung else seconds)

    hanging = dying("ours, hangs", 1, hang)
    monkeypatch.setattr(endtoend.Worker, "ask", impatient)
    lost, eager = bench.measure(ENCODE, [hanging, EAGER])
    assert lost["missing"] == "no answer within 3 s" and eager["ms"] > 0


def test_a_lost_reference_is_no_fault_of_a_contender(bench, monkeypatch):
    monkeypatch.setattr(bench, "_references", endtoend.Worker(os.abort))
    ours, eager = bench.measure(Shape("encode", 1, 64), [OURS, EAGER])
    assert ours["missing"] == eager["missing"] == "no reference: its process was ended by SIGABRT"
    assert bench.broken == 0


def test_a_reference_is_made_once_per_shape(bench, monkeypatch):
    asked = []
    ask = bench._references.ask
    monkeypatch.setattr(bench._references, "ask", lambda *a, **k: asked.append(a[:3]) or ask(*a, **k))
    shape = Shape("decode", 1, 64)
    for _ in range(2):
        bench.measure(shape, [EAGER, dying("eager, lives", 1000)])
    assert asked == [("write", CAPACITOR, shape)]


def test_references_are_float32_without_tf32(setting, tmp_path, monkeypatch):
    seen, encode = [], contenders.Autoencoder.encode

    def spy(model, x):
        seen.append((x.dtype, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return encode(model, x)

    monkeypatch.setattr(contenders.Autoencoder, "encode", spy)
    half = Setting(CPU, torch.bfloat16, TINY, TINY_FLUX2)
    sides.References(half).write(CAPACITOR, Shape("encode", 20, 512), tmp_path / "r.pt")
    x, truth = torch.load(tmp_path / "r.pt")
    # cuDNN's is on unless one says otherwise
    assert seen == [(torch.float32, False, False)] and torch.backends.cudnn.allow_tf32
    assert x.dtype == torch.bfloat16 and len(x) == len(truth) == 4 and truth.dtype == torch.float32


@pytest.mark.parametrize("kind", [MEMORY, FAULT, LOST])
def test_what_fails_while_timed_is_dropped(kind):
    calls = {"a": lambda count: 1e6, "b": lambda count: (_ for _ in ()).throw(Failure("gone", kind))}
    timed = endtoend.take_turns(calls, rounds=3)
    assert timed["a"].replays == 3 and timed["b"].reason == "gone"


@pytest.mark.parametrize("contender", [*CAPACITORS, *FLUX2S], ids=lambda c: c.key)
def test_contenders_can_be_sent_to_a_process(contender):
    assert pickle.loads(pickle.dumps(contender)).key == contender.key


def stats_after_a_call(setting: Setting, contender: Contender, shape: Shape):
    (x,) = sides.make_inputs(setting, CAPACITOR, shape, 1)
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


def test_processes_take_turns():
    order = []
    # 20 ms make a sample: four calls of 5 ms
    samplers = {name: lambda count, name=name: order.append((name, count)) or 5e3 for name in "ab"}
    timed = endtoend.take_turns(samplers, rounds=2)
    assert order == [(name, count) for count in (1, 4, 4) for name in "ab"]
    assert timed["a"].us == 5e3 and timed["a"].replays == 2


def test_a_side_walks_over_its_inputs(setting, tmp_path):
    sides.References(setting).write(CAPACITOR, ENCODE, tmp_path / "r.pt")
    side = sides.Side(setting, EAGER)
    side.prepare(ENCODE, tmp_path / "r.pt")
    seen = []
    side._run = lambda x: seen.append(x)
    assert side.sample(3) > 0
    first, second, again = seen
    assert again is first and not torch.equal(first, second)
    # the first is what the reference was made of
    assert torch.equal(first, torch.load(tmp_path / "r.pt")[0])


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


@pytest.mark.parametrize("group", [CAPACITORS, FLUX2S], ids=["model", "flux2"])
def test_a_single_image_is_measured_with_and_without_low_latency(group):
    for batch in (1, 2):
        shapes = [Shape("encode", batch, 32)], [Shape("encode", batch, 64)]
        for _, found in model.plan_jobs(group, *shapes, "all"):
            names = [c.name for c in found]
            assert "ours" in names and ("ours, low_latency" in names) == (batch == 1)


def test_our_contenders_differ_by_public_settings(setting):
    (x,) = sides.make_inputs(setting, CAPACITOR, ENCODE, 1)
    found = {c.name: c.build(setting, ENCODE, x).__self__ for c in CAPACITORS if c.is_ours}
    assert {name: (m.cuda_graphs, m.low_latency, m.overlap) for name, m in found.items()} == {
        "ours": (True, False, False),
        "ours, low_latency": (True, True, False),
        "ours, no graphs": (False, False, False),
        "ours, overlap": (True, False, True),
    }


def test_inputs_are_random_and_rotated(setting):
    images = sides.make_inputs(setting, CAPACITOR, ENCODE)
    assert len(images) >= 2 and not torch.equal(images[0], images[1])
    assert images[0].shape == (1, 3, 32, 32) and images[0].min() >= -1 and images[0].max() <= 1 and images[0].min() < 0
    assert sides.make_inputs(setting, CAPACITOR, DECODE)[0].shape == (2, TINY.bottleneck_dim, 2, 2)


def test_model_command_writes_one_line_per_contender(tmp_path, capsys):
    out = tmp_path / "model.jsonl"
    options = ["--device", "cpu", "--shape", "encode:1x32", "--compile", "none", "--out", str(out)]
    assert model.main(options) == 0
    ceilings, *lines = map(json.loads, out.read_text().splitlines())
    assert ceilings["bench"] == "ceilings" and ceilings["tflops"] > 0
    assert [line["variant"] for line in lines] == ["ours", "eager", "ours, low_latency", "eager, channels_last"]
    for line in lines:
        assert {"ms", "p20", "p80", "error", "weights", "commit", "date", "torch", "triton", "busy"} <= set(line)
    assert "these times say nothing" in capsys.readouterr().out


def test_asked_to_end_the_command_leaves_nothing_but_its_lines(tmp_path):
    out, folder = tmp_path / "model.jsonl", tmp_path / "tmp"
    folder.mkdir()
    command = [sys.executable, "-m", "bench", "model", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    root = Path(model.__file__).parents[1]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL) as process:
        until(lambda: list(folder.glob("capacitor-bench-*")) or process.poll() is not None)
        process.terminate()
        assert process.wait(HANG_SECONDS) == 128 + signal.SIGTERM
    assert not list(folder.glob("capacitor-bench-*")) and read_lines(out)[0]["bench"] == "ceilings"


@pytest.mark.parametrize(
    ("text", "message"),
    [("encode", "is not DIRECTION:BATCHxSIZE"), ("sort:1x32", "e.g. encode:8x512"), ("encode:1x40", "multiple of 32")],
)
def test_model_command_refuses(text, message):
    with pytest.raises(SystemExit, match=message):
        model.parse_shape(text)


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model.main([]) == cache.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("no CUDA GPU here") == 2


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Put the driver's tool into PATH, and a second GPU that it and torch number differently: `driver(answer)`."""
    uuid = "11111111-2222-3333-4444-555555555555"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(uuid=uuid))

    def answer(text: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f'#!/bin/sh\n[ "$1 $2" = "-i GPU-{uuid}" ] && echo "{text}"\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return answer


@pytest.mark.parametrize(
    ("state", "warning"), [("0, 12", None), ("97, 12", "97 % busy"), ("0, 30000", "30000 MiB taken"), ("n/a", None)]
)
def test_a_busy_gpu_is_recorded(driver, state, warning):
    driver(state)
    found = device.busy(torch.device("cuda", 1))
    assert found is None if warning is None else warning in found


def test_without_the_drivers_tool_nothing_is_claimed(driver, monkeypatch):
    monkeypatch.setenv("PATH", "")
    gpu = torch.device("cuda")
    assert device.nvidia_smi(gpu, "clocks.sm") == device.clocks(gpu) == {} and device.busy(gpu) is None


def test_clocks_are_numbers_of_the_gpu_by_its_uuid(driver):
    driver("1755, 41, 312.60")
    assert device.clocks(torch.device("cuda")) == {"clock_mhz": 1755, "celsius": 41, "watts": 313}


@pytest.mark.parametrize("left", [[], ["--resize", "gpu"], ["--decode", "gpu"]], ids=str)
def test_caching_throughput(tmp_path, capsys, left):
    out = tmp_path / "cache.jsonl"
    options = ["--set", "500", "--images", "3", "--workers", "0", "--out", str(out), "--folder", str(tmp_path), *left]
    assert cache.main(options) == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["images"] == 3 and line["quarantined"] == 0 and line["images_per_s"] > 0
    assert line["limited_by"] in line["occupancy"] and 0 <= line["device_waiting_percent"] <= 100
    assert line["core_images_per_s"]["exact"] > 0 and line["cpu_ms"] > 0 and line["plain"]["images_per_s"] > 0
    assert "times the cache's time" in capsys.readouterr().out
    # nothing is left behind
    assert [path.name for path in tmp_path.iterdir()] == ["cache.jsonl"]


def test_caching_without_its_packages_is_one_line(monkeypatch, capsys):
    find = cache.importlib.util.find_spec
    monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name, *_: None if name == "PIL" else find(name))
    assert cache.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out == "caching not measured: pillow not installed: pip install '.[cache]'\n"


def test_jpeg_files_differ(tmp_path):
    nbytes = PhotoSet("test", 48, 64, 5).write(tmp_path / "files", 5)
    files = [path.read_bytes() for path in sorted((tmp_path / "files").iterdir())]
    assert len(set(files)) == 5 and sum(map(len, files)) == nbytes
    assert {decode_image(data).pixels.shape for data in files} == {(48, 64, 3)}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape("encode", 3, 64), Shape("decode", 1, 64)], ids=str)
def test_every_contender_on_a_gpu(tmp_path, shape):
    setting = Setting(torch.device("cuda"), torch.bfloat16, dataclasses.replace(TINY, model_dim=128), TINY_FLUX2)
    with endtoend.Bench(setting, CEILINGS, {"gpu": "test"}, tmp_path / "out.jsonl", "model", rounds=3) as bench:
        lines = bench.measure(shape, [c for c in CAPACITORS if c.compiles == "no"])
    for line in lines:
        assert "missing" not in line and "refused" not in line, line
        assert line["peak_bytes"] > 0 and line["device_bytes"] >= 0 and line["ms"] > 0
