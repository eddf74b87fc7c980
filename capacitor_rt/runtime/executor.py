"""Walks a plan on the current stream: arguments are resolved once, a run only queues launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from capacitor_kernels.launch import Launch, chained, recording

from .arena import ALIGNMENT, Buffer
from .host_ops import host_function
from .plan import LaunchPlan, Step


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
        self.calls = [_bind(step, views, weights) for step in plan.steps]

    def run(self) -> None:
        """Call the op of every step in order, on the current stream."""
        with chained(self.plan.key.dependent):
            for call in self.calls:
                call()


def trace(plan: LaunchPlan) -> list[tuple[Step, list[Launch]]]:
    """The launches of every step, exactly as a run would queue them, with tensors of the meta device as arguments."""
    weights = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in plan.weights.items()}
    executor = Executor(plan, weights, torch.empty(plan.arena_bytes, dtype=torch.uint8, device="meta"))
    traced = []
    for step, call in zip(plan.steps, executor.calls, strict=True):
        with recording(plan.key.cc) as launches, chained(plan.key.dependent):
            call()
        traced.append((step, list(launches)))
    return traced


def _bind(step: Step, views: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Callable[[], None]:
    tensors = {}
    for argument, ref in step.args.items():
        place, name = ref.split(":")
        tensors[argument] = weights[name] if place == "weight" else views[name]
    return functools.partial(host_function(step.op), **tensors, **step.options)


def _size(buffer: Buffer) -> int:
    return buffer.spec.nbytes
