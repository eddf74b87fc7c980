"""Several processes that write one cache share the tasks, take over those of the dead, and leave the same bytes."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cache_cases import commits_of, snapshot, write_images
from held import last_task
from kill_driver import REQUEST, in_child
from models import random_model
from waiting import HANG_SECONDS, until

from capacitor_rt.cache import LatentDataset, RunOptions, cache_images
from capacitor_rt.cache.folder import LEASES, TMP, CacheFolder
from capacitor_rt.cache.leases import Leases
from capacitor_rt.cache.mutex import LOCK, Mutex, me, owner_bytes
from capacitor_rt.cache.task_queue import remove_stale
from capacitor_rt.cache.verify import verify

HERE = Path(__file__).parents[1] / "support"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes") / "src"
    write_images(folder, 90, sizes=((40, 40), (20, 80), (90, 24)))
    (folder / "004b.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def whole(src):
    cache_images(src, src.parent / "whole", random_model(), REQUEST, workers=0, progress=False)
    return src.parent / "whole"


def share(src, out, count, kills, seed):
    """How much each process has read that ended by itself, and all exit codes."""
    args = [sys.executable, HERE / "kill_driver.py", "share", src, out, count, kills, seed]
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, env=ENV, timeout=2 * HANG_SECONDS)
    assert done.returncode == 0 and not done.stderr, done.stderr
    codes = [int(code) for code in done.stdout.partition("codes ")[2].split()]
    return [int(n) for n in re.findall(r"read (\d+)", done.stdout)], codes


def test_two_processes_share_the_work_and_leave_the_bytes_of_one(tmp_path, src, whole):
    read, codes = share(src, tmp_path / "out", 2, 0, 0)
    assert codes == [3, 3]
    # nothing is done twice, and both have worked, as each has a task before one goes on
    assert sum(read) == 91 and min(read) > 0
    assert snapshot(tmp_path / "out") == snapshot(whole)


RIVALS = """
import os, sys, time
from dataclasses import replace
from kill_driver import REQUEST, in_child
from models import random_model
from capacitor_rt.cache import RunOptions, cache_images
from capacitor_rt.errors import CacheError

def run(side):
    time.sleep(max(0, begin - time.time()))
    try:
        options = RunOptions(workers=0, progress=False)
        report = cache_images(*sys.argv[1:3], model, replace(REQUEST, side=side), options=options)
    except CacheError as e:
        refused = "was planned otherwise" in str(e) and f"geometry.side {96 - side} -> {side}" in str(e)
        return 1 if refused else 70
    return report.exit_code

model, begin = random_model(), time.time() + 0.2
children = [in_child(lambda side=side: run(side)) for side in (32, 64)]
print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_of_two_that_want_different_things_of_one_place_one_is_refused(tmp_path, src, whole):
    """Whichever planned first: its cache is whole, and nothing of the other's is in it."""
    command = [sys.executable, "-c", RIVALS, str(src), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=2 * HANG_SECONDS)
    codes = [int(code) for code in done.stdout.split()]
    assert sorted(codes) == [1, 3] and not done.stderr, done
    found = verify(tmp_path / "out")
    assert not found.problems and not found.notes and not found.unfinished
    if codes[0] == 3:
        assert snapshot(tmp_path / "out") == snapshot(whole)
    else:
        assert {size.height * size.width for size in LatentDataset(tmp_path / "out", verify=True).buckets} >= {64 * 64}


def test_the_living_take_over_the_tasks_of_the_killed(tmp_path, src, whole):
    seed = random.randrange(1 << 30)
    _, codes = share(src, tmp_path / "out", 3, 2, seed)
    # one that was to be killed may have ended before
    assert codes.count(3) + codes.count(-9) == 3 and codes.count(3) >= 1, seed
    assert snapshot(tmp_path / "out") == snapshot(whole), seed
    assert verify(tmp_path / "out").problems == []


