"""`cache --update`: a cache that follows its source, and is whole at every moment."""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import Forbidden, index_rows, open_cache, snapshot, write_images
from kill_driver import REQUEST as DRIVEN
from models import random_model
from PIL import Image
from update_cases import OLD, SIZES, age, cache, drive, image, out, reads, rows_of, run, src, update, write_tar

from capacitor_rt.cache import CacheRequest, LatentDataset, accounts
from capacitor_rt.cache.compare import compare
from capacitor_rt.cache.garbage import collect
from capacitor_rt.cache.generations import recorded
from capacitor_rt.cache.repair import repair
from capacitor_rt.cache.reuse import KnownContents
from capacitor_rt.cache.sources import ColumnsRequest
from capacitor_rt.cache.status import status
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError

__all__ = ["out", "reads", "run", "src"]


def assert_as_fresh(src: Path, out: Path, tmp_path: Path, **options) -> None:
    """An updated cache has the rows of one that is made anew, in the same order, and is sound."""
    fresh = tmp_path / f"fresh-{len(list(tmp_path.iterdir()))}"
    cache(src, fresh, **options)
    wanted, found = rows_of(fresh), rows_of(out)
    assert list(found) == list(wanted)
    for id, tensors in wanted.items():
        assert all(torch.equal(tensors[kind], found[id][kind]) for kind in tensors), id
    left_out = {"row", "file"}
    strip = lambda rows: [{k: v for k, v in row.items() if k not in left_out} for row in rows]  # noqa: E731
    assert strip(index_rows(out)) == strip(index_rows(fresh))
    assert (out / "quarantine.jsonl").read_bytes() == (fresh / "quarantine.jsonl").read_bytes()
    assert not compare(fresh, out)
    found = verify(out)
    assert found.problems == [] and not found.unfinished


def test_new_files_alone_are_read_and_encoded(src, out, tmp_path, reads):
    before = snapshot(out)
    image(src / "000a.png", 50)
    image(src / "zz.png", 51, (90, 24))
    report = update(src, out)
    assert (report.cached, report.reused, report.new_images, report.generation) == (12, 11, 2, 1)
    assert len(reads["read"]) == 2 and sorted(reads["decoded"]) == ["000a.png", "zz.png"]
    # the old generation lies there as it was
    after = snapshot(out)
    _, plan = open_cache(out)
    assert all(after[name] == data for name, data in before.items() if name != "plan.json")
    assert [p for p in after if p.startswith("generations/")] == [
        f"generations/{plan.fields['generation']['of'][:8]}.json"
    ]
    assert after[f"generations/{plan.fields['generation']['of'][:8]}.json"] == before["plan.json"]
    assert_as_fresh(src, out, tmp_path)


def test_rows_are_not_copied(src, out):
    """An update writes what is new: the files of latents of the old rows are read where they lie."""
    image(src / "zz.png", 51)
    sizes = {path.name: path.stat().st_size for path in (out / "tasks").iterdir()}
    update(src, out)
    new = [path for path in (out / "tasks").iterdir() if path.name not in sizes]
    rows = LatentDataset(out)
    row = sum(t.nbytes for t in rows.tensors(0).values())
    assert sum(path.stat().st_size for path in new) < 5 * 8192 + 2 * row


def test_deleted_changed_renamed_and_restored_files(src, out, tmp_path, reads):
    (src / "001.png").unlink()
    os.rename(src / "002.png", src / "900.png")
    shutil.copy(src / "004.png", src / "004-copy.png")
    image(src / "005.png", 70, SIZES[2])
    (src / "sub").mkdir()
    os.rename(src / "003b.png", src / "sub" / "bad.png")
    report = update(src, out)
    # what has another name is read, and decoded only if no row has its bytes
    assert report.exit_code == 3 and sorted(reads["decoded"]) == ["005.png", "sub/bad.png"]
    assert len(reads["read"]) == 4
    assert_as_fresh(src, out, tmp_path)
    image(src / "001.png", 1, SIZES[1])
    reads["decoded"].clear()
    reads["read"].clear()
    report = update(src, out)
    # its row still lies there, and the generation that says so
    assert report.generation == 2 and len(reads["read"]) == 1 and reads["decoded"] == []
    assert_as_fresh(src, out, tmp_path)


