"""Runs whose images are decoded by other processes: the same files, and nothing left when they are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import image_files as files
import numpy as np
import pytest
from cache_cases import commits_of, snapshot
from held import held
from models import random_model
from waiting import HANG_SECONDS, runs, until

from capacitor_rt import CapacitorError
from capacitor_rt.cache import CacheRequest, begin, cache_images, coordinator
from capacitor_rt.cache import run as run_module
from capacitor_rt.cache.options import RunOptions
from capacitor_rt.cache.plan import Task

REQUEST = CacheRequest(48, area=True, batch=3, task_inputs=10)
COUNT = 34


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("src")
    for i in range(COUNT):
        picture = files.texture(60 + 9 * (i % 4), 60 + 13 * (i % 3), i)
        data = files.encoded(picture, ("JPEG", "PNG")[i % 2])
        (folder / f"{i:03}.img.{'jpg' if i % 2 == 0 else 'png'}").write_bytes(data[:-90] if i == 20 else data)
    return folder


@pytest.fixture(scope="module")
def alone(src, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("alone") / "out"
    options = RunOptions(workers=0, progress=False)
    assert cache_images(src, out, random_model(), REQUEST, options=options).quarantined == {"truncated": 1}
    return snapshot(out)


def test_files_do_not_depend_on_workers(src, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(begin, "BYTES_PER_WORKER", 1)
    report = cache_images(src, tmp_path / "out", random_model(), REQUEST, options=RunOptions(3, progress=False))
    assert report.meters.workers == 3 and report.meters.seconds["decode"] > 0
    assert snapshot(tmp_path / "out") == alone


def test_killed_with_its_workers_it_goes_on(src, alone, tmp_path):
    out = tmp_path / "out"
    code = textwrap.dedent(
        f"""
        import sys
        sys.path[:] = {sys.path!r}
        from pathlib import Path
        from models import random_model
        from test_cache_workers import REQUEST
        from capacitor_rt.cache import cache_images
        cache_images(Path({str(src)!r}), Path({str(out)!r}), random_model(), REQUEST, workers=1, progress=False)
        """
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    plan8 = next(name for name in alone if name.startswith("index/")).removeprefix("index/")[:8]
    with held(out, plan8, 2):
        run = subprocess.Popen([sys.executable, "-c", code], env=env)
        until(lambda: commits_of(out) or run.poll() is not None)
        below = [int(p) for p in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        # the helper does not outlive its coordinator
        assert below
        until(lambda: not any(map(runs, below)))
        assert 0 < len(commits_of(out)) < 4
    report = cache_images(src, out, random_model(), REQUEST, options=RunOptions(workers=0, progress=False, stale=0.1))
    assert report.exit_code == 3
    assert snapshot(out) == alone


@pytest.mark.parametrize(
    ("wanted", "nbytes", "count"), [(0, 10**12, 0), (3, 0, 1), (3, 10**12, 3), (8, 70 << 20, 4), (4, -1, 1)]
)
def test_as_many_workers_as_there_is_work_for(wanted, nbytes, count):
    class Prepared:
        class source:
            class listing:
                sizes = np.array([nbytes // 2, nbytes - nbytes // 2] if nbytes >= 0 else [-1, -1])

    assert begin.workers_for(wanted, Prepared, [Task(0, 0, 2)]) == count


def test_the_helper_starts_before_the_plan_and_serves_the_run(src, alone, tmp_path, monkeypatch):
    started, planned = [], []

    class Counted(run_module.Helper):
        def __init__(self):
            super().__init__()
            started.append(self.pid)
            assert not planned

    monkeypatch.setattr(run_module, "Helper", Counted)
    monkeypatch.setattr("capacitor_rt.cache.decoding.coordinator.Helper", lambda: pytest.fail("another was started"))
    monkeypatch.setattr(run_module, "planned", lambda *args, plan=run_module.planned: planned.append(1) or plan(*args))
    cache_images(src, tmp_path / "out", random_model(), REQUEST, options=RunOptions(1, progress=False))
    assert snapshot(tmp_path / "out") == alone and len(started) == 1
    # nothing is planned for a cache that is there
    cache_images(src, tmp_path / "out", random_model(), REQUEST, options=RunOptions(1, progress=False))
    assert len(started) == 1
    assert not Path(f"/proc/{started[0]}").exists()


@pytest.mark.parametrize(("workers", "is_there"), [(1, False), (0, False), (1, True)])
def test_a_coordinator_starts_the_helper_before_it_is_told_to_go_on(tmp_path, workers, is_there):
    """So that it imports while another makes the plan; where there is a plan, or no worker, there is none."""
    if is_there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "plan.json").write_text("{}")
    ours, theirs = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            coordinator.coordinate = lambda setup, tell, helper: tell("helper", None if helper is None else helper.pid)
            coordinator.main(os.dup(theirs.fileno()))
        finally:
            os._exit(0)
    theirs.close()
    options = RunOptions(workers, progress=False)
    ours.send(coordinator.Setup("src", str(tmp_path / "out"), None, REQUEST, options))
    ours.send(coordinator.GO)
    word, pid = ours.recv()
    assert word == "helper" and (pid is not None) == (workers == 1 and not is_there)
    os.waitpid(child, 0)
    # it has ended with its coordinator
    assert pid is None or not Path(f"/proc/{pid}").exists()


def test_a_helper_that_is_not_needed_is_gone_at_once(tmp_path, monkeypatch):
    started = []

    class Kept(run_module.Helper):
        def __init__(self):
            super().__init__()
            started.append(self)

    monkeypatch.setattr(run_module, "Helper", Kept)
    with pytest.raises(CapacitorError):
        cache_images(tmp_path / "none", tmp_path / "out", random_model(), REQUEST, options=RunOptions(progress=False))
    # else it would have ended by itself, once it had imported what it did not need
    assert [helper.returncode for helper in started] == [-signal.SIGKILL]
    assert not (tmp_path / "out").exists()


def test_a_command_starts_the_helper_before_it_has_imported_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from capacitor_rt.cache.decoding.helper import Helper\n"
        "from capacitor_rt.cache.sources import files, parquet, remote, tar\n"
        "with Helper() as helper: assert helper.pid"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_SECONDS)
