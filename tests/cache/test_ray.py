"""Actors on a local Ray: the same leases, the same bytes, and the living take over from the dead."""

from __future__ import annotations

import os
import shutil
import signal
import threading

import pytest
from cache_cases import commits_of, snapshot, write_images
from held import held, last_task
from kill_driver import REQUEST
from models import random_model
from update_cases import COPIES, changed_caches
from waiting import until

from capacitor_rt.cache import Checkpoint, RunOptions, cache_images, ray_actors
from capacitor_rt.cache.ray_actors import cache_on_ray
from capacitor_rt.errors import CacheError

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray, or pip install '.[ray]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=80 << 20)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    write_images(folder / "src", 90, sizes=((40, 40), (20, 80), (90, 24)))
    (folder / "src" / "004b.png").write_bytes(b"no image")
    random_model().save_pretrained(folder / "model")
    model = Checkpoint(str(folder / "model"))
    cache_images(folder / "src", folder / "whole", model, REQUEST, workers=0, progress=False)
    return folder


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    return changed_caches(tmp_path_factory.mktemp("changed"))


def cache(folder, out, notes, **more):
    model = Checkpoint(str(folder / "model"))
    options = RunOptions(workers=0, progress=False)
    return cache_on_ray(
        "local", folder / "src", out, model, REQUEST, actors=2, note=notes.append, options=options, **more
    )


def test_two_actors_leave_the_bytes_of_one_process(cluster, folder, tmp_path):
    notes = []
    report = cache(folder, tmp_path / "out", notes)
    assert (report.exit_code, report.cached, report.quarantined) == (3, 90, {"not_an_image": 1})
    # nothing is done twice, and what is to be said is said once
    assert report.new_images == 91 and len(notes) == len({line.partition(":")[0] for line in notes})
    assert snapshot(tmp_path / "out") == snapshot(folder / "whole")
    assert cache(folder, tmp_path / "out", notes).new_images == 0


def test_the_tasks_of_a_dead_actor_are_taken_over(cluster, folder, tmp_path, monkeypatch):
    started, notes = [], []
    seat = ray_actors._seat
    monkeypatch.setattr(ray_actors, "_seat", lambda *args: started.append(seat(*args)) or started[-1])

    def kill_the_planner():
        until(lambda: commits_of(tmp_path / "out"))
        os.kill(ray.get(started[0].actor.pid.remote()), signal.SIGKILL)
        give_back()

    with held(tmp_path / "out", *last_task(folder / "whole")) as give_back:
        thread = threading.Thread(target=kill_the_planner, daemon=True)
        thread.start()
        report = cache(folder, tmp_path / "out", notes)
        thread.join()
    assert report.exit_code == 3
    assert [line for line in notes if "lost" in line] == [
        "the coordinator on Ray (0) was lost (ActorDiedError): its tasks are taken over by the others"
    ]
    assert snapshot(tmp_path / "out") == snapshot(folder / "whole")


def test_an_interruption_stops_the_actors_and_keeps_what_is_complete(cluster, folder, tmp_path, monkeypatch):
    look = ray_actors._look

    def interrupted(*args):
        if commits_of(tmp_path / "out"):
            raise KeyboardInterrupt
        look(*args)

    monkeypatch.setattr(ray_actors, "_look", interrupted)
    with held(tmp_path / "out", *last_task(folder / "whole")):
        with pytest.raises(KeyboardInterrupt):
            cache(folder, tmp_path / "out", [])
        # that of this process is the only one left
        assert commits_of(tmp_path / "out") and len(list((tmp_path / "out" / "leases").iterdir())) == 1
    monkeypatch.undo()
    assert cache(folder, tmp_path / "out", []).exit_code == 3
    assert snapshot(tmp_path / "out") == snapshot(folder / "whole")


@pytest.mark.parametrize(("name", "request_"), [("one", REQUEST), ("views", COPIES)])
def test_updates_of_a_cache_and_of_views_with_copies(cluster, changed, tmp_path, name, request_):
    out = shutil.copytree(changed / "old" / name, tmp_path / name)
    options = RunOptions(workers=0, progress=False, update=True)
    model, notes = Checkpoint(str(changed / "model")), []
    report = cache_on_ray("local", changed / "src", out, model, request_, actors=2, note=notes.append, options=options)
    assert report.exit_code == 3 and not any("lost" in line for line in notes)
    assert report.generation == (1 if name == "one" else 2)
    assert snapshot(out) == snapshot(changed / "whole" / name)


def test_what_is_refused_is_refused_once(cluster, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    notes = []
    with pytest.raises(CacheError, match="is not empty and no latent cache"):
        cache(folder, tmp_path / "out", notes)
    assert notes == []
    model = Checkpoint(str(folder / "model"), device="cuda")
    with pytest.raises(CacheError, match="the Ray cluster has no GPU"):
        cache_on_ray("local", folder / "src", tmp_path / "gpu", model, REQUEST, note=notes.append)
