"""How a batch is split: replays of one micro-batch, and a tail. Pure."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ..config import ModelConfig
from .plan import LaunchPlan, PlanKey, make_plan

ARENA_BUDGET = 384 << 20
"""Bytes that one micro-batch takes: 128 images of 256x256 in bfloat16, or 32 of 512x512, to encode."""


@lru_cache(maxsize=128)
def cached_plan(config: ModelConfig, key: PlanKey) -> LaunchPlan:
    """`make_plan`, remembered: planning costs milliseconds of Python."""
    return make_plan(config, key)


def micro_batch(config: ModelConfig, key: PlanKey, budget: int) -> int:
    """Images of this key's shape that run together: a power of two whose arena is within `budget`, at least 1."""
    one, two = (make_plan(config, replace(key, batch=n)).arena_bytes for n in (1, 2))
    most = max(1, (budget - one) // max(1, two - one) + 1)
    size = 1 << (most.bit_length() - 1)
    # an arena does not grow quite evenly: alignment, and sums per tile
    while size > 1 and make_plan(config, replace(key, batch=size)).arena_bytes > budget:
        size //= 2
    return size


def parts(batch: int, size: int) -> list[int]:
    """Sizes of the runs of a batch: micro-batches of `size`, then what is left."""
    return [size] * (batch // size) + ([batch % size] if batch % size else [])
