"""The helper process of a pool, which forks its workers, and what a worker does until its coordinator is gone.

It is a plain subprocess, not one of multiprocessing's: the coordinator's main module is not imported, so that a script
needs no guard, and nothing is registered anywhere that would have to be cleaned up. Everything is imported once, here,
in a process without other threads, where forking is safe. It ends, and its workers with it, when the coordinator's end
of the control socket closes or the coordinator is no longer its parent.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pickle
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from .allowance import Allowance
from .ring import SharedMemory
from .work import Job, Meter, Worker, to_batch

# messages of the control socket: a word, a number of a worker, and what belongs to it
SETUP, FORK, KILL, DIED, READY, BROKEN = "setup", "fork", "kill", "died", "ready", "broken"
MESSAGE_BYTES = 1 << 16
# how often to look whether the coordinator is still the parent
_LOOK_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BYTES = 16 << 20


class Setup(NamedTuple):
    """What the helper has to know before it forks."""

    job: Job
    workers: int
    ring_bytes: int


class Task(NamedTuple):
    """A chunk for a worker: inputs, their part of the ring, those that are known to fail, and which views are wanted.

    With `careful`, each is read only when its turn has come, so that a worker that dies or hangs does so because of it.
    """

    number: int
    ordinals: Sequence[int]
    begin: int
    end: int
    failed: dict[int, tuple[str, str]]
    careful: bool
    views: tuple[int, ...] = (0,)


class Done(NamedTuple):
    """A decoded chunk: Arrow bytes of its rows, and the offsets of their pixels as int64 bytes (-1 for none)."""

    number: int
    rows: bytes
    offsets: bytes
    meter: Meter


class Failure(NamedTuple):
    """An error that no input is to blame for."""

    error: BaseException | None
    text: str


def main(control_fd: int) -> None:
    """Serve the coordinator at the other end of `control_fd` until it is gone. What it is to do comes later."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    control = socket.socket(fileno=control_fd)
    try:
        _import_what_decoding_needs()
        message, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 2)
        if not message:
            # it was not needed
            return
        setup_fd, ring_fd = fds
        with os.fdopen(setup_fd, "rb") as file:
            setup: Setup = pickle.load(file)
        memory = SharedMemory(setup.workers, setup.ring_bytes, ring_fd)
    except BaseException:
        with suppress(OSError):
            control.send(pickle.dumps((BROKEN, 0, traceback.format_exc()[-4000:])))
        return
    try:
        # a coordinator that found nothing to do is gone, which the forker notices
        with suppress(BrokenPipeError):
            control.send(pickle.dumps((READY, 0, None)))
        _Forker(control, setup, memory, parent).serve()
    finally:
        # there is nothing to finalize, which with torch takes longer than all else at the end
        os._exit(0)


def _import_what_decoding_needs() -> None:
    """Import, and use once, what the workers are going to use, while there is one thread only."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    from ...images.geometry import Size
    from ...images.load import FILTER, PixelPolicy, load_image
    from ...images.resample import torch_agrees

    torch_agrees(FILTER)
    with suppress(Exception):
        load_image(b"P6 2 2 255\n" + bytes(12), PixelPolicy(), [Size(1, 1)])
    to_batch([])
    # collections in the workers pass over all this, and so do not copy its pages
    gc.freeze()
    gc.enable()


class _Forker:
    def __init__(self, control: socket.socket, setup: Setup, memory: SharedMemory, parent: int):
        self.control, self.setup, self.memory, self.parent = control, setup, memory, parent
        self.children: dict[int, int] = {}
        # a child's death wakes select
        self.woken, waker = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)

    def serve(self) -> None:
        try:
            while os.getppid() == self.parent:
                listened: list[Any] = [self.control, self.woken]
                readable, _, _ = select.select(listened, [], [], _LOOK_SECONDS)
                if self.control in readable and not self._obey():
                    return
                if self.woken in readable:
                    with suppress(BlockingIOError):
                        os.read(self.woken, 4096)
                self._reap()
        finally:
            for pid in self.children.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in self.children.values():
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def _obey(self) -> bool:
        try:
            message, fds, _, _ = socket.recv_fds(self.control, MESSAGE_BYTES, 1)
        except OSError:
            return False
        if not message:
            return False
        word, number = pickle.loads(message)
        if word == KILL:
            if number in self.children:
                os.kill(self.children[number], signal.SIGKILL)
            return True
        (fd,) = fds
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(number, fd, parent)
        os.close(fd)
        self.children[number] = pid
        return True

    def _reap(self) -> None:
        for number, pid in list(self.children.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self.children[number]
                with suppress(OSError):
                    self.control.send(pickle.dumps((DIED, number, os.waitstatus_to_exitcode(status))))

    def _become_worker(self, number: int, fd: int, parent: int) -> None:
        """Serve a coordinator's connection in a child, and end it."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _settle(parent)
            self.control.close()
            null = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1, 2):
                # libraries complain there of damaged files
                os.dup2(null, standard)
            with Connection(fd) as connection:
                _serve(connection, self.setup.job, self.memory, number)
        finally:
            os._exit(0)


