"""Result lines as the benchmarks write them, with made-up figures: for the tests alone, never in bench/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GPU = "NVIDIA Test"
FACTS: dict[str, Any] = {
    "gpu": GPU,
    "device": "cuda",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "driver_version": "600.1",
    "commit": "aaaaaaaaaaaa",
    "dirty": False,
    "date": "2026-01-01T00:00:00Z",
    "busy": None,
    "ceilings": [800.0, 4000.0],
}


def call(
    bench: str,
    variant: str,
    ms: float,
    *,
    model: str = "full_capacitor",
    shape: tuple[str, int, int] = ("encode", 128, 256),
    row: str = "",
    over: dict[str, float] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """A line of `python -m bench model` or `flux2`."""
    direction, batch, size = shape
    return {
        "bench": bench,
        "row": row,
        "direction": direction,
        "batch": batch,
        "size": size,
        "model": model,
        "variant": variant,
        "dtype": "bfloat16",
        "weights": "random",
        "error": 7e-3,
        "ms": ms,
        "p20": 0.995 * ms,
        "p80": 1.005 * ms,
        "spread_percent": 1.0,
        "noisy": False,
        "images_per_s": 1e3 * batch / ms,
        "flops": 1e9 * ms,
        "tflops": 400.0,
        "percent_of_floor": 50.0,
        "peak_bytes": 100 << 20,
        "device_bytes": 200 << 20,
        "speedup_over": over or {},
        **FACTS,
        **facts,
    }


def launch(op: str, us: float, **facts: Any) -> dict[str, Any]:
    """A line of `python -m bench kernels`."""
    return {
        "bench": "kernels",
        "op": op,
        "images": "128x256x256",
        "use": "throughput",
        "dtype": "bfloat16",
        "dim": 896,
        "hidden": 3584,
        "difference": 1e-3,
        "us": us,
        "p20": us,
        "p80": us,
        "flops": 2e11,
        "bytes": 3e8,
        "tflops": 2e5 / us,
        "gbps": 3e5 / us,
        "percent_of_floor": 60.0,
        "x_eager": 2.5,
        **FACTS,
        **facts,
    }


def caching(rate: float, **facts: Any) -> dict[str, Any]:
    """A line of `python -m bench cache`."""
    shares = {"decode": 0.8, "fill": 0.1, "encode": 0.2, "write": 0.05}
    return {
        "bench": "cache",
        "size": 256,
        "file_size": "500x375",
        "backend": "triton",
        "images": 4096,
        "images_per_s": rate,
        "cpu_ms": 1.5,
        "plain": {"images_per_s": 300.0, "cpu_ms": 3.5},
        "workers": 15,
        "occupancy": shares,
        "limited_by": "decode",
        **FACTS,
        **facts,
    }


def ceilings(**facts: Any) -> dict[str, Any]:
    return {"bench": "ceilings", "tflops": 800.0, "gbps": 4000.0, **FACTS, **facts}


def check(name: str, *, ok: bool = True, problem: str = "", **facts: Any) -> dict[str, Any]:
    """A line of the self-check."""
    found = {"bench": "correctness", "name": name, "dtype": "bfloat16", "error": 0.004 if ok else 0.3, "bound": 0.01}
    return {**found, "ok": ok, "problem": problem, **FACTS, **facts}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
