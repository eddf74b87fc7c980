"""Plans: what they fix, what they refuse, and that a finished cache is left alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from cache_cases import Forbidden, flip_byte, open_cache, snapshot, stamps, write_images
from hypothesis import given
from hypothesis import strategies as st
from models import random_model
from PIL import Image

import capacitor_rt.cache
from capacitor_rt import FullCapacitor
from capacitor_rt.cache import CacheRequest, LatentDataset, cache_images, dry_run
from capacitor_rt.cache.decoding.reading import Ahead
from capacitor_rt.cache.hashing import canonical_json
from capacitor_rt.cache.model_source import Loaded
from capacitor_rt.cache.sources import Listing
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError, InputError

REQUEST = CacheRequest(64, area=True, task_inputs=3, batch=2)


def run(src, out, model, request=REQUEST, **options):
    return cache_images(src, out, model, request, workers=0, progress=False, **options)


@pytest.fixture
def cached(tmp_path):
    model = random_model()
    src, out = tmp_path / "src", tmp_path / "out"
    write_images(src, 8)
    run(src, out, model)
    return src, out, model


def test_layout_of_a_finished_cache(cached):
    _, out, _ = cached
    _, plan = open_cache(out)
    assert sorted(p.name for p in out.iterdir()) == [
        ".stamps", "commits.jsonl", "index", "plan.json", "quarantine.jsonl", "source.parquet", "tasks",
    ]  # fmt: skip
    for folder, kind in (("tasks", "safetensors"), ("index", "parquet")):
        names = sorted(p.name for p in (out / folder).iterdir())
        assert names == [f"{plan.id[:8]}-{n:06d}.{kind}" for n in range(3)]
    assert plan.fields["format"] == "capacitor-latents/2"
    assert plan.fields["source"]["count"] == 8 and plan.fields["source"]["tasks"] == 3
    assert plan.fields["model"]["latent_space"].startswith("full_capacitor/whitened@")
    assert (out / "quarantine.jsonl").read_bytes() == b""


def listing_of(containers: list[int]) -> Listing:
    n = len(containers)
    numbers = np.zeros(n, np.int64)
    names = [b"%d" % c for c in sorted(set(containers) - {-1})]
    return Listing([b"%d" % i for i in range(n)], numbers, numbers, numbers, np.array(containers, np.int32), names)


@given(st.lists(st.integers(1, 30), max_size=6), st.integers(1, 9))
def test_tasks_are_slices_of_the_inputs_within_their_containers(counts, most):
    containers = [c for c, n in enumerate(counts) for _ in range(n)]
    bounds = listing_of(containers).tasks(most) if containers else []
    assert [i for first, stop in bounds for i in range(first, stop)] == list(range(len(containers)))
    for first, stop in bounds:
        assert 0 < stop - first <= most
        assert len(set(containers[first:stop])) == 1
    # no more than it takes
    assert len(bounds) == sum(-(-n // most) for n in counts)


def test_files_of_their_own_are_cut_by_number_alone():
    assert listing_of([-1] * 7).tasks(3) == [(0, 3), (3, 6), (6, 7)]


def test_a_second_run_writes_nothing_and_does_not_load_the_model(cached, monkeypatch):
    src, out, model = cached
    before = stamps(out)
    monkeypatch.delattr(Ahead, "_attempt")
    report = run(src, out, Forbidden(model))
    assert (report.inputs, report.cached, report.new_images, report.exit_code) == (8, 8, 0, 0)
    assert stamps(out) == before


def test_the_same_images_elsewhere_give_the_same_files(cached, tmp_path):
    _src, out, model = cached
    moved = tmp_path / "elsewhere" / "photos"
    write_images(moved, 8)
    run(moved, tmp_path / "out2", model)
    a, b = snapshot(out), snapshot(tmp_path / "out2")
    # times of the input files are the one thing that is this machine's own
    assert {k: v for k, v in a.items() if k != "source.parquet"} == {
        k: v for k, v in b.items() if k != "source.parquet"
    }
    assert run(moved, out, Forbidden(model)).cached == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": 96}, r"geometry\.side 64 -> 96"),
        ({"area": False}, r"geometry\.mode area -> size"),
        ({"max_aspect": 2.0}, r"geometry\.max_aspect 4\.0 -> 2\.0"),
        ({"background": (0, 0, 0)}, r"pixels\.background \[255, 255, 255\] -> \[0, 0, 0\]"),
        ({"dtype": "fp32"}, r"store\.dtype bfloat16 -> float32"),
        ({"posterior": True}, r"store\.posterior False -> True"),
        ({"flip": True}, r"store\.flip False -> True"),
        ({"batch": 4}, r"store\.batch 2 -> 4"),
        ({"task_inputs": 5}, r"store\.task_inputs 3 -> 5"),
    ],
)
def test_other_settings_are_refused_by_field(cached, change, message):
    src, out, model = cached
    before = snapshot(out)
    settings = {"side": 64, "area": True, "task_inputs": 3, "batch": 2} | change
    with pytest.raises(CacheError, match=message) as error:
        run(src, out, model, CacheRequest(**settings))
    # an aspect is a matter of areas alone
    assert str(error.value).count("->") == 1 + ("area" in change)
    assert snapshot(out) == before


def test_another_model_is_refused_and_the_same_under_another_name_is_not(cached, tmp_path):
    src, out, _model = cached
    with pytest.raises(CacheError, match=r"model\.sha256 [0-9a-f]{64} -> [0-9a-f]{64}"):
        run(src, out, random_model(seed=1))
    with pytest.raises(CacheError, match=r"model\.config\.latent_running_stats_eps 0\.0001 -> 0\.001"):
        run(src, out, random_model(latent_running_stats_eps=1e-3))
    with pytest.raises(CacheError, match=r"model\.compute_dtype float32 -> bfloat16"):
        run(src, out, random_model().to(dtype=torch.bfloat16))


def test_checkpoints_are_identified_by_content_not_by_name(tmp_path):
    model = random_model()
    write_images(tmp_path / "src", 3)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    run(tmp_path / "src", tmp_path / "out", tmp_path / "one")
    before = snapshot(tmp_path / "out")
    assert run(tmp_path / "src", tmp_path / "out", tmp_path / "two").new_images == 0
    assert snapshot(tmp_path / "out") == before


def test_left_out_batch_and_task_inputs_are_those_of_the_plan(cached):
    src, out, model = cached
    assert run(src, out, Forbidden(model), CacheRequest(64, area=True)).new_images == 0


def test_added_removed_and_changed_inputs_are_refused_by_name(cached):
    src, out, model = cached
    before = snapshot(out)
    (src / "003.png").unlink()
    write_images(src / "more", 5)
    Image.new("RGB", (9, 9)).save(src / "000.png")
    with pytest.raises(CacheError) as error:
        run(src, out, model)
    text = str(error.value)
    assert "5 added: 'more/000.png', 'more/001.png', 'more/002.png', ..." in text
    assert "1 removed: '003.png'" in text
    assert "1 changed: '000.png'" in text
    assert "new OUT" in text
    assert snapshot(out) == before


def test_an_edited_file_of_the_same_size_is_found_by_its_bytes(cached):
    src, out, model = cached
    path = src / "002.png"
    data = path.read_bytes()
    os.utime(path, ns=(1, 1))
    assert run(src, out, Forbidden(model)).new_images == 0
    path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    with pytest.raises(CacheError, match=r"1 changed: '002\.png'"):
        run(src, out, model)


def test_a_damaged_plan_is_named(cached):
    src, out, model = cached
    plan = (out / "plan.json").read_text()
    for bad in ("", plan[: len(plan) // 2], plan.replace('"side": 64', '"side": 96'), "[]", "{}", "[" * 9000):
        (out / "plan.json").write_text(bad)
        with pytest.raises(CacheError, match=r"plan\.json is damaged .*--repair .*new OUT"):
            run(src, out, model)
    (out / "plan.json").write_text(json.dumps({**json.loads(plan), "format": "capacitor-latents/9"}))
    with pytest.raises(CacheError, match="capacitor-latents/9"):
        run(src, out, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["store"].update(batch=True), r"store\.batch is True, not a number"),
        (lambda f: f["store"].update(batch=10**15), r"store\.batch"),
        (lambda f: f["store"].update(tensors=["logsnr"]), r"store\.tensors are not latents"),
        (lambda f: f["geometry"].update(buckets=[[-1, 2]]), r"geometry\.buckets\[0\]\[0\] is -1"),
        (lambda f: f["geometry"].update(buckets=[[7, 9]]), r"no multiple of the model's stride"),
        (lambda f: f["geometry"].update(buckets=[[64, 1 << 20]]), r"a bucket of 64x1048576 is not one of side"),
        (lambda f: f["geometry"].update(side=1 << 20), r"no image is brought to 1048576\^2 pixels"),
        (lambda f: f["model"].update(channels=0), r"model\.channels is 0"),
        (lambda f: f.update(whitening={"mean": [0.0], "std": [1.0]}), r"one number per channel"),
        (lambda f: f.update(surprise=1), r"has an unknown 'surprise'"),
        (lambda f: f.pop("code"), r"lacks 'code'"),
        (lambda f: f["source"].update(tasks=99), r"source\.tasks does not fit"),
    ],
)
def test_a_plan_that_no_one_wrote_is_refused_although_its_hash_is_right(cached, change, message):
    src, out, model = cached
    fields = json.loads((out / "plan.json").read_bytes())
    del fields["sha256"]
    change(fields)
    fields["sha256"] = hashlib.sha256(canonical_json(fields)).hexdigest()
    (out / "plan.json").write_text(json.dumps(fields))
    for use in (lambda: run(src, out, model), lambda: LatentDataset(out)):
        with pytest.raises(CacheError, match=rf"plan\.json is damaged .*{message}"):
            use()
    assert any("plan.json is damaged" in problem for problem in verify(out).problems)


def test_a_plan_of_other_buckets_than_its_size_has_is_refused(cached):
    src, out, model = cached
    fields = json.loads((out / "plan.json").read_bytes())
    del fields["sha256"]
    fields["geometry"]["buckets"].insert(0, [32, 32])
    fields["sha256"] = hashlib.sha256(canonical_json(fields)).hexdigest()
    # with no file whose name tells the plan's identity
    for name in ("index", "tasks"):
        shutil.rmtree(out / name)
    (out / "commits.jsonl").unlink()
    (out / "plan.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CacheError, match=r"geometry\.buckets are not those that follow from the rest"):
        run(src, out, model)


def test_a_cache_of_version_0_2_is_left_as_it_is(cached):
    src, out, model = cached
    (out / "plan.json").write_text('{"format": "capacitor-latents/1"}')
    before = snapshot(out)
    for use in (lambda: run(src, out, model), lambda: LatentDataset(out), lambda: verify(out)):
        with pytest.raises(CacheError, match=r"capacitor-latents/1, which version 0\.2 wrote .*left as it is"):
            use()
    assert snapshot(out) == before


def test_a_damaged_list_of_inputs_is_written_anew_from_the_same_inputs(cached):
    src, out, model = cached
    before = snapshot(out)
    flip_byte(out / "source.parquet", 200)
    assert any("source.parquet is damaged" in problem for problem in verify(out).problems)
    assert run(src, out, Forbidden(model)).new_images == 0
    assert snapshot(out) == before
    # but not from others
    flip_byte(out / "source.parquet", 200)
    (src / "000.png").unlink()
    with pytest.raises(CacheError, match=r"source\.parquet is damaged"):
        run(src, out, model)


def test_a_plan_that_was_never_finished_is_made_anew(cached):
    src, out, model = cached
    whole = snapshot(out)
    for name in ("index", "tasks"):
        shutil.rmtree(out / name)
    for name in ("plan.json", "commits.jsonl", "quarantine.jsonl"):
        (out / name).unlink()
    (out / "source.parquet").write_bytes(b"half a table")
    (out / f"plan.json.tmp-{'0' * 32}").write_text("half a plan")
    run(src, out, model)
    assert snapshot(out) == whole


def test_folders_that_are_no_cache_are_refused_and_left_alone(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    write_images(src, 1)
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(CacheError, match=r"no latent cache: it holds 'thesis\.tex'"):
        run(src, out, random_model())
    assert snapshot(out) == {"thesis.tex": b"x"}
    with pytest.raises(CacheError, match=r"cannot use .*Not a directory"):
        run(src, out / "thesis.tex", random_model())
    with pytest.raises(CacheError, match=r"is not empty and no latent cache"):
        run(src, src, random_model())


def test_what_is_refused_leaves_no_folder_behind(tmp_path):
    model = random_model()
    with pytest.raises(CacheError, match="No such file"):
        run(tmp_path / "nowhere", tmp_path / "out", model)
    write_images(tmp_path / "src", 1)
    with pytest.raises(InputError, match="100 is not a multiple of 32: use 96 or 128"):
        run(tmp_path / "src", tmp_path / "out", model, CacheRequest(100))
    with pytest.raises(InputError, match=r"side 16000 is too large: .* more than 13377 x 13377 pixels"):
        CacheRequest(16000)
    with pytest.raises(CacheError, match="deterministic"):
        deterministic = random_model(bottleneck_posterior_kind="deterministic")
        run(tmp_path / "src", tmp_path / "out", deterministic, CacheRequest(64, posterior=True))
    with pytest.raises(CacheError, match="decoder only"):
        run(tmp_path / "src", tmp_path / "out", random_model(encoder_depth=0))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_write_permission_is_refused(tmp_path, as_nobody):
    write_images(tmp_path / "src", 1)
    (tmp_path / "locked").mkdir(mode=0o555)
    model = random_model()
    with as_nobody(tmp_path):
        for out in (tmp_path / "locked", tmp_path / "locked" / "out"):
            with pytest.raises(CacheError, match=r"cannot (write to|create) .*Permission denied: give an OUT"):
                run(tmp_path / "src", out, model)


def test_a_plan_without_latents_may_be_deleted_and_says_so(cached):
    src, out, model = cached
    (out / "commits.jsonl").write_text("")
    with pytest.raises(CacheError, match=r"or delete .*, which holds no latents yet\n  store.batch 2 -> 4"):
        run(src, out, model, CacheRequest(64, area=True, task_inputs=3, batch=4))


def test_too_little_space_is_said_beforehand(tmp_path, monkeypatch):
    write_images(tmp_path / "src", 3)
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr("capacitor_rt.cache.prepare.shutil.disk_usage", lambda path: usage(1000, 990, 10))
    lines: list[str] = []
    assert run(tmp_path / "src", tmp_path / "out", random_model(), note=lines.append).cached == 3
    assert "are to be written and" in lines[1] and "0.00 GB free" in lines[1]
    foreseen = dry_run(tmp_path / "src", tmp_path / "new" / "out", random_model(), REQUEST, progress=False)
    assert "are to be written and" in foreseen.notes[0]


def test_a_dry_run_counts_and_writes_nothing(cached, tmp_path):
    src, out, model = cached
    (src / "broken.png").write_text("no image")
    (src / "._003.png").write_text("what a Mac leaves beside a picture")
    new = dry_run(src, tmp_path / "new", Forbidden(model), REQUEST, progress=False)
    assert sum(new.buckets.values()) == 8
    assert new.quarantined == {"not_an_image": 1}
    # 8 channels of 2 bytes on a grid of 1/16: 8 rows of 64^2 pixels
    assert new.nbytes == new.todo_nbytes == 8 * 8 * 16 * 2
    assert not (tmp_path / "new").exists()
    for name in ("broken.png", "._003.png"):
        (src / name).unlink()
    old = dry_run(src, out, Forbidden(model), REQUEST, progress=False)
    assert (old.tasks, old.todo, old.todo_nbytes) == (new.tasks, 0, 0)


def test_the_cache_may_lie_among_its_inputs(tmp_path):
    model = random_model()
    write_images(tmp_path, 3)
    run(tmp_path, tmp_path / "cache", model)
    before = stamps(tmp_path)
    assert run(tmp_path, tmp_path / "cache", Forbidden(model)).cached == 3
    assert stamps(tmp_path).keys() == before.keys()


def test_the_names_of_version_0_1_resolve():
    from capacitor_rt.cache import Request, forecast

    assert Request is CacheRequest and forecast is dry_run
    assert not {"Request", "forecast"} & set(capacitor_rt.cache.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Forecast'"):
        capacitor_rt.cache.Forecast  # noqa: B018


def test_pyarrow_is_loaded_when_a_cache_is_opened_and_not_before():
    code = """
        import sys, capacitor_rt.cache as cache
        for name in cache.__all__:
            getattr(cache, name)
        import capacitor_rt.cache.verify
        sys.exit(any(m.split(".")[0] in ("pyarrow", "xxhash") for m in sys.modules))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=600)


def test_an_edited_model_is_another_one():
    """What is folded and computed with is what the plan names: the checkpoint, or the parameters as they are."""
    model = FullCapacitor.from_pretrained("sample")
    loaded = Loaded(model).identity()
    assert (loaded.id, loaded.sha256) == ("sample", model.source.sha256)
    # a cast is the same checkpoint in another compute dtype, whichever way it came about
    cast = Loaded(FullCapacitor.from_pretrained("sample").bfloat16()).identity()
    assert cast.sha256 == loaded.sha256 and cast.compute_dtype == "bfloat16"
    with torch.no_grad():
        model.encoder.to_bottleneck.bias.add_(1e-3)
    edited = Loaded(model).identity()
    assert edited.id == "memory" and edited.sha256 != loaded.sha256
    assert edited.latent_space != loaded.latent_space
