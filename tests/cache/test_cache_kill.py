"""Runs that end at any moment: kill -9, Ctrl-C, SIGTERM, a full disk. What is left is whole, the next run goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cache_cases import snapshot, write_images
from kill_driver import REQUEST
from models import random_model

from capacitor_rt.cache import CacheRequest, cache_images, durable
from capacitor_rt.cache import pipeline as pipeline_module
from capacitor_rt.cache.durable import DiskFull, read_commits
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError

HERE = Path(__file__).parents[1] / "support"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def run(src, out, model, request=REQUEST):
    return cache_images(src, out, model, request, workers=2, progress=False)


def mixed_folder(src: Path, count: int) -> None:
    """Images in three buckets, and some that fail in their header or in their pixels."""
    paths = write_images(src, count, sizes=((40, 40), (20, 80), (90, 24)))
    data = paths[0].read_bytes()
    (src / "004b-cut.png").write_bytes(data[: len(data) // 2])
    (src / "017b-empty.png").write_bytes(b"")
    (src / "text.jpg").write_text("text")


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "src"
    mixed_folder(folder, 48)
    return folder


@pytest.fixture(scope="module")
def whole(src):
    """A cache of `src` that nothing has disturbed."""
    run(src, src.parent / "whole", random_model())
    return src.parent / "whole"


@pytest.fixture
def out(tmp_path, whole):
    """A copy of the undisturbed cache."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def drive(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "kill_driver.py"), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


def test_killed_at_random_points_the_cache_ends_up_the_same_byte_for_byte(tmp_path, src, whole):
    kills = 0
    # on a busy machine a run may be over before it was disturbed often enough
    for attempt in range(6):
        seed, out = random.randrange(1 << 30), tmp_path / f"out-{attempt}"
        died = [int(n) for n in drive("kill", src, out, 9, seed).stdout.split()]
        # no shard is lost
        assert died == sorted(died)
        assert snapshot(out) == snapshot(whole), f"seed {seed}"
        kills += len(died)
        if kills >= 6:
            return
    raise AssertionError(f"only {kills} of 54 kills struck a run")


def test_what_is_done_is_not_decoded_again(src, out, whole, monkeypatch):
    lines = (out / "commits.jsonl").read_bytes().splitlines(keepends=True)
    lost = [json.loads(line) for line in lines[-2:]]
    (out / "commits.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:30])
    for record in lost:
        (out / record["shard"]).unlink()
        (out / record["index"]).unlink()
    decoded = []
    original = pipeline_module.Loader.__call__
    monkeypatch.setattr(
        pipeline_module.Loader, "__call__", lambda self, i, b: decoded.append(i) or original(self, i, b)
    )
    run(src, out, random_model())
    assert len(decoded) == sum(record["inputs"] for record in lost)
    assert snapshot(out) == snapshot(whole)


def test_a_lost_commit_log_is_written_anew_from_the_shards(src, out, whole, monkeypatch):
    (out / "commits.jsonl").unlink()
    monkeypatch.delattr(pipeline_module, "open_image")
    run(src, out, random_model())
    assert snapshot(out) == snapshot(whole)


def test_an_uncommitted_shard_that_does_not_fit_its_index_is_refused(src, out, whole):
    commit = list(read_commits(out).values())[-1]
    (out / "commits.jsonl").unlink()
    shard = out / commit["shard"]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheError, match=r"does not match its index .*delete both"):
        run(src, out, random_model())
    shard.unlink()
    (out / commit["index"]).unlink()
    run(src, out, random_model())
    assert snapshot(out) == snapshot(whole)


def test_a_deleted_shard_is_written_again(src, out, whole):
    commit = list(read_commits(out).values())[2]
    (out / commit["shard"]).unlink()
    (out / commit["index"]).unlink()
    run(src, out, random_model())
    assert snapshot(out) == snapshot(whole)


def test_a_shard_cut_short_is_refused_before_work_starts(src, out, whole):
    commit = list(read_commits(out).values())[2]
    shard = out / commit["shard"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CacheError, match=rf"{shard.name} is damaged: .* bytes.*: delete {commit['shard']} and"):
        run(src, out, random_model())


