"""Honest timings: graph replays over rotated inputs, variants interleaved, clocks steady, ceilings from the same run.

On a GPU each variant is captured in a CUDA graph of many calls that walk over copies of its inputs, together larger
than three times the L2 cache, so that neither launch gaps nor a warm cache flatter it. Variants are replayed in turn
and compared by medians, since clocks and temperature drift. On the CPU the same interface times plain calls, which
only serves to test the benchmarks themselves.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

RESULTS = Path(__file__).parent / "results"
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
class Ceilings:
    """What the device reaches on the two extremes, measured, not specified.

    Attributes:
        tflops: a square matrix product on random values, in `matmul_dtype`.
        gbs: a device-to-device copy, bytes read plus bytes written, in 10^9 bytes a second.
    """

    tflops: float
    gbs: float
    matmul_size: int
    matmul_dtype: str

    def floor_us(self, flops: float, nbytes: float) -> float:
        """Microseconds that neither ceiling lets a kernel go below."""
        return max(flops / (self.tflops * 1e6), nbytes / (self.gbs * 1e3))


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

    def replay() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    return replay, 1


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
        once = _elapsed_us(lambda: [call() for call in calls], stream) / count
    rounds = max(1, min(200, round(GRAPH_MILLISECONDS * 1e3 / (once * count))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    torch.cuda.synchronize(device)

    # `calls` stays alive with the closure: the graph holds pointers into its tensors
    def replay(_keep: Any = calls) -> float:
        return _elapsed_us(graph.replay, torch.cuda.current_stream(device))

    return replay, rounds * count


def _elapsed_us(work: Callable[[], Any], stream: torch.cuda.Stream) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _warm(replay: Callable[[], float], calls: int) -> None:
    """Replay until five in a row agree within 2 %, or ten times the usual warm-up has passed."""
    begin, recent = time.monotonic(), []
    while time.monotonic() - begin < 10 * WARM_SECONDS:
        recent = [*recent[-4:], replay() / calls]
        settled = len(recent) == 5 and max(recent) <= (1 + STEADY_SPREAD) * min(recent)
        if settled and time.monotonic() - begin >= WARM_SECONDS:
            return


def measure_ceilings(device: torch.device) -> Ceilings:
    """Ceilings of this device, now: 8192^3 in bf16 and a copy of 1 GiB; tiny ones on the CPU."""
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
    return Ceilings(tflops, 2 * nbytes / timed["copy"].us / 1e3, size, str(dtype).removeprefix("torch."))


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
    index = str(device.index or 0)
    values = _output("nvidia-smi", "-i", index, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    facts |= dict(zip(fields, (v.strip() for v in values.split(",")), strict=False)) if values else {}
    return facts | {"cuda": torch.version.cuda, "sms": torch.cuda.get_device_properties(device).multi_processor_count}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line and flush it, so that an interrupted run keeps what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def default_results(device: torch.device, stem: str) -> Path:
    """bench/results/<stem>-<gpu>.jsonl, the GPU's name in lower case with dashes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return RESULTS / f"{stem}-{'-'.join(name.lower().split())}.jsonl"


def ceilings_line(ceilings: Ceilings, facts: dict[str, Any]) -> dict[str, Any]:
    """The JSON line of measured ceilings."""
    return {"bench": "ceilings", **asdict(ceilings), **facts}
