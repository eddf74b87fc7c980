"""Images and Parquet files by URL, on file systems that fsspec brings: in memory, and this machine's as if remote."""

from __future__ import annotations

import io
import pickle

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import pixels, write_images
from models import random_model
from PIL import Image

from capacitor_rt.cache import CacheRequest, ColumnsRequest, LatentDataset, RunOptions, cache_images
from capacitor_rt.cache.sources.open import open_source
from capacitor_rt.errors import CacheError

REQUEST = CacheRequest(32, dtype="fp32", task_inputs=4)


def run(src, out, *, workers=0, kind="auto", **columns):
    options = RunOptions(
        workers=workers, progress=False, backoff=(0.0,), source=kind, columns=ColumnsRequest(**columns)
    )
    return cache_images(src, out, random_model(), REQUEST, options=options)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(40, 40, seed=seed)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def memory():
    """An object store in memory with five images in two folders."""
    store = fsspec.filesystem("memory")
    for i in range(5):
        store.pipe_file(f"/bucket/{'ab'[i % 2]}/{i}.png", png(i))
    store.pipe_file("/bucket/a/._0.png", b"of a Mac")
    store.pipe_file("/bucket/notes.txt", b"")
    yield store
    store.rm("/bucket", recursive=True)


def test_images_below_a_url(memory, tmp_path):
    report = run("memory://bucket", tmp_path / "out", labels="folder")
    assert (report.cached, report.exit_code) == (5, 0)
    dataset = LatentDataset(tmp_path / "out", verify=True)
    assert list(dataset.ids) == ["a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png"]
    assert dataset.column("label").to_pylist() == [0, 0, 0, 1, 1]
    assert run("memory://bucket/", tmp_path / "out", labels="folder").new_images == 0
    memory.pipe_file("/bucket/a/9.png", png(9))
    with pytest.raises(CacheError, match=r"1 added: 'a/9\.png'"):
        run("memory://bucket", tmp_path / "out", labels="folder")


def test_a_url_gives_the_bytes_of_the_folder(tmp_path):
    write_images(tmp_path / "src", 5)
    run(tmp_path / "src", tmp_path / "local")
    # in workers, which open the file system themselves
    run(f"file://{tmp_path}/src", tmp_path / "remote", workers=1)
    local, remote = (LatentDataset(tmp_path / name) for name in ("local", "remote"))
    assert list(local.ids) == list(remote.ids)
    assert all(torch.equal(local[i]["latents"], remote[i]["latents"]) for i in range(5))


def test_what_a_network_does_is_tried_again_and_never_quarantined(memory, tmp_path, monkeypatch):
    original, failures = type(memory).cat_file, {"4.png": 1}

    def failing(self, path, *args, **options):
        name = path.rpartition("/")[2]
        if failures.get(name, 0) > 0:
            failures[name] -= 1
            raise ConnectionError("reset by peer")
        return original(self, path, *args, **options)

    monkeypatch.setattr(type(memory), "cat_file", failing)
    assert run("memory://bucket", tmp_path / "out").exit_code == 0
    failures["4.png"] = 9
    report = run("memory://bucket", tmp_path / "out2")
    assert (report.failed, report.exit_code, report.quarantined) == ({"io_error": 1}, 1, {})
    assert report.examples == ["a/4.png: ConnectionError: reset by peer"]


def test_parquet_files_below_a_url(memory, tmp_path):
    for n, rows in enumerate((range(3), range(3, 5))):
        images = [{"bytes": png(i), "path": None} for i in rows]
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": images, "label": list(rows)}), buffer)
        memory.pipe_file(f"/bucket/data/train-{n}.parquet", buffer.getvalue())
    for n, src in enumerate(("memory://bucket/data/train-*.parquet", "memory://bucket/data")):
        kind = "auto" if src.endswith("parquet") else "parquet"
        assert run(src, tmp_path / f"out{n}", kind=kind, labels="label").exit_code == 0
        dataset = LatentDataset(tmp_path / f"out{n}", verify=True)
        assert dataset.column("label").to_pylist() == list(range(5))
        assert list(dataset.ids)[3] == "train-1.parquet/0000000"
    source = pickle.loads(pickle.dumps(open_source("memory://bucket/data/train-1.parquet", tmp_path)))
    assert source.open().read(1) == png(4)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere", "no images below memory://nowhere"),
        ("nope://x", r"nope://x cannot be read: Protocol not known"),
        ("memory://bucket/x.txt", "lists are read from local disks alone"),
        ("memory://bucket/x.tar", r"memory://bucket/x\.tar does not exist"),
        ("memory://bucket/x-*.parquet", r"no \.parquet files in"),
    ],
)
def test_what_cannot_be_read_is_named(memory, tmp_path, url, message):
    with pytest.raises(CacheError, match=message):
        run(url, tmp_path / "out")
    assert not (tmp_path / "out").exists()