def test_a_file_that_differs_is_never_replaced(src, out, whole):
    commit = list(read_commits(out).values())[-1]
    lines = (out / "commits.jsonl").read_bytes().splitlines(keepends=True)
    (out / "commits.jsonl").write_bytes(b"".join(lines[:-1]))
    (out / commit["index"]).unlink()
    (out / commit["shard"]).write_bytes(b"somebody's")
    with pytest.raises(CacheError, match="exists and differs"):
        run(src, out, random_model())
    assert (out / commit["shard"]).read_bytes() == b"somebody's"


def test_a_damaged_commit_line_is_named_and_can_be_dropped(src, out, whole):
    log = out / "commits.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + b"\0\0\0\n" + b"".join(lines[2:]))
    with pytest.raises(CacheError, match=r"commits\.jsonl line 2 is damaged: delete that line"):
        run(src, out, random_model())
    log.write_bytes(lines[0] + b"".join(lines[2:]))
    run(src, out, random_model())
    assert sorted(log.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert verify(out).problems == []


def test_two_processes_cannot_write_one_cache(src, out, whole):
    hold = (
        "import sys, time; from pathlib import Path; from capacitor_rt.cache.durable import Lock\n"
        "with Lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(out)], stdout=subprocess.PIPE, text=True, env=ENV)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CacheError, match=f"is being written by process {holder.pid} on .*: wait for it to end"):
            run(src, out, random_model())
    finally:
        holder.kill()
        holder.wait()
    # the kernel has dropped the lock of the dead holder
    run(src, out, random_model())
    assert snapshot(out) == snapshot(whole)


def test_without_kernel_locks_the_file_itself_is_the_lock(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (
        durable.Lock(tmp_path),
        pytest.raises(CacheError, match="if that process is gone, delete"),
        durable.Lock(tmp_path),
    ):
        pass
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    (tmp_path / ".lock").write_text(f'{{"host":"{host}","pid":{dead.pid}}}')
    with durable.Lock(tmp_path):
        pass


def test_a_file_that_outgrows_the_disk_leaves_nothing(tmp_path, src):
    out = tmp_path / "new"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # enough for every file but a shard: a header of 4 KiB and 30 rows of 1 KiB
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(DiskFull, match=r"no space left for .*safetensors.*finished shards are safe"):
            run(src, out, random_model(), CacheRequest(64, dtype="fp32", posterior=True, shard_rows=30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(out.rglob("*.tmp-*")) and not list(out.rglob("*.safetensors"))
    assert len(read_commits(out)) == 1


def test_after_a_full_disk_the_same_command_goes_on(tmp_path, src, whole, monkeypatch):
    out = tmp_path / "new"
    write, left = os.write, [20 << 10]

    def limited(fd, data):
        data = memoryview(data)[: left[0]]
        if not len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= len(data)
        return write(fd, data)

    monkeypatch.setattr(durable.os, "write", limited)
    done: list[int] = []
    while True:
        try:
            run(src, out, random_model())
            break
        except DiskFull:
            left[0] = 60 << 10
            done.append(len(read_commits(out)) if out.exists() else 0)
            assert not list(out.rglob("*.tmp-*"))
            assert len(done) < 100
    assert len(done) > 3 and done == sorted(done)
    monkeypatch.undo()
    assert snapshot(out) == snapshot(whole)


def test_an_interrupted_command_says_so_and_goes_on(tmp_path):
    src, model = tmp_path / "src", random_model()
    write_images(src, 120, sizes=((40, 40),))
    model.save_pretrained(tmp_path / "model")
    outs = [tmp_path / "interrupted", tmp_path / "terminated"]
    numbers = [int(signal.SIGINT), int(signal.SIGTERM)]
    driver = drive("signal", src, tmp_path / "model", outs[0], numbers[0], outs[1], numbers[1])
    assert driver.stdout.split() == ["130", "143"], driver.stderr
    assert driver.stderr.count("the same command goes on from there") == 2
    assert "Traceback" not in driver.stderr
    for out in outs:
        assert 0 < len(read_commits(out)) < 60
        assert {p.name for p in out.iterdir()} >= {"plan.json", "quarantine.jsonl"}
        assert not list(out.rglob("*.tmp-*")) and not (out / ".lock").exists()
    done = len(read_commits(outs[0]))
    lines: list[str] = []
    report = cache_images(
        src, outs[0], tmp_path / "model", CacheRequest(32, shard_rows=2), progress=False, note=lines.append
    )
    assert (report.cached, report.new_images) == (120, 120 - 2 * done)
    assert lines == [f"going on: {done} of 60 shards are done"]
