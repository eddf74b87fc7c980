"""Judging mutants in forked children: a crash, a hang or a raw error of one costs that one only."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from capacitor_rt.errors import CapacitorError

TAKEN, REFUSED = "taken", "refused"
# of one mutant, CPU time, so that a busy machine finds nothing; a refusal is quicker than what is taken
SECONDS, REFUSAL_SECONDS = 2.0, 1.0
# that `pace` takes on the machine that these are the limits of: a slower one has more, a faster one no less
PACE_SECONDS = 0.0045
# on the clock, for what waits: a busy machine does not take so long
WAIT_SECONDS = 60.0
PEAK_BYTES = 200 << 20
# of address space, above the peak that is asked for, so that a breach is seen and not answered by MemoryError
ADDRESS_BYTES = 8 << 30
BATCH = 50


class Surface:
    """A kind of file and what reads it."""

    name: str
    # a folder for each mutant that once was a finding; those whose names begin with "taken" are no longer refused
    corpus: Path

    def warm(self) -> None:
        """Read something good, so that the children find every module imported."""
        raise NotImplementedError

    def write(self, seed: int, number: int, folder: Path) -> str:
        """Write mutant `number` of `seed` into an empty folder; what was done to it, in words."""
        raise NotImplementedError

    def again(self, case: Path, folder: Path) -> None:
        """Write what once was a finding into an empty folder, from its folder in the corpus."""
        shutil.copytree(case, folder, dirs_exist_ok=True)

    def read(self, folder: Path) -> None:
        """Read it as a user would. An error of the library refuses the mutant; every other one is a finding."""
        raise NotImplementedError


class Corpus(Surface):
    """The mutants of a surface that once were findings, by the order of their names."""

    def __init__(self, surface: Surface):
        self.name, self.corpus, self.warm, self.read = surface.name, surface.corpus, surface.warm, surface.read
        self.again = surface.again
        self.cases = sorted(p for p in surface.corpus.iterdir() if p.is_dir())

    def write(self, seed: int, number: int, folder: Path) -> str:
        self.again(self.cases[number], folder)
        return self.cases[number].name


class Verdict(NamedTuple):
    """Of one mutant: `outcome` is TAKEN, REFUSED or the finding; CPU seconds, and bytes of peak memory added."""

    number: int
    what: str
    outcome: str
    seconds: float = 0.0
    peak: int = 0

    @property
    def is_finding(self) -> bool:
        return self.outcome not in (TAKEN, REFUSED)


def scratch() -> str | None:
    """Where mutants are written: in memory where there is room, since a surface may wait for the disk often."""
    with suppress(OSError):
        free = os.statvfs("/dev/shm")
        if free.f_bavail * free.f_frsize > 1 << 30 and os.access("/dev/shm", os.W_OK):
            return "/dev/shm"
    return None


def judge(surface: Surface, seed: int, numbers: range) -> Iterator[Verdict]:
    """The verdicts on the mutants of these numbers, in order."""
    todo = list(numbers)
    while todo:
        batch = todo[:BATCH]
        done = yield from _one_child(surface, seed, batch)
        todo = todo[done:]


def _one_child(surface: Surface, seed: int, batch: list[int]) -> Iterator[Verdict]:
    """Verdicts of one child; it ends early with the mutant that killed it. Returns the number of mutants judged."""
    folder = Path(tempfile.mkdtemp(prefix="capacitor-fuzz-", dir=scratch()))
    # so that children collect their own garbage alone
    gc.collect()
    gc.freeze()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _work(surface, seed, batch, folder, send)
    os.close(send)
    done, what = 0, "?"
    with os.fdopen(receive, "rb") as results:
        while True:
            try:
                item = pickle.load(results)
            except (EOFError, pickle.UnpicklingError):
                break
            if isinstance(item, str):
                what = item
                continue
            done += 1
            yield item
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(folder, ignore_errors=True)
    if done < len(batch):
        done += 1
        yield Verdict(batch[done - 1], what, _death(status))
    return done


def _death(status: int) -> str:
    if status >= 0:
        return f"ended with {status}"
    kind = signal.Signals(-status).name
    if kind == "SIGPROF":
        return f"took over {SECONDS:g} s"
    return f"waited over {WAIT_SECONDS:g} s" if kind == "SIGALRM" else f"killed by {kind}"


def _work(surface: Surface, seed: int, batch: list[int], folder: Path, send: int) -> None:
    """Judge mutants in a child, and end it."""
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (1, 2):
            os.dup2(null, fd)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = _status("VmSize") + ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        slowness = max(1.0, min(pace() for _ in range(5)) / PACE_SECONDS)
        with os.fdopen(send, "wb", buffering=0) as results:
            for number in batch:
                place = folder / str(number)
                place.mkdir()
                try:
                    what = surface.write(seed, number, place)
                    results.write(pickle.dumps(what))
                    verdict = _read(surface, number, what, place, slowness)
                except Exception as error:
                    verdict = Verdict(number, "?", f"no mutant: {_raw(error)}")
                results.write(pickle.dumps(verdict))
                shutil.rmtree(place)
                # what one mutant leaves of addresses and files would count against the next
                gc.collect()
        code = 0
    finally:
        os._exit(code)


def pace() -> float:
    """CPU seconds of a loop that is always the same."""
    start, total = time.process_time(), 0
    for i in range(200_000):
        total += i % 7
    return time.process_time() - start


def _read(surface: Surface, number: int, what: str, place: Path, slowness: float) -> Verdict:
    before = _reset_peak()
    start = time.process_time()
    # not handled, so that it also ends code that never comes back to the interpreter
    signal.setitimer(signal.ITIMER_PROF, SECONDS * slowness)
    signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
    try:
        surface.read(place)
        outcome = TAKEN
    except CapacitorError:
        outcome = REFUSED
    except BaseException as error:
        outcome = _raw(error)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, peak = time.process_time() - start, _status("VmHWM") - before
    if outcome == REFUSED and seconds > REFUSAL_SECONDS * slowness:
        outcome = f"refused after {seconds:.1f} s"
    if outcome == REFUSED and peak > PEAK_BYTES:
        outcome = f"refused after {peak >> 20} MiB"
    return Verdict(number, what, outcome, seconds, peak)


def _raw(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:200]}"


def _reset_peak() -> int:
    """Make the peak of resident memory what is resident now; that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    """An entry of the process's status, in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) << 10
    raise KeyError(key)
