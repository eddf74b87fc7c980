"""Row groups of Parquet files: streamed, so that a worker reads each about once and holds little of it."""

from __future__ import annotations

import io
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from http_files import serving

from capacitor_rt.cache.sources.containers import LocalFiles
from capacitor_rt.cache.sources.open import open_source
from capacitor_rt.errors import ImageError

ROWS, GROUP, NBYTES = 1200, 600, 20_000


def image(i):
    return np.random.default_rng(i).bytes(NBYTES)


def table(first, count):
    return pa.table({"image": [{"bytes": image(i), "path": None} for i in range(first, first + count)]})


@pytest.fixture
def file(tmp_path):
    # pages end where a batch of the writer does
    sizes = {"row_group_size": GROUP, "data_page_size": 1 << 16, "write_batch_size": 2}
    pq.write_table(table(0, ROWS), tmp_path / "x.parquet", **sizes)
    return tmp_path / "x.parquet"


@pytest.fixture
def counted(monkeypatch):
    """Bytes that readers have read of files."""
    read = []

    class Counting(io.FileIO):
        def read(self, n=-1):
            data = super().read(n)
            read.append(len(data))
            return data

    monkeypatch.setattr(LocalFiles, "open", lambda self, name: Counting(self.root + b"/" + name))
    return read


def test_workers_read_a_group_once_each_and_hold_little(file, tmp_path, counted):
    """Two readers take chunks of 32 rows by turns, as the workers of a pool do, each with some threads."""
    source = open_source(file, tmp_path / "out")
    chunks = [list(range(first, min(first + 32, ROWS))) for first in range(0, ROWS, 32)]
    for mine in (chunks[::2], chunks[1::2]):
        reader = source.open()
        counted.clear()
        before = pa.total_allocated_bytes()
        peak = 0
        for chunk in mine:
            reader.expect(chunk)
            found = {}
            todo = iter(chunk)
            lock = threading.Lock()

            def work(todo=todo, lock=lock, found=found, reader=reader):
                while True:
                    with lock:
                        ordinal = next(todo, None)
                    if ordinal is None:
                        return
                    found[ordinal] = reader.read(ordinal)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(found[i] == image(i) for i in chunk)
            peak = max(peak, pa.total_allocated_bytes() - before)
        assert sum(counted) < 1.1 * file.stat().st_size
        assert not reader._expected and not any(stream._kept for stream in reader._streams.values())
        # two streams of some batches, a page and a buffer each
        assert peak < 5_000_000 < GROUP * NBYTES / 2


def test_rows_come_in_any_order(file, tmp_path):
    reader = open_source(file, tmp_path / "out").open()
    for i in (1199, 0, 850, 17, 16, 600, 599):
        assert reader.read(i) == image(i)


def test_what_goes_wrong_is_for_now_and_mends(tmp_path):
    pytest.importorskip("aiohttp", reason="files over HTTP need aiohttp")
    buffer = io.BytesIO()
    pq.write_table(table(0, 40), buffer, row_group_size=20)
    with serving() as server:
        server.files["/x.parquet"] = buffer.getvalue()
        source = open_source(f"{server.url}/x.parquet", tmp_path)
        reader = source.open()
        for fault in ("reset", "500", "short", "404"):
            server.faults["/x.parquet"] = [fault]
            with pytest.raises(ImageError) as raised:
                # each fault meets a stream that is opened anew
                source.open().read(25)
            assert raised.value.reason in ("io_error", "changed"), fault
        assert reader.read(25) == image(25)
        server.files["/x.parquet"] += b"x"
        with pytest.raises(ImageError, match="another one than") as raised:
            reader.read(3)
        assert raised.value.reason == "changed"
