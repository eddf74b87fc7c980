"""Memory that workers share: nobody gets more than there is, nobody waits for ever, and the dead have nothing."""

from __future__ import annotations

import mmap
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
from decode_sources import Files
from waiting import HANG_SECONDS, until

from capacitor_rt.cache.decoding import DecodePool
from capacitor_rt.cache.decoding.allowance import Allowance
from capacitor_rt.cache.decoding.reading import Ahead
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.load import PixelPolicy

MB = 1 << 20


@pytest.fixture
def shared():
    """A file whose locks are the queue, and slots that forked processes share."""
    fd = os.memfd_create("allowance")
    os.ftruncate(fd, 4096)
    memory = mmap.mmap(fd, 4096)
    slots = np.frombuffer(memory, np.int64)[:256].reshape(-1, 32)[:, 0]
    yield fd, slots
    os.close(fd)


def fork(work) -> int:
    """Run `work` in a child, which ends with 0 if it returns True."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(int(HANG_SECONDS))
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_processes_never_have_more_than_there_is(shared):
    fd, slots = shared

    class Checked(Allowance):
        def have(self, nbytes: int) -> None:
            more = nbytes > self._mine
            super().have(nbytes)
            if more:
                # under the lock: the others can only have come to have less since
                others = int(self.slots.sum()) - nbytes
                assert others + nbytes <= self.common or others == 0

    def work(number: int) -> bool:
        rng = np.random.default_rng(number)
        mine = Checked(2000, slots, number, fd)
        for _ in range(300):
            if mine.take(int(rng.choice([10, 300, 400, 999, 1500])), wait=True):
                # what is optional is had or not, and never waited for
                mine.take(mine._mine + int(rng.integers(1, 400)), wait=False)
            mine.have(0)
        return True

    assert [code_of(pid) for pid in [fork(lambda n=n: work(n)) for n in range(8)]] == [0] * 8
    assert not slots.any()


def test_what_is_larger_than_all_comes_to_its_turn_and_whoever_waits_lets_nobody_past(shared):
    fd, slots = shared
    mine = Allowance(2000, slots, 0, fd)
    assert mine.take(100, wait=True)
    large = fork(lambda: Allowance(2000, slots, 1, fd).take(5000, wait=True) and slots[0] == 0)
    # there is room for little ones, which would keep the large one waiting for ever
    other = lambda: Allowance(2000, slots, 2, fd).take(10, wait=False)  # noqa: E731
    until(lambda: code_of(fork(other)) == 2)
    assert slots[1] == 0
    mine.have(0)
    assert code_of(large) == 0 and slots[1] == 5000
    # the dead have what they had until it is taken from them
    assert code_of(fork(other)) == 2
    slots[1] = 0
    assert code_of(fork(other)) == 0


def test_one_that_is_killed_while_it_waits_keeps_nobody(shared):
    fd, slots = shared
    mine = Allowance(2000, slots, 0, fd)
    assert mine.take(900, wait=True)
    waiting = fork(lambda: Allowance(2000, slots, 1, fd).take(500, wait=True))
    until(lambda: code_of(fork(lambda: Allowance(2000, slots, 2, fd).take(50, wait=False))) == 2)
    os.kill(waiting, signal.SIGKILL)
    assert code_of(waiting) == -signal.SIGKILL
    assert code_of(fork(lambda: Allowance(2000, slots, 2, fd).take(50, wait=False))) == 0


def test_time_stands_still_for_whoever_waits(shared):
    fd, slots = shared
    waited = []

    def waiting():
        # only now does the other give back what it has
        waited.append(1)
        slots[1] = 0
        return nullcontext()

    slots[1] = 900
    mine = Allowance(2000, slots, 0, fd, 0, waiting)
    assert mine.take(50, wait=True) and not waited
    assert mine.take(500, wait=True) and waited == [1]


def test_one_alone_reads_ahead_no_more_than_it_may():
    reading = Ahead(Files((100,) * 40), 4, (), Allowance(1000))
    reading.push(range(40))
    # four in one go, as they are small
    assert (len(reading._ahead), reading._held) == (8, 800)
    for left in range(39, -1, -1):
        ordinal, future = reading.next()
        assert (ordinal, len(future.result().data)) == (39 - left, 100)
        assert reading._held <= 1000
        reading.let_go(future.result())
        assert future.result().data is None
    assert reading._held == 0
    reading.close()


@pytest.mark.parametrize("known", [True, False])
def test_memory_of_files_of_many_workers_is_bounded(known):
    """Some are larger than all that there is; unbounded, 8 workers would have 8 x 16 files at a time."""
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(1, 3 * MB, 200)]
    lengths[50] = lengths[120] = lengths[121] = 30 * MB
    source = Files(tuple(lengths), known, 0.01)
    budget = 128 * MB
    with DecodePool(source, PixelPolicy(), [Size(32, 32)], workers=8, pixel_budget=budget) as decoder:
        memory = decoder._coordinator._memory
        of_files = decoder._job.file_bytes
        peak, reasons = 0, []
        for chunk in decoder.decode([range(i, i + 10) for i in range(0, 200, 10)]):
            # not at one moment, but what is had is had for a while
            peak = max(peak, int(memory.of_files.sum()))
            reasons += chunk.columns["reason"].to_pylist()
            chunk.release()
        assert reasons == ["not_an_image"] * 200
        assert decoder.meter.queued > 0
        assert not memory.of_files.any() and of_files == 16 * MB
    # the large ones alone; lengths that are not known are guessed until a file is read, so that the guesses of those
    # under way may err, and all three large ones may be under way at once (unbounded it would be 192 MB and more)
    assert peak <= (31 if known else 31 + 8 * 3 + 2 * 30) * MB


def test_a_worker_that_dies_with_files_gives_them_back():
    source = Files((3 * MB,) * 60, dies_at=20)
    with DecodePool(source, PixelPolicy(), [Size(32, 32)], workers=4, pixel_budget=32 * MB) as decoder:
        reasons = []
        for chunk in decoder.decode([range(i, i + 4) for i in range(0, 60, 4)]):
            reasons += chunk.columns["reason"].to_pylist()
            chunk.release()
        assert reasons == ["not_an_image"] * 20 + ["crashed"] + ["not_an_image"] * 39
        assert not decoder._coordinator._memory.of_files.any()
