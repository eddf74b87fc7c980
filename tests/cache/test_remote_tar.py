"""Tar files by URL: fetched in spans, listed once, and what a network does to them."""

from __future__ import annotations

import io
import tarfile

import fsspec
import pytest
import torch
from cache_cases import snapshot
from http_files import FAULTS, serving
from models import random_model
from test_remote_sources import REQUEST, png, run

from capacitor_rt.cache import ColumnsRequest, LatentDataset, RunOptions, cache_images
from capacitor_rt.cache.sources import spans, tar
from capacitor_rt.cache.sources.open import open_source
from capacitor_rt.cache.sources.remote import expand
from capacitor_rt.errors import CacheError


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def shard(first, count):
    """Images with a class and a caption beside each."""
    members = []
    for i in range(first, first + count):
        members += [(f"x/{i:04d}.png", png(i)), (f"x/{i:04d}.cls", b"%d" % (i % 3))]
        members += [(f"x/{i:04d}.txt", f"picture {i}".encode())] if i % 2 else []
    return tar_bytes(members)


@pytest.fixture
def memory():
    store = fsspec.filesystem("memory")
    store.pipe_file("/wds/00000.tar", shard(0, 6))
    store.pipe_file("/wds/00001.tar", shard(6, 3))
    store.pipe_file("/wds/readme.md", b"")
    yield store
    store.rm("/wds", recursive=True)


@pytest.mark.parametrize("url", ["memory://wds/*.tar", "memory://wds", "memory://wds/{00000..00001}.tar"])
def test_a_url_gives_the_bytes_of_the_files(memory, tmp_path, url):
    (tmp_path / "wds").mkdir()
    for name in ("00000.tar", "00001.tar"):
        (tmp_path / "wds" / name).write_bytes(memory.cat_file(f"/wds/{name}"))
    columns = {"labels": "cls", "captions": "txt"}
    run(tmp_path / "wds", tmp_path / "local", **columns)
    assert run(url, tmp_path / "remote", kind="tar", **columns).cached == 9
    local, remote = (LatentDataset(tmp_path / name, verify=True) for name in ("local", "remote"))
    for a, b in zip(local, remote, strict=True):
        assert torch.equal(a.pop("latents"), b.pop("latents")) and a == b
    assert remote[1]["caption"] == "picture 1" and remote[1]["label"] == 1


def test_a_run_that_goes_on_lists_by_the_plan(memory, tmp_path, monkeypatch):
    """Remote tar files of the same time are not read again to be listed; captions of the rest are found still."""
    columns = {"labels": "cls", "captions": "txt"}
    run("memory://wds/*.tar", tmp_path / "whole", kind="tar", **columns)

    def stop(self, task, found):
        if task.number == 2:
            raise KeyboardInterrupt
        return write(self, task, found)

    from capacitor_rt.cache.store import TaskStore

    write = TaskStore.write
    with monkeypatch.context() as patch:
        patch.setattr(TaskStore, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            run("memory://wds/*.tar", tmp_path / "out", kind="tar", **columns)
    listed = []
    members = tar.tar_list.members
    monkeypatch.setattr(
        tar.tar_list, "members", lambda files, name, *a, **k: listed.append(name) or members(files, name, *a, **k)
    )
    assert run("memory://wds/*.tar", tmp_path / "out", kind="tar", **columns).exit_code == 0
    # of the task that was left to do, for its captions
    assert listed == [b"00001.tar"]
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    # one that was replaced is listed, and noticed
    memory.pipe_file("/wds/00000.tar", shard(1, 6))
    with pytest.raises(CacheError, match="other inputs"):
        run("memory://wds/*.tar", tmp_path / "out", kind="tar", **columns)


def test_numbered_names_are_those_of_webdataset():
    assert expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("{0..1}-{5..6}.tar") == ["0-5.tar", "0-6.tar", "1-5.tar", "1-6.tar"]
    assert expand("plain-{a,b}.tar") == ["plain-{a,b}.tar"]
    with pytest.raises(CacheError, match="stands for 10000000000 files"):
        expand("{0..9999999999}.tar")


@pytest.fixture
def server():
    pytest.importorskip("aiohttp", reason="files over HTTP need aiohttp")
    with serving() as held:
        held.files["/data/a.tar"] = shard(0, 8)
        yield held


def cache_http(server, out, *, give_up=False, attempts=2):
    options = RunOptions(workers=0, progress=False, backoff=(0.0,) * (attempts - 1), give_up=give_up)
    return cache_images(f"{server.url}/data/a.tar", out, random_model(), REQUEST, options=options)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_once_is_tried_again(server, tmp_path, fault):
    source = open_source(f"{server.url}/data/a.tar", tmp_path)
    assert len(source.listing) == 8 and source.listing.mtimes[0] == -1
    cache_http(server, tmp_path / "whole")
    original = tar.TarReader.expect

    def failing(self, ordinals):
        # the list is read by then
        if not started:
            started.append(ordinals)
            server.faults["/data/a.tar"] = [fault]
        original(self, ordinals)

    started: list[range] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar.TarReader, "expect", failing)
        report = cache_http(server, tmp_path / "out", attempts=3)
    assert started and server.faults["/data/a.tar"] == [] and report.exit_code == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_what_stays_wrong_leaves_the_task_for_later_and_never_quarantines(server, tmp_path, monkeypatch):
    original = tar.TarReader.expect

    def failing(self, ordinals):
        server.faults["/data/a.tar"] = ["reset"] * 500
        original(self, ordinals)

    with monkeypatch.context() as patch:
        patch.setattr(tar.TarReader, "expect", failing)
        report = cache_http(server, tmp_path / "out")
    assert (report.exit_code, report.unfinished, set(report.failed), report.quarantined) == (1, 2, {"io_error"}, {})
    server.faults.clear()
    assert cache_http(server, tmp_path / "out").exit_code == 0


