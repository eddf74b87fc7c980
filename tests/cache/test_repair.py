"""`verify --repair` and a run after it: damage of any kind ends in the bytes of an undisturbed cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from cache_cases import commits_of, flip_byte, snapshot, task_files, write_images
from models import random_model

from capacitor_rt.cache import CacheRequest, LatentDataset, cache_images
from capacitor_rt.cache.decoding.reading import Ahead
from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.hashing import canonical_json
from capacitor_rt.cache.leases import Leases
from capacitor_rt.cache.mutex import Mutex
from capacitor_rt.cache.repair import repair
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError

REQUEST = CacheRequest(32, dtype="fp32", flip=True, task_inputs=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair")
    write_images(folder / "src", 10)
    (folder / "src" / "bad.png").write_text("no image")
    cache_images(folder / "src", folder / "out", random_model(), REQUEST, workers=0, progress=False)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def flip_data(cache):
    flip_byte(task_files(cache, 1)[1], -1)


def flip_index(cache):
    flip_byte(task_files(cache, 1)[0], 100)


def lose_index(cache):
    task_files(cache, 1)[0].unlink()


def lose_data(cache):
    task_files(cache, 1)[1].unlink()


def flip_line(cache):
    flip_byte(cache / "commits.jsonl", 20)


def lengthen_log(cache):
    with (cache / "commits.jsonl").open("ab") as log:
        log.write(b"\n" * (3 << 20))


def link_log(cache):
    (cache / "commits.jsonl").rename(cache.parent / "elsewhere")
    (cache / "commits.jsonl").symlink_to(cache.parent / "elsewhere")


def lose_plan(cache):
    (cache / "plan.json").unlink()


def lose_plan_and_log(cache):
    (cache / "plan.json").write_bytes(b"{")
    (cache / "commits.jsonl").unlink()


def another_plan(cache):
    """One that could be, and is not that of the files: a run would begin anew beside them."""
    fields = json.loads((cache / "plan.json").read_bytes())
    del fields["sha256"]
    fields["geometry"]["multiple"] = 16
    fields["sha256"] = hashlib.sha256(canonical_json(fields)).hexdigest()
    (cache / "plan.json").write_text(json.dumps(fields))


def swap_tasks(cache):
    a, b = (task_files(cache, n)[1] for n in (0, 1))
    a.rename(cache / "x")
    b.rename(a)
    (cache / "x").rename(b)


def foreign_task(cache):
    line = (cache / "commits.jsonl").read_bytes().splitlines(keepends=True)[-1]
    path = task_files(cache, 2)[1]
    (cache / "commits.jsonl").write_bytes((cache / "commits.jsonl").read_bytes().removesuffix(line))
    path.write_bytes(b"somebody's")


def drop_quarantine(cache):
    (cache / "quarantine.jsonl").unlink()


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (flip_data, 4), (flip_index, 4), (lose_index, 4), (lose_data, 4), (flip_line, 0),
        (lengthen_log, 0), (link_log, 0), (lose_plan, 0), (lose_plan_and_log, 0), (another_plan, 0),
        (swap_tasks, 8), (foreign_task, 3), (drop_quarantine, 0),
    ],
)  # fmt: skip
def test_what_is_damaged_is_made_anew_and_nothing_else(made, cache, monkeypatch, damage, again):
    damage(cache)
    found = verify(cache)
    assert found.problems or found.unfinished
    repair(cache, found)
    left = verify(cache)
    assert left.problems == []
    decoded = []
    original = Ahead._attempt
    monkeypatch.setattr(Ahead, "_attempt", lambda self, i: decoded.append(i) or original(self, i))
    cache_images(made / "src", cache, random_model(), REQUEST, workers=0, progress=False)
    assert len(decoded) == again
    files = {name: data for name, data in snapshot(cache).items() if not name.startswith("damaged/")}
    assert files == snapshot(made / "out")
    assert verify(cache).problems == []


def test_nothing_is_deleted(cache):
    index, data = task_files(cache, 1)
    flip_byte(data, -1)
    kept = {path.read_bytes() for path in (index, data)}
    repair(cache, verify(cache))
    assert {path.read_bytes() for path in (cache / "damaged").iterdir()} == kept
    # a second time beside the first
    flip_byte(task_files(cache, 0)[1], -1)
    repair(cache, verify(cache))
    assert len(list((cache / "damaged").iterdir())) == 4


def test_a_plan_without_a_copy_cannot_be_restored(cache):
    (cache / "plan.json").unlink()
    for path in (cache / "index").iterdir():
        flip_byte(path, 100)
    with pytest.raises(CacheError, match="no index holds a sound copy"):
        repair(cache, verify(cache))


def test_a_cache_that_is_being_written_is_not_repaired(cache):
    flip_data(cache)
    found = verify(cache)
    with CacheFolder(cache) as folder, Mutex(folder) as mutex:
        leases = Leases(folder, mutex, task_files(cache, 0)[0].name[:8])
        assert leases.take(7)
    with pytest.raises(CacheError, match=f"is being written by process {os.getpid()}"):
        repair(cache, found)
    assert len(commits_of(cache)) == 3


OUTSIDE = (
    "plan.json",
    "source.parquet",
    "commits.jsonl",
    "quarantine.jsonl",
    "tasks",
    "index",
    ".lock",
    ".stamps",
    ".rows",
    "leases",
)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("finished", [True, False])
def test_nothing_outside_is_touched(made, cache, tmp_path, name, finished):
    """A name of the cache that is a link leads nowhere: no run, reader or check makes or changes what it names."""
    outside = tmp_path / "outside"
    outside.mkdir()
    target = outside / "target"
    if name in ("tasks", "index", "leases"):
        target.mkdir()
        (target / f"x.tmp-{'0' * 32}").write_text("mine")
        shutil.rmtree(cache / name, ignore_errors=True)
    else:
        target.write_bytes((cache / name).read_bytes() if (cache / name).exists() else b"mine")
        (cache / name).unlink(missing_ok=True)
    if not finished:
        for path in task_files(made / "out", 2):
            (cache / path.relative_to(made / "out")).unlink(missing_ok=True)
    (cache / name).symlink_to(target)
    before, names = snapshot(outside), sorted(os.listdir(outside))
    for use in (
        lambda: cache_images(made / "src", cache, random_model(), REQUEST, progress=False),
        lambda: LatentDataset(cache, verify=True)[0],
        lambda: repair(cache, verify(cache)),
    ):
        try:
            use()
        except CacheError:
            continue
    assert snapshot(outside) == before and sorted(os.listdir(outside)) == names


def test_a_hard_link_is_not_written_through(made, cache, tmp_path):
    lines = (cache / "commits.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "mine").write_bytes(b"".join(lines[:2]))
    (cache / "commits.jsonl").unlink()
    os.link(tmp_path / "mine", cache / "commits.jsonl")
    for path in task_files(cache, 2):
        path.unlink()
    with pytest.raises(CacheError, match=r"commits\.jsonl is a link"):
        cache_images(made / "src", cache, random_model(), REQUEST, progress=False)
    assert (tmp_path / "mine").read_bytes() == b"".join(lines[:2])


@pytest.mark.parametrize("name", ["plan.json", "commits.jsonl", "source.parquet", "quarantine.jsonl", "tasks", "index"])
def test_a_pipe_is_no_file(made, cache, name):
    path = cache / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.mkfifo(path)
    try:
        cache_images(made / "src", cache, random_model(), REQUEST, progress=False)
    except CacheError:
        pass
    else:
        assert name in ("source.parquet", "quarantine.jsonl")
        assert verify(cache).problems == []
