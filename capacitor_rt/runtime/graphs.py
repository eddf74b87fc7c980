"""Plans bound to arenas, captured as CUDA graphs, kept by key in a cache with a byte budget."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .executor import Executor
from .memory import new_arena, retire
from .plan import LaunchPlan, PlanKey
from .stats import Stats

MAX_BOUND = 256
"""Plans kept; the driver holds some memory of its own for each captured graph."""
# torch allows one capture at a time in a process
_capturing = threading.Lock()


class Bound:
    """A plan bound to an arena, which others on the same device may share: one of them runs at a time."""

    def __init__(self, plan: LaunchPlan, weights: Mapping[str, Tensor], arena: Tensor):
        self.plan, self.arena = plan, arena
        self.executor = Executor(plan, weights, arena)
        self.inputs, self.outputs = self.executor.inputs, self.executor.outputs
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self, pool: Any) -> None:
        """Capture the launches. They run once before, so that every kernel is compiled and loaded.

        `torch.cuda.graph` would wait for the device and empty the allocator's cache first; the launches allocate
        nothing, so neither is needed.
        """
        caller = torch.cuda.current_stream(self.arena.device)
        side = torch.cuda.Stream(self.arena.device)
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(caller)
        with _capturing, torch.cuda.stream(side):
            self.executor.run()
            # other threads may go on allocating meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self.executor.run()
            finally:
                graph.capture_end()
        caller.wait_stream(side)
        self.graph = graph

    def run(self) -> None:
        """Replay, or launch where nothing was captured.

        Raises:
            RuntimeError: of CUDA; the message names the key.
        """
        if self.graph is None:
            self.executor.run()
            return
        try:
            self.graph.replay()
        except RuntimeError as error:
            raise RuntimeError(f"replay of {self.plan.key} failed: {error}") from error


class BoundCache:
    """Least recently used cache of bound plans. Arenas are shared: a smaller plan runs in the arena of a larger one.

    All of it belongs to one device and is used by one call at a time (`runtime.Runtime` sees to that).

    Args:
        budget: bytes of arenas. The plan about to run is kept whatever its size.
        arena_step: a new arena is at least twice as large as the largest so far, up to this many bytes, so that ever
            larger shapes need few of them.
    """

    def __init__(self, device: torch.device, budget: int, arena_step: int, stats: Stats):
        self.device, self.budget, self.arena_step, self.stats = device, budget, arena_step, stats
        self._bound: OrderedDict[PlanKey, Bound] = OrderedDict()
        # None where nothing is to be captured
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def find(self, key: PlanKey) -> Bound | None:
        """The bound plan of `key`, now the most recently used one."""
        bound = self._bound.get(key)
        if bound is not None:
            self.stats.hits += 1
            self._bound.move_to_end(key)
        return bound

    def add(self, bound: Bound) -> None:
        """Capture a plan and keep it; the least recently used ones go until the rest is within the budget."""
        if self._pool is not None:
            bound.capture(self._pool)
            self.stats.captures += 1
        self._bound[bound.plan.key] = bound
        while (self._nbytes() > self.budget or len(self._bound) > MAX_BOUND) and len(self._bound) > 1:
            self._retire(self._bound.popitem(last=False)[1])
            self.stats.evictions += 1
        self.stats.nbytes = self._nbytes()

    def drop(self, unwanted: Callable[[LaunchPlan], bool]) -> None:
        """Free the bound plans that are unwanted."""
        for key in [r for r, bound in self._bound.items() if unwanted(bound.plan)]:
            self._retire(self._bound.pop(key))
            self.stats.evictions += 1
        self.stats.nbytes = self._nbytes()

    def clear(self) -> None:
        """Free every graph and arena."""
        for bound in self._bound.values():
            self._retire(bound)
        self._bound.clear()
        self.stats.nbytes = 0

    def arena(self, nbytes: int) -> Tensor:
        """The smallest arena in the cache that is large enough, else a new one."""
        sizes = {b.arena.nbytes: b.arena for b in self._bound.values()}
        fitting = [size for size in sizes if size >= nbytes]
        if fitting:
            return sizes[min(fitting)]
        return new_arena(max(nbytes, min(2 * max(sizes, default=0), self.arena_step)), self.device)

    def _retire(self, bound: Bound) -> None:
        retire([bound.arena])

    def _nbytes(self) -> int:
        return sum({b.arena.data_ptr(): b.arena.nbytes for b in self._bound.values()}.values())
