"""Reading a cache back: rows, hashes, workers, and a sampler that never mixes buckets and never repeats a row."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from cache_cases import flip_byte, index_rows, task_files, task_layout, write_images
from models import random_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from capacitor_rt.cache import BucketBatchSampler, CacheRequest, LatentDataset, cache_images, latent_reader
from capacitor_rt.cache.latent_reader import LatentReader
from capacitor_rt.errors import CacheError, InputError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    sizes = ((40, 40), (20, 80), (40, 40), (90, 24))
    write_images(folder / "src", 23, sizes=sizes)
    (folder / "src" / "005b.png").write_text("no image")
    request = CacheRequest(64, area=True, task_inputs=4, posterior=True)
    cache_images(folder / "src", folder / "out", random_model(), request, workers=0, progress=False)
    return folder / "out"


@pytest.fixture
def rows(cache):
    return LatentDataset(cache)


def place(root, id):
    """Number of the task that holds the row of an input, its bucket, and its position in that bucket's tensors."""
    (entry,) = (entry for entry in index_rows(root) if entry["id"] == id)
    rows = LatentDataset(root)
    return entry["input"] // 4, rows.plan.buckets[entry["bucket"]], entry["row"]


def test_rows_are_in_the_order_of_the_inputs_and_those_of_the_files(rows, cache):
    assert len(rows) == 23
    ids = [rows[i]["id"] for i in range(23)]
    assert ids == sorted(ids) == list(rows.ids) == rows.ids[:] and "005b.png" not in ids
    for i in range(23):
        row, bucket = rows[i], rows.bucket(i)
        assert set(row) == {"latents", "logsnr", "id", "height", "width"}
        assert (row["height"], row["width"]) == (bucket.height, bucket.width)
        task, placed, number = place(cache, row["id"])
        assert placed == bucket
        stored = load_file(task_files(cache, task)[1])
        for name in ("latents", "logsnr"):
            tensor = stored[f"{name}/{bucket}"]
            assert tensor.shape[1:] == (8, bucket.height // 16, bucket.width // 16)
            assert torch.equal(row[name], tensor[number])
    assert torch.equal(rows[-1]["latents"], rows[22]["latents"])
    for i in (23, -24):
        with pytest.raises(IndexError):
            rows[i]


def test_several_rows_are_those_one_by_one(rows, monkeypatch):
    reads = []
    original = latent_reader.read_into
    monkeypatch.setattr(latent_reader, "read_into", lambda *args: reads.append(len(args[3])) or original(*args))
    asked = [22, 3, 4, 5, 5, 0, -1]
    several = rows.__getitems__(asked)
    # rows 0, 3 of one bucket of their tasks are no neighbours; nothing is read twice but what is asked for twice
    assert sum(reads) == len(rows.plan.tensors) * len(asked)
    for i, row in zip(asked, several, strict=True):
        for name, value in rows[i].items():
            assert torch.equal(row[name], value) if isinstance(value, torch.Tensor) else row[name] == value
    reads.clear()
    wide = [i for i in range(23) if str(rows.bucket(i)) == "64x64"]
    rows.__getitems__(wide)
    # a run of rows of one file is one read for each tensor
    tasks = {place(rows.root, rows.ids[i])[0] for i in wide}
    assert len(reads) == len(rows.plan.tensors) * len(tasks)


def test_the_index_is_told_by_column_and_by_row(rows, cache):
    kept = [entry for entry in index_rows(cache) if entry["status"] == "ok"]
    for name in ("id", "width", "row_hash", "std"):
        assert rows.column(name).to_pylist() == [entry[name] for entry in kept]
    assert [rows.entries(i) for i in range(23)] == kept
    with pytest.raises(InputError, match="no column 'colour'"):
        rows.column("colour")
    assert rows.ids[-2:] == list(rows.ids)[-2:] and rows.entries(-1) == rows.entries(22)


def test_rows_are_the_callers_own(rows):
    rows[0]["latents"].zero_()
    assert rows[0]["latents"].any()


def test_few_files_are_open_at_a_time_and_none_before_use(cache, monkeypatch):
    monkeypatch.setattr(latent_reader, "OPEN_FILES", 2)
    rows = LatentDataset(cache)
    before = len(os.listdir("/proc/self/fd"))
    for i in [*range(23), *range(0, 23, 3)]:
        rows[i]
    # two of the folders themselves
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_pickles_small_and_without_open_files(rows):
    first = rows[0]
    before = len(os.listdir("/proc/self/fd"))
    data = pickle.dumps(rows)
    copy = pickle.loads(data)
    assert len(os.listdir("/proc/self/fd")) == before
    assert torch.equal(copy[0]["latents"], first["latents"])
    assert len(data) < 16_000


def test_loader_workers_give_the_same_batches(rows):
    sampler = BucketBatchSampler(rows, 4, seed=3)
    plain = list(DataLoader(rows, batch_sampler=sampler))
    for a, b in zip(plain, DataLoader(rows, batch_sampler=sampler, num_workers=2), strict=True):
        assert a["id"] == b["id"]
        assert torch.equal(a["latents"], b["latents"]) and torch.equal(a["logsnr"], b["logsnr"])


def test_a_damaged_row_is_found_when_it_is_read_and_others_are_not_blamed(cache, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(cache, root)
    rows = LatentDataset(root, verify=True)
    id = rows[9]["id"]
    task, bucket, row = place(root, id)
    tensor = task_layout(root, task).tensors[rows.plan.buckets.index(bucket), "logsnr"]
    path = task_files(root, task)[1]
    flip_byte(path, tensor.begin + row * tensor.row_nbytes)
    with pytest.raises(CacheError, match=rf"row {row} of {bucket} in .*{path.name} \('{id}'\) is damaged"):
        rows[9]
    for i in set(range(23)) - {9}:
        rows[i]
    LatentDataset(root)[9]


@pytest.mark.parametrize("in_worker", [False, True])
def test_a_batch_that_finds_no_memory_says_so(monkeypatch, in_worker):
    reader = LatentReader(lambda: pytest.fail("no file is needed"), (), str, str)
    if in_worker:
        monkeypatch.setattr(latent_reader, "get_worker_info", object)
    where = "no shared memory .*--shm-size" if in_worker else "no memory .*take smaller batches$"
    with pytest.raises(CacheError, match=where.replace(".*", r"for a batch of 3 rows, 3,221,225,472 MiB.*")):
        reader._empty((3, 1 << 49), torch.bfloat16)


def test_damaged_files_are_named(cache, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(cache, root)
    index, path = task_files(root, 0)
    whole = path.read_bytes()
    for bad in (b"", b"\xff" * 100, whole[:4200], whole + b"x", whole[:8] + b"{" * 4088, b"\0" + whole[1:]):
        path.write_bytes(bad)
        with pytest.raises(CacheError, match=f"{path.name} is damaged: its header"):
            LatentDataset(root)[0]
    path.unlink()
    with pytest.raises(CacheError, match=f"{path.name} cannot be read: No such file"):
        LatentDataset(root)[0]
    path.symlink_to(task_files(cache, 0)[1])
    with pytest.raises(CacheError, match=f"{path.name} is a link or no regular file"):
        LatentDataset(root)[0]
    flip_byte(index, 100)
    with pytest.raises(CacheError, match=f"{index.name} is damaged"):
        LatentDataset(root)
    with pytest.raises(CacheError, match="is no latent cache"):
        LatentDataset(tmp_path)


def test_a_log_that_lost_a_line_is_not_a_finished_cache(cache, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(cache, root)
    log = root / "commits.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(CacheError, match=r"not finished: 20 of 24 inputs done: run"):
        LatentDataset(root)
    log.write_bytes(b"".join(lines[:2]) + b"x" + b"".join(lines[2:]))
    with pytest.raises(CacheError, match=r"1 lines of commits\.jsonl are damaged"):
        LatentDataset(root)
    assert set(LatentDataset(root, allow_partial=True).ids) < set(LatentDataset(cache).ids)


def test_an_unfinished_cache_is_opened_only_when_asked(cache, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(cache, root)
    log = root / "commits.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(CacheError, match=r"not finished: \d+ of 24 inputs done"):
        LatentDataset(root)
    assert 0 < len(LatentDataset(root, allow_partial=True)) < 23


def test_missing_packages_are_named_with_their_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CacheError, match=r"pyarrow is not installed: pip install '\.\[cache\]'"):
        LatentDataset(cache)


def test_drawing_needs_logsnr(rows):
    row = {k: v for k, v in rows[0].items() if k != "logsnr"}
    with pytest.raises(InputError, match="no logsnr"):
        rows.draw(row)
    assert rows.draw(rows[0], torch.Generator().manual_seed(1)).shape == rows[0]["latents"].shape


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_are_of_one_bucket_and_ranks_share_all_rows_once(rows, world_size, shuffle, drop_last):
    options = {"shuffle": shuffle, "drop_last": drop_last, "world_size": world_size}
    samplers = [BucketBatchSampler(rows, 2, rank=r, **options) for r in range(world_size)]
    ranks = [list(s) for s in samplers]
    assert [len(s) for s in samplers] == [len(b) for b in ranks]
    batches = [b for rank in ranks for b in rank]
    for batch in batches:
        assert 0 < len(batch) <= 2
        assert len({rows.bucket(i) for i in batch}) == 1
    given = Counter(i for b in batches for i in b)
    assert max(given.values()) == 1
    per_bucket = Counter(rows.bucket(i) for i in range(23))
    step = 2 * world_size
    expected = sum(n - n % step if drop_last else n for n in per_bucket.values())
    assert given.total() == expected
    if drop_last:
        assert len({len(rank) for rank in ranks}) == 1
        assert all(len(b) == 2 for b in batches)
        for step_batches in zip(*ranks, strict=True):
            assert len({rows.bucket(b[0]) for b in step_batches}) == 1


def test_runs_of_neighbours_stay_together_and_every_row_comes_once(rows, monkeypatch):
    per_bucket = Counter(rows.bucket(i) for i in range(23))
    members = {bucket: [i for i in range(23) if rows.bucket(i) == bucket] for bucket in per_bucket}
    seen = set()
    for epoch in range(4):
        samplers = [BucketBatchSampler(rows, 4, seed=7, rank=r, world_size=2, run=2) for r in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        ranks = [list(sampler) for sampler in samplers]
        assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(23))
        assert [len(sampler) for sampler in samplers] == [len(rank) for rank in ranks]
        for batch in (b for rank in ranks for b in rank if len(b) == 4):
            order = members[rows.bucket(batch[0])]
            neighbours = [order.index(b) - order.index(a) == 1 for a, b in zip(batch[::2], batch[1::2], strict=True)]
            assert sum(neighbours) >= len(neighbours) - 1
            seen.update(order.index(i) % 2 for i, near in zip(batch[::2], neighbours, strict=True) if near)
    # they begin at odd rows too
    assert seen == {0, 1}
    with pytest.raises(InputError, match="run 3 does not divide batch_size 4"):
        BucketBatchSampler(rows, 4, run=3)
    old = BucketBatchSampler(rows, 4).state_dict()
    del old["run"]
    BucketBatchSampler(rows, 4).load_state_dict(old)
    with pytest.raises(InputError, match="run 1 -> 2"):
        BucketBatchSampler(rows, 4, run=2).load_state_dict(old)


def test_runs_are_read_at_once(tmp_path, monkeypatch):
    write_images(tmp_path / "src", 48, sizes=((40, 40),))
    cache_images(tmp_path / "src", tmp_path / "out", random_model(), CacheRequest(32), workers=0, progress=False)
    rows = LatentDataset(tmp_path / "out")
    reads = []
    original = latent_reader.read_into
    monkeypatch.setattr(latent_reader, "read_into", lambda *args: reads.append(len(args[3])) or original(*args))
    for run, most in ((1, 48), (8, 7)):
        reads.clear()
        assert sum(len(batch["id"]) for batch in DataLoader(rows, batch_sampler=BucketBatchSampler(rows, 16, run=run)))
        assert sum(reads) == 48 and len(reads) <= most
    assert len(reads) < 10


def test_order_is_a_function_of_seed_and_epoch(rows):
    def order(seed, epoch):
        sampler = BucketBatchSampler(rows, 3, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({str(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    plain = BucketBatchSampler(rows, 3, shuffle=False)
    assert list(plain) == list(plain)
    assert all(b == sorted(b) for b in plain)


def test_resumes_in_the_middle_of_an_epoch(rows):
    first = BucketBatchSampler(rows, 2, seed=5)
    first.set_epoch(2)
    everything = list(first)
    going = iter(first)
    seen = [next(going) for _ in range(4)]
    assert seen == everything[:4]
    for state, done in ((first.state_dict(), 4), (first.state_dict(done=3), 3)):
        again = BucketBatchSampler(rows, 2, seed=5)
        again.load_state_dict(pickle.loads(pickle.dumps(state)))
        # what a training loop does at the top of the epoch it resumes
        again.set_epoch(2)
        assert list(again) == everything[done:]
        again.set_epoch(3)
        first.set_epoch(3)
        assert list(again) == list(first)
        first.set_epoch(2)
        going = iter(first)
        for _ in range(4):
            next(going)


def test_a_state_of_other_settings_is_refused(rows):
    state = BucketBatchSampler(rows, 2, seed=5).state_dict()
    with pytest.raises(InputError, match=r"seed 5 -> 6"):
        BucketBatchSampler(rows, 2, seed=6).load_state_dict(state)
    with pytest.raises(InputError, match=r"batch_size 2 -> 3"):
        BucketBatchSampler(rows, 3, seed=5).load_state_dict(state)
    with pytest.raises(InputError, match="rank 2"):
        BucketBatchSampler(rows, 2, rank=2, world_size=2)


class Million(LatentDataset):
    """A cache of a million rows, as far as a sampler looks at it."""

    bucket_numbers = np.random.default_rng(0).integers(0, 3, 1_000_000).astype(np.int32)

    def __len__(self):
        return 1_000_000


def test_a_large_index_is_sampled_quickly(cache):
    sampler = BucketBatchSampler(Million(cache), 64, world_size=8, rank=3)
    begin = time.process_time()
    taken = list(itertools.islice(sampler, 100))
    assert len(sampler) > 1900 and len(taken) == 100
    assert time.process_time() - begin < 3
