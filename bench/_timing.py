"""Honest timings: graph replays over rotated inputs, variants interleaved, clocks steady, ceilings from the same run.

On a GPU each variant is captured in a CUDA graph of many calls that walk over copies of its inputs, together larger
than three times the L2 cache, so that neither launch gaps nor a warm cache flatter it. Variants are replayed in turn
and compared by medians, since clocks and temperature drift. On the CPU the same interface times plain calls, which
only serves to test the benchmarks themselves.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from capacitor_rt.runtime.forecast import Ceilings

from ._device import elapsed_us, nvidia_smi

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


def floor_us(ceilings: Ceilings, flops: float, nbytes: float) -> float:
    """Microseconds that neither ceiling lets a launch go below."""
    return max(flops / (ceilings.tflops * 1e6), nbytes / (ceilings.gbps * 1e3))


def time_variants(variants: Sequence[Variant], device: torch.device, replays: int = 21) -> dict[str, Timing]:
    """Time variants against each other, interleaved; name -> timing."""
    prepare = _graph if device.type == "cuda" else _plain
    prepared = {variant.name: prepare(variant, device) for variant in variants}
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    if device.type == "cuda":
        for replay, calls in prepared.values():
            _warm(replay, calls)
    for _ in range(replays):
        for name, (replay, calls) in prepared.items():
            samples[name].append(replay() / calls)
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


def _plain(variant: Variant, device: torch.device) -> tuple[Callable[[], float], int]:
    call = variant.make()
    call()

    return lambda: elapsed_us(call, device), 1


def _graph(variant: Variant, device: torch.device) -> tuple[Callable[[], float], int]:
    properties = torch.cuda.get_device_properties(device)
    # the driver under-reports the L2 of some parts; an eighth of a gigabyte covers every current one
    count = min(copies_for(variant.nbytes, max(properties.L2_cache_size, 64 << 20)), 64)
    calls = [variant.make() for _ in range(count)]
    stream = torch.cuda.Stream(device)
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

    return replay, rounds * count


def _warm(replay: Callable[[], float], calls: int) -> None:
    """Replay until five in a row agree within 2 %, or ten times the usual warm-up has passed."""
    begin, recent = time.monotonic(), []
    while time.monotonic() - begin < 10 * WARM_SECONDS:
        recent = [*recent[-4:], replay() / calls]
        settled = len(recent) == 5 and max(recent) <= (1 + STEADY_SPREAD) * min(recent)
        if settled and time.monotonic() - begin >= WARM_SECONDS:
            return


def measure_ceilings(device: torch.device) -> Ceilings:
    """What this device reaches now, not what is specified: 8192^3 in bf16 and a copy of 1 GiB; tiny ones on the CPU.

    Values are random; bytes of the copy count as read and as written.
    """
    on_gpu = device.type == "cuda"
    size, dtype, nbytes = (8192, torch.bfloat16, 1 << 30) if on_gpu else (256, torch.float32, 4 << 20)

    def matmul() -> Call:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    def copy() -> Call:
        source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    timed = time_variants(
        [Variant("matmul", matmul, 3 * size * size * dtype.itemsize), Variant("copy", copy, 2 * nbytes)], device
    )
    tflops = 2 * size**3 / timed["matmul"].us / 1e6
    what = f"measured: a {size}^3 product in {str(dtype).removeprefix('torch.')} and a copy of {nbytes >> 20} MiB"
    return Ceilings(tflops, 2 * nbytes / timed["copy"].us / 1e3, what)


def environment(device: torch.device) -> dict[str, Any]:
    """Where a figure comes from: device, driver, clocks, versions, commit, date."""
    facts: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": device.type,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_output("git", "-C", str(Path(__file__).parent), "status", "--porcelain", "-uno")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if device.type != "cuda":
        return facts | {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    facts |= nvidia_smi(device, *fields)
    return facts | {"cuda": torch.version.cuda, "sms": torch.cuda.get_device_properties(device).multi_processor_count}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
