"""Interrupts never leave the lock of a cache held: whoever cleans up after one needs it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from waiting import HANG_SECONDS

from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.interrupts import Interrupts
from capacitor_rt.cache.mutex import Mutex


# `signal.raise_signal` reaches this thread before it returns; a signal to the process may reach another one, later
class Stop(Exception):
    pass


@pytest.fixture
def stopping():
    """SIGTERM raises Stop, as SIGINT does KeyboardInterrupt."""

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGTERM, stop)
    yield stop
    signal.signal(signal.SIGTERM, before)


def test_what_comes_meanwhile_is_raised_at_the_end(stopping):
    interrupts, reached = Interrupts(), []
    with pytest.raises(Stop):
        interrupts.hold()
        signal.raise_signal(signal.SIGTERM)
        interrupts.hold()
        interrupts.release()
        reached.append("still held")
        interrupts.release()
        reached.append("never")
    assert reached == ["still held"]
    assert signal.getsignal(signal.SIGTERM) is stopping
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_block_can_be_interrupted_and_what_follows_it_not(stopping):
    interrupts, reached = Interrupts(), []
    interrupts.hold()
    try:
        with pytest.raises(Stop), interrupts.allowed():
            signal.raise_signal(signal.SIGTERM)
            reached.append("never")
        interrupts.hold()
        signal.raise_signal(signal.SIGINT)
        interrupts.release()
        reached.append("held")
        with pytest.raises(KeyboardInterrupt), interrupts.allowed():
            reached.append("never")
    finally:
        interrupts.release()
    assert reached == ["held"]


def test_handlers_of_other_kinds_and_other_threads_are_left_alone():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    interrupts, seen = Interrupts(), []
    interrupts.hold()
    seen.append(signal.getsignal(signal.SIGTERM))
    interrupts.release()

    def elsewhere():
        interrupts.hold()
        seen.append(signal.getsignal(signal.SIGINT))
        with interrupts.allowed():
            interrupts.check()
        interrupts.release()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL, signal.default_int_handler]


HOLD = f"""
import sys, time
from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.mutex import Mutex
with CacheFolder(sys.argv[1]) as folder, Mutex(folder):
    print("held", flush=True)
    time.sleep({HANG_SECONDS})
"""
# as a run does: an interrupt, then whatever has to be put in order, under the same lock
CLEAN_UP = """
import os, random, signal, sys, threading, time
from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.mutex import Mutex

armed = False

def stop(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

def interrupt():
    rng = random.Random(int(sys.argv[2]))
    while True:
        time.sleep(rng.random() * 0.002)
        os.kill(os.getpid(), signal.SIGINT)

def other():
    while True:
        with mutex:
            time.sleep(0.0005)

def use():
    global armed
    try:
        armed = True
        while True:
            with mutex:
                time.sleep(0.0001)
    except KeyboardInterrupt:
        with mutex:
            return

signal.signal(signal.SIGINT, stop)
with CacheFolder(sys.argv[1]) as folder:
    mutex, count = Mutex(folder), 0
    threading.Thread(target=other, daemon=True).start()
    threading.Thread(target=interrupt, daemon=True).start()
    end = time.monotonic() + 1.5
    # a slow machine takes longer
    while time.monotonic() < end or count <= 20:
        use()
        count += 1
    print(count, flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm_of_interrupts_leaves_no_lock_behind(tmp_path, seed):
    """Two processes of two threads each: on a lock that is left open both would wait for ever."""
    command = [sys.executable, "-c", CLEAN_UP, str(tmp_path)]
    pair = [
        subprocess.Popen([*command, str(2 * seed + i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        for process in pair:
            count, errors = process.communicate(timeout=HANG_SECONDS)
            assert process.returncode == 0, errors
            assert int(count) > 20
    finally:
        for process in pair:
            process.kill()
            process.wait()


def test_whoever_waits_can_be_interrupted_and_can_ask_without_waiting(tmp_path, stopping, monkeypatch):
    monkeypatch.setattr("capacitor_rt.cache.mutex.PATIENCE", 0.2)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with CacheFolder(tmp_path) as folder:
            # it is told, from another thread, when it has waited for a while
            mutex = Mutex(folder, lambda line: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Stop):
                mutex.acquire()
            # for which the other need not have ended
            assert holder.poll() is None
            assert not mutex.acquire(blocking=False)
            holder.kill()
            with mutex:
                assert mutex.acquire(blocking=False)
                mutex.release()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert signal.getsignal(signal.SIGTERM) is stopping


def test_a_long_block_under_the_lock_ends_with_an_interrupt(tmp_path, stopping):
    with CacheFolder(tmp_path) as folder:
        mutex = Mutex(folder)
        with pytest.raises(Stop), mutex, mutex.interruptible():
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError
        another = Mutex(folder)
        assert another.acquire(blocking=False)
        # while one is held handlers wait, those of other tests too
        another.release()
