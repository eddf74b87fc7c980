"""Walks a plan on the current stream: arguments are resolved once, a run only launches."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from .arena import ALIGNMENT, Buffer
from .plan import LaunchPlan, Step


def broadcast(*, row: Tensor, out: Tensor) -> None:
    """Fill the rows of `out [T,D]` with `row [D]`."""
    out.copy_(row.expand_as(out))


def combine(*, out: Tensor, coefficients: tuple[float, ...], **images: Tensor) -> None:
    """`out = sum_i coefficients[i] * x{i}`, elementwise, float32; allocates nothing."""
    torch.mul(images["x0"], coefficients[0], out=out)
    for i in range(1, len(coefficients)):
        out.add_(images[f"x{i}"], alpha=coefficients[i])


LOCAL = {"broadcast": broadcast, "combine": combine}


def launcher(name: str) -> Callable[..., None]:
    """The function that runs a step of this name: one of ours, or the launch of that name in its module."""
    return LOCAL[name] if name in LOCAL else getattr(importlib.import_module(f"capacitor_kernels.ops.{name}"), name)


class Executor:
    """A plan bound to tensors. `inputs` and `outputs` are views of the arena, by name.

    Args:
        plan: what to run.
        weights: packed tensors by the names that the plan uses.
        arena: uint8 memory of at least `plan.arena_bytes`, aligned to 256 bytes.
    """

    def __init__(self, plan: LaunchPlan, weights: Mapping[str, Tensor], arena: Tensor):
        if arena.nbytes < plan.arena_bytes or arena.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"arena has {arena.nbytes} bytes, the plan needs {plan.arena_bytes} aligned to {ALIGNMENT}"
            )
        views = {b.name: arena[b.offset :][: _size(b)].view(b.dtype).view(b.shape) for b in plan.buffers}
        self.plan = plan
        self.inputs = {name: views[name] for name in plan.inputs}
        self.outputs = {name: views[name] for name in plan.outputs}
        self._calls = [_bind(step, views, weights) for step in plan.steps]

    def run(self) -> None:
        """Launch every step in order on the current stream."""
        for call in self._calls:
            call()


def _bind(step: Step, views: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Callable[[], None]:
    tensors = {}
    for argument, ref in step.args.items():
        place, name = ref.split(":")
        tensors[argument] = weights[name] if place == "weight" else views[name]
    return functools.partial(launcher(step.kernel), **tensors, **step.options)


def _size(buffer: Buffer) -> int:
    return prod(buffer.shape) * buffer.dtype.itemsize
