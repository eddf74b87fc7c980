"""Runs that end at any moment: kill -9, Ctrl-C, SIGTERM, a full disk. What is left is whole, the next run goes on."""

from __future__ import annotations

import errno
import fcntl
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
from cache_cases import commits_of, snapshot, task_files, write_images
from kill_driver import REQUEST, VIEWS
from models import random_model
from waiting import HANG_SECONDS

from capacitor_rt.cache import CacheRequest, cache_images, soundness
from capacitor_rt.cache import folder as folder_module
from capacitor_rt.cache.decoding import work
from capacitor_rt.cache.decoding.reading import Ahead
from capacitor_rt.cache.folder import CacheFolder, DiskFull
from capacitor_rt.cache.mutex import Mutex, me, owner_bytes
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError

HERE = Path(__file__).parents[1] / "support"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def run(src, out, model, request=REQUEST):
    return cache_images(src, out, model, request, workers=0, progress=False)


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
    result = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=2 * HANG_SECONDS)
    assert result.returncode == 0, result.stderr
    return result


def test_killed_at_random_points_the_cache_ends_up_the_same_byte_for_byte(tmp_path, src, whole):
    kills = 0
    # near its end a run may be over before it was disturbed often enough
    for attempt in range(6):
        seed, out = random.randrange(1 << 30), tmp_path / f"out-{attempt}"
        died = [int(n) for n in drive("kill", src, out, 9, seed).stdout.split()]
        # no task is lost
        assert died == sorted(died)
        assert snapshot(out) == snapshot(whole), f"seed {seed}"
        kills += len(died)
        if kills >= 6:
            return
    raise AssertionError(f"only {kills} of 54 kills struck a run")


def test_killed_at_random_points_every_view_ends_up_the_same(tmp_path, src):
    model = random_model()
    for name, request in VIEWS.items():
        run(src, tmp_path / "alone" / name, model, request)
    kills = 0
    for attempt in range(4):
        seed, out = random.randrange(1 << 30), tmp_path / f"out-{attempt}"
        died = [int(n) for n in drive("kill-views", src, out, 6, seed).stdout.split()]
        assert died == sorted(died)
        assert snapshot(out) == snapshot(tmp_path / "alone"), f"seed {seed}"
        kills += len(died)
        if kills >= 4:
            return
    raise AssertionError(f"only {kills} of 24 kills struck a run")


def test_what_is_done_is_not_decoded_again(src, out, whole, monkeypatch):
    lines = (out / "commits.jsonl").read_bytes().splitlines(keepends=True)
    lost = [commits_of(out)[n] for n in (len(lines) - 2, len(lines) - 1)]
    (out / "commits.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:30])
    for commit in lost:
        for path in task_files(out, commit.task):
            path.unlink()
    decoded = []
    original = Ahead._attempt
    monkeypatch.setattr(Ahead, "_attempt", lambda self, i: decoded.append(i) or original(self, i))
    run(src, out, random_model())
    assert len(decoded) == sum(commit.inputs for commit in lost)
    assert snapshot(out) == snapshot(whole)


def test_a_lost_commit_log_is_written_anew_from_the_tasks(src, out, whole, monkeypatch):
    (out / "commits.jsonl").unlink()
    monkeypatch.delattr(work, "load_views")
    run(src, out, random_model())
    assert snapshot(out) == snapshot(whole)


def test_an_uncommitted_task_that_does_not_fit_its_index_is_refused(src, out, whole):
    last = max(commits_of(out))
    index, data = task_files(out, last)
    (out / "commits.jsonl").unlink()
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheError, match=rf"{data.name} is not committed, and does not match its index.*--repair"):
        run(src, out, random_model())
    data.unlink()
    index.unlink()
    run(src, out, random_model())
    assert snapshot(out) == snapshot(whole)


def test_an_index_that_is_not_the_one_that_the_latents_name_is_not_parsed(src, out, monkeypatch):
    """Nothing vouches for an uncommitted index but its latents, and a parser is not fed bytes from nowhere."""
    index, _ = task_files(out, max(commits_of(out)))
    (out / "commits.jsonl").unlink()
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheError, match="is not the one that it names"):
        run(src, out, random_model())


def test_a_deleted_task_is_written_again(src, out, whole):
    for path in task_files(out, 2):
        path.unlink()
    run(src, out, random_model())
    assert snapshot(out) == snapshot(whole)


@pytest.mark.parametrize("which", [0, 1])
def test_a_task_of_which_one_file_is_missing_is_refused(src, out, which):
    task_files(out, 2)[which].unlink()
    with pytest.raises(CacheError, match=r"is damaged: run .*verify --repair.*\n.* is missing"):
        run(src, out, random_model())


def test_latents_cut_short_are_refused_before_work_starts(src, out, whole):
    _, data = task_files(out, 2)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CacheError, match=rf"verify --repair.*\n.*{data.name} is damaged: its header or its size"):
        run(src, out, random_model())


def test_a_changed_byte_in_latents_is_found_before_work_starts(src, out, whole):
    """Whatever is not known to be the file that was hashed is hashed again."""
    _, data = task_files(out, 2)
    run(src, out, random_model())
    stat = data.stat()
    whole_bytes = data.read_bytes()
    data.write_bytes(whole_bytes[:-1] + bytes([whole_bytes[-1] ^ 1]))
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CacheError, match=rf"{data.name} is damaged: its hash"):
        run(src, out, random_model())