# no test takes so long
STALE = 3600


@pytest.fixture
def leases(tmp_path):
    with CacheFolder(tmp_path) as folder:
        yield Leases(folder, Mutex(folder), "01234567", heartbeat=0.05, stale=STALE)


def another(leases):
    return Leases(leases.folder, Mutex(leases.folder), leases.plan8, heartbeat=0.05, stale=STALE)


def test_a_lease_is_one_process_s_while_it_is_touched(leases, tmp_path):
    other = another(leases)
    with leases:
        assert leases.take(3) and leases.holds(3)
        assert not other.take(3) and other.take(4)
        # one that has not been touched for so long is another's, had it not been touched
        os.utime(tmp_path / leases.name(3), (1, 1))
        until(lambda: (tmp_path / leases.name(3)).stat().st_mtime != 1)
        assert not other.take(3) and leases.holds(3)
        leases.release(3)
        assert other.take(3) and other.holds(3) and not leases.holds(3)


def test_a_folder_that_another_removes_before_there_is_a_file_in_it(tmp_path):
    """Whoever gives the last lease back removes the folder, and another process may want it at that moment."""
    (tmp_path / "out").mkdir()
    end = time.monotonic() + 1.0

    def remove() -> int:
        with CacheFolder(tmp_path / "out") as folder:
            while time.monotonic() < end:
                folder.remove_folder(LEASES)
                time.sleep(0.0002)
        return 0

    # no thread: it would take turns with this one, and find the folder empty each time
    child = in_child(remove)
    with CacheFolder(tmp_path / "out") as folder:
        leases = Leases(folder, Mutex(folder), "0" * 8)
        while time.monotonic() < end:
            assert abs(leases._now() - time.time()) < HANG_SECONDS
    assert os.waitpid(child, 0)[1] == 0


def test_a_folder_that_another_removes_whenever_the_disk_is_waited_for(tmp_path, monkeypatch):
    """As on one busy core, where whoever waits for the disk lets the other run."""
    (tmp_path / "out").mkdir()
    with CacheFolder(tmp_path / "out") as folder, CacheFolder(tmp_path / "out") as other:
        fsync, synced = os.fsync, []

        def removed_meanwhile(fd: int) -> None:
            other.remove_folder(LEASES)
            fsync(fd)
            synced.append(fd)

        monkeypatch.setattr(os, "fsync", removed_meanwhile)
        leases = Leases(folder, Mutex(folder), "0" * 8)
        assert leases.take(3) and leases.holds(3)
        # the folder that stayed, too
        assert len(synced) == 2
        leases.release(3)


def test_an_untouched_lease_is_taken_over_and_its_holder_knows(leases, tmp_path):
    assert leases.take(3)
    elsewhere = me()._replace(host="elsewhere")
    (tmp_path / leases.name(3)).write_bytes(owner_bytes(elsewhere))
    other = another(leases)
    assert not other.take(3)
    os.utime(tmp_path / leases.name(3), (1, 1))
    assert other.take(3)
    assert other.holds(3) and not leases.holds(3)
    # what a holder that was thought dead gives back is another's
    leases.release(3)
    assert other.holds(3)


def test_a_lease_that_this_process_gave_back_and_could_not_remove_is_taken_at_once(leases, tmp_path, monkeypatch):
    assert leases.take(3)
    with monkeypatch.context() as patch:
        patch.setattr(CacheFolder, "unlink", lambda self, name: (_ for _ in ()).throw(OSError(30, "read-only")))
        leases.release(3)
    assert (tmp_path / leases.name(3)).exists()
    other = another(leases)
    assert other.take(3) and other.holds(3)
    # one that another run of this process has is its own
    assert not leases.take(3)


