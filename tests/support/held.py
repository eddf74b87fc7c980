"""Runs that cannot end before a test has struck them, on however fast a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.leases import Leases, clear
from capacitor_rt.cache.mutex import Mutex


@contextmanager
def held(out: Path, plan8: str, task: int) -> Iterator[Callable[[], None]]:
    """This process has a task of the run into `out`, of the plan that begins so, and does not do it: whoever runs does
    all others, and waits. What is yielded gives the task back, which the end of the block does too.
    """
    out.mkdir(parents=True, exist_ok=True)
    with CacheFolder(out) as folder:
        mutex = Mutex(folder)
        with Leases(folder, mutex, plan8) as leases:
            with mutex:
                assert leases.take(task)

            def give_back() -> None:
                with mutex:
                    leases.release(task)

            yield give_back
        clear(folder, mutex)


def last_task(like: Path) -> tuple[str, int]:
    """First digits of the plan, and number of the last task, of a finished cache of one generation."""
    plan8, _, number = max(path.stem for path in (like / "index").iterdir()).partition("-")
    return plan8, int(number)