def test_a_touched_file_is_read_and_not_decoded(src, out, tmp_path, reads):
    os.utime(src / "004.png")
    image(src / "zz.png", 51)
    update(src, out)
    assert len(reads["read"]) == 2 and reads["decoded"] == ["zz.png"]
    assert_as_fresh(src, out, tmp_path)


def test_an_edit_of_the_same_size_is_found(src, out, tmp_path):
    data = np.zeros((40, 40, 3), np.uint8)
    Image.fromarray(data).save(src / "a.bmp")
    update(src, out)
    data[3, 3] = 200
    Image.fromarray(data).save(src / "a.bmp")
    report = update(src, out)
    assert (report.generation, report.new_images) == (2, 1)
    assert_as_fresh(src, out, tmp_path)


def test_a_file_written_just_before_it_was_listed_is_read_again(src, out, tmp_path, reads):
    """Its time may stand still while its bytes change."""
    data = np.zeros((40, 40, 3), np.uint8)
    Image.fromarray(data).save(src / "a.bmp")
    update(src, out)
    info = (src / "a.bmp").stat()
    data[3, 3] = 200
    Image.fromarray(data).save(src / "a.bmp")
    os.utime(src / "a.bmp", ns=(info.st_atime_ns, info.st_mtime_ns))
    image(src / "zz.png", 51)
    update(src, out)
    assert "a.bmp" in reads["decoded"]
    assert_as_fresh(src, out, tmp_path)


def test_rehash_trusts_no_time(src, out, tmp_path, reads):
    data = (src / "000.png").read_bytes()
    other = image(tmp_path / "other.bmp", 3)
    Image.open(other).convert("RGB").save(src / "b.bmp")
    os.utime(src / "b.bmp", (OLD, OLD))
    update(src, out)
    assert not update(src, out, rehash=True).reused
    changed = bytearray((src / "b.bmp").read_bytes())
    changed[-1] ^= 0xFF
    (src / "b.bmp").write_bytes(changed)
    os.utime(src / "b.bmp", (OLD, OLD))
    # by its size and time it is the same
    assert update(src, out).generation == 1
    reads["decoded"].clear()
    report = update(src, out, rehash=True)
    assert report.generation == 2 and reads["decoded"] == ["003b.png", "b.bmp"]
    assert (src / "000.png").read_bytes() == data
    assert_as_fresh(src, out, tmp_path)


def test_without_changes_nothing_is_touched(src, out, run):
    before = snapshot(out)
    report = update(src, out, Forbidden(random_model()))
    assert (report.generation, report.new_images, report.reused) == (0, 0, 0)
    assert snapshot(out) == before


def test_update_of_what_is_not_there_makes_it(src, tmp_path, out):
    update(src, tmp_path / "new")
    assert snapshot(tmp_path / "new") == snapshot(out)


def test_an_unfinished_cache_is_updated_too(src, tmp_path, out):
    """Inputs that change while a long run is going on: what is done is kept."""
    for path in (out / "index", out / "tasks"):
        sorted(path.iterdir())[-1].unlink()
    log = (out / "commits.jsonl").read_bytes().splitlines(keepends=True)
    (out / "commits.jsonl").write_bytes(b"".join(log[:-1]))
    image(src / "zz.png", 51)
    with pytest.raises(CacheError, match=r"was planned for other inputs.*add --update"):
        cache(src, out)
    report = update(src, out)
    assert report.reused == 9
    assert_as_fresh(src, out, tmp_path)


@pytest.mark.parametrize(
    "request_", [CacheRequest(48, area=True, dtype="fp32", posterior=True), CacheRequest(32, area=True, dtype="fp32")]
)
def test_other_settings_are_refused(src, out, request_):
    image(src / "zz.png", 51)
    before = snapshot(out)
    with pytest.raises(CacheError, match=r"was planned otherwise.*cache into a new OUT\n"):
        update(src, out, request=request_)
    with pytest.raises(CacheError, match=r"(?s)was planned otherwise.*model.sha256"):
        update(src, out, random_model(seed=1))
    assert snapshot(out) == before


def test_a_run_on_an_updated_cache_finds_it_finished(src, out):
    image(src / "zz.png", 51)
    update(src, out)
    before = snapshot(out)
    report = cache(src, out, Forbidden(random_model()))
    assert report.exit_code == 3 and snapshot(out) == before


