"""What a call will run, hold and at best take, from its plans alone. Pure: no GPU and no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import torch

from capacitor_kernels.gpu_limits import base_cc
from capacitor_kernels.launch import dtype_name

from ..config import ModelConfig
from ..errors import InputError
from ..printable import counted
from .batching import ARENA_BUDGET, cached_plan, micro_batch, parts
from .plan import LaunchPlan, PlanKey, Step, Tensors

MIB = 1 << 20


@dataclass(frozen=True)
class Ceilings:
    """The best a GPU can do: dense bfloat16 TFLOP/s with float32 sums, GB/s, and where the figures are from.

    `fp8` is how many times as fast it multiplies e4m3; 0 where it cannot.
    """

    tflops: float
    gbps: float
    source: str
    fp8: float = 2.0

    def milliseconds(self, step: Step) -> tuple[float, str]:
        """Time of a step that reaches the ceiling that binds it, and which one that is."""
        rate = self.tflops * (self.fp8 if step.op.endswith("_fp8") else 1)
        maths, memory = step.flops / rate / 1e9, step.nbytes / self.gbps / 1e6
        return (maths, "math") if maths > memory else (memory, "memory")


# docs/numbers.md
CEILINGS: dict[int, Ceilings] = {
    80: Ceilings(312.0, 2040.0, "A100-80 SXM, datasheet", 0.0),
    89: Ceilings(165.2, 1008.0, "RTX 4090, datasheet"),
    90: Ceilings(790.0, 4300.0, "H200, measured: an 8192^3 product and a copy"),
    120: Ceilings(209.5, 1792.0, "RTX 5090, datasheet", 4.0),
}


def ceilings_of(cc: int, dtype: torch.dtype, tflops: float | None, gbps: float | None) -> Ceilings:
    """The stated ceilings, else the known ones of a compute capability.

    Raises:
        InputError: none are known for it, or not for float32.
    """
    known = CEILINGS.get(base_cc(cc))
    if tflops is not None and gbps is not None:
        return Ceilings(tflops, gbps, "as given", 2.0 if known is None else known.fp8)
    if known is None or dtype == torch.float32:
        what = "float32" if dtype == torch.float32 else f"compute capability {cc}"
        raise InputError(f"no ceilings are known for {what}: state both with --tflops and --gbps")
    if tflops is None and gbps is None:
        return known
    return replace(
        known,
        tflops=tflops or known.tflops,
        gbps=gbps or known.gbps,
        source=f"as given; the rest: {known.source}",
    )


@dataclass(frozen=True)
class Forecast:
    """The runs of one call. `runs` are numbers of images; `plans` one plan per different number."""

    key: PlanKey
    runs: tuple[int, ...]
    plans: dict[int, LaunchPlan]
    ceilings: Ceilings

    @property
    def milliseconds(self) -> float:
        """Of all runs at the ceilings, gaps between launches not counted."""
        return sum(n * self._of(self.plans[size]) for size, n in Counter(self.runs).items())

    def _of(self, plan: LaunchPlan) -> float:
        return sum(self.ceilings.milliseconds(step)[0] for step in plan.steps)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sizes in bytes, times in milliseconds."""
        r = self.key
        return {
            "direction": r.direction,
            "batch": r.batch,
            "height": r.height,
            "width": r.width,
            "dtype": dtype_name(r.dtype),
            "image_dtype": dtype_name(r.image_dtype),
            "layout": r.layout,
            "compute_capability": r.cc,
            "use": r.use,
            "precision": r.precision,
            "inference": None if r.inference is None else asdict(r.inference),
            "runs": list(self.runs),
            "ceilings": asdict(self.ceilings),
            "milliseconds": self.milliseconds,
            "plans": [self._plan(size) for size in self.plans],
        }

    def _plan(self, size: int) -> dict[str, Any]:
        plan = self.plans[size]
        return {
            "images": size,
            "flops": plan.flops,
            "bytes": plan.nbytes,
            "milliseconds": self._of(plan),
            "arena_bytes": plan.arena_bytes,
            "input_bytes": _nbytes(plan.inputs),
            "output_bytes": _nbytes(plan.outputs),
            "steps": [self._step(step) for step in plan.steps],
            "buffers": [
                {
                    "name": b.name,
                    "shape": list(b.shape),
                    "dtype": dtype_name(b.dtype),
                    "bytes": b.nbytes,
                    "offset": b.offset,
                    "first": b.first,
                    "last": b.last,
                }
                for b in plan.buffers
            ],
        }

    def _step(self, step: Step) -> dict[str, Any]:
        milliseconds, bound = self.ceilings.milliseconds(step)
        config = step.options.get("config")
        return {
            "op": step.op,
            "args": dict(step.args),
            "flops": step.flops,
            "bytes": step.nbytes,
            "milliseconds": milliseconds,
            "bound": bound,
            "config": _fields(config),
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        r = self.key
        kind = dtype_name(r.dtype) + (" and fp8" if r.precision else "")
        what = f"{r.direction}, {counted(r.batch, 'image')} of {r.height}x{r.width}, {kind}, sm_{r.cc}"
        what += ", launches that start early" if r.dependent else ""
        runs = " + ".join(f"{n} x {size}" for size, n in Counter(self.runs).items())
        yield f"{what}: {runs} images, {sum(len(self.plans[n].steps) for n in self.runs)} ops"
        for size, plan in self.plans.items():
            yield from self._lines(size, plan)
        flops, nbytes = (sum(getattr(self.plans[n], name) for n in self.runs) for name in ("flops", "nbytes"))
        total = self.milliseconds
        yield ""
        yield f"{flops / 1e9:,.1f} GFLOP and {nbytes / 1e6:,.1f} MB in all"
        rate = f"{self.ceilings.tflops:g} TFLOP/s"
        rate += f", {self.ceilings.fp8:g} times that in e4m3," if r.precision else ""
        yield (
            f"{total:.3f} ms at best, {1e3 * r.batch / total:,.0f} images/s: every op at its ceiling of "
            f"{rate} or {self.ceilings.gbps:g} GB/s ({self.ceilings.source})"
        )

    def _lines(self, size: int, plan: LaunchPlan) -> Iterator[str]:
        yield ""
        yield f"{size} images:  #  op               GFLOP         MB        ms  bound   config"
        pad = " " * len(f"{size} images:")
        for i, step in enumerate(plan.steps):
            milliseconds, bound = self.ceilings.milliseconds(step)
            config = _short(step.options.get("config"))
            figures = f"{step.flops / 1e9:>11.3f} {step.nbytes / 1e6:>10.2f} {milliseconds:>9.4f}"
            yield f"{pad}{i:>3}  {step.op:<11}{figures}  {bound:<6}  {config}".rstrip()
        yield ""
        yield f"{pad}     buffer         MiB     offset   steps    shape"
        for b in sorted(plan.buffers, key=lambda b: b.offset):
            place = f"{b.nbytes / MIB:>8.2f} {b.offset:>10}  {b.first:>3}-{b.last:<3}"
            yield f"{pad}     {b.name:<10}{place}  {dtype_name(b.dtype)} {list(b.shape)}"
        static = (_nbytes(plan.inputs), _nbytes(plan.outputs))
        yield (
            f"{pad}     arena {plan.arena_bytes / MIB:.2f} MiB, input {static[0] / MIB:.2f}, "
            f"output {static[1] / MIB:.2f}"
        )


def forecast(config: ModelConfig, key: PlanKey, ceilings: Ceilings, budget: int = ARENA_BUDGET) -> Forecast:
    """Plans of the runs into which the runtime splits a key."""
    runs = parts(key.batch, min(micro_batch(config, key, budget), key.batch))
    plans = {size: cached_plan(config, replace(key, batch=size)) for size in dict.fromkeys(runs)}
    return Forecast(key, tuple(runs), plans, ceilings)


def _nbytes(tensors: Tensors) -> int:
    return sum(spec.nbytes for spec in tensors.values())


def _fields(config: Any) -> dict[str, Any] | None:
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else None


def _short(config: Any) -> str:
    """A config in a few words: block_m 128, ..."""
    return ", ".join(f"{k} {v}" for k, v in (_fields(config) or {}).items() if v not in (None, False))
