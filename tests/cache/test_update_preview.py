"""`--update --dry-run`: what it says is what the update then does, and nothing is written."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from cache_cases import Forbidden, index_rows, snapshot, write_images
from models import random_model
from update_cases import OLD, REQUEST, SIZES, cache, change, image, out, reads, run, src, update

from capacitor_rt.cache import (
    Checkpoint,
    RunOptions,
    accounts,
    cache_views,
    dry_run,
    dry_run_views,
    parse_views,
    update_outlook,
)
from capacitor_rt.cache.report import Changes
from capacitor_rt.errors import CacheError

__all__ = ["out", "reads", "run", "src"]


def preview(src, out, request=REQUEST, **options):
    """What is said; nothing but what is read is touched."""
    before = snapshot(out), sorted(path.name for path in out.iterdir())
    found = dry_run(src, out, Forbidden(random_model()), request, options=RunOptions(update=True, workers=0, **options))
    assert (snapshot(out), sorted(path.name for path in out.iterdir())) == before
    return found


def change_all(src):
    change(src)
    os.utime(src / "bad.png", (OLD, OLD))


def written(out, before):
    """Files of latents and of the index that are new, and the bytes of the latents in them without what is around."""
    new = [p for p in out.rglob("*") if p.is_file() and p.relative_to(out).parts[0] in ("tasks", "index")]
    return [p for p in new if str(p.relative_to(out)) not in before]


def test_what_it_says_is_what_is_done(src, out, reads):
    change_all(src)
    (out / ".stamps").unlink()
    found = preview(src, out)
    assert found.update == Changes(11, 14, new=3, changed=1, gone=2, reused=10, moved=2, read=7)
    assert found.quarantined == {"not_an_image": 1} and sum(found.buckets.values()) == 3
    assert reads == {"read": [], "decoded": []}
    before = snapshot(out)
    report = update(src, out)
    assert (report.reused, report.new_images) == (found.update.reused, found.update.read)
    new = written(out, before)
    assert (len(new), report.tasks) == (found.files, found.todo)
    rows = [row for row in index_rows(out) if row["status"] == "ok" and row["file"] is None]
    assert len(rows) == 3
    again = preview(src, out)
    assert again.update is None and again.todo == 0
    assert again.notes == ["the inputs are those of the cache: there is nothing to update"]


def test_rows_of_an_update_under_way_count_as_done(src, out, monkeypatch):
    change_all(src)
    with monkeypatch.context() as patch:
        patch.setattr(accounts, "_make_current", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            update(src, out)
    found = preview(src, out)
    assert (found.todo, found.files, found.todo_nbytes) == (0, 0, 0)
    assert found.update == Changes(11, 14, new=0, changed=0, gone=2, reused=14, moved=0, read=0)
    image(src / "zzz.png", 52)
    found = preview(src, out)
    assert (found.update.new, found.update.changed, found.update.reused) == (1, 0, 14)
    assert found.todo == found.tasks == 5 and found.files == 10
    assert found.todo_nbytes == found.nbytes > 0


def test_copies_are_counted_once_with_dedupe(src, tmp_path):
    request = replace(REQUEST, dedupe=True)
    cache(src, tmp_path / "out", request=request)
    for i in range(3):
        image(src / f"x{i}.png", 60)
    found = preview(src, tmp_path / "out", request)
    assert (found.update.new, found.update.moved, sum(found.buckets.values())) == (1, 2, 1)
    # what is no image has no row
    found = preview(src, tmp_path / "out", request, rehash=True).update
    assert (found.reused, found.changed, found.read) == (12, 1, 14)


def test_of_many_a_sample_is_read(src, out, monkeypatch):
    monkeypatch.setattr(update_outlook, "SAMPLE", 4)
    for i in range(8):
        image(src / f"x{i}.png", 60 + i)
    found = preview(src, out)
    assert found.sampled == 4
    assert (found.update.new, found.update.read, found.update.reused) == (8, 8, 11)


def test_what_an_update_refuses_is_refused(src, out):
    image(src / "zz.png", 51)
    with pytest.raises(CacheError, match="was planned otherwise"):
        preview(src, out, replace(REQUEST, side=64))


def test_the_command_and_its_views(tmp_path, run):
    write_images(tmp_path / "src", 5, sizes=SIZES)
    for path in (tmp_path / "src").iterdir():
        os.utime(path, (OLD, OLD))
    random_model().save_pretrained(tmp_path / "model")
    more = ("--model", tmp_path / "model", "--device", "cpu", "--update", "--dry-run")
    args = ("cache", tmp_path / "src", tmp_path / "out", *more)
    code, text, _ = run(*args, "--view", "32,64@flip")
    assert code == 0 and text.count("1 task of at most") == 2 and not (tmp_path / "out").exists()
    views, model = parse_views(["32", "64@flip"], REQUEST), Checkpoint(str(tmp_path / "model"))
    options = RunOptions(workers=0, progress=False)
    cache_views(tmp_path / "src", tmp_path / "out", model, views, note=str, options=options)
    image(tmp_path / "src" / "zz.png", 51)
    before = snapshot(tmp_path / "out")
    found = dry_run_views(tmp_path / "src", tmp_path / "out", model, views, options=RunOptions(update=True))
    assert {name: f.update.new for name, f in found.items()} == dict.fromkeys(views, 1)
    assert snapshot(tmp_path / "out") == before
    code, text, err = run("cache", tmp_path / "src", tmp_path / "out" / "32", *more, "--area", 32, "--posterior",
                          "--dtype", "fp32", "--task-inputs", 3, "--batch", 2)  # fmt: skip
    assert code == 0, err
    assert "an update to 6 inputs in place of 5: 1 new, 0 changed, 0 gone, 5 reused (0 under another name)" in text
    assert "to be read: 1 input; to be written: 2 tasks, 4 files, " in text
    assert snapshot(tmp_path / "out") == before
