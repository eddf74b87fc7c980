"""Row groups of Parquet files: streamed, so that a worker reads each about once and holds little of it."""

from __future__ import annotations

import io
import threading
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from http_files import serving
from parquet_damage import end_of_process

from capacitor_rt.cache.sources.containers import LocalFiles
from capacitor_rt.cache.sources.open import open_source
from capacitor_rt.cache.sources.parquet_groups import BATCH_BYTES, BUFFER_BYTES, batch_rows
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
        # and the begin of each group once more, to see whether what the footer says of it is damaged
        begins = pq.read_metadata(file).num_row_groups * BUFFER_BYTES
        assert sum(counted) - begins < 1.1 * file.stat().st_size
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


@pytest.mark.parametrize("struct", [False, True])
def test_what_a_dictionary_repeats_is_not_held_many_times_over(tmp_path, struct):
    """A file of a few kilobytes, of which sixteen rows are a third of a gigabyte."""
    large = 8 << 20
    values = pa.array([bytes(large), b"small"], pa.binary())
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0] * 40, pa.int32()), values)
    if struct:
        column = pa.StructArray.from_arrays([column, pa.nulls(120, pa.string())], ["bytes", "path"])
    options = {"dictionary_pagesize_limit": 1 << 30, "store_schema": False, "compression": "zstd"}
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet", **options)
    assert (tmp_path / "x.parquet").stat().st_size < 100_000
    reader = open_source(tmp_path / "x.parquet", tmp_path / "out").open()
    before = pa.total_allocated_bytes()
    for i in range(120):
        assert len(reader.read(i)) == (5 if i % 3 == 1 else large)
        # the dictionary decompressed, as it is kept, and a batch
        assert pa.total_allocated_bytes() - before < 5 * large


@pytest.mark.parametrize(("nbytes", "rows"), [(1000, 16), (3 << 20, 5), (20 << 20, 1)])
def test_batches_of_large_images_are_short(tmp_path, nbytes, rows):
    images = [np.random.default_rng(i).bytes(nbytes) for i in range(6)]
    options = {"use_dictionary": False, "compression": None, "write_batch_size": 1, "data_page_size": 1}
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet", **options)
    with open(tmp_path / "x.parquet", "rb") as handle:
        assert batch_rows(pq.ParquetFile(handle), handle, 0, "image") == rows
    reader = open_source(tmp_path / "x.parquet", tmp_path / "out").open()
    before = pa.total_allocated_bytes()
    for i in (0, 1, 5):
        assert reader.read(i) == images[i]
        assert pa.total_allocated_bytes() - before < max(4 * nbytes, 2 * BATCH_BYTES)


def test_no_damage_of_what_a_footer_says_ends_the_process(tmp_path):
    """Of a column's size statistics a bit is enough: asked for the column, Arrow throws where nobody catches."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": b"x" * 50, "path": "a"}] * 20, "label": range(20)}), sink)
    data = sink.getvalue()

    def read(damaged: bytes) -> None:
        handle = io.BytesIO(damaged)
        with suppress(Exception):
            batch_rows(pq.ParquetFile(handle, pre_buffer=False), handle, 0, "image")

    assert not end_of_process(data, 5, read)


def test_a_dictionary_whose_header_is_odd_is_taken_for_a_large_one(tmp_path):
    pq.write_table(pa.table({"image": [b"a", b"b", b"a"] * 9}), tmp_path / "x.parquet")
    file = pq.ParquetFile(tmp_path / "x.parquet")
    for head in (b"", b"\x15", b"\x15\xff\xff", bytes(16), b"\xff" * 16):
        assert batch_rows(file, io.BytesIO(b"PAR1" + head), 0, "image") == 1
    assert batch_rows(file, io.BytesIO((tmp_path / "x.parquet").read_bytes()), 0, "image") == 16
