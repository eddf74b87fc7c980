"""Updates, copies and several views, shared by coordinators: the bytes are those of one process."""

from __future__ import annotations

import shutil
import threading

import pytest
from cache_cases import commits_of, snapshot
from held import held
from kill_driver import REQUEST, VIEWS
from update_cases import COPIES, changed_caches
from waiting import until

from capacitor_rt.cache import Checkpoint, RunOptions, coordinators
from capacitor_rt.cache.coordinators import cache_on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return changed_caches(tmp_path_factory.mktemp("shared"))


def share(folder, out, request):
    options = RunOptions(workers=0, progress=False, update=True)
    model, notes = Checkpoint(str(folder / "model")), []
    report = cache_on(["cpu", "cpu"], folder / "src", out, model, request, note=notes.append, options=options)
    assert report.exit_code == 3
    return report, notes


def test_views_with_copies_are_updated_together(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = shutil.copytree(folder / "old" / "views", tmp_path / "views")
    report, _ = share(folder, out, COPIES)
    # one update has one input for each content, the next the others
    assert {name: (r.cached, r.generation) for name, r in report.views.items()} == dict.fromkeys(VIEWS, (53, 2))
    assert snapshot(out) == snapshot(folder / "whole" / "views")


def test_an_update_is_gone_on_with_where_a_coordinator_is_killed(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = shutil.copytree(folder / "old" / "one", tmp_path / "one")
    started, start = [], coordinators._start
    monkeypatch.setattr(coordinators, "_start", lambda *args: started.append(start(*args)) or started[-1])

    def kill_the_planner():
        until(lambda: any(log.stat().st_size for log in out.glob("commits-*.jsonl")))
        started[0].process.kill()
        give_back()

    (index, *_) = {p.stem for p in (folder / "whole" / "one" / "index").iterdir()} - {
        p.stem for p in (out / "index").iterdir()
    }
    plan8, _, number = index.partition("-")
    with held(out, plan8, int(number)) as give_back:
        thread = threading.Thread(target=kill_the_planner, daemon=True)
        thread.start()
        report, notes = share(folder, out, REQUEST)
        thread.join()
    assert sum("was ended by SIGKILL" in line for line in notes) == 1
    assert (report.cached, report.generation) == (53, 1) and len(commits_of(out)) == report.tasks
    assert snapshot(out) == snapshot(folder / "whole" / "one")
