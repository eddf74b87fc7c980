"""Kernels of plans to come, compiled side by side before any of them is launched."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from triton.runtime import driver

from capacitor_kernels.launch import Launch

from .executor import trace
from .plan import LaunchPlan
from .stats import Stats

MOST_THREADS = 8
_log = logging.getLogger("capacitor_rt")


def precompile(plans: Iterable[LaunchPlan], stats: Stats) -> None:
    """Compile what the launches of `plans` need on the current CUDA device; their first calls then only load it.

    Triton keeps the results in its cache on disk as well, so that the next process finds them there.
    """
    begin = time.perf_counter()
    launches = {identity(launch): launch for plan in plans for _, queued in trace(plan) for launch in queued}
    if not launches:
        return
    compile_launches(launches.values())
    seconds = time.perf_counter() - begin
    stats.compile_seconds += seconds
    _log.info("%d kernels made ready in %.1f s", len(launches), seconds)


def compile_launches(launches: Iterable[Launch]) -> None:
    """Compile launches side by side, for the current CUDA device; of equal ones the first.

    What fails is left out: it fails again, with its reason, when it is launched.
    """
    distinct = list({identity(launch): launch for launch in launches}.values())
    # ptxas is a process of its own, and most of the rest runs without Python's lock
    threads = max(1, min(MOST_THREADS, os.cpu_count() or 1, len(distinct)))
    made = []
    with ThreadPoolExecutor(threads) as pool:
        with _side_by_side(pool):
            for launch in distinct:
                with suppress(Exception):
                    made.append(launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.options))
        _build_launchers(pool, made)


@contextmanager
def _side_by_side(pool: Executor) -> Iterator[None]:
    """Triton's mode in which compilations are left to a pool, whose errors stay there."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode, active_mode
    except ImportError:
        # one after another
        yield
        return
    try:
        with AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        # where anything is raised, Triton before 3.8 leaves it on, with a pool that is gone
        active_mode.set(None)


def _build_launchers(pool: Executor, made: Iterable[Any]) -> None:
    """What Triton 3.6 builds by the C compiler before a first launch, which then finds it in the cache."""
    kernels = [kernel.result(ignore_errors=True) if hasattr(kernel, "result") else kernel for kernel in made]
    # by what their source depends on
    distinct = {
        (*k.src.signature.values(), repr(getattr(k.metadata, "tensordesc_meta", None))): k for k in kernels if k
    }
    for built in [pool.submit(driver.active.launcher_cls, k.src, k.metadata) for k in distinct.values()]:
        built.exception()


def identity(launch: Launch) -> tuple[object, ...]:
    """Equal for launches that differ in nothing that is compiled in, and for few others."""
    args = tuple(
        (name, value if isinstance(value, (int, float, str, bool)) else (type(value).__name__, _dtype(value)))
        for name, value in launch.args.items()
    )
    return launch.kernel.__name__, args, tuple(sorted(launch.options.items()))


def _dtype(value: object) -> str:
    base = getattr(value, "base", value)
    return str(getattr(base, "dtype", ""))
