"""Plans bound to static tensors, captured as CUDA graphs, kept by request in a cache with a byte budget."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .arena import ALIGNMENT
from .executor import Executor
from .plan import Plan, Request


@dataclass
class Stats:
    """Counters of a model's runtime.

    Attributes:
        hits: calls served by a plan already bound; captures: CUDA graphs captured; replays: of them.
        eager: runs by single launches (no CUDA, or inside another capture); evictions: of the cache.
        nbytes: of static inputs, outputs and arenas now; capture_seconds: spent in binding and capturing.
        weight_nbytes: of packed weights now.
    """

    hits: int = 0
    captures: int = 0
    replays: int = 0
    eager: int = 0
    evictions: int = 0
    nbytes: int = 0
    capture_seconds: float = 0.0
    weight_nbytes: int = 0


def new_arena(nbytes: int, device: torch.device) -> Tensor:
    """Uninitialised uint8 memory that starts on a 256-byte boundary."""
    block = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -block.data_ptr() % ALIGNMENT
    return block[start : start + nbytes]


class Bound:
    """A plan with static inputs and outputs of its own; the arena may be shared with others on the same device."""

    def __init__(self, plan: Plan, weights: Mapping[str, Tensor], arena: Tensor, device: torch.device):
        self.plan, self.arena = plan, arena
        self.inputs, self.outputs = (
            {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in tensors.items()}
            for tensors in (plan.inputs, plan.outputs)
        )
        self.executor = Executor(plan, weights, arena, self.inputs, self.outputs)
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the static inputs and outputs."""
        return sum(t.nbytes for t in (*self.inputs.values(), *self.outputs.values()))

    def capture(self, pool: tuple[int, int]) -> None:
        """Capture the launches. They run once before, so that every kernel is compiled and loaded."""
        stream = torch.cuda.Stream(self.arena.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.executor.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on allocating while this one captures
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.executor.run()
        self.graph = graph

    def run(self) -> None:
        """Replay, or launch where nothing was captured."""
        if self.graph is None:
            self.executor.run()
            return
        try:
            self.graph.replay()
        except RuntimeError as error:
            raise RuntimeError(f"replay of {self.plan.request} failed: {error}") from error


class BoundCache:
    """Least recently used cache of bound plans. Arenas are shared: a smaller plan runs in the arena of a larger one.

    All of it belongs to one device and is used by one call at a time (`runtime.Runtime` sees to that).
    """

    def __init__(self, device: torch.device, budget: int, stats: Stats):
        self.device, self.budget, self.stats = device, budget, stats
        self._bound: OrderedDict[Request, Bound] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def get(self, request: Request, bind: Callable[[Callable[[int], Tensor]], Bound]) -> Bound:
        """The bound plan of `request`; `bind(arena_of)` makes it where there is none."""
        if request in self._bound:
            self.stats.hits += 1
            self._bound.move_to_end(request)
            return self._bound[request]
        started = time.perf_counter()
        bound = bind(self.arena)
        if self._pool is not None:
            with torch.cuda.device(self.device):
                bound.capture(self._pool)
            self.stats.captures += 1
        self._bound[request] = bound
        self.stats.capture_seconds += time.perf_counter() - started
        self._evict()
        return bound

    def clear(self) -> None:
        """Free every graph, arena and static tensor."""
        self._bound.clear()
        self.stats.nbytes = 0

    def drop(self, unwanted: Callable[[Request], bool]) -> None:
        """Free the plans whose request is unwanted."""
        for request in [r for r in self._bound if unwanted(r)]:
            del self._bound[request]
            self.stats.evictions += 1
        self.stats.nbytes = self._nbytes()

    def arena(self, nbytes: int) -> Tensor:
        """The smallest arena in the cache that is large enough, else a new one."""
        fitting = [b.arena for b in self._bound.values() if b.arena.nbytes >= nbytes]
        return min(fitting, key=lambda a: a.nbytes) if fitting else new_arena(nbytes, self.device)

    def _nbytes(self) -> int:
        arenas = {b.arena.data_ptr(): b.arena.nbytes for b in self._bound.values()}
        return sum(arenas.values()) + sum(b.nbytes for b in self._bound.values())

    def _evict(self) -> None:
        # the newest stays, whatever its size: it is about to run
        while (size := self._nbytes()) > self.budget and len(self._bound) > 1:
            self._bound.popitem(last=False)
            self.stats.evictions += 1
        self.stats.nbytes = size
