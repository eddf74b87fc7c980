"""How `python -m bench model` and `flux2` measure whole calls.

Calls are the public ones with fresh outputs; inputs rotate over more than three L2 caches; contenders are interleaved
and compared by medians. One whose result is not that of the float32 reference gets no time; one that does not fit or
does not compile gets a row that says why. Memory is weighed for each alone, before the timing.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capacitor_rt.errors import CapacitorError

from ._contenders import Contender, Setting, Shape, truth_of
from ._device import MemoryMeter, clocks, elapsed_us, exact_float32, release, why
from ._records import append_line
from ._timing import Ceilings, Timing, copies_for, floor_us, summarise

# relative rms difference from the float32 reference beyond which no time is reported: in bfloat16 and plain torch
# random weights give 0.8 % for full_capacitor and 3.6 % for FLUX.2, which is many more layers deep
LIMITS = {
    "full_capacitor": {"bfloat16": 2e-2, "float16": 3e-3, "float32": 2e-4},
    "flux2": {"bfloat16": 1e-1, "float16": 2e-2, "float32": 2e-4},
}
NOISY_PERCENT = 3.0
TRUTH_PIXELS = 4 * 512 * 512
SEED = 0
SLICE_US = 20e3
WARM_SECONDS = 0.4
Job = tuple[Shape, Sequence[Contender]]
HEADER = f"{'':44} {'ms':>9} {'spread':>7} {'images/s':>9} {'TFLOP/s':>8} {'% floor':>8} {'peak MiB':>9} {'error':>8}"


def time_calls(calls: dict[str, Callable[[int], Any]], device: torch.device, rounds: int) -> dict[str, Timing | str]:
    """Time calls against each other: name -> timing, or why there is none. `call(i)` is the i-th call."""
    samples: dict[str, list[float]] = {}
    failed: dict[str, Timing | str] = {}
    repeats: dict[str, int] = {}
    turns = {name: itertools.count() for name in calls}

    def sample(name: str, count: int) -> float | None:
        def work() -> None:
            for _ in range(count):
                calls[name](next(turns[name]))

        try:
            return elapsed_us(work, device) / count
        except Exception as error:
            failed[name] = why(error)
            samples.pop(name, None)
        # outside of the handler, whose traceback holds the tensors that did not fit
        release(device)
        return None

    for name in calls:
        once = sample(name, 1)
        if once is not None:
            samples[name], repeats[name] = [], max(1, min(200, round(SLICE_US / once)))
    begin = time.monotonic()
    while device.type == "cuda" and time.monotonic() - begin < WARM_SECONDS * len(calls):
        for name in tuple(samples):
            sample(name, repeats[name])
    for _ in range(rounds):
        for name in tuple(samples):
            us = sample(name, repeats[name])
            if us is not None:
                samples[name].append(us)
    return {name: summarise(us) for name, us in samples.items()} | failed


def make_inputs(setting: Setting, model: str, shape: Shape) -> list[Tensor]:
    """Random inputs of one model, enough copies to exceed three L2 caches."""
    if shape.direction == "encode":
        size = (shape.batch, 3, shape.size, shape.size)
    else:
        size = (shape.batch, setting.channels(model), shape.size // 16, shape.size // 16)
    on_gpu = setting.device.type == "cuda"
    nbytes = setting.dtype.itemsize * torch.Size(size).numel()
    l2 = max(torch.cuda.get_device_properties(setting.device).L2_cache_size, 64 << 20) if on_gpu else 0
    draw = torch.rand if shape.direction == "encode" else torch.randn
    count = min(copies_for(nbytes, l2), 64)
    made = [draw(size, device=setting.device, dtype=setting.dtype) for _ in range(count)]
    return [x.mul_(2).sub_(1) for x in made] if shape.direction == "encode" else made


class Bench:
    """Measures jobs one after another and appends their lines to a file."""

    def __init__(self, setting: Setting, ceilings: Ceilings, facts: dict[str, Any], out: Path, bench: str, rounds: int):
        self.setting, self.ceilings, self.facts, self.out = setting, ceilings, facts, out
        self.bench, self.rounds = bench, rounds
        self.broken = 0

    def run(self, jobs: Sequence[Job], deadline: float) -> None:
        """Measure every job that begins before the deadline (of `time.monotonic`); the others' rows say so."""
        for shape, contenders in jobs:
            print(f"{shape}{f'  ({shape.name})' if shape.name else ''}", flush=True)
            if time.monotonic() >= deadline:
                lines = [self._base(shape, c) | {"missing": "out of time: give more --minutes"} for c in contenders]
            else:
                lines = self.measure(shape, contenders)
            for line in lines:
                append_line(self.out, line | {"ceilings": [self.ceilings.tflops, self.ceilings.gbps]} | self.facts)
                print(format_line(line), flush=True)

    def measure(self, shape: Shape, contenders: Sequence[Contender]) -> list[dict[str, Any]]:
        """The lines of one shape."""
        lines = {f"{c.model}/{c.name}": self._base(shape, c) for c in contenders}
        inputs: dict[str, list[Tensor]] = {}
        truths: dict[str, Tensor] = {}
        calls: dict[str, Callable[[int], Any]] = {}
        for contender in contenders:
            key = f"{contender.model}/{contender.name}"
            problem = None
            try:
                if contender.model not in truths:
                    inputs[contender.model] = make_inputs(self.setting, contender.model, shape)
                    truths[contender.model] = self._truth(contender.model, shape, inputs[contender.model][0])
                call, found = self._prepare(contender, shape, inputs[contender.model], truths[contender.model])
                lines[key] |= found
                if call is not None:
                    calls[key] = call
            # whatever a compiler, a driver or diffusers raises is the reason in a row, and the run goes on
            except Exception as error:
                problem = error
                lines[key]["missing"] = why(error)
            if problem is not None:
                self._blame(contender, problem)
                problem = None
                release(self.setting.device)
        timed = time_calls(calls, self.setting.device, self.rounds)
        state = clocks(self.setting.device)
        for key, timing in timed.items():
            if isinstance(timing, str):
                lines[key]["missing"] = timing
                self.broken += "/ours" in key and not timing.startswith("out of memory")
                continue
            lines[key] |= self._figures(shape, lines[key], timing) | state
            if shape.batch == 1:
                lines[key]["latency_ms"] = self._latency(calls[key])
            over = {other: t.us / timing.us for other, t in timed.items() if other != key and isinstance(t, Timing)}
            lines[key]["speedup_over"] = over
        calls.clear()
        release(self.setting.device)
        return list(lines.values())

    def _base(self, shape: Shape, contender: Contender) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "row": shape.name,
            "direction": shape.direction,
            "batch": shape.batch,
            "size": shape.size,
            "model": contender.model,
            "variant": contender.name,
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "weights": "random",
        }

    def _truth(self, model: str, shape: Shape, x: Tensor) -> Tensor:
        """float32 output for the first images of an input."""
        count = max(1, min(shape.batch, TRUTH_PIXELS // shape.size**2))
        with exact_float32():
            return truth_of(self.setting, model, shape, x, count, SEED)

    def _prepare(
        self, contender: Contender, shape: Shape, inputs: list[Tensor], truth: Tensor
    ) -> tuple[Callable[[int], Any] | None, dict[str, Any]]:
        """(call by number of input, what was found); no call for a contender with a wrong result."""
        device = self.setting.device
        meter, begin = MemoryMeter(device), time.perf_counter()
        run = contender.build(self.setting, shape, inputs[0])
        # captured graphs replay from the third call on at the latest, and replays are what is checked and weighed
        for _ in range(3 if device.type == "cuda" else 0):
            run(inputs[0])
        torch.manual_seed(SEED)
        got = run(inputs[0])[: len(truth)].float()
        gap = ((got - truth).square().mean() / truth.square().mean()).sqrt().item()
        del got
        found: dict[str, Any] = {"error": gap, "build_s": round(time.perf_counter() - begin, 3)}
        limit = LIMITS[contender.model][str(self.setting.dtype).removeprefix("torch.")]
        if not gap <= limit:
            self.broken += contender.name.startswith("ours")
            return None, found | {"refused": f"differs from float32 by {gap:.2e}, more than {limit:.0e}"}
        memory = meter.measure(partial(run, inputs[-1]))
        if memory:
            found |= {"peak_bytes": memory.peak_bytes, "device_bytes": memory.device_bytes}
        return lambda i: run(inputs[i % len(inputs)]), found

    def _figures(self, shape: Shape, line: dict[str, Any], timing: Timing) -> dict[str, Any]:
        flops = self.setting.flops(line["model"], shape)
        spread = 100 * (timing.p80 - timing.p20) / timing.us
        return {
            "ms": timing.us / 1e3,
            "p20": timing.p20 / 1e3,
            "p80": timing.p80 / 1e3,
            "replays": timing.replays,
            "spread_percent": spread,
            "noisy": spread > NOISY_PERCENT,
            "images_per_s": shape.batch / timing.us * 1e6,
            "flops": flops,
            "tflops": flops / timing.us / 1e6,
            "percent_of_floor": 100 * floor_us(self.ceilings, flops, 0) / timing.us,
        }

    def _latency(self, call: Callable[[int], Any]) -> float:
        """Median milliseconds of a call that is waited for, seen by the host."""
        seen = []
        for i in range(20 if self.setting.device.type == "cuda" else 1):
            begin = time.perf_counter()
            call(i)
            if self.setting.device.type == "cuda":
                torch.cuda.synchronize(self.setting.device)
            seen.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(seen)

    def _blame(self, contender: Contender, error: Exception) -> None:
        """Count what only a fault of this runtime explains: not memory, not a machine that cannot run it."""
        if contender.name.startswith("ours") and not isinstance(error, (torch.OutOfMemoryError, CapacitorError)):
            self.broken += 1


def format_line(line: dict[str, Any]) -> str:
    """A line of the printed table."""
    head = f"  {line['model']:14} {line['variant']:27}"
    for reason in ("refused", "missing"):
        if reason in line:
            return f"{head} {reason}: {line[reason]}"
    peak = f"{line['peak_bytes'] / 2**20:9.0f}" if "peak_bytes" in line else f"{'-':>9}"
    return (
        f"{head} {line['ms']:9.3f} {line['spread_percent']:6.1f}% {line['images_per_s']:9.1f} {line['tflops']:8.1f} "
        f"{line['percent_of_floor']:8.1f} {peak} {line['error']:8.1e}{'  noisy' if line['noisy'] else ''}"
    )
