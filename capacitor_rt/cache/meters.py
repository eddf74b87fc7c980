"""What the stages of a run did, what they waited for, and what would make it faster."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..printable import counted

STAGES = ("read", "decode", "fill", "encode", "write")
WAITS = ("start", "decode", "encode", "write", "starved", "queued", "idle")
GPU_DECODE = "gpu_decode"
"""A stage, and a wait of the coordinator, of runs whose JPEGs the GPU decodes."""
BUSY = 0.95
"""Share of the time from which on a stage counts as busy."""


ADVICE_SECONDS = 5.0
"""Of a shorter run, starting is what took the time."""


@dataclass
class Meters:
    """Seconds of a run.

    Attributes:
        workers: processes that decode; 0 if the coordinator did.
        cores: that the run may use.
        device: "gpu" or "cpu", where it encodes.
        seconds: of work, by stage: "read" (reading threads, added up, on the clock), "decode" (CPU time of all
            workers), `GPU_DECODE` (of the thread that has the GPU decode and resize, on the clock), "fill" (pixels
            copied into batches), "encode" (the device), "write" (hashing, writing, fsync).
        waits: of the coordinator for the workers' first images ("start"), and for "decode", "encode" and "write"; of
            the workers, added up, for bytes ("starved"), for their turn at the pixel budget ("queued") and for work
            ("idle").
        ahead: decoded chunks that were ready when one was wanted, on average.
        images: that were read.
        wall: of all; of several processes, of the one that took longest.
        processes: that shared the work, whose seconds are added up here.
        decoded: how images are decoded, by the plan.
        costs: what storage types cost, where that was measured, as `dtype_costs.as_json` gives it.
    """

    workers: int
    cores: int = 1
    device: str = "cpu"
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    waits: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAITS, 0.0))
    ahead: float = 0.0
    images: int = 0
    wall: float = 0.0
    processes: int = 1
    decoded: str = "exact"
    costs: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @classmethod
    def joined(cls, several: Sequence[Meters]) -> Meters:
        """Those of processes, at least one, that worked side by side."""
        n = len(several)
        seconds, waits = (
            # one that had nothing to encode has not all stages
            {name: sum(part.get(name, 0.0) for part in parts) for name in {n: None for part in parts for n in part}}
            for parts in ([m.seconds for m in several], [m.waits for m in several])
        )
        return cls(
            workers=sum(m.workers for m in several),
            cores=max(m.cores for m in several),
            device=several[0].device,
            seconds=seconds,
            waits=waits,
            ahead=sum(m.ahead for m in several) / n,
            images=sum(m.images for m in several),
            wall=max(m.wall for m in several),
            processes=n,
            decoded=several[0].decoded,
            costs=next((m.costs for m in several if m.costs), {}),
        )

    def occupancy(self) -> dict[str, float]:
        """Share of the time since the workers' start that each stage has worked, 0 to 1; of decoding, its workers'."""
        wall = max(self.running, 1e-9) * self.processes
        shares = {stage: seconds / wall for stage, seconds in self.seconds.items() if stage != "read"}
        shares["decode"] *= self.processes / max(self.workers, self.processes)
        return {stage: min(share, 1.0) for stage, share in shares.items()}

    @property
    def running(self) -> float:
        """Seconds since the workers had started."""
        return self.wall - self.waits["start"] / self.processes

    def device_waiting(self) -> float:
        """Share of the time that the device did nothing."""
        return 1.0 - self.occupancy()["encode"]

    def limit(self) -> str:
        """What the others wait for: "encode", or what the coordinator waited for longest, "fill" if for nothing."""
        if self.device_waiting() <= 1 - BUSY:
            return "encode"
        waited = {stage: self.waits[stage] for stage in ("decode", GPU_DECODE, "write") if stage in self.waits}
        # without workers decoding is the coordinator's own work
        waited["decode"] += 0.0 if self.workers else self.seconds["decode"]
        waited["fill"] = self.seconds["fill"]
        return max(waited, key=waited.__getitem__)

    def advice(self) -> str:
        """One line: how long the device waits and for what, and what to do about it."""
        if self.running < ADVICE_SECONDS:
            return "too short a run to say what holds it up"
        name = "GPU" if self.device == "gpu" else "encoder"
        waiting = self.device_waiting()
        limit = self.limit()
        if limit == "encode":
            return f"{name} works {1 - waiting:.0%} of the time: nothing else holds it up"
        told = {"decode": self._decoding, "write": self._writing, "fill": self._filling}
        why, remedy = (told | {GPU_DECODE: self._gpu_decoding})[limit]()
        return f"{name} waits {waiting:.0%} for {why}: {remedy}"

    def _decoding(self) -> tuple[str, str]:
        if not self.workers:
            return "decode", "give --workers N"
        if self.waits["starved"] > self.seconds["decode"]:
            return "reading", "the storage is slow; more --workers read further ahead"
        if self.waits["queued"] > self.seconds["decode"]:
            return "memory for large images", "use a larger pixel budget"
        # what a plan decodes by is chosen once, and a GPU is not everywhere
        other = {"gpu": "", "fast": "--decode gpu" if self.device == "gpu" else ""}
        way = other.get(self.decoded, "--decode gpu" if self.device == "gpu" else "--decode fast")
        if self.workers < self.cores:
            return "decode", f"add --workers, or {way}" if way else "add --workers"
        return "decode", f"use {way + ', ' if way else ''}smaller images, or more than {self.cores} cores"

    def _gpu_decoding(self) -> tuple[str, str]:
        return "its JPEG decoder", "use --decode fast with many --workers, or share the work among --gpus"

    def _writing(self) -> tuple[str, str]:
        return "write", "the disk is slow: another OUT, or a smaller --dtype"

    def _filling(self) -> tuple[str, str]:
        return "pixels copied into batches", f"share the work: --coordinators {self.processes + 1}"

    def __str__(self) -> str:
        names = {GPU_DECODE: "GPU decode"}
        share = {stage: f"{names.get(stage, stage)} {value:.0%}" for stage, value in self.occupancy().items()}
        share["decode"] += f" of {counted(self.workers, 'worker')}" if self.workers else " in this process"
        where = f" in {self.processes} processes" if self.processes > 1 else ""
        return f"{', '.join(share.values())}{where}; {self.advice()}"

    def report(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        rate = self.images / self.wall if self.wall else 0.0
        derived = {"images_per_second": rate, "device_waiting": self.device_waiting(), "limit": self.limit()}
        fields = asdict(self)
        costs = fields.pop("costs")
        return fields | derived | {"advice": self.advice()} | costs


def write_metrics(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Put a report in the place of `path`, whole or not at all: JSON, or Prometheus text if the name ends in `.prom`.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    text = prometheus(report) if path.suffix == ".prom" else json.dumps(report, indent=1) + "\n"
    temporary = path.with_name(f"{path.name[:200]}.tmp-{uuid.uuid4().hex}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as e:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write metrics to {path}: {e.strerror}: give a file that you may write") from e


def prometheus(report: Mapping[str, Any]) -> str:
    """A report in Prometheus's text format: numbers as gauges, those of stages with a label."""
    lines = []
    for name, value in report.items():
        metric = f"capacitor_cache_{name}"
        if isinstance(value, Mapping):
            label = "dtype" if name.startswith("dtype_") else "stage"
            samples = [(f'{{{label}="{key}"}}', number) for key, number in value.items() if number is not None]
        elif isinstance(value, (int, float)):
            samples = [("", value)]
        else:
            continue
        lines.append(f"# TYPE {metric} gauge")
        lines += [f"{metric}{label} {float(number)!r}" for label, number in samples]
    return "\n".join(lines) + "\n"