def test_latents_are_hashed_once_by_a_machine(src, out, monkeypatch):
    hashed = []
    original = soundness.file_hashes

    def counted(folder, name, placed):
        hashed.append(name)
        return original(folder, name, placed)

    monkeypatch.setattr(soundness, "file_hashes", counted)
    run(src, out, random_model())
    assert len(hashed) == len(commits_of(out))
    hashed.clear()
    run(src, out, random_model())
    assert not hashed
    (out / ".stamps").write_bytes(b"\0not a stamp\n")
    run(src, out, random_model())
    assert len(hashed) == len(commits_of(out))


def test_a_file_that_differs_is_never_replaced(src, out, whole):
    last = max(commits_of(out))
    index, data = task_files(out, last)
    lines = (out / "commits.jsonl").read_bytes().splitlines(keepends=True)
    (out / "commits.jsonl").write_bytes(b"".join(lines[:-1]))
    index.unlink()
    data.write_bytes(b"somebody's")
    with pytest.raises(CacheError, match=r"is not committed, and its index .* is missing"):
        run(src, out, random_model())
    assert data.read_bytes() == b"somebody's"


def test_a_damaged_commit_line_counts_as_lost(src, out, whole):
    log = out / "commits.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(
        lines[0] + b"\0\0\0\n" + b"".join(lines[2:3]) + lines[3].replace(b'"rows":3', b'"rows":2') + b"".join(lines[4:])
    )
    assert "damaged in line 2" in verify(out).problems[0]
    told: list[str] = []
    cache_images(src, out, random_model(), REQUEST, progress=False, note=told.append)
    assert any("damaged and counts as lost" in line for line in told)
    assert snapshot(out) == snapshot(whole)
    assert verify(out).problems == []


def test_a_line_is_known_to_be_damaged_by_itself(out):
    """Each byte of a line is vouched for by the line's own hash."""
    log = out / "commits.jsonl"
    line = log.read_bytes().splitlines()[0]
    for at in range(len(line)):
        log.write_bytes(line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :] + b"\n")
        assert commits_of(out) == {}, at


HOLD = (
    "import sys, time; from capacitor_rt.cache.folder import CacheFolder; from capacitor_rt.cache.mutex import Mutex\n"
    f"with Mutex(CacheFolder(sys.argv[1])): print('held', flush=True); time.sleep({HANG_SECONDS})"
)


def test_the_lock_of_a_dead_process_is_no_lock(src, out, whole):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True, env=ENV)
    try:
        assert holder.stdout.readline() == "held\n"
        with CacheFolder(out) as folder:
            assert Mutex(folder)._try() is None
    finally:
        holder.kill()
        holder.wait()
    run(src, out, random_model())
    assert snapshot(out) == snapshot(whole)


def test_whoever_waits_is_told_for_whom(out, monkeypatch):
    monkeypatch.setattr("capacitor_rt.cache.mutex.PATIENCE", 0.1)
    told: list[str] = []

    def tell(line):
        told.append(line)
        holder.kill()

    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True, env=ENV)
    assert holder.stdout.readline() == "held\n"
    with CacheFolder(out) as folder, Mutex(folder, tell):
        pass
    holder.wait()
    assert told == [f"waiting for process {holder.pid} on {socket.gethostname()}, which is writing to {out}"]


def test_without_kernel_locks_a_file_is_the_lock(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with CacheFolder(tmp_path) as folder:
        with Mutex(folder):
            assert Mutex(folder)._try() is None
        dead = subprocess.Popen(["true"])
        dead.wait()
        (tmp_path / ".lock.held").write_bytes(owner_bytes(me()._replace(pid=dead.pid)))
        with Mutex(folder):
            pass
        assert not (tmp_path / ".lock.held").exists()


def test_a_file_that_outgrows_the_disk_leaves_nothing(tmp_path, src):
    out = tmp_path / "new"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # enough for every file but the latents: a header of 4 KiB and 30 rows of 1 KiB
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, limit[1]))
    try:
        with pytest.raises(DiskFull, match=r"no space left for .*safetensors.*finished tasks are safe"):
            run(src, out, random_model(), CacheRequest(64, dtype="fp32", posterior=True, task_inputs=30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(out.rglob("*.tmp-*")) and not list(out.rglob("*.safetensors"))
    assert len(commits_of(out)) == 0


def test_after_a_full_disk_the_same_command_goes_on(tmp_path, src, whole, monkeypatch):
    out = tmp_path / "new"
    write, left = os.write, [20 << 10]

    def limited(fd, data):
        data = memoryview(data)[: left[0]]
        if not len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= len(data)
        return write(fd, data)

    monkeypatch.setattr(folder_module.os, "write", limited)
    done: list[int] = []
    while True:
        try:
            run(src, out, random_model())
            break
        except DiskFull:
            left[0] = 80 << 10
            done.append(len(commits_of(out)))
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
        assert 0 < len(commits_of(out)) < 60
        assert {p.name for p in out.iterdir()} >= {"plan.json", "quarantine.jsonl"}
        assert not list(out.rglob("*.tmp-*")) and not (out / ".lock").exists()
    done = len(commits_of(outs[0]))
    lines: list[str] = []
    report = cache_images(
        src, outs[0], tmp_path / "model", CacheRequest(32, task_inputs=2), progress=False, note=lines.append
    )
    assert (report.cached, report.new_images) == (120, 120 - 2 * done)
    assert lines == [f"going on: {done} of 60 tasks are done"]
