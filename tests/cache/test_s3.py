"""Sources on S3, which moto plays in a process of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_faults import FAULTS, proxy
from test_remote_sources import png, run
from test_remote_tar import shard

from capacitor_rt.cache import LatentDataset
from capacitor_rt.errors import CacheError

for module, extra in (("s3fs", "s3"), ("moto", "test"), ("flask", "test"), ("flask_cors", "test")):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[{extra}]'")


# at a port that is free then, until whoever started it is gone
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def bucket():
    """A bucket with images, tar and Parquet files; its file system."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ,
        )
        try:
            # it answers by then
            port = int(server.stdout.readline())
            # which the decode workers see as well
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            s3fs.S3FileSystem.clear_instance_cache()
            store = s3fs.S3FileSystem()
            store.mkdir("photos")
            for i in range(3):
                store.pipe_file(f"photos/loose/{i}.png", png(i))
            store.pipe_file("photos/wds/0.tar", shard(0, 5))
            buffer = io.BytesIO()
            pq.write_table(pa.table({"image": [{"bytes": png(i), "path": None} for i in range(4)]}), buffer)
            store.pipe_file("photos/table/0.parquet", buffer.getvalue())
            store.port = port
            yield store
        finally:
            server.kill()
            server.communicate()
            s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("url", "workers", "ids"),
    [
        ("s3://photos/loose", 1, ["0.png", "1.png", "2.png"]),
        ("s3://photos/wds/0.tar", 0, [f"0.tar/x/{i:04d}.png" for i in range(5)]),
        ("s3://photos/table/*.parquet", 0, [f"0.parquet/{i:07d}" for i in range(4)]),
    ],
)
def test_sources_on_s3(bucket, tmp_path, url, workers, ids):
    report = run(url, tmp_path / "out", workers=workers)
    assert (report.exit_code, report.cached) == (0, len(ids))
    assert list(LatentDataset(tmp_path / "out", verify=True).ids) == ids
    assert run(url, tmp_path / "out").new_images == 0


def test_what_was_replaced_or_is_not_there(bucket, tmp_path):
    bucket.pipe_file("photos/other/0.tar", shard(0, 3))
    run("s3://photos/other/0.tar", tmp_path / "out")
    bucket.pipe_file("photos/other/0.tar", shard(1, 3))
    with pytest.raises(CacheError, match="planned for other inputs"):
        run("s3://photos/other/0.tar", tmp_path / "out")
    with pytest.raises(CacheError, match=r"s3://photos/other/1\.tar does not exist"):
        run("s3://photos/other/1.tar", tmp_path / "out2")


@pytest.fixture
def faults(bucket, monkeypatch):
    """What goes wrong with requests, by a proxy; the client's own attempts are few, and quick."""
    import s3fs

    with proxy(bucket.port) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        for i in range(6):
            bucket.pipe_file(f"photos/many/{i}.png", png(i))
        bucket.pipe_file("photos/tars/0.tar", shard(0, 3))
        bucket.pipe_file("photos/tars/1.tar", shard(3, 3))
        yield faults
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def undisturbed(bucket, tmp_path_factory):
    """The files of a cache of `photos/many`."""
    out = tmp_path_factory.mktemp("s3") / "out"
    for i in range(6):
        bucket.pipe_file(f"photos/many/{i}.png", png(i))
    run("s3://photos/many", out)
    return {p.name: p.read_bytes() for p in (out / "tasks").iterdir()}


@pytest.mark.parametrize("fault", FAULTS[::2])
def test_what_goes_wrong_once_in_the_middle_is_tried_again(undisturbed, faults, tmp_path, fault):
    faults.next["/photos/many/2.png"] = [fault]
    report = run("s3://photos/many", tmp_path / "out")
    assert (report.exit_code, report.cached) == (0, 6)
    assert not faults.next["/photos/many/2.png"] and faults.gets["/photos/many/2.png"] >= 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "tasks").iterdir()} == undisturbed


@pytest.mark.parametrize("fault", FAULTS[1::2])
def test_what_stays_wrong_costs_its_task_alone_until_the_next_run(undisturbed, faults, tmp_path, fault):
    faults.always["/photos/many/5.png"] = fault
    report = run("s3://photos/many", tmp_path / "out")
    assert (report.exit_code, report.unfinished, report.cached) == (1, 1, 4)
    assert list(report.failures) == ["5.png"] and not report.quarantined
    assert set(report.failed) <= {"io_error", "changed"}
    faults.always.clear()
    faults.gets.clear()
    report = run("s3://photos/many", tmp_path / "out")
    assert (report.exit_code, report.cached) == (0, 6)
    # what is committed is not fetched again
    assert {path for path, times in faults.gets.items() if times} == {"/photos/many/4.png", "/photos/many/5.png"}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "tasks").iterdir()} == undisturbed


@pytest.mark.parametrize("fault", ["SlowDown", "short"])
def test_a_tar_file_on_s3_that_fails_in_the_middle(faults, tmp_path, fault):
    url, path = "s3://photos/tars/*.tar", "/photos/tars/1.tar"
    run(url, tmp_path / "whole")
    # once to be listed; then its images fail
    faults.spared[path] = faults.gets[path] // 2
    faults.gets.clear()
    faults.always[path] = fault
    report = run(url, tmp_path / "out")
    assert (report.exit_code, report.cached, report.quarantined.total()) == (1, 3, 0)
    assert set(report.failed) <= {"io_error", "changed"}
    faults.always.clear()
    report = run(url, tmp_path / "out")
    assert (report.exit_code, report.cached) == (0, 6)
    for path in (tmp_path / "whole" / "tasks").iterdir():
        assert (tmp_path / "out" / "tasks" / path.name).read_bytes() == path.read_bytes()