def test_an_open_reader_goes_on_with_the_old_generation(src, out):
    ds = LatentDataset(out, verify=True)
    wanted = {id: ds.tensors(i) for i, id in enumerate(ds.ids)}
    again = LatentDataset(out, verify=True)
    (src / "001.png").unlink()
    image(src / "005.png", 70, SIZES[2])
    update(src, out)
    assert [*again.ids] == [*ds.ids]
    for i, id in enumerate(again.ids):
        assert torch.equal(again.tensors(i)["latents"], wanted[id]["latents"])
    assert "001.png" not in [*LatentDataset(out).ids]
    assert again.entries(1)["id"] == again.ids[1]


def test_gc_removes_the_old_generation_and_what_no_row_lies_in(src, out, tmp_path, run):
    for name in ("000.png", "001.png", "002.png"):
        # the first task has no row that is needed
        (src / name).unlink()
    image(src / "zz.png", 51)
    update(src, out)
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    planned = {name for name, _ in collect(out, dry_run=True)}
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == names
    assert {"commits.jsonl", "source.parquet"} <= planned
    assert status(out).litter_nbytes > 0
    code, text, _ = run("gc", out)
    assert code == 0 and "removed" in text
    left = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert left == names - planned and not (out / "generations").exists()
    assert len([n for n in left if n.startswith("tasks/")]) == 3 + 3
    assert_as_fresh(src, out, tmp_path)
    assert collect(out) == []
    # and from what is left it is updated again
    image(src / "zzz.png", 52)
    assert update(src, out).new_images == 1
    assert_as_fresh(src, out, tmp_path)
    collect(out)
    assert_as_fresh(src, out, tmp_path)


def test_an_interrupted_update_leaves_the_old_cache_and_goes_on(src, out, tmp_path, monkeypatch, reads, run):
    image(src / "000a.png", 50)
    image(src / "zz.png", 51)
    before, old_rows = snapshot(out), rows_of(out)
    original = accounts._make_current

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(accounts, "_make_current", stop)
    with pytest.raises(KeyboardInterrupt):
        update(src, out)
    monkeypatch.setattr(accounts, "_make_current", original)
    after = snapshot(out)
    assert all(after[name] == data for name, data in before.items())
    assert list(rows_of(out)) == list(old_rows)
    found = verify(out)
    assert found.problems == [] and any("an update to 13 inputs is under way" in note for note in found.notes)
    _, text, _ = run("status", out)
    assert "an update is unfinished: 13 of 13 inputs are done, 5 of 5 tasks" in text
    # what it has done is no litter
    assert collect(out) == []
    reads["read"].clear()
    report = update(src, out)
    assert report.generation == 1 and reads["read"] == []
    assert_as_fresh(src, out, tmp_path)


