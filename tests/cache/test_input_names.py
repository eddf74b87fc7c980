"""Many names in little memory, and lists of inputs that hold them."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.sources.listing import Listing, load_listing
from capacitor_rt.images import packed_names as module
from capacitor_rt.images.packed_names import Names

LISTS = ([], [b""], [b"", b"a", b"\xff\0b", b""], [b"%d/x" % i for i in range(50)])


@pytest.mark.parametrize("block", [7, 1 << 14])
@pytest.mark.parametrize("plain", LISTS, ids=len)
def test_names_are_the_list_that_they_are_of(plain, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    chunks = [pa.array(plain[:3], pa.binary()), pa.array([b"zz", *plain[3:], b"zz"], pa.binary())[1:-1]]
    made = [Names(plain), Names(iter(plain)), Names.of_arrow(pa.chunked_array(chunks, pa.binary()))]
    made += [
        Names.of_arrow(pa.chunked_array([pa.array(plain, pa.large_binary())])),
        pickle.loads(pickle.dumps(made[0])),
    ]
    for names in made:
        assert list(names) == plain and len(names) == len(plain) and names == plain and names == made[0]
        assert [names[i] for i in range(len(plain))] == plain and names[1:] == plain[1:] and names[::-2] == plain[::-2]
        assert names.arrow().to_pylist() == plain and names.joined() == b"".join(plain)
        assert names.lengths.tolist() == list(map(len, plain))
        assert names != [*plain, b"more"] and names != Names([*plain, b""])
        for i in (len(plain), -len(plain) - 1):
            with pytest.raises(IndexError):
                names[i]
    if len(plain) > 2:
        assert made[0][-1] == plain[-1] and made[0] != Names([b"".join(plain[:2]), b"", *plain[2:]])


def listing(count: int, containers: int) -> Listing:
    numbers = np.arange(count, dtype=np.int32) * containers // count if containers else np.full(count, -1, np.int32)
    return Listing(
        (b"%05d.parquet/%07d" % (i // 1000, i) for i in range(count)),
        np.arange(count, dtype=np.int64),
        np.full(count, 5, np.int64),
        np.arange(count, dtype=np.int64),
        numbers,
        [b"c%d" % i for i in range(containers)],
        {7: "gone"} if count < 1000 else {},
    )


@pytest.mark.parametrize("containers", [0, 3])
def test_lists_are_read_as_they_were_written(tmp_path, containers):
    made = listing(100, containers)
    with CacheFolder(tmp_path) as folder:
        made.save(folder)
        read = load_listing(folder, "source.parquet", made.digest(), len(made))
    for name in ("sizes", "mtimes", "offsets", "containers"):
        assert (
            np.array_equal(getattr(read, name), getattr(made, name))
            and getattr(read, name).dtype == getattr(made, name).dtype
        )
    assert (read.names, read.container_names, read.errors) == (made.names, made.container_names, made.errors)
    assert read.id(3) == "00000.parquet/0000003" and read.tasks(40) == made.tasks(40)


def test_a_list_takes_little_memory(tmp_path):
    """Its columns, 28 bytes, and the names; as Python objects names and containers took 160 more while it was read."""
    count = 50_000
    with CacheFolder(tmp_path) as folder:
        tracemalloc.start()
        try:
            made = listing(count, 7)
            assert tracemalloc.get_traced_memory()[0] / count < 64
            made.save(folder)
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            read = load_listing(folder, "source.parquet", made.digest(), len(made))
            current, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(read) == count and (current - before) / count < 64 and (peak - before) / count < 110