def test_members_are_fetched_in_spans_each_once(server, tmp_path, monkeypatch):
    source = open_source(f"{server.url}/data/a.tar", tmp_path)
    server.requests.clear()
    server.sent.clear()
    reader = source.open()
    reader.expect(range(8))
    assert [reader.read(i) for i in (1, 0, 3, 2, 7, 6, 5, 4)] == [png(i) for i in (1, 0, 3, 2, 7, 6, 5, 4)]
    assert server.requests["/data/a.tar"] == 1 and not reader.members._spans
    # not expected: alone; a span is no longer than it may be
    assert reader.read(3) == png(3) and server.requests["/data/a.tar"] == 2
    monkeypatch.setattr(spans, "SPAN_BYTES", 2 * len(png(0)) + 2048)
    reader = source.open()
    # from here on spans are fetched ahead
    server.requests.clear()
    reader.expect(range(8))
    assert [reader.read(i) for i in range(8)] == [png(i) for i in range(8)]
    assert 3 <= server.requests["/data/a.tar"] <= 5


def test_spans_are_fetched_ahead_within_a_bound(server, tmp_path, monkeypatch):
    source = open_source(f"{server.url}/data/a.tar", tmp_path)
    monkeypatch.setattr(spans, "SPAN_BYTES", len(png(0)))
    for held, most in ((spans.HELD_BYTES, 8), (1, 1 + spans.FETCHERS)):
        monkeypatch.setattr(spans, "HELD_BYTES", held)
        reader = source.open()
        server.requests.clear()
        reader.expect(range(8))
        reader.members._fetchers.shutdown(wait=True)
        assert 1 <= server.requests["/data/a.tar"] <= most
        assert [reader.read(i) for i in range(8)] == [png(i) for i in range(8)]
        # nothing is fetched twice, and nothing is held
        assert server.requests["/data/a.tar"] == 8 and reader.members._held == 0


@pytest.mark.parametrize("change", ["cut", "longer", "gone"])
def test_a_file_that_is_another_one_now_is_for_now(server, tmp_path, change):
    reader = open_source(f"{server.url}/data/a.tar", tmp_path).open()
    data = server.files["/data/a.tar"]
    server.files["/data/a.tar"] = {"cut": data[:-600], "longer": data + b"x", "gone": data}[change]
    if change == "gone":
        del server.files["/data/a.tar"]
    with pytest.raises(Exception, match=r"another one than|is gone") as raised:
        reader.read(7)
    assert raised.value.reason == "changed"


def test_a_tar_file_cut_short_is_refused_when_it_is_listed(server, tmp_path):
    server.files["/data/a.tar"] = server.files["/data/a.tar"][:9000]
    with pytest.raises(CacheError, match=r"/data/a\.tar cannot be read as an uncompressed tar file"):
        open_source(f"{server.url}/data/a.tar", tmp_path)
    server.files["/data/0.tar"] = shard(0, 1)
    with pytest.raises(CacheError, match=r"/data/1\.tar does not exist"):
        open_source(f"{server.url}/data/{{0..1}}.tar", tmp_path)
    with pytest.raises(CacheError, match=r"/data/b\.tar does not exist"):
        open_source(f"{server.url}/data/b.tar", tmp_path, columns=ColumnsRequest())
