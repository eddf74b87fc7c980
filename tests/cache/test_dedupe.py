"""`cache --dedupe`: inputs of the same bytes share a row, and everything else is as if they did not."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import Forbidden, index_rows, open_cache, snapshot, write_images
from kill_driver import REQUEST as DRIVEN
from models import random_model
from update_cases import REQUEST as PLAIN
from update_cases import SIZES, age, cache, drive, image, reads, rows_of, run, src, update, write_tar

from capacitor_rt.cache import LatentDataset
from capacitor_rt.cache import run as run_module
from capacitor_rt.cache.commits import Commit
from capacitor_rt.cache.dedupe import distinct, restricted, subset
from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.garbage import collect
from capacitor_rt.cache.hashing import xxh3
from capacitor_rt.cache.index import is_own
from capacitor_rt.cache.parquet_files import parquet_bytes
from capacitor_rt.cache.plan import load_plan
from capacitor_rt.cache.repair import repair
from capacitor_rt.cache.sources import ColumnsRequest
from capacitor_rt.cache.sources.open import open_source
from capacitor_rt.cache.status import status
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError

REQUEST = dataclasses.replace(PLAIN, dedupe=True)
__all__ = ["reads", "run", "src"]


@pytest.fixture
def twins(src) -> Path:
    """The folder with copies, a hard link, a symbolic link, a copy of what is no image, and a file of the same size."""
    shutil.copy(src / "002.png", src / "copy-a.png")
    shutil.copy(src / "002.png", src / "000-copy.png")
    os.link(src / "005.png", src / "link.png")
    os.symlink("006.png", src / "soft.png")
    shutil.copy(src / "003b.png", src / "bad-copy.png")
    data = bytearray((src / "007.png").read_bytes())
    data[-20] ^= 1
    (src / "other.png").write_bytes(data)
    age(src)
    return src


def assert_as_plain(src, out, tmp_path, **options) -> None:
    """A cache with shared rows has the rows of one without, in the same order."""
    plain = tmp_path / f"plain-{len(list(tmp_path.iterdir()))}"
    cache(src, plain, request=PLAIN, **options)
    wanted, found = rows_of(plain), rows_of(out)
    assert list(found) == list(wanted)
    for id, tensors in wanted.items():
        assert all(torch.equal(tensors[kind], found[id][kind]) for kind in tensors), id
    names = ("id", "status", "reason", "bytes_hash", "width", "row_hash", "min", "std")
    assert [[r[n] for n in names] for r in index_rows(out)] == [[r[n] for n in names] for r in index_rows(plain)]
    lines = [(x / "quarantine.jsonl").read_bytes() for x in (out, plain)]
    assert lines[0] == lines[1]
    checked = verify(out)
    assert checked.problems == [] and not checked.unfinished


def stored_rows(out: Path) -> int:
    """Rows in all files of latents."""
    from safetensors import safe_open

    count = 0
    for path in (out / "tasks").iterdir():
        with safe_open(path, framework="pt") as file:
            count += sum(file.get_slice(n).get_shape()[0] for n in file.keys() if n.startswith("latents/"))  # noqa: SIM118
    return count


def test_equal_bytes_are_decoded_and_stored_once(twins, tmp_path, reads):
    told: list[str] = []
    report = cache(twins, tmp_path / "out", request=REQUEST, told=told)
    assert (report.inputs, report.cached, report.exit_code) == (17, 14, 3)
    # what cannot be decoded is tried under each of its names
    assert sorted({*reads["decoded"]} - {f"{i:03d}.png" for i in range(10)}) == [
        *("000-copy.png", "003b.png", "bad-copy.png", "other.png")
    ]
    assert len(reads["decoded"]) == len(set(reads["decoded"])) == 9 + 4
    assert any("5 of 17 inputs" in line and "share its row" in line for line in told)
    assert stored_rows(tmp_path / "out") == 10
    _, plan = open_cache(tmp_path / "out")
    assert plan.fields["store"]["dedupe"] is True and not plan.is_interim
    assert_as_plain(twins, tmp_path / "out", tmp_path)
    # finished is finished
    before = snapshot(tmp_path / "out")
    cache(twins, tmp_path / "out", Forbidden(random_model()), request=REQUEST)
    assert snapshot(tmp_path / "out") == before
    collect(tmp_path / "out")
    assert_as_plain(twins, tmp_path / "out", tmp_path)


def test_without_copies_it_is_a_cache_like_any(src, tmp_path):
    report = cache(src, tmp_path / "out", request=REQUEST)
    assert report.generation == 0 and (tmp_path / "out" / "commits.jsonl").exists()
    assert_as_plain(src, tmp_path / "out", tmp_path)


def test_the_setting_is_part_of_the_plan(twins, tmp_path):
    cache(twins, tmp_path / "out", request=REQUEST)
    with pytest.raises(CacheError, match=r"store.dedupe True -> False"):
        cache(twins, tmp_path / "out", request=PLAIN)


def test_tar_files_and_parquet_files_have_copies_too(tmp_path):
    data = [path.read_bytes() for path in write_images(tmp_path / "one", 5, sizes=SIZES)]
    folder = tmp_path / "wds"
    folder.mkdir()
    write_tar(folder / "0.tar", [("a.png", data[0]), ("b.png", data[1]), ("c.png", data[0])])
    # nothing of its own: its container is not in the interim plan
    write_tar(folder / "1.tar", [("d.png", data[1])])
    write_tar(folder / "2.tar", [("e.png", data[2]), ("f.png", data[3])])
    report = cache(folder, tmp_path / "out", request=REQUEST)
    assert report.cached == 6 and stored_rows(tmp_path / "out") == 4
    assert_as_plain(folder, tmp_path / "out", tmp_path)
    table = tmp_path / "hf" / "x.parquet"
    table.parent.mkdir()
    pq.write_table(pa.table({"image": [data[i] for i in (0, 0, 0, 1, 4)]}), table, row_group_size=2)
    report = cache(table, tmp_path / "out2", request=REQUEST)
    assert report.cached == 5 and stored_rows(tmp_path / "out2") == 3
    assert_as_plain(table, tmp_path / "out2", tmp_path)


def test_labels_and_captions_stay_with_each_input(tmp_path):
    src = tmp_path / "src"
    for label in ("cat", "dog"):
        write_images(src / label, 3)
    for path in src.rglob("*.png"):
        path.with_suffix(".txt").write_text(str(path.relative_to(src)))
    cache(src, tmp_path / "out", request=REQUEST, columns=ColumnsRequest("folder", "txt"))
    ds = LatentDataset(tmp_path / "out")
    assert [ds[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1] and stored_rows(tmp_path / "out") == 3
    assert [ds[i]["caption"] for i in range(6)] == [ds.ids[i] for i in range(6)]


def test_an_interrupted_run_goes_on_in_either_part(twins, tmp_path, monkeypatch, reads):
    out = tmp_path / "out"
    original = run_module.prepare_update
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prepare_update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            cache(twins, out, request=REQUEST)
    # it is no finished cache, and says so
    with pytest.raises(CacheError, match=r"is not finished: inputs of the same bytes are still to be added"):
        LatentDataset(out)
    assert len(LatentDataset(out, allow_partial=True)) == 10
    assert status(out).is_interim and verify(out).unfinished == 1 and verify(out).problems == []
    # an earlier moment: a task is missing
    part = Path(shutil.copytree(out, tmp_path / "part"))
    for folder in ("index", "tasks"):
        sorted((part / folder).iterdir())[-1].unlink()
    reads["decoded"].clear()
    cache(twins, out, request=REQUEST)
    assert reads["decoded"] == ["bad-copy.png"]
    reads["decoded"].clear()
    cache(twins, part, request=REQUEST)
    assert len(reads["decoded"]) == 3 + 1
    assert snapshot(part) == snapshot(out)
    assert_as_plain(twins, out, tmp_path)
    assert original is run_module.prepare_update


def test_a_copy_that_is_edited_meanwhile_is_encoded(twins, tmp_path, monkeypatch):
    """What the search said was true then: what counts is what is read."""
    out, original = tmp_path / "out", run_module.prepare_update

    def edited(*args):
        if args[-1] is not None:
            size = (twins / "copy-a.png").stat().st_size
            shutil.copy(twins / "004.png", twins / "copy-a.png")
            data = (twins / "copy-a.png").read_bytes()
            (twins / "copy-a.png").write_bytes(data.ljust(size, b"\0")[:size] if len(data) < size else data)
        return original(*args)

    monkeypatch.setattr(run_module, "prepare_update", edited)
    report = cache(twins, out, request=REQUEST)
    if report.unfinished:
        # it has another size: the plan is another one
        assert report.failed == {"changed": 1}
        update(twins, out, request=REQUEST)
    assert_as_plain(twins, out, tmp_path)


def test_an_update_encodes_new_copies_once(twins, tmp_path, reads):
    out = tmp_path / "out"
    cache(twins, out, request=REQUEST)
    old = rows_of(out)
    for name in ("new-a.png", "new-b.png"):
        image(twins / name, 90)
    shutil.copy(twins / "001.png", twins / "new-c.png")
    reads["decoded"].clear()
    report = update(twins, out, request=REQUEST)
    assert len(reads["decoded"]) == 1 and report.cached == 17
    assert list(old) == [id for id in rows_of(out) if "new" not in id]
    assert stored_rows(out) == 11
    assert_as_plain(twins, out, tmp_path)
    assert not update(twins, out, Forbidden(random_model()), request=REQUEST).new_images
    collect(out)
    assert status(out).updates == []
    assert_as_plain(twins, out, tmp_path)


def test_workers_and_processes_write_the_same_bytes(twins, tmp_path):
    cache(twins, tmp_path / "one", request=REQUEST)
    cache(twins, tmp_path / "two", request=REQUEST, workers=2)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A source with many copies, and its cache that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("many")
    paths = write_images(folder / "src", 24, sizes=SIZES)
    for i, path in enumerate(paths[::2]):
        shutil.copy(path, folder / "src" / f"{(7 * i) % 24:03d}-copy.png")
    (folder / "src" / "bad.png").write_bytes(b"no image")
    age(folder / "src")
    cache(folder / "src", folder / "whole", request=dataclasses.replace(DRIVEN, dedupe=True))
    return folder / "src", folder / "whole"


def test_killed_and_shared_the_bytes_are_those_of_an_undisturbed_run(tmp_path, many):
    src, whole = many
    kills = 0
    # near its end a run may be over before it was disturbed often enough
    for attempt in range(4):
        seed, out = random.randrange(1 << 30), tmp_path / f"killed-{attempt}"
        kills += len(drive("kill-dedupe", src, out, 8, seed).split())
        assert snapshot(out) == snapshot(whole), f"seed {seed}"
        if kills >= 2:
            break
    assert kills >= 2
    drive("share-dedupe", src, tmp_path / "shared", 2, 0, seed)
    assert snapshot(tmp_path / "shared") == snapshot(whole), seed


def test_a_damaged_row_that_is_shared_is_encoded_again(twins, tmp_path):
    out = tmp_path / "out"
    cache(twins, out, request=REQUEST)
    collect(out)
    rows = index_rows(out)
    stem = next(r["file"] for r in rows if r["id"] == "copy-a.png")
    assert stem == next(r["file"] for r in rows if r["id"] == "002.png")
    path = out / "tasks" / f"{stem}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = verify(out)
    assert len(found.problems) == 1 and found.damaged_files == [f"tasks/{stem}.safetensors"]
    repair(out, found)
    cache(twins, out, request=REQUEST)
    assert_as_plain(twins, out, tmp_path)


def test_an_index_that_its_own_file_does_not_vouch_for_is_refused(twins, tmp_path):
    """Its commit line has its hash, and the rows are read from files of the earlier generation."""
    out = tmp_path / "out"
    cache(twins, out, request=REQUEST)
    plan = load_plan(CacheFolder(out))
    log = out / plan.log_name
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    tables = {fields["task"]: pq.read_table(out / plan.index_name(fields["task"])) for fields in lines}
    # a task all of whose rows lie elsewhere
    at = next(n for n, t in tables.items() if "ok" in t["status"].to_pylist() and not t["bucket"].filter(is_own(t)))
    ids = [b"renamed.png" if status == "ok" else b"x.png" for status in tables[at]["status"].to_pylist()]
    forged = tables[at].set_column(tables[at].schema.get_field_index("id"), "id", pa.array(map(bytes.decode, ids)))
    body = bytes(parquet_bytes(forged))
    (out / plan.index_name(at)).write_bytes(body)
    for fields in lines:
        del fields["sum"]
        if fields["task"] == at:
            fields |= {"index_bytes": len(body), "index_xxh3": xxh3(body).hexdigest()}
    log.write_bytes(b"".join(Commit(**fields).line() for fields in lines))
    with pytest.raises(CacheError, match="is damaged: its header is not that of its index: run `capacitor-rt verify"):
        LatentDataset(out)
    assert verify(out).problems
    (out / plan.data_name(at)).unlink()
    with pytest.raises(CacheError, match="cannot be read"):
        LatentDataset(out)


def test_the_search(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    rng = random.Random(0)
    blobs = [rng.randbytes(20_000) for _ in range(4)]
    # the same size and the same middle
    blobs.append(b"x" + blobs[0][1:])
    chosen = [0, 1, 0, 4, 2, 1, 4, 3]
    for i, number in enumerate(chosen):
        (folder / f"{i}.png").write_bytes(blobs[number])
    (folder / "8.png").write_bytes(b"")
    (folder / "9.png").write_bytes(b"")
    source = open_source(folder, tmp_path / "out")
    found = distinct(source, np.arange(10))
    assert found.kept.tolist() == [0, 1, 3, 4, 7, 8, 9] and found.nbytes == 60_000
    assert distinct(source, np.array([5, 6, 7])).kept.tolist() == list(range(10))
    assert distinct(source, np.array([], np.int64)).kept.tolist() == list(range(10))
    part = subset(source, found.kept)
    assert [part.listing.id(i) for i in range(3)] == ["0.png", "1.png", "3.png"]
    assert [part.open().read(i) for i in range(5)] == [blobs[n] for n in (0, 1, 4, 2, 3)]


def test_the_interim_plan_is_for_its_source_alone(twins, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "prepare_update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            cache(twins, out, request=REQUEST)
    folder, plan = open_cache(out)
    with folder:
        assert restricted(folder, plan, open_source(twins, out)) is not None
        image(twins / "new.png", 91)
        assert restricted(folder, plan, open_source(twins, out)) is None
    with pytest.raises(CacheError, match="was planned for other inputs"):
        cache(twins, out, request=REQUEST)
    update(twins, out, request=REQUEST)
    assert_as_plain(twins, out, tmp_path)


def test_the_command(twins, run, tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    code, text, err = run(
        *("cache", twins, tmp_path / "out", "--model", tmp_path / "model", "--size", 32, "--dedupe", "--quiet"),
        *("--device", "cpu", "--workers", 0),
    )
    assert code == 3 and "cached 14 of 17 images" in text and "5 of 17 inputs" in err, sys.exc_info()