def test_a_source_that_changes_during_an_update_keeps_what_the_update_has_done(src, out, tmp_path, monkeypatch, reads):
    for i in range(4):
        image(src / f"a{i}.png", 50 + i)
    with monkeypatch.context() as patch:
        patch.setattr(accounts, "_make_current", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            update(src, out)
    image(src / "b.png", 60)
    reads["decoded"].clear()
    report = update(src, out)
    assert reads["decoded"] == ["b.png"] and report.generation == 2
    assert_as_fresh(src, out, tmp_path)
    # the one that was given up goes with gc, the rows that were taken from it stay
    collect(out)
    with open_cache(out)[0] as folder:
        assert recorded(folder) == []
    assert_as_fresh(src, out, tmp_path)


def begun(src, out, monkeypatch) -> str:
    """An update that is whole and was not made current; the digits of its plan."""
    image(src / "zz.png", 51)
    with monkeypatch.context() as patch:
        patch.setattr(accounts, "_make_current", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            update(src, out)
    return next(path.name[:8] for path in (out / "generations").iterdir())


@pytest.mark.parametrize("damage", ["latents", "index", "uncommitted", "carried", "source", "record", "lost record"])
def test_damage_to_an_unfinished_update_is_mended_by_doing_it_again(src, out, tmp_path, monkeypatch, damage):
    plan8 = begun(src, out, monkeypatch)
    name = {
        "latents": f"tasks/{plan8}-000003.safetensors",
        "index": f"index/{plan8}-000001.parquet",
        "uncommitted": f"tasks/{plan8}-000003.safetensors",
        "carried": f"carried-{plan8}.jsonl",
        "source": f"source-{plan8}.parquet",
    }.get(damage, f"generations/{plan8}.json")
    data = bytearray((out / name).read_bytes())
    data[-1 if damage == "latents" else len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    if damage == "uncommitted":
        (out / f"commits-{plan8}.jsonl").unlink()
    if damage == "lost record":
        for path in (out / "index").glob(f"{plan8}-*"):
            path.unlink()
    if "record" in damage:
        with pytest.raises(CacheError, match=r"the plan of another generation, is damaged: run .*--repair"):
            update(src, out)
        repair(out, verify(out))
    assert len(rows_of(out)) == 10
    assert update(src, out).cached == 11
    assert_as_fresh(src, out, tmp_path)


def test_damage_to_the_record_of_an_earlier_generation(src, out, tmp_path):
    image(src / "zz.png", 51)
    update(src, out)
    record = next((out / "generations").iterdir())
    record.write_bytes(b"{")
    repair(out, verify(out))
    assert verify(out).problems == [] and record.read_bytes() != b"{"
    collect(out)
    assert_as_fresh(src, out, tmp_path)


def test_unfinished_updates_can_be_given_up(src, out, tmp_path, monkeypatch):
    before = snapshot(out)
    image(src / "zz.png", 51)
    with monkeypatch.context() as patch:
        patch.setattr(accounts, "_make_current", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            update(src, out)
    collect(out, drop_updates=True)
    assert snapshot(out) == before


def test_labels_keep_their_numbers(tmp_path):
    src = tmp_path / "src"
    for label in ("cat", "dog"):
        write_images(src / label, 3)
    age(src)
    columns = ColumnsRequest(labels="folder")
    cache(src, tmp_path / "out", columns=columns)
    write_images(src / "cow", 2)
    update(src, tmp_path / "out", columns=columns)
    ds = LatentDataset(tmp_path / "out")
    assert ds.label_names == ["cat", "dog", "cow"]
    assert [ds[i]["label"] for i in range(len(ds))] == [0, 0, 0, 2, 2, 1, 1, 1]
    assert cache(src, tmp_path / "out", Forbidden(random_model()), columns=columns).exit_code == 0


def test_captions_are_added_without_encoding(src, out, reads):
    for path in src.glob("*.png"):
        path.with_suffix(".txt").write_text(f"a picture of {path.stem}")
    report = update(src, out, Forbidden(random_model()), columns=ColumnsRequest(captions="txt"))
    assert report.reused == 11 and reads["read"] == []
    ds = LatentDataset(out)
    assert ds[0]["caption"] == "a picture of 000"


def damaged_shared_file(out: Path) -> Path:
    ds = LatentDataset(out)
    return out / ds._carried[0].name


@pytest.mark.parametrize("how", ["bytes", "missing"])
def test_damage_in_a_file_of_an_earlier_generation(src, out, tmp_path, how):
    image(src / "zz.png", 51)
    update(src, out)
    collect(out)
    path = damaged_shared_file(out)
    if how == "bytes":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(CacheError, match=r"is damaged: run `capacitor-rt verify --repair"):
        cache(src, out)
    found = verify(out)
    assert found.damaged == [0] and path.name in found.problems[0]
    repair(out, found)
    report = cache(src, out)
    assert report.exit_code == 3 and report.new_images
    assert_as_fresh(src, out, tmp_path)


@pytest.mark.parametrize("is_old_kept", [True, False], ids=["with the old generation", "after gc"])
@pytest.mark.parametrize("how", ["missing", "torn", "a digit", "a line"])
def test_a_damaged_list_of_carried_files_is_restored_from_these(src, out, tmp_path, run, how, is_old_kept):
    image(src / "zz.png", 51)
    update(src, out)
    if not is_old_kept:
        collect(out)
    path = next(out.glob("carried-*.jsonl"))
    kept = path.read_bytes()
    lines = kept.splitlines(keepends=True)
    assert len(lines) > 2
    digit = bytearray(kept)
    at = kept.index(b'"data_xxh3":"') + 13
    digit[at] = ord("1" if digit[at] == ord("0") else "0")
    found = {
        "missing": None,
        "torn": kept[: len(kept) // 2],
        "a digit": bytes(digit),
        "a line": kept.replace(lines[1], b""),
    }
    path.unlink()
    if found[how] is not None:
        assert found[how] != kept
        path.write_bytes(found[how])
    for refused in (lambda: LatentDataset(out), lambda: cache(src, out), lambda: update(src, out)):
        with pytest.raises(CacheError, match="verify --repair"):
            refused()
    code, said, errors = run("verify", out)
    assert code == 1 and path.name in said + errors and "plan.json" not in said + errors
    code, said, errors = run("verify", "--repair", out)
    assert f"{path.name}: restored from the files of latents" in said + errors
    assert path.read_bytes() == kept and not verify(out).problems
    assert cache(src, out).new_images == 0
    assert_as_fresh(src, out, tmp_path)


def test_a_list_of_carried_files_that_nothing_tells_of_is_said_to_be_lost(src, out, tmp_path):
    image(src / "zz.png", 51)
    update(src, out)
    collect(out)
    path, data = next(out.glob("carried-*.jsonl")), damaged_shared_file(out)
    path.unlink()
    kept = data.read_bytes()
    data.unlink()
    lost = rf"1 of the \d files that rows lie in are missing or damaged too, such as {data.stem}"
    with pytest.raises(CacheError, match=lost):
        repair(out, verify(out))
    # and nothing is lost by asking
    data.write_bytes(kept)
    repair(out, verify(out))
    assert not verify(out).problems and LatentDataset(out, verify=True)[0]


def test_damage_in_the_old_generation_is_not_taken_over(src, out, tmp_path):
    path = sorted((out / "tasks").iterdir())[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    image(src / "zz.png", 51)
    told: list[str] = []
    report = update(src, out, told=told)
    assert report.reused == 9 and any("is encoded anew" in line and path.name in line for line in told)
    assert_as_fresh(src, out, tmp_path)


def test_a_lost_plan_is_that_of_the_current_generation(src, out, tmp_path):
    image(src / "zz.png", 51)
    update(src, out)
    before = (out / "plan.json").read_bytes()
    (out / "plan.json").write_bytes(b"{")
    repair(out, verify(out))
    assert (out / "plan.json").read_bytes() == before


def test_workers_write_the_same_bytes(src, out, tmp_path):
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    os.utime(src / "004.png")
    for i in range(3):
        image(src / f"a{i}.png", 50 + i)
    update(src, out)
    update(src, copy, workers=2)
    assert snapshot(out) == snapshot(copy)


def test_tar_files_that_are_added_and_appended_to(tmp_path, reads):
    src, out = tmp_path / "wds", tmp_path / "out"
    files = write_images(tmp_path / "one", 7, sizes=SIZES)
    data = [path.read_bytes() for path in files]
    src.mkdir()
    for shard in (0, 1):
        write_tar(src / f"{shard}.tar", [(f"{i}.png", data[i]) for i in (2 * shard, 2 * shard + 1)])
    age(src)
    cache(src, out)
    reads["read"].clear(), reads["decoded"].clear()
    # one is as it was, one is longer, and one is new
    write_tar(src / "1.tar", [(f"{i}.png", data[i]) for i in (2, 4, 3)])
    write_tar(src / "2.tar", [(f"{i}.png", data[i]) for i in (5, 6)])
    report = update(src, out)
    assert len(reads["read"]) == 5 and sorted(reads["decoded"]) == ["1.tar/4.png", "2.tar/5.png", "2.tar/6.png"]
    assert report.reused == 4
    assert_as_fresh(src, out, tmp_path)


def test_parquet_files_that_are_added_and_replaced(tmp_path, reads):
    src, out = tmp_path / "hf", tmp_path / "out"
    data = [path.read_bytes() for path in write_images(tmp_path / "one", 8, sizes=SIZES)]
    src.mkdir()

    def write(name, numbers):
        pq.write_table(pa.table({"image": [data[i] for i in numbers]}), src / name, row_group_size=2)

    write("a.parquet", [0, 1, 2])
    write("b.parquet", [3, 4])
    age(src)
    cache(src, out)
    reads["read"].clear(), reads["decoded"].clear()
    write("b.parquet", [4, 3, 5])
    write("c.parquet", [6, 0])
    report = update(src, out)
    assert len(reads["read"]) == 5 and len(reads["decoded"]) == 2 and report.reused == 6
    assert_as_fresh(src, out, tmp_path)


def test_a_list_in_another_order(src, tmp_path, reads):
    out, names = tmp_path / "out", sorted(path.name for path in src.iterdir())
    (src / "list.txt").write_text("\n".join(names))
    cache(src / "list.txt", out)
    reads["read"].clear(), reads["decoded"].clear()
    (src / "list.txt").write_text("\n".join(reversed(names[2:])))
    update(src / "list.txt", out, Forbidden(random_model()))
    assert reads["read"] == []
    assert_as_fresh(src / "list.txt", out, tmp_path)


def test_the_page_of_the_format_reads_an_updated_cache(src, tmp_path, monkeypatch):
    cache(src, tmp_path / "latents")
    image(src / "zz.png", 51)
    update(src, tmp_path / "latents")
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text(), re.S
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    wanted = rows_of(tmp_path / "latents")
    assert names["latents"].keys() == wanted.keys()
    assert all(torch.equal(names["latents"][id], wanted[id]["latents"]) for id in wanted)


def test_the_command(src, out, run, tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    shutil.rmtree(out)
    command = ("cache", src, out, "--model", tmp_path / "model", "--size", 32, "--update", "--quiet", "--device", "cpu")
    code, text, _ = run(*command)
    assert code == 3 and text.startswith("cached 10 of 11 images")
    code, text, _ = run(*command)
    assert code == 3 and text.startswith("nothing to do")
    image(src / "zz.png", 51)
    code, text, _ = run(*command)
    assert code == 3 and "cached 11 of 12 images" in text and "11 rows reused for generation 1" in text
    code, text, err = run(*command[:-4], "--rehash")
    assert code == 2 and "--rehash is for --update" in err
    code, _, err = run("cache", src, out, "--model", tmp_path / "model", "--size", 64, "--update", "--device", "cpu")
    assert code == 1 and "was planned otherwise" in err and "geometry.side 32 -> 64" in err


def test_known_contents():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**63, (50, 2)).astype(np.uint64)
    # equal first halves
    keys[10:20, 0] = keys[10, 0]
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys = keys[order]
    known = KnownContents(keys[:, 0].copy(), keys[:, 1].copy())
    assert [known.find(key.tobytes()) for key in keys] == list(range(50))
    others = keys ^ np.uint64(1)
    assert known.find_all(np.concatenate([keys, others])).tolist() == list(range(50)) + [-1] * 50
    assert known.find(others[3].tobytes()) == -1
    empty = KnownContents(keys[:0, 0], keys[:0, 1])
    assert empty.find(keys[0].tobytes()) == -1 and empty.find_all(keys).tolist() == [-1] * 50


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A source that has grown, shrunk and changed, the cache of what it was, and its update that nothing disturbed."""
    folder = tmp_path_factory.mktemp("grown")
    src = folder / "src"
    write_images(src, 30, sizes=SIZES)
    (src / "004b.png").write_bytes(b"no image")
    age(src)
    cache(src, folder / "old", request=DRIVEN)
    for i in range(8):
        image(src / f"{3 * i:03d}-new.png", 100 + i, SIZES[i % 3])
    for i in (3, 17, 18):
        (src / f"{i:03d}.png").unlink()
    image(src / "022.png", 200, SIZES[1])
    os.utime(src / "023.png")
    whole = Path(shutil.copytree(folder / "old", folder / "whole"))
    report = update(src, whole, request=DRIVEN)
    # of the 27 old ones that are left and unchanged all, and the one that is quarantined
    assert (report.reused, report.new_images) == (27, 10)
    return src, folder / "old", whole


def test_a_killed_update_leaves_the_old_rows_and_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, grown):
    src, old, whole = grown
    kills = 0
    for attempt in range(4):
        seed, out = random.randrange(1 << 30), Path(shutil.copytree(old, tmp_path / f"out-{attempt}"))
        died = drive("kill-update", src, out, 6, seed).split()
        assert snapshot(out) == snapshot(whole), f"seed {seed}"
        kills += len(died)
        if kills >= 4:
            return
    raise AssertionError(f"only {kills} of 24 kills struck an update")


@pytest.mark.parametrize(("count", "kills"), [(2, 0), (3, 1)])
def test_several_processes_share_an_update(tmp_path, grown, count, kills):
    src, old, whole = grown
    out = Path(shutil.copytree(old, tmp_path / "out"))
    seed = random.randrange(1 << 30)
    text = drive("share-update", src, out, count, kills, seed)
    codes = text.partition("codes ")[2].split()
    assert codes.count("3") >= count - kills, (seed, text)
    if not kills:
        # nothing is encoded twice
        assert sum(map(int, re.findall(r"read (\d+)", text))) == 10
    assert snapshot(out) == snapshot(whole), seed
