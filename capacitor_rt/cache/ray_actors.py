"""A run by actors on a Ray cluster, each of which is a coordinator with a GPU of its own.

Ray only starts them and says who is alive: an actor lists the source itself, takes tasks by their leases in OUT, reads,
decodes, encodes and writes. What crosses Ray are the arguments of a run, lines of progress, and a report; no pixels and
no latents. SRC and OUT have to be at the same place on every machine, and this package installed there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CacheError, InputError
from ..extras import require_extra
from .coordinator import STOP_SECONDS, STOPPED, Message, Setup, Teller, coordinate
from .gathering import Gathering
from .model_source import Checkpoint
from .options import RunOptions
from .report import Report
from .request import CacheRequest
from .watch import Bar

POLL_SECONDS = 0.5


class Actor:
    """A coordinator in a process of Ray's. `run` and `hear` are called side by side."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def run(self, setup: Setup) -> None:
        """Do a run; how it goes and ends is told by `hear`."""
        try:
            coordinate(setup, self._tell, Teller(self._tell, self._stopping))
        except KeyboardInterrupt:
            self._tell(STOPPED, None)

    def hear(self) -> list[Message]:
        """What was told since the last call."""
        with self._lock:
            messages, self._messages = self._messages, []
        return messages

    def stop(self) -> None:
        """End the run as an interruption does: what is complete is written."""
        self._stopping.set()

    def pid(self) -> int:
        """Number of the process."""
        return os.getpid()

    def _tell(self, word: str, what: Any) -> None:
        with self._lock:
            self._messages.append((word, what))


@dataclass
class _Seat:
    actor: Any
    setup: Setup
    running: Any = None
    hearing: Any = None


def cache_on_ray(
    address: str,
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: Checkpoint,
    request: CacheRequest | Mapping[str, CacheRequest],
    *,
    actors: int | None = None,
    note: Callable[[str], None],
    options: RunOptions | None = None,
) -> Report:
    """`cache_images` by actors on a Ray cluster. An actor that is lost is reported, and its tasks are taken over.

    With a request for each of several views it is `cache_views`.

    Args:
        address: of the cluster, "auto" for the one that this machine belongs to, "local" for one that ends with the
            run. A cluster that this process is connected to already is used.
        model: on "cuda" an actor has a GPU of its own, on "cpu" none.
        actors: how many; None: as many as the cluster has GPUs, or machines where no GPU is used.
        options: `workers` and the pixel budget are those of each actor. None for workers: by the cluster's cores.

    Raises:
        MissingExtraError: Ray is not installed. CacheError: the cluster cannot be reached or has no GPU, or no actor is
            left; else as `cache_images`.
    """
    ray = require_extra("ray", "ray")
    begin = time.perf_counter()
    chosen = options or RunOptions()
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except Exception as e:
            # errors of its own and of what it starts
            raise CacheError(f"the Ray cluster {address!r} cannot be reached: {str(e)[:300]}") from e
    try:
        kind = model.device.partition(":")[0]
        count, cores = _capacity(ray, kind, actors)
        setup = Setup(_shared_path(src), _shared_path(out), _shared(model, kind), request, chosen)
        seats = [_seat(ray, setup, number, count, cores, kind) for number in range(count)]
        gathering = Gathering([f"Ray ({i})" for i in range(count)], note, Bar(chosen.progress, chosen.metrics))
        whole = False
        try:
            _hear(ray, seats, gathering)
            whole = True
        finally:
            _stop(ray, seats)
            gathering.end(whole)
    finally:
        if mine:
            ray.shutdown()
    report = gathering.report()
    report.seconds = time.perf_counter() - begin
    return report


