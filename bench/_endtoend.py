"""How `python -m bench model` and `flux2` measure whole calls.

Calls are the public ones with fresh outputs; inputs rotate over more than three L2 caches. One whose result is not that
of the float32 reference gets no time; one that does not fit or does not compile gets a row that says why. Memory is
weighed for each alone, before the timing.

Every contender has a process of its own, and so have the references. An illegal access ends all CUDA work of the
process that made it, and a crash the process: it costs one row, whose contender finds a new process at the next shape.
The comparison stays honest because the processes take turns: this one, which leaves the device alone, asks one after
another for a sample of some 20 ms, so at any time one of them works and drifting clocks meet all alike; medians are
compared. Before it is timed a process makes one call, which pays for the change of processes, and between turns it
gives its allocator's cache back, so that what does not fit beside the others is no more than it was in one process.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capacitor_rt.runtime.timing import Timing, summarise

from ._contenders import Contender, Setting, Shape
from ._device import clocks
from ._records import append_line
from ._sides import References, Side
from ._timing import Ceilings, floor_us
from ._workers import FAULT, LOST, MEMORY, REFUSED, Failure, Worker

NOISY_PERCENT = 3.0
SLICE_US = 20e3
WARM_SECONDS = 0.4
# to build and check a contender, which for some means to compile; and for anything else
PREPARE_SECONDS = {"no": 180.0, "default": 900.0, "autotune": 1800.0}
ANSWER_SECONDS = 120.0
Job = tuple[Shape, Sequence[Contender]]
HEADER = f"{'':44} {'ms':>9} {'spread':>7} {'images/s':>9} {'TFLOP/s':>8} {'% floor':>8} {'peak MiB':>9} {'error':>8}"


def take_turns(
    sides: Mapping[str, Callable[[int], float]], rounds: int, warm_seconds: float = 0.0
) -> dict[str, Timing | Failure]:
    """Time sides against each other: name -> timing, or why there is none.

    Args:
        sides: `side(count)` gives the microseconds per call of so many calls, or raises `Failure`.
        rounds: samples of each.
        warm_seconds: of each, before the first sample that counts.
    """
    samples: dict[str, list[float]] = {}
    failed: dict[str, Timing | Failure] = {}
    repeats: dict[str, int] = {}

    def sample(name: str, count: int) -> float | None:
        try:
            return sides[name](count)
        except Failure as failure:
            failed[name] = failure
            samples.pop(name, None)
            return None

    for name in sides:
        once = sample(name, 1)
        if once is not None:
            samples[name], repeats[name] = [], max(1, min(200, round(SLICE_US / once)))
    begin = time.monotonic()
    while samples and time.monotonic() - begin < warm_seconds * len(sides):
        for name in tuple(samples):
            sample(name, repeats[name])
    for _ in range(rounds):
        for name in tuple(samples):
            us = sample(name, repeats[name])
            if us is not None:
                samples[name].append(us)
    return {name: summarise(us) for name, us in samples.items()} | failed


class Bench:
    """Measures jobs one after another and appends their lines to a file. A context: its processes end with it."""

    def __init__(self, setting: Setting, ceilings: Ceilings, facts: dict[str, Any], out: Path, bench: str, rounds: int):
        self.setting, self.ceilings, self.facts, self.out = setting, ceilings, facts, out
        self.bench, self.rounds = bench, rounds
        self.broken = 0
        # without the weights that it may have made here
        self._given = dataclasses.replace(setting)
        self._sides: dict[Contender, Worker] = {}
        self._references = Worker(References, self._given)
        self._written: dict[tuple[str, Shape], Path | Failure] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="capacitor-bench-"))

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        workers = (*self._sides.values(), self._references)
        try:
            for worker in workers:
                worker.dismiss()
            for worker in workers:
                worker.stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

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
        lines = {c.key: self._base(shape, c) for c in contenders}
        workers = {c.key: self._worker(c) for c in contenders}
        for worker in (self._references, *workers.values()):
            worker.start()
        for key, worker in tuple(workers.items()):
            try:
                worker.ask("ready")
            except Failure as failure:
                self._missing(lines[key], failure)
                del workers[key]
        running: dict[str, Worker] = {}
        for contender in contenders:
            if contender.key in workers:
                worker, line = workers[contender.key], lines[contender.key]
                if self._prepare(contender, shape, worker, line):
                    running[contender.key] = worker
        self._time(shape, running, lines)
        for contender in contenders:
            self._let_go(contender)
        return list(lines.values())

    def _prepare(self, contender: Contender, shape: Shape, worker: Worker, line: dict[str, Any]) -> bool:
        """Whether the contender is to be timed; its line gets what was found."""
        try:
            reference = self._reference(contender.model, shape)
            line |= worker.ask("prepare", shape, reference, seconds=PREPARE_SECONDS[contender.compiles])
        except Failure as failure:
            self._missing(line, failure)
            self._drop(worker)
            return False
        if "refused" in line:
            self.broken += contender.is_ours
            self._drop(worker)
            return False
        return True

    def _time(self, shape: Shape, running: dict[str, Worker], lines: dict[str, dict[str, Any]]) -> None:
        """Add timings, and latencies of single images, to the lines."""

        def side(worker: Worker) -> Callable[[int], float]:
            return lambda count: worker.ask("sample", count, seconds=ANSWER_SECONDS)

        warm = WARM_SECONDS if self.setting.device.type == "cuda" else 0.0
        timed = take_turns({key: side(worker) for key, worker in running.items()}, self.rounds, warm)
        state = clocks(self.setting.device)
        for key, timing in timed.items():
            if isinstance(timing, Failure):
                self._missing(lines[key], timing)
                continue
            lines[key] |= self._figures(shape, lines[key], timing) | state
            over = {other: t.us / timing.us for other, t in timed.items() if other != key and isinstance(t, Timing)}
            lines[key]["speedup_over"] = over
            if shape.batch == 1:
                try:
                    lines[key]["latency_ms"] = running[key].ask("latency", seconds=ANSWER_SECONDS)
                except Failure as failure:
                    # the timing stands
                    lines[key]["latency_missing"] = failure.reason

    def _reference(self, model: str, shape: Shape) -> Path:
        """The file of one model's reference at a shape, made once."""
        known = self._written.get((model, shape))
        if known is None:
            known = self._folder / f"{len(self._written)}.pt"
            try:
                self._references.ask("write", model, shape, known, seconds=PREPARE_SECONDS["no"])
            except Failure as failure:
                # a fault of the reference is none of the contender's
                kind = MEMORY if failure.kind == MEMORY else REFUSED
                known = Failure(f"no reference: {failure.reason}", kind)
            self._written[model, shape] = known
        if isinstance(known, Failure):
            raise known
        return known

    def _worker(self, contender: Contender) -> Worker:
        return self._sides.setdefault(contender, Worker(Side, self._given, contender))

    def _let_go(self, contender: Contender) -> None:
        """Free the device; what was compiled will hardly be needed for another shape."""
        worker = self._sides[contender]
        if contender.compiles != "no":
            worker.stop()
        self._drop(worker)

    def _drop(self, worker: Worker) -> None:
        if worker.pid is not None:
            try:
                worker.ask("drop")
            except Failure:
                worker.stop()

    def _missing(self, line: dict[str, Any], failure: Failure) -> None:
        """Say why there are no figures, and count what only a fault of this runtime explains."""
        line["missing"] = failure.reason
        self.broken += line["variant"].startswith("ours") and failure.kind in (FAULT, LOST)

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
