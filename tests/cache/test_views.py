"""Several views from one decode: each is, to the bit, what a run of it alone writes, whatever happened on the way."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch
from cache_cases import Forbidden, commits_of, open_cache, snapshot, stamps, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model

from capacitor_rt.cache import CacheRequest, LatentDataset, RunOptions, cache_images, cache_views, dry_run_views
from capacitor_rt.cache import pipeline as pipeline_module
from capacitor_rt.cache.decoding.reading import Ahead, FileRead
from capacitor_rt.cache.plan import Task
from capacitor_rt.cache.sources import ColumnsRequest
from capacitor_rt.cache.span_queue import Span, spans
from capacitor_rt.cache.status import status
from capacitor_rt.cache.verify import verify
from capacitor_rt.cache.views import parse_views, views_in
from capacitor_rt.errors import CacheError, ImageError, InputError
from capacitor_rt.images.decode import OpenedImage

BASE = CacheRequest(32, dtype="fp32", batch=2, task_inputs=4)
VIEWS = parse_views(["32, 64@area+flip", "96@adm+posterior+int8"], BASE)


def run(src, out, model, views=VIEWS, workers=0, notes=None, **options):
    """The reports of the views."""
    return run_all(src, out, model, views, workers, notes, **options).views


def run_all(src, out, model, views=VIEWS, workers=0, notes=None, **options):
    chosen = RunOptions(workers=workers, progress=False, backoff=(0.0,), measure=0, **options)
    return cache_views(src, out, model, views, note=(notes if notes is not None else []).append, options=chosen)


def alone(src, out, model, request, **options):
    chosen = RunOptions(workers=0, progress=False, backoff=(0.0,), measure=0, **options)
    return cache_images(src, out, model, request, options=chosen)


def each_is_as_alone(src, out, model, folder, views=VIEWS, **options):
    for name, request in views.items():
        expected = folder / f"alone-{name}"
        if not expected.exists():
            alone(src, expected, model, request, **options)
        assert snapshot(out / name) == snapshot(expected), name
        assert verify(out / name).problems == []


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "src", 11, sizes=((90, 70), (65, 130), (64, 64), (200, 40)))
    (tmp_path / "src" / "005.png").write_text("no image")
    return tmp_path / "src", tmp_path / "out", random_model()


class TestSpecification:
    def test_names_and_requests(self):
        assert list(VIEWS) == ["32", "64-area-flip", "96-adm-posterior-int8"]
        a, b, c = VIEWS.values()
        assert a == BASE
        assert b == CacheRequest(64, area=True, flip=True, dtype="fp32", batch=2, task_inputs=4)
        assert c == CacheRequest(96, crop="adm", posterior=True, dtype="int8", batch=2, task_inputs=4)

    def test_the_order_of_options_does_not_matter(self):
        assert parse_views(["64@flip+area"], BASE) == parse_views(["64@area+flip"], BASE)

    @pytest.mark.parametrize(
        ("texts", "said"),
        [
            (["x"], "view 'x' is not one: use SIDE"),
            ([""], "view '' is not one"),
            (["64@"], "view '64@' is not one"),
            (["../64"], "is not one"),
            (["64@flop"], "unknown option 'flop': use area, adm, posterior, flip, bf16"),
            (["64@flip+flip"], "an option twice"),
            (["64@bf16+int8"], "an option twice"),
            (["64", "64"], "view '64' is there twice"),
            (["64@flip,064@flip"], "is there twice"),
            (["64@area+adm"], "crop adm is square"),
            ([], "no view is given"),
        ],
    )
    def test_what_is_none(self, texts, said):
        with pytest.raises(InputError) as caught:
            parse_views(texts, BASE)
        assert said in str(caught.value)


def tasks_of(stops):
    return [Task(i, a, b) for i, (a, b) in enumerate(zip([0, *stops], stops, strict=False))]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_spans_are_the_shortest_that_are_whole_in_every_view(data):
    count = data.draw(st.integers(1, 40))
    cuts = st.lists(st.integers(1, count), max_size=8).map(lambda found: sorted({*found, count}))
    tasks = [tasks_of(data.draw(cuts)) for _ in range(data.draw(st.integers(1, 3)))]
    found = spans(tasks)
    for view, several in enumerate(tasks):
        assert [task for span in found for v, task in span.tasks if v == view] == several
    ends = [max(task.stop for _, task in span.tasks) for span in found]
    assert ends == sorted(set.intersection(*({task.stop for task in view} for view in tasks)))
    seen = {(view, i): [] for view, several in enumerate(tasks) for i in range(len(several))}
    for span in found:
        for chosen, here in span.stretches():
            assert len(chosen) and here
            for view, task in here:
                assert task.first <= chosen.start and chosen.stop <= task.stop
                seen[view, task.number] += chosen
    for (view, i), ordinals in seen.items():
        assert ordinals == list(range(tasks[view][i].first, tasks[view][i].stop))


def test_stretches_leave_out_what_no_view_wants():
    span = Span(((0, Task(0, 0, 4)), (1, Task(3, 6, 8)), (2, Task(5, 2, 4))))
    assert [(list(chosen), [v for v, _ in here]) for chosen, here in span.stretches()] == [
        ([0, 1], [0]), ([2, 3], [0, 2]), ([6, 7], [1]),
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_each_view_is_what_it_is_alone(images, tmp_path, workers):
    src, out, model = images
    reports = run(src, out, model, workers=workers)
    assert {name: (r.inputs, r.cached, r.exit_code) for name, r in reports.items()} == dict.fromkeys(VIEWS, (11, 10, 3))
    each_is_as_alone(src, out, model, tmp_path)
    assert sorted(path.name for path in out.iterdir()) == sorted(VIEWS)
    assert views_in(out) == sorted(out / name for name in VIEWS)
    assert len(LatentDataset(out / "64-area-flip", verify=True)) == 10
    assert (LatentDataset(out / "96-adm-posterior-int8").plan.policy.crop, status(out / "32").rows) == ("adm", 10)


def test_every_image_is_read_and_decoded_once(images, monkeypatch):
    src, out, model = images
    decoded, read = [], []
    stored, attempt = OpenedImage.stored_pixels, Ahead._attempt
    monkeypatch.setattr(
        OpenedImage, "stored_pixels", lambda self, *a, **k: decoded.append(self._name) or stored(self, *a, **k)
    )
    monkeypatch.setattr(Ahead, "_attempt", lambda self, ordinal: read.append(ordinal) or attempt(self, ordinal))
    total = run_all(src, out, model)
    assert len(decoded) == len(set(decoded)) == 10
    assert sorted(read) == list(range(11))
    assert total.meters.images == 11 and total.meters.seconds["encode"] > 0
    assert (total.inputs, total.cached, total.quarantined.total(), total.exit_code) == (33, 30, 3, 3)


def test_a_second_run_writes_nothing_and_does_not_load_the_model(images):
    src, out, model = images
    run(src, out, model)
    before = {name: stamps(out / name) for name in VIEWS}
    reports = run(src, out, Forbidden(model))
    assert all((r.new_images, r.meters) == (0, None) for r in reports.values())
    assert {name: stamps(out / name) for name in VIEWS} == before


def test_tasks_of_other_lengths(images, tmp_path):
    """Tasks of 3 and of 4 inputs have their ends in common only at the end."""
    src, out, model = images
    alone(src, out / "64-area-flip", model, CacheRequest(**{**VIEWS["64-area-flip"].__dict__, "task_inputs": 3}))
    shutil.rmtree(out / "64-area-flip" / "tasks")
    shutil.rmtree(out / "64-area-flip" / "index")
    views = {name: CacheRequest(**{**r.__dict__, "task_inputs": 3 if r.area else 4}) for name, r in VIEWS.items()}
    run(src, out, model, views)
    assert len(commits_of(out / "64-area-flip")) == 4 and len(commits_of(out / "32")) == 3
    each_is_as_alone(src, out, model, tmp_path, views)


def test_what_one_view_has_is_not_encoded_for_it_again(images, tmp_path):
    src, out, model = images
    alone(src, out / "32", model, VIEWS["32"])
    before = stamps(out / "32")
    encoded = []
    original = model.encode

    class Counting(Forbidden):
        def load(self, identity):
            return model

    model.encode = lambda pixels: encoded.append(tuple(pixels.shape)) or original(pixels)
    reports = run(src, out, Counting(model))
    del model.encode
    assert stamps(out / "32") == before
    assert encoded and all(shape[1:3] != (32, 32) for shape in encoded)
    assert reports["32"].new_images == 0 and reports["64-area-flip"].new_images == 11
    each_is_as_alone(src, out, model, tmp_path)


def test_a_view_is_added_later(images, tmp_path):
    src, out, model = images
    run(src, out, model, parse_views(["32"], BASE))
    run(src, out, model)
    each_is_as_alone(src, out, model, tmp_path)
    # and one alone is gone on with
    shutil.rmtree(out / "32" / "tasks")
    shutil.rmtree(out / "32" / "index")
    alone(src, out / "32", model, BASE)
    each_is_as_alone(src, out, model, tmp_path)


def test_interrupted_anywhere_and_gone_on_with(images, tmp_path, monkeypatch):
    """The writer of any view stops at any of its tasks; what others have done stays, and is not done again."""
    src, out, model = images
    rng = random.Random(1)
    original = pipeline_module.Pipeline._write
    for _ in range(12):
        left = rng.randint(0, 4)

        def failing(self, open_task):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return original(self, open_task)

        monkeypatch.setattr(pipeline_module.Pipeline, "_write", failing)
        try:
            run(src, out, model)
        except KeyboardInterrupt:
            assert not any((out / name / "leases").exists() for name in VIEWS)
            continue
        break
    monkeypatch.undo()
    run(src, out, model)
    each_is_as_alone(src, out, model, tmp_path)


def test_io_errors_leave_the_tasks_of_all_views_and_pass(images, tmp_path, monkeypatch):
    src, out, model = images
    attempt = Ahead._attempt
    failing = True

    def read(self, ordinal):
        if failing and ordinal == 2:
            return FileRead(error=ImageError("io_error", "Input/output error"))
        return attempt(self, ordinal)

    monkeypatch.setattr(Ahead, "_attempt", read)
    reports = run(src, out, model)
    assert {name: (r.unfinished, dict(r.failed), r.exit_code) for name, r in reports.items()} == dict.fromkeys(
        VIEWS, (1, {"io_error": 1}, 1)
    )
    assert not any((out / name / "leases").exists() for name in VIEWS)
    failing = False
    reports = run(src, out, model)
    assert all(r.new_images == 4 for r in reports.values())
    each_is_as_alone(src, out, model, tmp_path)


def test_a_task_that_another_process_has_is_left_to_it(images, tmp_path):
    """Someone fills one of the views alone meanwhile: its lease is respected, and the others are filled."""
    from threading import Thread

    src, out, model = images
    other = Thread(target=lambda: alone(src, out / "32", random_model(), VIEWS["32"]))
    other.start()
    run(src, out, model)
    other.join()
    each_is_as_alone(src, out, model, tmp_path)


class TestRefused:
    def test_one_view_refused_means_nothing_written(self, images):
        src, out, model = images
        with pytest.raises((CacheError, InputError), match="50 is not a multiple of"):
            run(src, out, model, parse_views(["32", "50"], BASE))
        assert not out.exists()

    def test_another_plan_of_one_view(self, images):
        src, out, model = images
        run(src, out, model, parse_views(["32"], BASE))
        before = snapshot(out)
        changed = CacheRequest(32, dtype="fp16", batch=2, task_inputs=4)
        with pytest.raises(CacheError, match=r"view 32: .*planned otherwise") as caught:
            run(src, out, model, parse_views(["96@adm", "32"], changed))
        assert "store.dtype float32 -> float16" in str(caught.value)
        assert snapshot(out) == before and sorted(path.name for path in out.iterdir()) == ["32"]

    def test_a_cache_or_anything_else_in_the_place(self, images, tmp_path):
        src, out, model = images
        alone(src, out, model, BASE)
        with pytest.raises(CacheError, match="is a cache, and several views have a cache each"):
            run(src, out, model)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("")
        with pytest.raises(CacheError, match=r"holds 'thesis.txt', which is no cache"):
            run(src, tmp_path / "mine", model)
        shutil.rmtree(out)
        run(src, out, model)
        (out / "README.md").write_text("")
        assert all(report.new_images == 0 for report in run(src, out, model).values())

    def test_who_reads_the_parent_is_told_of_the_views(self, images):
        src, out, model = images
        run(src, out, model)
        for look in (LatentDataset, status, verify):
            with pytest.raises(CacheError, match="it holds the caches 32, 64-area-flip, 96-adm-posterior-int8: "):
                look(out)


def test_dry_run_says_it_of_every_view(images):
    src, out, model = images
    found = dry_run_views(src, out, Forbidden(model), VIEWS)
    assert {name: (f.tasks, f.files) for name, f in found.items()} == dict.fromkeys(VIEWS, (3, 6))
    assert found["32"].nbytes == 10 * 8 * 4 * 4
    assert not out.exists()


def test_labels_and_captions_are_in_every_view(tmp_path):
    for name in ("ant", "bee"):
        write_images(tmp_path / "src" / name, 2)
    model = random_model()
    run(tmp_path / "src", tmp_path / "out", model, columns=ColumnsRequest(labels="folder"))
    for name in VIEWS:
        rows = LatentDataset(tmp_path / "out" / name)
        assert [rows[i]["label"] for i in range(4)] == [0, 0, 1, 1]


def test_defaults_of_task_lengths_are_powers_of_two_and_nest(images):
    src, out, model = images
    views = parse_views(["32", "512", "96@area"], CacheRequest(32))
    found = dry_run_views(src, out, model, views)
    lengths = [f.inputs for f in found.values()]
    assert all(n & (n - 1) == 0 for n in lengths)


def test_latents_are_of_the_same_rows(images):
    src, out, model = images
    run(src, out, model)
    datasets = [LatentDataset(out / name) for name in VIEWS]
    assert len({tuple(ds.ids) for ds in datasets}) == 1
    assert all(np.array_equal(ds.column("bytes_hash"), datasets[0].column("bytes_hash")) for ds in datasets)
    assert datasets[1][0]["latents_flip"].shape == datasets[1][0]["latents"].shape
    assert datasets[2][0]["latents"].dtype == torch.float32 and open_cache(out / "32")[1].dtype == "float32"