def _capacity(ray: Any, kind: str, actors: int | None) -> tuple[int, int]:
    """Number of actors, and cores for each."""
    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    if kind == "cuda" and not gpus:
        raise CacheError("the Ray cluster has no GPU: give --device cpu, or start Ray with GPUs")
    machines = sum(node["Alive"] for node in ray.nodes())
    count = actors or (gpus if kind == "cuda" else machines)
    if kind == "cuda" and count > gpus:
        raise InputError(f"{count} actors need a GPU each, and the Ray cluster has {gpus}: use fewer")
    return count, max(1, cores // count)


def _shared_path(path: str | os.PathLike[str]) -> str:
    """A path as every machine has it: whole. A URL as it is."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


def _shared(model: Checkpoint, kind: str) -> Checkpoint:
    path = Path(model.name).expanduser()
    return replace(model, device=kind, name=os.path.abspath(path) if path.exists() else model.name)


def _seat(ray: Any, setup: Setup, number: int, count: int, cores: int, kind: str) -> _Seat:
    rank, size = setup.options.place()
    workers = setup.options.workers
    options = replace(
        setup.options,
        # a core of its own for what drives the GPU
        workers=max(1, cores - 1) if workers is None else workers,
        rank=rank * count + number,
        world_size=size * count,
        # these are of all of them together
        progress=False,
        metrics=None,
        retry_quarantined=setup.options.retry_quarantined and number == 0,
    )
    # a lost one is not started again: its tasks are others' by then
    demands = {"num_gpus": int(kind == "cuda"), "num_cpus": cores, "max_concurrency": 4, "max_restarts": 0}
    return _Seat(ray.remote(Actor).options(**demands).remote(), setup._replace(options=options))


def _hear(ray: Any, seats: list[_Seat], gathering: Gathering) -> None:
    """Listen until every actor has ended."""
    _start(seats[0])
    while gathering.living:
        if gathering.is_finished() or gathering.has_failed():
            for number, seat in enumerate(seats):
                if seat.running is None:
                    # nothing is left to do for it, or it would be refused as well
                    gathering.living.discard(number)
        elif gathering.begun:
            for seat in seats:
                _start(seat)
        elif not any(seats[number].running is not None for number in gathering.living):
            _start(seats[min(gathering.living)])
        for number in sorted(gathering.living):
            seat = seats[number]
            if seat.running is not None:
                seat.hearing = seat.hearing or seat.actor.hear.remote()
        waited = [ref for n in gathering.living for ref in (seats[n].running, seats[n].hearing) if ref is not None]
        if waited:
            ray.wait(waited, num_returns=len(waited), timeout=POLL_SECONDS)
        for number in sorted(gathering.living):
            _look(ray, seats[number], number, gathering)


def _start(seat: _Seat) -> None:
    if seat.running is None:
        seat.running = seat.actor.run.remote(seat.setup)


def _look(ray: Any, seat: _Seat, number: int, gathering: Gathering) -> None:
    """Take what an actor has told, and note its end."""
    if seat.running is None:
        return
    try:
        ended = bool(ray.wait([seat.running], timeout=0)[0])
        if ended:
            ray.get(seat.running)
            # what it said at last
            messages = ray.get(seat.actor.hear.remote(), timeout=STOP_SECONDS)
            if seat.hearing is not None:
                messages = ray.get(seat.hearing) + messages
        elif seat.hearing is not None and ray.wait([seat.hearing], timeout=0)[0]:
            messages, seat.hearing = ray.get(seat.hearing), None
        else:
            return
    except ray.exceptions.RayError as e:
        gathering.lose(number, f"was lost ({type(e).__name__})")
        return
    for word, what in messages:
        gathering.hear(number, word, what)
    if ended and number in gathering.living:
        gathering.lose(number, "ended without a word")


def _stop(ray: Any, seats: list[_Seat]) -> None:
    """End the actors: first kindly, so that complete tasks are written."""
    try:
        running = [seat.running for seat in seats if seat.running is not None]
        if running and len(ray.wait(running, num_returns=len(running), timeout=0)[1]):
            for seat in seats:
                seat.actor.stop.remote()
            ray.wait(running, num_returns=len(running), timeout=STOP_SECONDS)
    finally:
        for seat in seats:
            with suppress(Exception):
                ray.kill(seat.actor)
