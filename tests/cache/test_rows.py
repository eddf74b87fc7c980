"""The memory-mapped table of rows: derived once, compared before it is believed, made anew when anything changes."""

from __future__ import annotations

import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from cache_cases import flip_byte, index_rows, open_cache, write_images
from models import random_model
from torch.utils.data import default_collate

from capacitor_rt.cache import BucketBatchSampler, CacheRequest, ColumnsRequest, LatentDataset, RunOptions, cache_images
from capacitor_rt.cache import rows as rows_module
from capacitor_rt.cache.index import parse_index
from capacitor_rt.errors import CacheError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_images(folder / "src", 23, sizes=((40, 40), (20, 80), (40, 40), (90, 24)))
    for i in range(0, 23, 3):
        (folder / "src" / f"{i:03d}.txt").write_text(f"number {i}")
    (folder / "src" / "005b.png").write_text("no image")
    options = RunOptions(workers=0, progress=False, columns=ColumnsRequest(captions="txt"))
    cache_images(
        folder / "src", folder / "out", random_model(), CacheRequest(64, area=True, task_inputs=4), options=options
    )
    return folder / "out"


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shutil.copytree(made, tmp_path / "out", ignore=shutil.ignore_patterns(".rows"))
    return tmp_path / "out"


def no_index(monkeypatch):
    def refuse(*args):
        raise AssertionError("an index was read")

    monkeypatch.setattr(rows_module, "read_index", refuse)


def contents(dataset):
    """All that a dataset says and holds."""
    rows = [dataset[i] for i in range(len(dataset))]
    return [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in rows]


def test_the_table_is_made_once_and_says_what_the_index_says(root, monkeypatch):
    first = LatentDataset(root, verify=True)
    before = contents(first)
    kept = [entry for entry in index_rows(root) if entry["status"] == "ok"]
    assert [(row["id"], row["caption"]) for row in before] == [(e["id"], e["caption"] or "") for e in kept]
    no_index(monkeypatch)
    again = LatentDataset(root, verify=True)
    assert contents(again) == before
    copy = pickle.loads(pickle.dumps(again))
    assert contents(copy) == before and list(copy.ids) == list(first.ids)
    assert copy.column("caption").to_pylist() == [e["caption"] for e in kept]
    np.testing.assert_array_equal(copy.bucket_numbers, first.bucket_numbers)
    fixed = sum(again._rows.table[name].nbytes for name in ("file", "bucket", "row", "row_hash"))
    assert fixed == 28 * len(again)


def test_many_chunks_are_as_one(root, monkeypatch):
    before = contents(LatentDataset(root))
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", 5)
    os.unlink(root / ".rows")
    dataset = LatentDataset(root, verify=True)
    assert dataset._rows.table["id"].num_chunks == 5
    assert contents(dataset) == before
    no_index(monkeypatch)
    assert contents(LatentDataset(root)) == before
    assert len(dataset.bucket_numbers) == 23 and dataset.ids[3:9] == [row["id"] for row in before[3:9]]


def test_whatever_is_wrong_with_the_file_it_is_made_anew(root, made):
    before = contents(LatentDataset(root))
    path = root / ".rows"
    whole = path.read_bytes()
    places = [0, 20, 60, 4095, 4096, 4200, len(whole) // 2, len(whole) - 1]
    damaged = [bytes([*whole[:at], whole[at] ^ 0x40, *whole[at + 1 :]]) for at in places]
    damaged += [b"", whole[:100], whole[:-1], whole + b"x", whole[:4096], b"capacitor-rows/1\n[1]\n"]
    for data in damaged:
        path.write_bytes(data)
        assert contents(LatentDataset(root)) == before
        assert path.read_bytes() == whole


def test_a_changed_index_or_log_is_noticed(root, made):
    LatentDataset(root)
    index = sorted((root / "index").iterdir())[2]
    info = index.stat()
    os.utime(index, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    before = (root / ".rows").stat().st_ino
    assert contents(LatentDataset(root)) == contents(LatentDataset(made))
    assert (root / ".rows").stat().st_ino != before
    flip_byte(index, 100)
    with pytest.raises(CacheError, match=f"{index.name} is damaged"):
        LatentDataset(root)
    index.unlink()
    with pytest.raises(CacheError, match=f"{index.name} is missing"):
        LatentDataset(root)


def test_where_out_takes_no_file_the_user_s_folder_does(root, tmp_path, monkeypatch):
    (root / ".rows").mkdir()
    before = contents(LatentDataset(root))
    (own,) = (tmp_path / "home" / "capacitor_rt" / "rows").iterdir()
    with monkeypatch.context() as patch:
        no_index(patch)
        assert contents(LatentDataset(root)) == before
    own.unlink()
    own.mkdir()
    # nowhere: the table is this process's, and a copy elsewhere makes its own
    dataset = LatentDataset(root)
    assert contents(dataset) == contents(pickle.loads(pickle.dumps(dataset))) == before
    assert not list(root.glob(".rows*tmp*")) and list(own.iterdir()) == []


def test_an_unfinished_cache_leaves_no_table(root):
    log = root / "commits.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    assert len(LatentDataset(root, allow_partial=True)) < 23
    assert not (root / ".rows").exists() and not (root.parent / "home").exists()


def test_collating_rows_of_a_batch_copies_nothing(root):
    dataset = LatentDataset(root)
    chosen = next(iter(BucketBatchSampler(dataset, 5, seed=1)))
    rows = dataset.__getitems__(chosen)
    batch = default_collate(rows)
    assert batch["latents"].data_ptr() == rows[0]["latents"].data_ptr()
    plain = default_collate([dict(row) for row in rows])
    assert batch.keys() == plain.keys()
    for key, value in plain.items():
        assert torch.equal(batch[key], value) if isinstance(value, torch.Tensor) else batch[key] == value
    # what a wrapper has put in the place of a row's tensor counts, and so does another order
    rows[1]["latents"] = rows[1]["latents"] + 1
    assert torch.equal(default_collate(rows)["latents"][1], plain["latents"][1] + 1)
    rows = dataset.__getitems__(chosen)
    assert torch.equal(default_collate(rows[::-1])["latents"], plain["latents"].flip(0))
    assert torch.equal(default_collate(rows[1:])["latents"], plain["latents"][1:])
    assert type(pickle.loads(pickle.dumps(rows[0]))) is dict


def test_no_thread_of_arrow_s_holds_an_index_once_it_is_read(root):
    """One that does when the interpreter ends aborts the process: it is to release an object, and cannot any more."""
    folder, plan = open_cache(root)
    folder.close()
    data = sorted((root / "index").iterdir())[0].read_bytes()
    before = sys.getrefcount(data)
    for _ in range(200):
        parse_index(data, "x", plan, 0)
        assert sys.getrefcount(data) == before
