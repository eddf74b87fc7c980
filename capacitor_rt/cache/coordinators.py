"""A run by several coordinators on one machine, a process per GPU: they share the tasks by their leases alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait

from ..errors import CacheError, InputError
from .coordinator import GO, STOP_SECONDS, Setup
from .decoding import usable_cores
from .gathering import Gathering
from .model_source import Checkpoint
from .options import RunOptions
from .report import Report
from .request import CacheRequest
from .watch import Bar

# the path comes first, and from the command: no file beside the user's is taken for a module
_COMMAND = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from capacitor_rt.cache.coordinator import main; main(int(sys.argv[2]))"
)


@dataclass
class _Process:
    process: subprocess.Popen[bytes]
    connection: Connection | None
    went: bool = False

    def go(self) -> None:
        if self.connection is not None and not self.went:
            self.went = True
            # that one is gone is noticed when it is listened to
            with suppress(OSError):
                self.connection.send(GO)


def cache_on(
    devices: Sequence[str],
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: Checkpoint,
    request: CacheRequest | Mapping[str, CacheRequest],
    *,
    note: Callable[[str], None],
    options: RunOptions | None = None,
) -> Report:
    """`cache_images` by a coordinator process on each of `devices`, such as "cuda:0"; "cpu" may be named repeatedly.

    With a request for each of several views it is `cache_views`.

    The first makes the plan or checks it, then all take tasks by leases: there is no process group and no barrier. A
    coordinator that dies or fails is reported through `note`, and the others take over its tasks. The files are those
    of one process. The workers and the pixel budget of `options` are shared out.

    Raises:
        As `cache_images`; CacheError also if no coordinator is left. KeyboardInterrupt: after all have stopped.
    """
    if not devices:
        raise InputError("devices names none: give one at least")
    begin = time.perf_counter()
    chosen = options or RunOptions()
    names = [device if devices.count(device) == 1 else f"{device} ({i})" for i, device in enumerate(devices)]
    gathering = Gathering(names, note, Bar(chosen.progress, chosen.metrics))
    processes: list[_Process] = []
    whole = False
    try:
        for i, device in enumerate(devices):
            setup = Setup(
                os.fspath(src),
                os.fspath(out),
                replace(model, device=device.partition(":")[0]),
                request,
                shared(chosen, i, devices),
            )
            processes.append(_start(setup, device))
        _hear(processes, gathering)
        whole = True
    finally:
        _stop(processes)
        gathering.end(whole)
    report = gathering.report()
    report.seconds = time.perf_counter() - begin
    return report


def shared(options: RunOptions, number: int, devices: Sequence[str]) -> RunOptions:
    """The options of one of the coordinators on `devices`: its rank, and its share of workers and of memory."""
    n = len(devices)
    rank, size = options.place()
    workers = options.workers
    if workers is None:
        # one core for each coordinator that drives a GPU
        workers = usable_cores() - sum(device.startswith("cuda") for device in devices)
    share = workers // n + (number < workers % n)
    return replace(
        options,
        workers=0 if options.workers == 0 else max(1, share),
        pixel_budget=max(1, options.pixel_budget // n),
        rank=rank * n + number,
        world_size=size * n,
        # these are of all of them together
        progress=False,
        metrics=None,
        retry_quarantined=options.retry_quarantined and number == 0,
    )


def _start(setup: Setup, device: str) -> _Process:
    ours, theirs = socket.socketpair()
    try:
        command = [sys.executable, "-I", "-c", _COMMAND, json.dumps(sys.path), str(theirs.fileno())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=os.environ | _visible(device),
            # the terminal's Ctrl-C is for the command, which tells them
            start_new_session=True,
        )
    except OSError as e:
        ours.close()
        raise CacheError(f"a coordinator on {device} cannot be started: {e}") from e
    finally:
        theirs.close()
    started = _Process(process, Connection(ours.detach()))
    assert started.connection is not None
    with suppress(OSError):
        started.connection.send(setup)
    return started


def _visible(device: str) -> dict[str, str]:
    """The environment in which CUDA sees one GPU alone: no process takes memory on another by mistake."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return {}
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    at = int(number or 0)
    return {"CUDA_VISIBLE_DEVICES": names[at] if at < len(names) else str(at)}


def _hear(processes: list[_Process], gathering: Gathering) -> None:
    """Listen until every coordinator has ended."""
    processes[0].go()
    while True:
        if gathering.is_finished():
            # those that have not been let go have nothing to do
            for number, one in enumerate(processes):
                if not one.went and one.connection is not None:
                    one.connection.close()
                    one.connection = None
                    gathering.living.discard(number)
        open_ones = {one.connection: number for number, one in enumerate(processes) if one.connection is not None}
        if not open_ones:
            return
        for connection in wait(list(open_ones)):
            assert isinstance(connection, Connection)
            number = open_ones[connection]
            try:
                word, what = connection.recv()
            except (EOFError, OSError):
                _close(processes[number], number, gathering)
                continue
            gathering.hear(number, word, what)
        if gathering.begun:
            for one in processes:
                one.go()
        elif not any(one.went and one.connection is not None for one in processes):
            _next(processes, gathering)


def _next(processes: list[_Process], gathering: Gathering) -> None:
    """The coordinator that was to make the plan is gone: the next one makes it, unless the first was refused, as all
    would be.
    """
    refused = gathering.has_failed()
    for number, one in enumerate(processes):
        if one.connection is None:
            continue
        if not refused:
            one.go()
            return
        one.connection.close()
        one.connection = None
        gathering.living.discard(number)


def _close(one: _Process, number: int, gathering: Gathering) -> None:
    assert one.connection is not None
    one.connection.close()
    one.connection = None
    code = one.process.wait()
    if number in gathering.living:
        try:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        except ValueError:
            how = f"was ended by signal {-code}"
        gathering.lose(number, f"(process {one.process.pid}) {how}")


def _stop(processes: list[_Process]) -> None:
    """End those that still run: first kindly, so that complete tasks are written."""
    try:
        for one in processes:
            if one.connection is not None or not one.went:
                one.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for one in processes:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        # also where a second Ctrl-C has come
        for one in processes:
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait()
            if one.connection is not None:
                one.connection.close()
