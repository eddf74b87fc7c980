"""`status`, `diff`, `gc` and `--retry-quarantined`: a cache is looked at, compared, cleared and mended."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys

import pytest
from cache_cases import commits_of, flip_byte, snapshot, stamps, task_files, write_images
from models import random_model

from capacitor_rt.cache import CacheRequest, RunOptions, cache_images
from capacitor_rt.cache.compare import compare
from capacitor_rt.cache.folder import LEASES
from capacitor_rt.cache.garbage import collect
from capacitor_rt.cache.mutex import me, owner_bytes
from capacitor_rt.cache.repair import repair
from capacitor_rt.cache.sources import files as files_module
from capacitor_rt.cache.status import status
from capacitor_rt.cache.verify import verify
from capacitor_rt.cli.app import _run
from capacitor_rt.errors import CacheError

REQUEST = CacheRequest(32, dtype="fp32", task_inputs=3)


def cache(src, out, request=REQUEST, **options):
    chosen = RunOptions(workers=0, progress=False, backoff=(0.0,), **options)
    return cache_images(src, out, random_model(), request, options=chosen)


@pytest.fixture
def made(tmp_path):
    src = tmp_path / "src"
    write_images(src, 7)
    (src / "003b.png").write_bytes(b"no image")
    cache(src, tmp_path / "out")
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", *map(str, args)])
        try:
            code = _run()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_status_of_a_finished_cache(made, run):
    before = stamps(made / "out")
    found = status(made / "out")
    assert (found.inputs, found.done_inputs, found.tasks, found.done_tasks, found.rows) == (8, 8, 3, 3, 7)
    assert found.quarantined == {"not_an_image": 1} and not found.workers and found.left_nbytes == 0
    code, out, _ = run("status", made / "out")
    assert code == 0 and "8 of 8 inputs done (100.0%), 3 of 3 tasks" in out and "not_an_image 1" in out
    code, out, _ = run("status", made / "out", "--json")
    assert code == 0 and json.loads(out)["rows"] == 7
    assert stamps(made / "out") == before


def test_status_of_one_that_is_being_written(made, run):
    out = made / "out"
    log = (out / "commits.jsonl").read_bytes().splitlines(keepends=True)
    (out / "commits.jsonl").write_bytes(b"".join(log[:2]))
    index, _ = task_files(made / "out", 1)
    os.utime(task_files(out, 0)[0], (1000, 1000))
    os.utime(index, (1010, 1010))
    (out / LEASES).mkdir()
    (out / LEASES / f"{index.name[:8]}-000002").write_bytes(owner_bytes(me()))
    found = status(out)
    # 3 inputs in the 10 seconds since the task before, and 2 inputs to go
    assert found.rate == pytest.approx(0.3) and found.left_seconds == pytest.approx(2 / 0.3)
    assert found.left_nbytes == round(2 * found.nbytes / 6)
    code, text, _ = run("status", out)
    assert code == 1 and f"task 2: process {os.getpid()}" in text and "0.3 inputs/s lately" in text
    assert "are still to be written" in text


def test_status_of_no_cache(tmp_path, run):
    code, _, err = run("status", tmp_path)
    assert code == 1 and "is no latent cache" in err


def test_gc_removes_what_was_moved_away_and_nothing_else(made, run):
    out = made / "out"
    whole = snapshot(out)
    flip_byte(task_files(out, 1)[1], -1)
    repair(out, verify(out))
    cache(made / "src", out)
    for folder in (out, out / "tasks"):
        old = folder / f"x.tmp-{'0' * 32}"
        old.write_bytes(b"old")
        os.utime(old, (1, 1))
    (out / "index" / f"y.tmp-{'1' * 32}").write_bytes(b"of a run that is at work")
    before = snapshot(out)
    code, text, err = run("gc", out, "--dry-run")
    assert code == 0 and "would be removed" in text and snapshot(out) == before
    names = {line.partition(":")[0] for line in err.splitlines()}
    assert sum(name.startswith("damaged/") for name in names) == 2
    code, text, _ = run("gc", out)
    assert code == 0 and text.startswith("3 files")
    left = snapshot(out)
    assert set(left) - set(whole) == {f"index/y.tmp-{'1' * 32}", f"tasks/x.tmp-{'0' * 32}"}
    assert {name: left[name] for name in whole} == whole
    assert collect(out) == [] and not (out / "damaged").exists()


def test_diff_names_what_is_other(made, run):
    src, other = made / "src", made / "other"
    shutil.copytree(src, other)
    assert not compare(made / "out", made / "out")
    (other / "000.png").unlink()
    write_images(other / "more", 2)
    shutil.copy(src / "002.png", other / "001.png")
    shutil.copy(src / "002.png", other / "003b.png")
    (other / "004.png").write_bytes(b"no image any more")
    cache(other, made / "out2")
    found = compare(made / "out", made / "out2")
    counts = {"added": 2, "removed": 1, "changed": 1, "re-encoded": 0, "failed": 1, "mended": 1}
    assert found.counts == counts and found.same == 4 and found.settings == []
    code, out, _ = run("diff", made / "out", made / "out2")
    assert code == 1 and "2 added: 'more/000.png', 'more/001.png'" in out and "1 failed: '004.png'" in out
    cache(src, made / "out3", CacheRequest(64, dtype="fp32", task_inputs=3))
    found = compare(made / "out", made / "out3")
    assert found.counts["re-encoded"] == 7 and "geometry.side 32 -> 64" in found.settings
    assert run("diff", made / "out", made / "out")[:2] == (0, "8 the same\n")


def test_quarantined_inputs_are_tried_again_when_asked(tmp_path, monkeypatch):
    src, out = tmp_path / "src", tmp_path / "out"
    write_images(src, 7)
    (src / "003b.png").write_bytes(b"no image")
    original = files_module._read_all

    def failing(fd, size):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("001.png"):
            raise OSError(errno.EIO, "I/O error")
        return original(fd, size)

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "_read_all", failing)
        report = cache(src, out, give_up=True)
        assert report.quarantined == {"io_error": 1, "not_an_image": 1}
        # still failing: nothing is touched
        before = stamps(out)
        assert cache(src, out, retry_quarantined=True).new_images == 0
        assert stamps(out) == before
    assert cache(src, out).new_images == 0
    report = cache(src, out, retry_quarantined=True)
    # of three tasks the one with the input that can be read now
    assert (report.cached, report.new_images, report.quarantined) == (7, 3, {"not_an_image": 1})
    cache(src, tmp_path / "undisturbed")
    files = {name: data for name, data in snapshot(out).items() if not name.startswith("generations/")}
    assert files == snapshot(tmp_path / "undisturbed")
    assert len(list((out / "generations").iterdir())) == 2
    assert len(collect(out)) == 2 and snapshot(out) == snapshot(tmp_path / "undisturbed")


def test_a_retry_that_is_killed_half_way_loses_nothing(made):
    """Files of a task that were moved away, with the commit line still there: the task is done again."""
    out, whole = made / "out", snapshot(made / "out")
    for path in task_files(out, 1):
        (out / "generations").mkdir(exist_ok=True)
        path.rename(out / "generations" / f"{path.name}.0")
    with pytest.raises(CacheError, match=r"is missing"):
        from capacitor_rt.cache import LatentDataset

        LatentDataset(out)
    cache(made / "src", out)
    assert {k: v for k, v in snapshot(out).items() if not k.startswith("generations/")} == whole
    assert len(commits_of(out)) == 3


def test_views_are_looked_at_and_cleared_together(made, run):
    src, out = made / "src", made / "views"
    for name in ("32", "64"):
        cache(src, out / name, CacheRequest(int(name), dtype="fp32", task_inputs=3))
    flip_byte(task_files(out / "64", 0)[1], 5000)
    code, text, _ = run("status", out)
    assert code == 0 and text.splitlines()[0] == "32:" and "64:" in text.splitlines()
    code, text, _ = run("status", out, "--json")
    assert {name: found["rows"] for name, found in json.loads(text).items()} == {"32": 7, "64": 7}
    code, text, errors = run("verify", out, "-q", "--repair")
    assert code == 1 and "32: 7 rows" in text and "repaired: " in errors
    code, text, errors = run("gc", out)
    assert code == 0 and "64/damaged/" in errors and "32/" not in errors
    assert not (out / "64" / "damaged").exists()
