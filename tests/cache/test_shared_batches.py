"""Batches that data loader workers leave in memory which serves again: what arrives, what is freed, and when."""

from __future__ import annotations

import gc
import os
import pickle

import pytest
import torch
from cache_cases import write_images
from models import random_model
from torch.utils.data import DataLoader, Subset

from capacitor_rt.cache import BucketBatchSampler, CacheRequest, LatentDataset, RunOptions, cache_images
from capacitor_rt.cache import shared_batches as module
from capacitor_rt.cache.shared_batches import SharedBatch, SharedBatches
from capacitor_rt.errors import CacheError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    write_images(folder / "src", 40, sizes=((40, 40), (20, 80), (40, 40), (90, 24)))
    request = CacheRequest(64, area=True, task_inputs=8, posterior=True)
    cache_images(folder / "src", folder / "out", random_model(), request, workers=0, progress=False)
    return folder / "out"


@pytest.fixture
def dataset(made):
    dataset = LatentDataset(made, verify=True)
    if dataset._shared is None:
        pytest.skip("this system has no anonymous files")
    return dataset


def same(a, b):
    assert list(a) == list(b)
    for key, value in b.items():
        assert torch.equal(a[key], value) if isinstance(value, torch.Tensor) else a[key] == value


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_what_none_do_and_the_memory_serves_again(dataset, context):
    sampler = BucketBatchSampler(dataset, 4, seed=2)
    plain = list(DataLoader(dataset, batch_sampler=sampler))
    options = {"num_workers": 1, "multiprocessing_context": context, "persistent_workers": True}
    loader = DataLoader(dataset, batch_sampler=sampler, **options)
    most = 0
    for _ in range(2):
        for got, expected in zip(loader, plain, strict=True):
            assert type(got) is dict
            same(got, expected)
            most = max(most, dataset._shared.taken())
    # two tensors of a unit each; some batches are under way, and none is held
    assert 0 < most <= 2 * 6
    del got, loader
    gc.collect()
    dataset._shared._reclaim()
    assert dataset._shared.taken() == 0


def test_what_is_held_stays_as_it_is_and_what_has_no_room_goes_another_way(dataset, monkeypatch):
    monkeypatch.setattr(module, "UNITS", 6)
    dataset._shared = SharedBatches()
    sampler = BucketBatchSampler(dataset, 4, seed=2)
    plain = list(DataLoader(dataset, batch_sampler=sampler))
    held = list(DataLoader(dataset, batch_sampler=sampler, num_workers=2))
    assert dataset._shared.taken() == 6 < 2 * len(plain)
    for got, expected in zip(held, plain, strict=True):
        same(got, expected)
    # a view keeps it as well
    views = [batch["latents"][0, 0] for batch in held]
    first = views[0].clone()
    del held, got
    again = list(DataLoader(dataset, batch_sampler=sampler, num_workers=1))
    assert torch.equal(views[0], first)
    for got, expected in zip(again, plain, strict=True):
        same(got, expected)


def test_rows_that_are_collated_otherwise_leave_nothing(dataset):
    def own(rows):
        return torch.stack([row["latents"] for row in rows]), [row["id"] for row in rows]

    sampler = BucketBatchSampler(dataset, 4, seed=2)
    for collate in (own, None):
        loader = DataLoader(Subset(dataset, range(40)), batch_sampler=sampler, num_workers=1, collate_fn=collate)
        for batch, chosen in zip(loader, sampler, strict=True):
            latents, ids = (batch["latents"], batch["id"]) if collate is None else batch
            assert list(ids) == [dataset.ids[i] for i in chosen]
            assert torch.equal(latents, torch.stack([dataset[i]["latents"] for i in chosen]))
        del batch, latents
    gc.collect()
    dataset._shared._reclaim()
    assert dataset._shared.taken() == 0


