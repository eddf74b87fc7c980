"""Several views that follow their source, or whose copies are encoded once: each is what it is alone, to the bit."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from cache_cases import Forbidden, snapshot, write_images
from kill_driver import VIEWS as DRIVEN
from models import random_model
from update_cases import SIZES, age, change, drive, image, reads

from capacitor_rt.cache import (
    CacheRequest,
    LatentDataset,
    RunOptions,
    accounts,
    cache_images,
    cache_views,
    parse_views,
    pipeline,
)
from capacitor_rt.cache import dedupe as dedupe_module
from capacitor_rt.cache.decoding.reading import Ahead, FileRead
from capacitor_rt.cache.sources import ColumnsRequest
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError, ImageError

__all__ = ["reads"]

BASE = CacheRequest(32, dtype="fp32", batch=2, task_inputs=3)
VIEWS = parse_views(["32", "48@area+flip"], BASE)
COPIES = parse_views(["32", "48@area+flip"], CacheRequest(32, dtype="fp32", batch=2, task_inputs=3, dedupe=True))


def views(src, out, model=None, asked=VIEWS, notes=None, **options):
    chosen = RunOptions(**{"workers": 0, "progress": False, "backoff": (0.0,), "measure": 0, **options})
    note = (notes if notes is not None else []).append
    return cache_views(src, out, model or random_model(), asked, note=note, options=chosen)


def alone(src, out, request, **options):
    chosen = RunOptions(workers=0, progress=False, backoff=(0.0,), measure=0, **options)
    return cache_images(src, out, random_model(), request, options=chosen)


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    """A source, and its views."""
    folder = tmp_path_factory.mktemp("views")
    write_images(folder / "src", 10, sizes=SIZES)
    (folder / "src" / "003b.png").write_bytes(b"no image")
    age(folder / "src")
    views(folder / "src", folder / "out")
    return folder


@pytest.fixture
def folder(began, tmp_path) -> Path:
    """A copy of them; `alone-NAME` are to be updated one by one."""
    for name in ("src", "out"):
        shutil.copytree(began / name, tmp_path / name)
    for name in VIEWS:
        shutil.copytree(began / "out" / name, tmp_path / "alone" / name)
    return tmp_path


def update_alone(folder: Path, asked=VIEWS, **options) -> None:
    for name, request in asked.items():
        alone(folder / "src", folder / "alone" / name, request, update=True, **options)


def assert_as_alone(folder: Path, asked=VIEWS) -> None:
    for name in asked:
        assert snapshot(folder / "out" / name) == snapshot(folder / "alone" / name), name
        found = verify(folder / "out" / name)
        assert found.problems == [] and not found.unfinished


@pytest.mark.parametrize("workers", [0, 2])
def test_each_is_what_an_update_of_it_alone_gives(folder, workers):
    change(folder / "src")
    report = views(folder / "src", folder / "out", update=True, workers=workers)
    assert (report.generation, report.exit_code) == (1, 3)
    update_alone(folder)
    assert_as_alone(folder)
    # and again, where nothing has changed
    before = snapshot(folder / "out")
    report = views(folder / "src", folder / "out", Forbidden(random_model()), update=True)
    assert report.meters is None and snapshot(folder / "out") == before


def test_what_changed_is_read_and_decoded_once_and_the_rest_not_at_all(folder, reads):
    change(folder / "src")
    report = views(folder / "src", folder / "out", update=True)
    assert sorted(reads["decoded"]) == ["000a.png", "005.png", "bad.png", "zz.png"]
    # beside them what has another name or time, whose bytes are known
    assert len(reads["read"]) == len(set(reads["read"])) == 7
    assert all((r.reused, r.new_images) == (10, 7) for r in report.views.values())
    assert report.meters.images == 7


def test_nothing_to_encode_needs_no_model(folder):
    (folder / "src" / "001.png").unlink()
    report = views(folder / "src", folder / "out", Forbidden(random_model()), update=True)
    assert all((r.generation, r.reused, r.new_images) == (1, 10, 0) for r in report.views.values())
    update_alone(folder)
    assert_as_alone(folder)


def test_views_of_other_generations_come_together(folder, reads):
    """One was updated before, one is new, one has had nothing done to it: each is read for what it lacks."""
    image(folder / "src" / "000a.png", 50)
    alone(folder / "src", folder / "out" / "32", VIEWS["32"], update=True)
    shutil.copytree(folder / "out" / "32", folder / "alone" / "32", dirs_exist_ok=True)
    change(folder / "src")
    reads["decoded"].clear(), reads["read"].clear()
    more = VIEWS | parse_views(["64"], BASE)
    report = views(folder / "src", folder / "out", asked=more, update=True)
    assert {name: r.generation for name, r in report.views.items()} == {"32": 2, "48-area-flip": 1, "64": 0}
    assert Counter(reads["decoded"]).most_common(1)[0][1] == 1 and len(reads["decoded"]) == 14
    update_alone(folder, more)
    assert_as_alone(folder, more)


@pytest.mark.parametrize("published", [0, 1])
def test_interrupted_between_the_views_publications(folder, monkeypatch, published):
    change(folder / "src")
    before = {name: [*LatentDataset(folder / "out" / name, verify=True).ids] for name in VIEWS}
    original, left = accounts._make_current, published

    def stop(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        original(*args)

    # what accounts for an interrupted run is stopped as well
    monkeypatch.setattr(accounts, "_make_current", stop)
    with pytest.raises(KeyboardInterrupt):
        views(folder / "src", folder / "out", update=True)
    monkeypatch.undo()
    found = {name: LatentDataset(folder / "out" / name, verify=True) for name in VIEWS}
    assert [ds.plan.number for ds in found.values()] == [published, 0]
    assert all([*ds.ids] == before[name] for name, ds in found.items() if not ds.plan.number)
    report = views(folder / "src", folder / "out", Forbidden(random_model()), update=True)
    assert report.generation == 1
    update_alone(folder)
    assert_as_alone(folder)


def test_without_update_other_inputs_are_refused_and_one_under_way_is_let_be(folder):
    image(folder / "src" / "zz.png", 51)
    before = snapshot(folder / "out")
    with pytest.raises(CacheError, match=r"view 32: .*was planned for other inputs"):
        views(folder / "src", folder / "out")
    with pytest.raises(CacheError, match=r"view 48-area: .*was planned otherwise"):
        shutil.copytree(folder / "out" / "32", folder / "out" / "48-area")
        views(folder / "src", folder / "out", asked=parse_views(["48@area"], BASE), update=True)
    shutil.rmtree(folder / "out" / "48-area")
    assert snapshot(folder / "out") == before


def test_what_failed_for_now_is_done_by_the_next_run(folder, monkeypatch):
    change(folder / "src")
    attempt, failing = Ahead._attempt, True

    def read(self, ordinal):
        if failing and self._source.listing.id(ordinal) == "zz.png":
            return FileRead(error=ImageError("io_error", "Input/output error"))
        return attempt(self, ordinal)

    monkeypatch.setattr(Ahead, "_attempt", read)
    report = views(folder / "src", folder / "out", update=True)
    assert {(r.unfinished, r.exit_code) for r in report.views.values()} == {(1, 1)}
    assert [LatentDataset(folder / "out" / name).plan.number for name in VIEWS] == [0, 0]
    failing = False
    report = views(folder / "src", folder / "out", update=True)
    assert report.generation == 1
    update_alone(folder)
    assert_as_alone(folder)


def test_a_task_that_was_lost_after_an_update_is_done_from_rows_that_are_there(folder):
    """Views together without --update go on with a generation whose task is gone, as one alone does."""
    change(folder / "src")
    views(folder / "src", folder / "out", update=True)
    whole = snapshot(folder / "out")
    for name in VIEWS:
        plan = LatentDataset(folder / "out" / name).plan
        log = folder / "out" / name / plan.log_name
        log.write_text("".join(log.read_text().splitlines(keepends=True)[1:]))
        for path in (plan.index_name(0), plan.data_name(0)):
            (folder / "out" / name / path).unlink(missing_ok=True)
    views(folder / "src", folder / "out")
    assert snapshot(folder / "out") == whole


def test_labels_keep_their_numbers_in_every_view(tmp_path):
    for label in ("cat", "dog"):
        write_images(tmp_path / "src" / label, 2)
    age(tmp_path / "src")
    columns = ColumnsRequest(labels="folder")
    views(tmp_path / "src", tmp_path / "out", columns=columns)
    write_images(tmp_path / "src" / "cow", 1)
    views(tmp_path / "src", tmp_path / "out", columns=columns, update=True)
    for name in VIEWS:
        ds = LatentDataset(tmp_path / "out" / name)
        assert ds.label_names == ["cat", "dog", "cow"] and [ds[i]["label"] for i in range(len(ds))] == [0, 0, 2, 1, 1]


def copy_some(src: Path) -> None:
    for i in (1, 4, 7):
        shutil.copy(src / f"{i:03d}.png", src / f"x{i}.png")
    shutil.copy(src / "x1.png", src / "a.png")


class TestCopies:
    def test_copies_are_searched_and_encoded_once_for_all_views(self, tmp_path, monkeypatch, reads):
        write_images(tmp_path / "src", 8, sizes=SIZES)
        copy_some(tmp_path / "src")
        searches, original = [], dedupe_module.distinct
        monkeypatch.setattr(dedupe_module, "distinct", lambda *args: searches.append(1) or original(*args))
        notes = []
        report = views(tmp_path / "src", tmp_path / "out", asked=COPIES, notes=notes)
        assert len(searches) == 1 and len(reads["decoded"]) == len(set(reads["decoded"])) == 8
        assert sum("4 of 12 inputs" in line for line in notes) == 1
        assert {(r.cached, r.generation) for r in report.views.values()} == {(12, 1)}
        for name, request in COPIES.items():
            alone(tmp_path / "src", tmp_path / "alone" / name, request)
        assert_as_alone(tmp_path, COPIES)

    def test_an_interrupted_one_goes_on(self, tmp_path, monkeypatch):
        write_images(tmp_path / "src", 8, sizes=SIZES)
        copy_some(tmp_path / "src")
        rng = random.Random(3)
        original = pipeline.Pipeline._write
        for _ in range(20):
            left = rng.randint(0, 3)

            def failing(self, open_task):
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return original(self, open_task)

            monkeypatch.setattr(pipeline.Pipeline, "_write", failing)
            try:
                views(tmp_path / "src", tmp_path / "out", asked=COPIES)
            except KeyboardInterrupt:
                continue
            break
        monkeypatch.undo()
        for name, request in COPIES.items():
            alone(tmp_path / "src", tmp_path / "alone" / name, request)
        assert_as_alone(tmp_path, COPIES)

    def test_an_update_with_copies(self, tmp_path, reads):
        write_images(tmp_path / "src", 8, sizes=SIZES)
        age(tmp_path / "src")
        views(tmp_path / "src", tmp_path / "out", asked=COPIES)
        shutil.copytree(tmp_path / "out", tmp_path / "alone")
        copy_some(tmp_path / "src")
        for i in (1, 2, 3):
            image(tmp_path / "src" / f"new{i}.png", 90)
        reads["decoded"].clear()
        report = views(tmp_path / "src", tmp_path / "out", asked=COPIES, update=True)
        assert len(reads["decoded"]) == 1 and {r.cached for r in report.views.values()} == {15}
        update_alone(tmp_path, COPIES)
        assert_as_alone(tmp_path, COPIES)

    def test_a_view_that_is_added_later(self, tmp_path):
        write_images(tmp_path / "src", 8, sizes=SIZES)
        copy_some(tmp_path / "src")
        alone(tmp_path / "src", tmp_path / "out" / "32", COPIES["32"])
        views(tmp_path / "src", tmp_path / "out", asked=COPIES)
        for name, request in COPIES.items():
            alone(tmp_path / "src", tmp_path / "alone" / name, request)
        assert_as_alone(tmp_path, COPIES)


def grown(folder: Path, asked) -> Path:
    """A source that has grown, shrunk and changed, views of what it was in `old`, and their update in `whole`."""
    src = folder / "src"
    write_images(src, 18, sizes=SIZES)
    (src / "004b.png").write_bytes(b"no image")
    age(src)
    views(src, folder / "old", asked=asked)
    for i in range(6):
        image(src / f"{3 * i:03d}-new.png", 100 + i % 4, SIZES[i % 3])
    (src / "003.png").unlink()
    image(src / "012.png", 200, SIZES[1])
    views(src, Path(shutil.copytree(folder / "old", folder / "whole")), asked=asked, update=True)
    return src


def test_killed_updates_leave_every_view_whole_and_end_with_the_bytes_of_an_undisturbed_one(tmp_path):
    src, kills = grown(tmp_path, DRIVEN), 0
    for attempt in range(4):
        seed, out = random.randrange(1 << 30), Path(shutil.copytree(tmp_path / "old", tmp_path / f"out-{attempt}"))
        died = drive("kill-views-update", src, out, 6, seed).split()
        assert snapshot(out) == snapshot(tmp_path / "whole"), f"seed {seed}"
        kills += len(died)
        if kills >= 4:
            return
    raise AssertionError(f"only {kills} of 24 kills struck an update")


def test_several_processes_share_an_update_with_copies_and_one_is_killed(tmp_path):
    src = grown(tmp_path, {name: replace(request, dedupe=True) for name, request in DRIVEN.items()})
    seed, out = random.randrange(1 << 30), Path(shutil.copytree(tmp_path / "old", tmp_path / "out"))
    text = drive("share-views-update-dedupe", src, out, 3, 1, seed)
    assert text.partition("codes ")[2].split().count("3") >= 2, (seed, text)
    assert snapshot(out) == snapshot(tmp_path / "whole"), seed
