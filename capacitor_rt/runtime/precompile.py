"""Kernels of plans to come, compiled side by side before any of them is launched."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

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
    compile_launches(list(launches.values()))
    seconds = time.perf_counter() - begin
    stats.compile_seconds += seconds
    _log.info("%d kernels made ready in %.1f s", len(launches), seconds)


def compile_launches(launches: Sequence[Launch]) -> None:
    """Compile launches side by side, for the current CUDA device."""
    # ptxas is a process of its own, and most of the rest runs without Python's lock
    threads = max(1, min(MOST_THREADS, os.cpu_count() or 1, len(launches)))
    with ThreadPoolExecutor(threads) as pool, _side_by_side(pool):
        for launch in launches:
            launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.options)


def _side_by_side(pool: ThreadPoolExecutor) -> AbstractContextManager[object]:
    """Triton's mode in which a compilation is left to a pool; one after another where this Triton has none."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        return nullcontext()
    return AsyncCompileMode(pool)


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