@pytest.mark.parametrize("seconds", [STALE / 2, -2 * STALE, 2 * STALE])
def test_a_lease_is_alive_by_its_time_whatever_it_holds(leases, tmp_path, seconds):
    """One of the future, which no living process touches, would be waited for until then."""
    (tmp_path / "leases").mkdir()
    lease = tmp_path / leases.name(3)
    lease.write_text('{"host": "elsewhere", "pid": 1e999, "start": 1}')
    now = time.time()
    os.utime(lease, (now + seconds, now + seconds))
    with leases, leases.mutex:
        assert leases.take(3) == (abs(seconds) > STALE)


def test_leases_are_seen_although_their_folder_was_removed_meanwhile(leases, tmp_path):
    """A process that has nothing more to do removes the folder; another may begin again while a third looks on."""
    assert leases.take(3)
    other = another(leases)
    leases.release(3)
    other.folder = CacheFolder(tmp_path)
    assert other.living_stems() == set()
    (tmp_path / LEASES).rmdir()
    assert other.take(4)
    assert leases.living_stems() == {"01234567-000004"}
    assert not leases.take(4) and leases.take(5)
    other.folder.close()


def test_the_lease_of_a_dead_process_of_this_host_is_taken_at_once(leases, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / LEASES).mkdir()
    (tmp_path / leases.name(3)).write_bytes(owner_bytes(me()._replace(pid=dead.pid)))
    assert leases.take(3)
    # of one that has this number now and was started later
    (tmp_path / leases.name(4)).write_bytes(owner_bytes(me()._replace(start=1)))
    assert leases.take(4)


@pytest.mark.parametrize("call", ["open", "pwrite", "rename", "utime"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_whoever_is_killed_as_it_takes_a_lease_is_not_waited_for(leases, tmp_path, call, moment):
    """Or as it asks for the time: at whichever call, and nothing of it is left."""
    child = in_child(lambda: killed_at(leases, call, moment))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with leases:
        with leases.mutex:
            assert leases.living_stems() == set()
            assert leases.take(3)
        assert [path.name for path in (tmp_path / LEASES).glob("*-*") if TMP not in path.name] == ["01234567-000003"]
    assert not (tmp_path / LEASES).exists()
    with leases.mutex:
        assert remove_stale(leases.folder, leases) == 0


def killed_at(leases, call, moment):
    """In a child: take a lease, ask for the time, and be killed at the first call of that name on a file of leases."""
    real = getattr(os, call)

    def killed(*args, **kwargs):
        mine = call != "open" or (args[1] & os.O_CREAT and args[0] != LOCK)
        if mine and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    with leases.mutex:
        setattr(os, call, killed)
        leases.take(3)
        leases._now()
    return 0


def test_a_run_waits_for_the_tasks_of_others_and_takes_them_over(tmp_path, src, whole, monkeypatch):
    """A process of another machine has a task and stops touching its lease: the run ends with that task done."""
    monkeypatch.setattr("capacitor_rt.cache.run.POLL_SECONDS", 0.05)
    out = tmp_path / "out"
    plan8, _ = last_task(whole)
    (out / LEASES).mkdir(parents=True)
    lease = out / LEASES / f"{plan8}-000005"
    lease.write_bytes(owner_bytes(me()._replace(host="elsewhere")))
    waited: list[int] = []

    def die():
        until(lambda: len(commits_of(out)) == len(commits_of(whole)) - 1)
        waited.append(len(commits_of(out)))
        os.utime(lease, (1, 1))

    thread = threading.Thread(target=die, daemon=True)
    thread.start()
    options = RunOptions(workers=0, progress=False, stale=STALE)
    report = cache_images(src, out, random_model(), REQUEST, options=options)
    thread.join()
    assert waited and report.exit_code == 3
    assert snapshot(out) == snapshot(whole)


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}, (6, 8)),
        ({"RANK": "one", "WORLD_SIZE": "4"}, (0, 1)),
    ],
)
def test_where_a_process_begins(monkeypatch, env, place):
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert RunOptions().place() == place
    assert RunOptions(rank=1, world_size=3).place() == (1, 3)