def _settle(parent: int) -> None:
    """Have the kernel end this process with its parent, leave no image of its memory behind, and keep none in it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # else glibc keeps what a large image took
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)
    if os.getppid() != parent:
        os._exit(0)


def _serve(connection: Connection, job: Job, memory: SharedMemory, number: int) -> None:
    def mark(ordinal: int | None) -> None:
        memory.since[number] = time.monotonic()
        memory.inputs[number] = -1 if ordinal is None else ordinal

    mark(None)
    queued = [0.0]
    try:
        waiting = _clock_stopped(memory, number, queued)
        pixels = Allowance(job.pixel_bytes, memory.of_pixels, number, memory.fd, 0, waiting)
        files = Allowance(job.file_bytes, memory.of_files, number, memory.fd, 1, waiting)
        worker = Worker(job, mark, _budget(pixels), pixels.share, files)
        tasks: list[Task] = []
        while True:
            idle = time.monotonic()
            while not tasks or connection.poll(0):
                task: Task = pickle.loads(connection.recv_bytes())
                tasks.append(task)
                if not task.careful:
                    worker.push(task.ordinals)
            idle = time.monotonic() - idle
            task, queued[0] = tasks.pop(0), 0.0
            out = memory.ring[task.begin : task.end]
            if task.careful:
                rows, meter = worker.carefully(task.ordinals, out, task.failed, task.views)
            else:
                rows, meter = worker.chunk(len(task.ordinals), out, task.views)
            offsets = np.array([row.offset for row in rows], np.int64).tobytes()
            batch = to_batch(rows).serialize().to_pybytes()
            meter = meter._replace(queued=queued[0], idle=idle)
            connection.send_bytes(pickle.dumps(Done(task.number, batch, offsets, meter)))
    except (EOFError, OSError):
        # the coordinator is gone
        return
    except BaseException as error:
        with suppress(OSError):
            connection.send_bytes(_as_failure(error))


def _as_failure(error: BaseException) -> bytes:
    text = traceback.format_exc()[-4000:]
    try:
        data = pickle.dumps(Failure(error, text))
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(Failure(None, text))


def _clock_stopped(
    memory: SharedMemory, number: int, queued: list[float]
) -> Callable[[], AbstractContextManager[None]]:
    """A context in which an image's time does not run, as it waits for memory; the seconds are added to `queued`."""

    @contextmanager
    def waiting() -> Iterator[None]:
        begin = time.monotonic()
        memory.since[number] = 0.0
        try:
            yield
        finally:
            memory.since[number] = time.monotonic()
            queued[0] += memory.since[number] - begin

    return waiting


def _budget(pixels: Allowance) -> Any:
    """An image that needs more than a share takes it from what all have in common."""

    @contextmanager
    def admit(nbytes: int) -> Iterator[None]:
        if nbytes <= pixels.share:
            yield
            return
        pixels.take(nbytes, wait=True)
        try:
            yield
        finally:
            pixels.have(0)

    return admit


if __name__ == "__main__":
    main(int(sys.argv[1]))
