"""Every kind of damage on disk is found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cache_cases import flip_byte, index_rows, snapshot, task_files, task_layout, write_images
from models import random_model

from capacitor_rt.cache import CacheRequest, cache_images
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError

REQUEST = CacheRequest(32, dtype="fp32", flip=True, task_inputs=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    write_images(folder / "src", 10)
    (folder / "src" / "bad.png").write_text("no image")
    cache_images(folder / "src", folder / "out", random_model(), REQUEST, workers=0, progress=False)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def tasks(cache):
    return sorted((cache / "tasks").iterdir())


def test_a_sound_cache_has_no_problems(cache):
    before, seen = snapshot(cache), []
    found = verify(cache, advance=lambda done, total: seen.append((done, total)))
    assert found.problems == [] and found.notes == [] and found.unfinished == 0
    assert (found.inputs, found.rows, found.tasks) == (11, 10, 3)
    assert found.nbytes == sum(p.stat().st_size for p in tasks(cache))
    assert seen == [(n, 3) for n in range(1, 4)]
    assert snapshot(cache) == before


def test_every_byte_counts(cache):
    """A changed byte in any file is found, in a problem that names the file or what it belongs to."""
    for path in [p for p in sorted(cache.rglob("*")) if p.is_file() and p.name != ".stamps"]:
        whole = path.read_bytes()
        few = {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}
        for at in range(0, len(whole), 9) if path.name == "commits.jsonl" else few:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
            found = verify(cache)
            # of the list of inputs, times are not part of the plan; a last line cut off is the trace of a crash
            assert found.problems or found.unfinished or path.name == "source.parquet", (path, at)
            if path.suffix in (".safetensors", ".json"):
                assert any(path.name in p for p in found.problems)
        path.write_bytes(whole)
    assert verify(cache).problems == []


def test_damaged_rows_are_named_with_the_way_out(cache):
    path = tasks(cache)[1]
    placed = task_layout(cache, 1)
    for row, kind in ((0, "latents"), (2, "latents_flip")):
        tensor = placed.tensors[0, kind]
        flip_byte(path, tensor.begin + row * tensor.row_nbytes + 5)
    (problem,) = verify(cache).problems
    assert f"{path} is damaged: 2 of 4 rows with another hash" in problem
    assert "0 of 32x32 ('004.png'), 2 of 32x32 ('006.png')" in problem
    assert problem.endswith(f"run `capacitor-rt verify --repair {cache}`, then the cache command again")


def test_damage_outside_the_rows_is_told_apart(cache):
    path = tasks(cache)[0]
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"task":"0"', b'"task":"1"'))
    assert "its header or its commit line; all rows match" in verify(cache).problems[0]
    path.write_bytes(data[:-10])
    assert "it ends before row" in verify(cache).problems[0]
    path.unlink()
    assert "cannot be read (No such file" in verify(cache).problems[0]


def test_missing_and_damaged_indexes_are_named(cache):
    index = sorted((cache / "index").iterdir())
    flip_byte(index[0], 30)
    index[1].unlink()
    problems = verify(cache).problems
    assert len(problems) == 2
    assert index[0].name in problems[0] and "is damaged: its hash" in problems[0]
    assert index[1].name in problems[1] and "is missing" in problems[1]


def test_swapped_tasks_are_found(cache):
    for folder in ("tasks", "index"):
        a, b = sorted((cache / folder).iterdir())[:2]
        a.rename(cache / "x")
        b.rename(a)
        (cache / "x").rename(b)
    assert len(verify(cache).problems) == 2


def test_quarantine_log_and_plan_are_checked(cache):
    (cache / "quarantine.jsonl").write_text("")
    assert "quarantine.jsonl is missing or does not match the index" in verify(cache).problems[0]
    (cache / "plan.json").unlink()
    assert "plan.json is missing" in verify(cache).problems[0]


def test_unfinished_is_no_damage_and_strangers_are_noted(cache):
    lines = (cache / "commits.jsonl").read_bytes().splitlines(keepends=True)
    (cache / "commits.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    (cache / "tasks" / "half.safetensors.tmp-12").write_text("x")
    found = verify(cache)
    assert found.problems == [] and found.unfinished == 1
    assert any("left by a killed run" in note for note in found.notes)
    assert sum("not committed, or foreign" in note for note in found.notes) == 2


def test_a_folder_without_a_cache_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CacheError, match="is no latent cache"):
            verify(path)


def test_index_rows_add_up(cache):
    assert [row["input"] for row in index_rows(cache)] == list(range(11))
    assert all(path.exists() for n in range(3) for path in task_files(cache, n))
