"""Times of calls that can be compared: CUDA graphs of many calls over rotated inputs, variants in turn, medians.

Each variant is captured in a graph of many calls that walk over copies of its inputs, together larger than three times
the L2 cache, so that neither launch gaps nor a warm cache flatter it. Variants are replayed in turn and compared by
medians, since clocks and temperature drift. On the CPU plain calls are timed, which serves only for trying things out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .graphs import capture_stream, capturing

L2_FACTOR = 3
GRAPH_MILLISECONDS = 8.0
WARM_SECONDS = 0.4
STEADY_SPREAD = 0.02

Call = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """One thing to time.

    Attributes:
        name: for tables.
        make: builds a call with inputs of its own; called once for each copy.
        nbytes: bytes that one call touches, which decides the number of copies.
    """

    name: str
    make: Callable[[], Call]
    nbytes: int


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median and the 20th and 80th percentile over replays."""

    us: float
    p20: float
    p80: float
    replays: int


@dataclass(frozen=True)
class Ready:
    """A variant with its inputs, captured: `replay()` runs `calls` calls and returns their microseconds."""

    replay: Callable[[], float]
    calls: int


def time_variants(variants: Sequence[Variant], device: torch.device, replays: int = 21) -> dict[str, Timing]:
    """Time variants against each other, interleaved; name -> timing."""
    return time_ready({variant.name: prepare(variant, device) for variant in variants}, device, replays)


def prepare(variant: Variant, device: torch.device) -> Ready:
    """A variant ready to be timed, with as many copies of its inputs as it takes."""
    return _graph(variant, device) if device.type == "cuda" else _plain(variant, device)


def time_ready(
    ready: Mapping[str, Ready], device: torch.device, replays: int, warm_seconds: float = WARM_SECONDS
) -> dict[str, Timing]:
    """Time what is `prepare`d, interleaved; name -> timing."""
    samples: dict[str, list[float]] = {name: [] for name in ready}
    if device.type == "cuda":
        for one in ready.values():
            _warm(one, warm_seconds)
    for _ in range(replays):
        for name, one in ready.items():
            samples[name].append(one.replay() / one.calls)
    return {name: summarise(values) for name, values in samples.items()}


def summarise(us: Sequence[float]) -> Timing:
    """Median and percentiles of microseconds per call."""
    ordered = sorted(us)
    last = len(ordered) - 1
    return Timing(
        us=statistics.median(ordered),
        p20=ordered[round(0.2 * last)],
        p80=ordered[round(0.8 * last)],
        replays=len(ordered),
    )


def copies_for(nbytes: int, l2_bytes: int) -> int:
    """Copies of the inputs that together exceed three times the L2 cache; at least two."""
    return max(2, -(-L2_FACTOR * l2_bytes // max(nbytes, 1)))


def elapsed_us(work: Callable[[], object], device: torch.device) -> float:
    """Microseconds of `work` on the device's current stream, by events, or on the CPU, by the clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e6
    stream = torch.cuda.current_stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _plain(variant: Variant, device: torch.device) -> Ready:
    call = variant.make()
    call()

    return Ready(lambda: elapsed_us(call, device), 1)


def _graph(variant: Variant, device: torch.device) -> Ready:
    properties = torch.cuda.get_device_properties(device)
    # the driver under-reports the L2 of some parts; an eighth of a gigabyte covers every current one
    count = min(copies_for(variant.nbytes, max(properties.L2_cache_size, 64 << 20)), 64)
    calls = [variant.make() for _ in range(count)]
    with capturing:
        stream = capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
            stream.synchronize()
            once = elapsed_us(lambda: [call() for call in calls], device) / count
        rounds = max(1, min(200, round(GRAPH_MILLISECONDS * 1e3 / (once * count))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        torch.cuda.synchronize(device)

    # `calls` stays alive with the closure: the graph holds pointers into its tensors
    def replay(_keep: Any = calls) -> float:
        return elapsed_us(graph.replay, device)

    return Ready(replay, rounds * count)


def _warm(ready: Ready, seconds: float) -> None:
    """Replay until five in a row agree within 2 %, or ten times the usual warm-up has passed."""
    begin, recent = time.monotonic(), list[float]()
    while time.monotonic() - begin < 10 * seconds:
        recent = [*recent[-4:], ready.replay() / ready.calls]
        settled = len(recent) == 5 and max(recent) <= (1 + STEADY_SPREAD) * min(recent)
        if settled and time.monotonic() - begin >= seconds:
            return