def test_integers_arrive_as_the_values_that_they_stand_for(made, tmp_path, monkeypatch):
    request = CacheRequest(64, area=True, task_inputs=8, dtype="int8")
    options = {"workers": 0, "progress": False, "options": RunOptions(progress=False, measure=0)}
    cache_images(made.parent / "src", tmp_path / "out", random_model(), request, **options)
    for raw in (False, True):
        dataset = LatentDataset(tmp_path / "out", raw=raw)
        sampler = BucketBatchSampler(dataset, 4, seed=2)
        plain = list(DataLoader(dataset, batch_sampler=sampler))
        held = list(DataLoader(dataset, batch_sampler=sampler, num_workers=1))
        for got, expected in zip(held, plain, strict=True):
            same(got, expected)
        # all kinds of all batches lie there
        kinds = sum(isinstance(v, torch.Tensor) and v.is_floating_point() for v in plain[0].values()) + raw
        assert dataset._shared is None or dataset._shared.taken() == kinds * len(plain)


def test_a_run_is_one_s_at_a_time():
    pool = SharedBatches()
    a, b = (pool.empty((3, 5), torch.bfloat16) for _ in range(2))
    a.fill_(1)
    b.fill_(2)
    assert pool.taken() == 2 and bool((a == 1).all())
    handle = pool.handle(a)
    assert pool.handle(a[:2]) is None and pool.handle(torch.zeros(3)) is None
    got = pickle.loads(pickle.dumps(SharedBatch(x=a, y=torch.arange(3), z=["text"])))
    assert list(got) == ["x", "y", "z"] and got["z"] == ["text"] and torch.equal(got["y"], torch.arange(3))
    assert torch.equal(got["x"], torch.ones(3, 5, dtype=torch.bfloat16))
    del a
    # the one that it was sent to has it
    assert pool.taken() == 2
    view = got["x"][1]
    del got
    assert pool.taken() == 2 and bool((view == 1).all())
    del view
    assert pool.taken() == 1
    with pytest.raises(CacheError, match="lost"):
        pool.receive(handle)
    assert pool.empty((module.UNITS * module.UNIT,), torch.uint8) is None
    assert pool.empty((0,), torch.uint8) is None


def test_what_dead_workers_had_under_way_is_free(monkeypatch):
    monkeypatch.setattr(module, "UNITS", 4)
    pool = SharedBatches()
    child = os.fork()
    if not child:
        held = [pool.empty((module.UNIT,), torch.uint8) for _ in range(4)]
        os._exit(0 if all(t is not None for t in held) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert pool.taken() == 4
    tensor = pool.empty((2 * module.UNIT,), torch.uint8)
    assert tensor is not None and pool.taken() == 2
    # what lives is not taken
    assert pool.empty((3 * module.UNIT,), torch.uint8) is None


def test_a_copy_that_goes_nowhere_at_once_shares_nothing(dataset):
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._shared is None
    assert torch.equal(copy[3]["latents"], dataset[3]["latents"])


def test_whoever_reads_without_workers_has_no_memory_for_them(made):
    """Of hundreds of datasets in one process each took a gibibyte of addresses and a descriptor."""

    def held():
        names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_there(fd)]
        return sum("capacitor-batches" in name for name in names)

    def addresses():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    gc.collect()
    before, mapped = held(), addresses()
    datasets = [LatentDataset(made) for _ in range(50)]
    rows = [dataset[3]["latents"] for dataset in datasets]
    assert held() == before and addresses() - mapped < 1 << 30
    loader = DataLoader(datasets[0], batch_size=1, num_workers=1, multiprocessing_context="spawn")
    first = next(iter(loader))["latents"]
    # mapping takes one as well
    assert held() == before + 2 * (datasets[0]._shared is not None)
    kept = first.clone()
    for dataset in datasets:
        dataset.close()
    assert torch.equal(first, kept) and all(torch.equal(row, rows[0]) for row in rows)
    del first, loader
    gc.collect()
    assert held() == before
    # and is there again when it is wanted
    assert torch.equal(datasets[0][0]["latents"], kept[0])


def _is_there(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_worker_makes_no_memory_of_its_own(monkeypatch):
    """Its batches would lie where the process that trains cannot read them."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", lambda name: (_ for _ in ()).throw(OSError("none left")))
        pool = SharedBatches()
        child = os.fork()
        if not child:
            patch.undo()
            os._exit(0 if pool.empty((3,), torch.uint8) is None else 1)
        assert os.waitpid(child, 0)[1] == 0 and pool.empty((3,), torch.uint8) is None
    assert pool.empty((3,), torch.uint8) is not None
