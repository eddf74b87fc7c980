"""What updates of many inputs do part by part gives what the whole would; what earlier generations cost."""

from __future__ import annotations

import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from update_cases import age, assert_as_fresh, change, image, out, reads, src, update

from capacitor_rt.cache import reuse, survey
from capacitor_rt.cache.carried import CarriedFile
from capacitor_rt.cache.sources import Listing
from capacitor_rt.cache.sources import listing as listing_module
from capacitor_rt.images.packed_names import Names
from capacitor_rt.images.scan import scan

__all__ = ["out", "reads", "src"]


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(reuse, "_PART", 2)


def listed(names: list[bytes], seed: int) -> Listing:
    n, rng = len(names), np.random.default_rng(seed)
    sizes, mtimes = rng.integers(0, 2, n), rng.integers(1, 3, n)
    return Listing(names, sizes, mtimes, np.zeros(n, np.int64), np.full(n, -1, np.int32))


names = st.lists(st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name), unique=True, max_size=60)


@settings(max_examples=60, deadline=None)
@given(names, names, st.randoms())
def test_unchanged_inputs_are_found_in_parts_as_in_whole(kept, others, random):
    before, now = kept + others[::2], kept + others[1::2]
    random.shuffle(now)
    old, new = listed(before, 0), listed(now, 1)
    times = 10**19
    expected = []
    for i, name in enumerate(now):
        at = before.index(name) if name in before else -1
        same = at >= 0 and (old.sizes[at], old.mtimes[at]) == (new.sizes[i], new.mtimes[i])
        expected.append(at if same else -1)
    with pytest.MonkeyPatch.context() as patch:
        for part in (2, 1 << 18):
            patch.setattr(reuse, "_PART", part)
            assert reuse.unchanged(old, times, new).tolist() == expected


def test_names_are_spread_over_parts_and_equal_ones_are_together():
    many = [b"train/%08d/%09d.jpg" % (i // 1000, i) for i in range(20000)]
    mixed = Names(many).mixed()
    assert (Names(many[::-1]).mixed() == mixed[::-1]).all()
    counts = np.bincount(mixed, minlength=256)
    assert counts.min() > 40 and counts.max() < 130


def test_an_update_in_parts_is_that_of_the_whole(src, out, tmp_path, in_parts, reads):
    change(src)
    report = update(src, out)
    assert report.reused == 10 and sorted(reads["decoded"]) == ["000a.png", "005.png", "bad.png", "zz.png"]
    assert_as_fresh(src, out, tmp_path)


@pytest.mark.parametrize("parts", [2, 1 << 18])
def test_of_rows_of_equal_bytes_all_inputs_have_the_first(src, out, tmp_path, monkeypatch, parts):
    monkeypatch.setattr(reuse, "_PART", parts)
    for number in (1, 4, 7):
        (src / f"9{number}.png").write_bytes((src / f"00{number}.png").read_bytes())
    age(src)
    update(src, out)
    assert_as_fresh(src, out, tmp_path)


def test_generations_that_nobody_removed_cost_nothing_but_what_they_alone_know(src, out, tmp_path, monkeypatch):
    looked_at: list[str] = []
    original = survey.read_index

    def read_index(folder, plan, commit):
        looked_at.append(f"{plan.number}-{commit.task}")
        return original(folder, plan, commit)

    for number in range(3):
        image(src / f"x{number}.png", 100 + number)
        update(src, out)
    monkeypatch.setattr(survey, "read_index", read_index)
    rows: list[int] = []
    init = reuse.Reuse.__init__
    monkeypatch.setattr(
        reuse.Reuse, "__init__", lambda self, looked, *rest: rows.append(len(looked)) or init(self, looked, *rest)
    )
    (src / "003.png").unlink()
    update(src, out)
    # every row is alive: no index but the current one's is read
    assert {name.partition("-")[0] for name in looked_at} == {"3"} and rows == [14]
    image(src / "y.png", 200)
    update(src, out)
    looked_at.clear()
    image(src / "003.png", 3, (40, 40))
    update(src, out)
    # the row of 003.png lies in a file of generation 0 that others need, and nothing refers to it
    assert "0-1" in looked_at and {"1-0", "2-0", "3-0"}.isdisjoint(looked_at) and rows[2] == 14 + 1
    assert_as_fresh(src, out, tmp_path)


def test_rows_that_a_file_has_not_are_none_of_its():
    file = CarriedFile("0" * 64, 0, "0" * 32, 1, "0" * 32, ((1, 3), (4, 2)))
    bucket, row = np.array([1, 1, 4, 4, 0, 9, 1]), np.array([0, 2, 0, 1, 0, 0, 3])
    assert survey.places_of(file, bucket, row).tolist() == [0, 2, 3, 4, -1, -1, -1]


def test_a_folder_is_listed_in_the_order_of_all_bytes(tmp_path):
    wanted = ["a-.png", "a.b/x.png", "a.png", "a/b.png", "a/b/c.png", "a0.png", "ab/a.png"]
    for name in wanted:
        path = tmp_path / name
        if path.name == "b" or name == "a/b/c.png":
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "a" / "b").mkdir()
    (tmp_path / "a" / "b" / "c.png").write_bytes(b"x")
    found = scan(tmp_path)
    assert found.paths == sorted(name.encode() for name in wanted)
    # one that cannot be listed stands where its own name puts it
    if os.getuid():
        os.chmod(tmp_path / "a", 0)
        try:
            found = scan(tmp_path)
            assert found.paths == sorted([*(n.encode() for n in wanted if not n.startswith("a/")), b"a"])
            assert (found.sizes[[*found.paths].index(b"a")], [*found.errors]) == (-1, [b"a"])
        finally:
            os.chmod(tmp_path / "a", 0o700)


def test_a_list_takes_little_more_than_itself_to_be_read():
    n = 200_000
    table = pa.table(
        {
            "locator": pa.array([b"folder/%012d.jpg" % i for i in range(n)], pa.binary()),
            "size": pa.array(np.arange(n)),
            "mtime_ns": pa.array(np.arange(n)),
            "offset": pa.array(np.zeros(n, np.int64)),
            "container": pa.nulls(n, pa.binary()),
            "error": pa.nulls(n, pa.string()),
        }
    )
    data = bytes(listing_module.parquet_bytes(table))
    del table
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    found = listing_module._listing(listing_module.parse_columns(data, "list", listing_module._schema()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = pa.total_allocated_bytes() - before
    assert len(found) == n and found.locators[n - 1] == b"folder/%012d.jpg" % (n - 1)
    # a name of 23 bytes and its end, a container; three numbers, which Arrow has
    assert held <= 25 * n and peak < 60 * n
