"""Streams, events and graphs of the fake GPU, as `torch.cuda` has them. Read from the sources of 2.10 to 2.14."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from fake_gpu import LEGACY, Clock, Memory, gpu

POOLED = 32
_capture_begin = inspect.signature(torch.cuda.CUDAGraph.capture_begin)
_numbers, handles = itertools.count(), itertools.count(1)
_held: WeakValueDictionary[int, Stream] = WeakValueDictionary()


class Stream:
    """One of the 32 that torch hands out in turn. `shared` tells whether somebody held it already."""

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None):
        self.device = torch.device("cuda:0")
        taken = next(_numbers)
        self.cuda_stream = taken % POOLED + 1 if number is None else number
        self.shared = any(s.cuda_stream == self.cuda_stream for s in [*_held.values()])
        _held[taken] = self

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        gpu.synchronize(self.cuda_stream)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return self.cuda_stream


class Event:
    """A place in a stream's work, or in a graph under capture."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ):
        self.timing, self.recorded = enable_timing, False
        self.clock: Clock = {}
        self.spent = 0
        self.capture: CUDAGraph | None = None
        self.place = (LEGACY, 0)

    def record(self, stream: Stream | None = None) -> None:
        number = (stream or current_stream()).cuda_stream
        self.recorded = True
        with gpu.lock:
            self.capture, self.clock = gpu.captures.get(number), dict(gpu.clocks[number])
            self.spent = gpu.spent[number]
            if self.capture is not None:
                self.place = number, self.capture.nodes[number]

    def wait(self, stream: Stream | None = None) -> None:
        number = (stream or current_stream()).cuda_stream
        with gpu.lock:
            here = gpu.captures.get(number)
            if self.capture is not None and self.capture in gpu.captures.values():
                self.capture._join(self.place, number)
                gpu.captures[number] = self.capture
            elif self.capture is not None or (here is not None and self.clock):
                # cudaErrorCapturedEvent, cudaErrorStreamCaptureIsolation
                gpu.fault("an event inside a capture is waited for outside, or the other way round")
                raise torch.AcceleratorError("CUDA error: dependency created on uncaptured work in another stream")
            gpu.wait(self.clock, number)

    def synchronize(self) -> None:
        gpu.refuse("a synchronization")
        gpu.wait(self.clock)

    def elapsed_time(self, end_event: Event) -> float:
        """A tenth of a millisecond for every work that the stream was given in between."""
        if not (self.timing and end_event.timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not (self.recorded and end_event.recorded):
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not (self.query() and end_event.query()):
            raise torch.AcceleratorError("CUDA error: device not ready")
        return 0.1 * (end_event.spent - self.spent)

    def query(self) -> bool:
        return all(gpu.host.get(stream, 0) >= n for stream, n in self.clock.items())


class CUDAGraph:
    """What was queued between the begin and the end of a capture: the memory that a replay uses."""

    def __init__(self, keep_graph: bool = False):
        self.memory: set[Memory] = set()
        self.works = 0
        self.handle: Hashable = None
        self.ended = self.ready = self.invalid = False
        # by stream: what was put into the graph from it, and how much of that others have waited for
        self.nodes, self.joined = Counter[int](), Counter[int]()

    def _join(self, place: tuple[int, int], stream: int) -> None:
        """A stream waits for a place in another one's part of the capture, and becomes part of it if it was not."""
        other, n = place
        if stream != other:
            self.joined[other] = max(self.joined[other], n)
        if stream not in gpu.captures:
            self.nodes[stream] += 1

    def capture_begin(self, pool: Hashable = None, capture_error_mode: str = "global", **more: Any) -> None:
        # releases differ in what else they take
        _capture_begin.bind(self, pool, capture_error_mode, **more)
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError(f"Unknown capture error mode, got {capture_error_mode}")
        stream = current_stream()
        if stream.cuda_stream == LEGACY:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        with gpu.lock:
            if stream.shared or stream.cuda_stream in gpu.captures:
                gpu.fault(f"a capture on stream {stream.cuda_stream}, which somebody else was handed before")
            self.handle, self.mode = pool or (next(handles), 0), capture_error_mode
            self.thread, self.origin = threading.get_ident(), stream.cuda_stream
            gpu.pools.begin(self.handle)
            gpu.host_pools.begin(self.handle)
            gpu.captures[self.origin] = self

    def capture_end(self) -> None:
        with gpu.lock:
            for number in [n for n, graph in gpu.captures.items() if graph is self]:
                del gpu.captures[number]
                if number != self.origin and self.joined[number] < self.nodes[number]:
                    # cudaErrorStreamCaptureUnjoined
                    gpu.fault(f"a capture ends before stream {number}, which was forked from it, was joined")
                    self.invalid = True
            if self.invalid:
                # torch raises before its allocators stop recording, so the pool is lost
                raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
            for pools in (gpu.pools, gpu.host_pools):
                pools.recording.discard(self.handle)
            self.ended = True
            gpu.count("instantiate")
            self.ready = True

    def replay(self) -> None:
        if not self.ready:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        for memory in self.memory:
            if memory.freed and memory.pool != self.handle:
                gpu.fault(f"a graph is replayed that uses {memory.label}, which was freed")
            memory.promised = False
        gpu.count("replay")
        gpu.work(self.memory)
        gpu.spent[gpu.stream] += self.works - 1

    def pool(self) -> Hashable:
        return self.handle

    def reset(self) -> None:
        with gpu.lock:
            if self.ended:
                gpu.release(self.handle)
                for capture in {c for c in gpu.captures.values() if c.thread == threading.get_ident()}:
                    capture.invalid = True
                    gpu.fault("a graph is destroyed inside a capture")
            self.ended = self.ready = False
            self.memory = set()

    __del__ = reset


def current_stream(device: Any = None) -> Stream:
    return getattr(gpu.local, "current", DEFAULT)


@contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    """`torch.cuda.stream`."""
    before = current_stream()
    set_stream(stream or before)
    try:
        yield
    finally:
        set_stream(before)


def set_stream(stream: Stream) -> None:
    gpu.local.current, gpu.local.stream = stream, stream.cuda_stream


DEFAULT = Stream(number=LEGACY)
