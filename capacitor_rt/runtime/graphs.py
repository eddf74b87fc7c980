"""Plans bound to arenas, captured as CUDA graphs, kept by their keys in a cache with a byte budget."""

from __future__ import annotations

import gc
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .executor import Executor
from .memory import is_out_of_memory, new_arena, retire
from .plan import LaunchPlan, PlanKey
from .platform import build_failure
from .stats import Stats

MAX_BOUND = 256
"""Plans kept; the driver holds some memory of its own for each captured graph."""
# torch allows one capture at a time in a process
capturing = threading.RLock()
# by device and branch: torch hands out 32 streams in turn, and would come round to those of its users
_capture_streams: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


class Bound:
    """A plan bound to an arena, which others on the same device may share: one of them runs at a time.

    Args:
        key: of the whole run.
        plan: of each branch, an equal part of the run's batch; the branches have parts of the arena of their own.
    """

    def __init__(self, key: PlanKey, plan: LaunchPlan, weights: Mapping[str, Tensor], arena: Tensor, branches: int = 1):
        self.key, self.plan, self.arena = key, plan, arena
        size = plan.arena_bytes
        self.executors = [Executor(plan, weights, arena[i * size : (i + 1) * size]) for i in range(branches)]
        self.graph: torch.cuda.CUDAGraph | None = None

    def parts(self, start: int) -> Iterator[tuple[Executor, slice]]:
        """Every branch, and the rows of the call that it computes, where the run's begin at `start`."""
        rows = self.plan.key.batch
        for i, executor in enumerate(self.executors):
            yield executor, slice(start + i * rows, start + (i + 1) * rows)

    def launch(self) -> None:
        """Queue the launches of all branches on the current stream, one branch after another."""
        for executor in self.executors:
            executor.run()

    def capture(self, pool: Any) -> None:
        """Capture the launches. They run once before, so that every kernel is compiled and loaded.

        `torch.cuda.graph` would wait for the device and empty the allocator's cache first; the launches allocate
        nothing, so neither is needed.
        """
        device = self.arena.device
        caller = torch.cuda.current_stream(device)
        graph = torch.cuda.CUDAGraph()
        with capturing:
            side, *others = (capture_stream(device, i) for i in range(len(self.executors)))
            side.wait_stream(caller)
            try:
                with torch.cuda.stream(side):
                    self.launch()
                    with _no_collection():
                        # other threads may go on allocating meanwhile
                        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                        try:
                            self._fork(side, others)
                        finally:
                            graph.capture_end()
            finally:
                # also after a failure: what was queued still uses the arena and the weights
                caller.wait_stream(side)
        self.graph = graph

    def _fork(self, side: torch.cuda.Stream, others: list[torch.cuda.Stream]) -> None:
        """Queue the first branch on `side`, and each other one beside it on a stream of its own, joined at the end."""
        for stream in others:
            stream.wait_stream(side)
        try:
            for executor, stream in zip(self.executors, [side, *others], strict=True):
                with torch.cuda.stream(stream):
                    executor.run()
        finally:
            for stream in others:
                side.wait_stream(stream)

    def run(self) -> None:
        """Replay, or launch where nothing was captured.

        Raises:
            RuntimeError: of CUDA; the message names the key.
        """
        if self.graph is None:
            self.launch()
            return
        try:
            self.graph.replay()
        except RuntimeError as error:
            raise RuntimeError(f"replay of {self.key} failed: {error}") from error


def capture_stream(device: torch.device, branch: int = 0) -> torch.cuda.Stream:
    """The stream that is captured on a device; hold `capturing` for as long as it is used."""
    if (device, branch) not in _capture_streams:
        _capture_streams[device, branch] = torch.cuda.Stream(device)
    return _capture_streams[device, branch]


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: what it frees may call the driver, which ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class BoundCache:
    """Least recently used cache of bound plans. Arenas are shared: a smaller plan runs in the arena of a larger one.

    All of it belongs to one device and is used by one call at a time (`runtime.Runtime` sees to that).

    Args:
        budget: bytes of arenas. The plan about to run is kept whatever its size.
        arena_step: a new arena is at least twice as large as the largest so far, up to this many bytes, so that ever
            larger shapes need few of them.
        graphs: capture what is added.
    """

    def __init__(self, device: torch.device, budget: int, arena_step: int, stats: Stats, graphs: bool = True):
        self.device, self.budget, self.arena_step, self.stats = device, budget, arena_step, stats
        self.graphs = graphs and device.type == "cuda"
        self._bound: OrderedDict[PlanKey, Bound] = OrderedDict()
        self._pool: Any = None
        self._warned = False

    def find(self, key: PlanKey) -> Bound | None:
        """The bound plan of `key`, now the most recently used one."""
        bound = self._bound.get(key)
        if bound is not None:
            self.stats.hits += 1
            self._bound.move_to_end(key)
        return bound

    def add(self, bound: Bound) -> None:
        """Capture a plan and keep it; the least recently used ones go until the rest is within the budget.

        A plan that cannot be captured is kept nevertheless, and launched without a graph.

        Raises:
            RuntimeError: memory ran out, or a kernel could not be built.
        """
        if self.graphs:
            self._capture(bound)
        self._bound[bound.key] = bound
        while (self._nbytes() > self.budget or len(self._bound) > MAX_BOUND) and len(self._bound) > 1:
            retire([self._bound.popitem(last=False)[1].arena])
            self.stats.evictions += 1
        self.stats.nbytes = self._nbytes()

    def _capture(self, bound: Bound) -> None:
        if self._pool is None or all(b.graph is None for b in self._bound.values()):
            # a pool ends with its last graph, and cannot be captured into again
            self._pool = torch.cuda.graph_pool_handle()
        try:
            bound.capture(self._pool)
        except RuntimeError as error:
            # nor into one that an interrupted capture has left half open
            self._pool = None
            if is_out_of_memory(error) or build_failure(error) is not None:
                raise
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"a CUDA graph of {bound.key.direction} could not be captured, so its launches are queued one "
                    f"by one: {error}; cuda_graphs=False does so from the start",
                    stacklevel=2,
                )
            return
        self.stats.captures += 1

    def drop(self, unwanted: Callable[[LaunchPlan], bool]) -> None:
        """Free the bound plans that are unwanted."""
        for key in [k for k, bound in self._bound.items() if unwanted(bound.plan)]:
            retire([self._bound.pop(key).arena])
            self.stats.evictions += 1
        self.stats.nbytes = self._nbytes()

    def clear(self) -> None:
        """Free every graph and arena."""
        retire(self.arenas())
        self._bound.clear()
        self.stats.nbytes = 0

    def arena(self, nbytes: int) -> Tensor:
        """The smallest arena in the cache that is large enough, else a new one."""
        sizes = {b.arena.nbytes: b.arena for b in self._bound.values()}
        fitting = [size for size in sizes if size >= nbytes]
        if fitting:
            return sizes[min(fitting)]
        roomy = max(nbytes, min(2 * max(sizes, default=0), self.arena_step))
        try:
            return new_arena(roomy, self.device)
        except torch.OutOfMemoryError:
            if roomy == nbytes:
                raise
        return new_arena(nbytes, self.device)

    def arenas(self) -> list[Tensor]:
        """Every arena, once per plan that is bound to it."""
        return [bound.arena for bound in self._bound.values()]

    def _nbytes(self) -> int:
        return sum({a.data_ptr(): a.nbytes for a in self.arenas()}.values())
