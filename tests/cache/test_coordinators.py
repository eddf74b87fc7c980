"""Several coordinators started by one command: they share the work, outlive one another, and end with the command."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import psutil
import pytest
from cache_cases import commits_of, snapshot, write_images
from held import held, last_task
from kill_driver import REQUEST, VIEWS
from models import random_model
from waiting import HANG_SECONDS, runs, until

from capacitor_rt.cache import Checkpoint, RunOptions, cache_images, coordinators
from capacitor_rt.cache.coordinator import ADVANCE, BEGIN, ERROR, NOTE, REPORT, STOPPED, Progress, Teller
from capacitor_rt.cache.coordinators import cache_on, shared
from capacitor_rt.cache.gathering import Gathering
from capacitor_rt.cache.meters import Meters
from capacitor_rt.cache.report import Report
from capacitor_rt.cache.verify import verify
from capacitor_rt.cli.options import parse_gpus, resolve_device, visible_gpus
from capacitor_rt.errors import CacheError, ImageError, InputError

HERE = Path(__file__).parents[1] / "support"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coordinators")
    write_images(folder / "src", 90, sizes=((40, 40), (20, 80), (90, 24)))
    (folder / "src" / "004b.png").write_bytes(b"no image")
    random_model().save_pretrained(folder / "model")
    model = Checkpoint(str(folder / "model"))
    cache_images(folder / "src", folder / "whole", model, REQUEST, workers=0, progress=False)
    return folder


def test_the_others_go_on_where_one_is_killed_and_leave_the_bytes_of_one_process(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started, notes = [], []
    start = coordinators._start
    monkeypatch.setattr(coordinators, "_start", lambda *args: started.append(start(*args)) or started[-1])

    def kill_the_planner():
        until(lambda: commits_of(tmp_path / "out"))
        started[0].process.kill()
        give_back()

    options = RunOptions(workers=0, progress=False, metrics=tmp_path / "metrics.json")
    model = Checkpoint(str(folder / "model"))
    with held(tmp_path / "out", *last_task(folder / "whole")) as give_back:
        thread = threading.Thread(target=kill_the_planner, daemon=True)
        thread.start()
        report = cache_on(
            ["cpu", "cpu"], folder / "src", tmp_path / "out", model, REQUEST, note=notes.append, options=options
        )
        thread.join()
    assert report.exit_code == 3 and report.quarantined == {"not_an_image": 1}
    (line,) = [line for line in notes if "coordinator" in line]
    assert line == (
        f"the coordinator on cpu (0) (process {started[0].process.pid}) was ended by SIGKILL: "
        "its tasks are taken over by the others"
    )
    assert snapshot(tmp_path / "out") == snapshot(folder / "whole")
    assert verify(tmp_path / "out").problems == []
    assert (tmp_path / "metrics.json").stat().st_size


def test_what_is_refused_is_refused_once_and_by_its_kind(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    notes = []
    model = Checkpoint(str(folder / "model"))
    with pytest.raises(CacheError, match=r"is not empty and no latent cache"):
        cache_on(["cpu", "cpu"], folder / "src", tmp_path / "out", model, REQUEST, note=notes.append)
    assert notes == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_all_end_with_the_command(folder, tmp_path, number):
    """SIGINT: all stop, and what is complete is written. SIGKILL: none is left behind."""
    command = [sys.executable, "-m", "capacitor_rt", "cache", folder / "src", tmp_path / "out", "-m", folder / "model"]
    settings = "--area 32 --dtype fp32 --posterior --flip --task-inputs 3 --batch 2 --workers 0 --quiet"
    command += [*settings.split(), "--device", "cpu", "--coordinators", "2"]
    plan8, last_number = last_task(folder / "whole")
    with held(tmp_path / "out", plan8, last_number):
        running = subprocess.Popen(list(map(str, command)), env=ENV, stderr=subprocess.PIPE, text=True)
        until(lambda: commits_of(tmp_path / "out") or running.poll() is not None)
        children = [child.pid for child in psutil.Process(running.pid).children()]
        running.send_signal(number)
        _, errors = running.communicate(timeout=HANG_SECONDS)
        assert len(children) == 2
        if number == signal.SIGINT:
            assert running.returncode == 130, errors
            *notes, last = errors.splitlines()
            assert last == "interrupted: finished parts are safe, and the same command goes on from there"
            # on a busy machine it may have to wait for the lock
            assert all(line.startswith(("note: to be written: ", "note: waiting for process ")) for line in notes)
            assert not any(map(runs, children))
            # that of this process is the only one left
            assert [lease.name for lease in (tmp_path / "out" / "leases").iterdir()] == [f"{plan8}-{last_number:06d}"]
        until(lambda: not any(map(runs, children)))
    before = len(commits_of(tmp_path / "out"))
    report = cache_images(
        folder / "src", tmp_path / "out", Checkpoint(str(folder / "model")), REQUEST, workers=0, progress=False
    )
    assert report.new_images < 91 and before
    assert snapshot(tmp_path / "out") == snapshot(folder / "whole")


class Watching:
    def __init__(self):
        self.told = []

    def begin(self, total, done):
        self.told.append((total, done))

    def advance(self, inputs, quarantined, measure):
        self.told.append((inputs, quarantined, measure().images))

    def end(self, meters):
        self.told.append(meters and meters.images)


def gathering(count=3):
    notes, watching = [], Watching()
    return Gathering([f"cuda:{i}" for i in range(count)], notes.append, watching), notes, watching.told


def report(tasks, unfinished=0, **more):
    return Report(10, 10, Counter(), tasks, 100, unfinished=unfinished, **more)


def test_several_are_told_as_one():
    one, notes, told = gathering()
    one.hear(0, NOTE, "left out: 3")
    one.hear(1, NOTE, "left out: 3")
    one.hear(0, BEGIN, (100, 40))
    one.hear(1, NOTE, "going on: 5 of 10 tasks are done")
    one.hear(1, BEGIN, (100, 52))
    one.hear(0, ADVANCE, Progress(30, 1, Meters(1, images=30)))
    # lost with its process and done again: no more than all
    one.hear(1, ADVANCE, Progress(50, 0, Meters(1, images=50)))
    one.hear(0, REPORT, report(8, 2, new_images=30, failures={"a": ("io_error", "x"), "b": ("io_error", "y")}))
    one.hear(1, REPORT, report(10, new_images=50))
    one.lose(2, "ended with 1")
    one.end(True)
    assert notes == ["left out: 3", "the coordinator on cuda:2 ended with 1"]
    assert told == [(100, 40), (30, 1, 30), (30, 0, 80), 80]
    done = one.report()
    assert (done.tasks, done.new_images, done.exit_code, done.failed) == (10, 80, 0, {})


def test_an_error_counts_where_the_others_could_not_do_without():
    one, notes, _ = gathering(2)
    one.hear(0, BEGIN, (100, 0))
    one.hear(0, ERROR, CacheError("no GPU memory"))
    assert notes == ["the coordinator on cuda:0 failed (no GPU memory): its tasks are taken over by the others"]
    one.hear(1, REPORT, report(10))
    assert one.report().exit_code == 0
    one, notes, _ = gathering(2)
    one.hear(0, ERROR, InputError("side 7"))
    with pytest.raises(InputError, match="side 7"):
        one.report()
    assert notes == []
    one, notes, _ = gathering(2)
    one.lose(0, "was ended by SIGKILL")
    one.hear(1, STOPPED, None)
    with pytest.raises(CacheError, match="every coordinator has ended") as raised:
        one.report()
    assert raised.value.problems == [
        "the coordinator on cuda:0 was ended by SIGKILL",
        "the coordinator on cuda:1 was terminated",
    ]


def test_seconds_of_several_are_shares_of_the_time_of_one():
    one = Meters(2, 8, "gpu", images=10, wall=10.0)
    one.seconds |= {"decode": 10.0, "encode": 4.0}
    one.waits |= {"start": 2.0}
    other = Meters(2, 8, "gpu", images=30, wall=10.0)
    other.seconds |= {"decode": 6.0, "encode": 8.0}
    other.waits |= {"start": 2.0}
    both = Meters.joined([one, other])
    assert (both.workers, both.processes, both.images, both.running) == (4, 2, 40, 8.0)
    assert both.occupancy()["encode"] == pytest.approx(0.75)
    assert both.occupancy()["decode"] == pytest.approx(0.5)
    assert Meters.joined([one]).occupancy() == one.occupancy()
    assert "in 2 processes" in str(both)


def test_workers_memory_and_ranks_are_shared_out(monkeypatch):
    monkeypatch.setattr(coordinators, "usable_cores", lambda: 16)
    devices = ["cuda:0", "cuda:1", "cuda:2"]
    options = RunOptions(pixel_budget=300, retry_quarantined=True, rank=1, world_size=2, metrics="x")
    shares = [shared(options, i, devices) for i in range(3)]
    # a core for each that drives a GPU
    assert [share.workers for share in shares] == [5, 4, 4]
    assert [(share.rank, share.world_size) for share in shares] == [(3, 6), (4, 6), (5, 6)]
    assert [share.retry_quarantined for share in shares] == [True, False, False]
    assert {(share.pixel_budget, share.metrics, share.progress) for share in shares} == {(100, None, False)}
    for workers, wanted in ((0, [0, 0, 0]), (1, [1, 1, 1]), (8, [3, 3, 2])):
        assert [shared(RunOptions(workers=workers), i, devices).workers for i in range(3)] == wanted


def test_progress_is_told_now_and_then(monkeypatch):
    # no time passes between the first three
    monkeypatch.setattr("capacitor_rt.cache.coordinator.time.monotonic", lambda: 100.0)
    told = []
    teller = Teller(lambda word, what: told.append((word, what)))
    teller.begin(10, 2)
    meters = Meters(1)
    for _ in range(3):
        teller.advance(2, 1, lambda: meters)
    teller.end(meters)
    assert told == [(BEGIN, (10, 2)), (ADVANCE, Progress(2, 1, meters)), (ADVANCE, Progress(4, 2, meters))]


def test_gpus_are_named_as_cuda_counts_those_it_sees(monkeypatch):
    assert parse_gpus("0, 3") == [0, 3]
    for wrong in ("", "a", "0,,1", "-1", "٣"):
        with pytest.raises(InputError, match="is neither 'all' nor a list"):
            parse_gpus(wrong)
    with pytest.raises(InputError, match="names a GPU twice"):
        parse_gpus("1,1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert visible_gpus("all") == [f"cuda:{i}" for i in range(4)]
    assert visible_gpus("1,3") == ["cuda:1", "cuda:3"]
    with pytest.raises(InputError, match="no GPU 4: CUDA sees 4, from 0 to 3"):
        visible_gpus("4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match="no GPU here"):
        visible_gpus("all")


def test_each_process_sees_its_gpu_alone(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert coordinators._visible("cuda:2") == {"CUDA_VISIBLE_DEVICES": "2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    assert coordinators._visible("cuda:1") == {"CUDA_VISIBLE_DEVICES": "GPU-b"}
    assert coordinators._visible("cpu") == {}


def test_processes_of_a_launcher_take_a_gpu_each(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_device("auto") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert (resolve_device("auto"), resolve_device("cuda")) == ("cuda:1", "cuda:1")
    assert (resolve_device("cuda:3"), resolve_device("cpu")) == ("cuda:3", "cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert resolve_device("auto") == "cuda"


def test_errors_go_from_process_to_process_as_they_are():
    for error in (CacheError("a", ["b", "c"]), ImageError("corrupt", "x"), InputError("y")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error) and copy.__dict__ == error.__dict__


def test_several_views_are_shared_as_well(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = Checkpoint(str(folder / "model"))
    options = RunOptions(workers=0, progress=False)
    report = cache_on(["cpu", "cpu"], folder / "src", tmp_path / "out", model, VIEWS, note=str, options=options)
    assert {name: (r.cached, r.exit_code) for name, r in report.views.items()} == dict.fromkeys(VIEWS, (90, 3))
    assert (report.cached, report.unfinished, report.exit_code) == (180, 0, 3)
    assert report.meters.processes == 2
    assert sum(r.new_images for r in report.views.values()) == 2 * 91
    for name, request in VIEWS.items():
        cache_images(folder / "src", tmp_path / name, model, request, workers=0, progress=False)
        assert snapshot(tmp_path / "out" / name) == snapshot(tmp_path / name)
