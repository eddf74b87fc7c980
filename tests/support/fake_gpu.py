"""What a GPU knows of its memory and of the work that uses it, without doing any: the ground of the fake device.

Work is ordered by vector clocks: of each stream, how far into every other one it has waited; of the host, what it
knows to be done. Errors are raised as torch raises them; `Gpu.faults` keeps those that no program may cause.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

import torch

Clock = dict[int, int]
LEGACY = 0
"""The default stream."""
OUT_OF_MEMORY: dict[str, tuple[type[Exception], str]] = {
    "allocate": (torch.OutOfMemoryError, "CUDA out of memory: as the test asked."),
    "load": (RuntimeError, "Triton Error [CUDA]: out of memory"),
    "instantiate": (torch.AcceleratorError, "CUDA error: out of memory"),
}


class Memory:
    """One allocation: the stream that it is of, its private pool if any, and the work that uses it."""

    def __init__(self, label: str, nbytes: int, stream: int, pool: Hashable, life: int):
        self.label, self.nbytes, self.stream, self.pool, self.life = label, nbytes, stream, pool, life
        self.uses: Clock = {}
        self.written: tuple[int, int] | None = None
        self.promised = False
        self.recorded: set[int] = set()
        self.freed = False


class Pools:
    """Private pools of one caching allocator: how many graphs use each handle, and the captures under way."""

    def __init__(self) -> None:
        self.users: dict[Hashable, int] = {}
        self.recording: set[Hashable] = set()

    def begin(self, handle: Hashable) -> None:
        """A capture begins. A handle without graphs is dead until the allocator forgets it."""
        if self.users.get(handle, 1) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.users[handle] = self.users.get(handle, 0) + 1
        if handle in self.recording:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.recording.add(handle)

    def empty(self) -> None:
        """`empty_cache` of this allocator forgets the pools that no graph uses."""
        self.users = {handle: n for handle, n in self.users.items() if n}


class Gpu:
    """One device: `limit` bytes can be allocated, `allocated` are."""

    def __init__(self) -> None:
        self.lock, self.local = threading.RLock(), threading.local()
        self.allocated = self.life = 0
        self.reset()

    def reset(self, cc: int = 90, limit: int = 80 << 30) -> None:
        """As at the start of a process, of compute capability `cc`; memory that is still held stays."""
        self.cc, self.limit = cc, limit
        self.life += 1
        self.faults: list[str] = []
        self.pools, self.host_pools, self.idle = Pools(), Pools(), Counter[Hashable]()
        self.clocks: defaultdict[int, Clock] = defaultdict(dict)
        self.host: Clock = {}
        self.captures: dict[int, Any] = {}
        self.freed: defaultdict[int, list[Memory]] = defaultdict(list)
        self.failures: dict[str, tuple[int, Exception]] = {}
        self.counts = Counter[str]()
        # works of each stream, those of replayed graphs included: the only clock there is
        self.spent = Counter[int]()

    @property
    def stream(self) -> int:
        """The current stream of this thread."""
        return getattr(self.local, "stream", LEGACY)

    # errors

    def fault(self, what: str) -> None:
        """Keep an error, with the line of the project or of a test that made it."""
        ours = [f for f in traceback.extract_stack() if "capacitor_rt/" in f.filename or "/test_" in f.filename]
        self.faults.append(what + (f" ({ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno})" if ours else ""))

    def fail(self, kind: str, after: int = 0, error: Exception | None = None) -> None:
        """Let one "allocate", "load" (of a module) or "instantiate" (of a graph) fail, after so many that succeed."""
        kind_of_error, message = OUT_OF_MEMORY[kind]
        self.failures[kind] = (after, error or kind_of_error(message))

    def count(self, kind: str) -> None:
        """One more of a kind; raises where it is the one that is to fail."""
        self.counts[kind] += 1
        left = self.failures[kind][0] if kind in self.failures else -1
        if left == 0:
            # without a name: the frame of a name and the traceback of an error hold each other
            raise self.failures.pop(kind)[1]
        if left > 0:
            self.failures[kind] = (left - 1, self.failures[kind][1])

    def refuse(self, what: str, beside: tuple[str, ...] = ("global",)) -> None:
        """End a capture of this thread, or any in one of the modes `beside`, which forbids what is about to be done."""
        for capture in {*self.captures.values()}:
            if capture.mode in beside or capture.thread == threading.get_ident():
                capture.invalid = True
                self.fault(f"{what} inside a capture")
                raise torch.AcceleratorError(f"CUDA error: operation not permitted when stream is capturing: {what}")

    # work

    def is_behind(self, stream: int, other: int, n: int) -> bool:
        """Whether what a stream does now comes after the first `n` works of another."""
        return other == stream or max(self.clocks[stream].get(other, 0), self.host.get(other, 0)) >= n

    def work(self, used: Iterable[Memory], stream: int | None = None, written: Iterable[Memory] = ()) -> None:
        """Queue work that uses memory and writes to some of it, or record it where the stream is being captured."""
        with self.lock:
            stream = self.stream if stream is None else stream
            if stream in self.captures:
                graph = self.captures[stream]
                graph.memory.update(used)
                graph.works += 1
                graph.nodes[stream] += 1
                for memory in written:
                    memory.promised = memory.pool == graph.handle
                return
            if stream == LEGACY:
                self.refuse("work on the legacy stream", beside=())
            n = self.clocks[stream][stream] = self.clocks[stream].get(stream, 0) + 1
            self.spent[stream] += 1
            for memory in used:
                memory.uses[stream] = n
                if memory.promised:
                    self.fault(f"{memory.label} is used before the graph that writes it was replayed")
                if memory.written is not None and not self.is_behind(stream, *memory.written):
                    self.fault(f"stream {stream} uses {memory.label} while stream {memory.written[0]} writes it")
            for memory in written:
                memory.written = (stream, n)

    def wait(self, clock: Clock, stream: int | None = None) -> None:
        """A stream, or else the host, waits for what a clock has seen."""
        with self.lock:
            mine = self.host if stream is None else self.clocks[stream]
            mine.update({s: n for s, n in clock.items() if n > mine.get(s, 0)})

    def synchronize(self, stream: int | None = None) -> None:
        """The host waits for a stream, or for all of them."""
        with self.lock:
            captured = bool(self.captures) if stream is None else stream in self.captures
            self.refuse("a synchronization", ("global", "thread_local", "relaxed") if captured else ())
            for clock in [*self.clocks.values()] if stream is None else [self.clocks[stream]]:
                self.wait(clock)

    # memory

    def allocate(self, label: str, nbytes: int) -> Memory:
        """Memory of the current stream; while that is captured, of the graph's pool."""
        with self.lock:
            capture = self.captures.get(self.stream)
            if capture is None:
                self.refuse("an allocation outside of the graph's pool", beside=())
                self.reuse(self.stream)
            self.count("allocate")
            if self.allocated + nbytes > self.limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.")
            self.allocated += nbytes
            return Memory(label, nbytes, self.stream, capture and capture.handle, self.life)

    def free(self, memory: Memory) -> None:
        """The last tensor went: the allocator gives the memory to whoever next asks on its stream."""
        with self.lock:
            memory.freed = True
            if self.pools.users.get(memory.pool):
                self.idle[memory.pool] += memory.nbytes
                return
            self.allocated -= memory.nbytes
            if memory.pool is not None or memory.life != self.life:
                # it goes back to the driver, which waits for the device; or is of a test before
                return
            # of recorded streams the allocator waits for all that is queued now
            waited = [self.clocks[stream] for stream in memory.recorded]
            memory.uses = {s: n for s, n in memory.uses.items() if all(c.get(s, 0) < n for c in waited)}
            self.freed[memory.stream].append(memory)

    def reuse(self, stream: int) -> None:
        """What was freed on a stream may be given out: work that uses it is to be done, or the stream behind it."""
        for memory in self.freed.pop(stream, []):
            for other, n in memory.uses.items():
                if not self.is_behind(stream, other, n):
                    self.fault(f"{memory.label} was freed while stream {other} still uses it")

    def release(self, handle: Hashable) -> None:
        """A graph went from a pool; with the last one its memory does."""
        with self.lock:
            for pools in (self.pools, self.host_pools):
                if handle in pools.users:
                    pools.users[handle] -= 1
            if not self.pools.users.get(handle):
                self.allocated -= self.idle.pop(handle, 0)

    def settle(self) -> list[str]:
        """All faults, those of memory that is free and unsafe included."""
        for stream in [*self.freed]:
            self.reuse(stream)
        return self.faults


gpu = Gpu()
