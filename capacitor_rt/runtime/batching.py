"""How a batch is split: replays of one micro-batch, and a tail; how that size follows the memory there is. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from capacitor_kernels import tuning

from ..config import ModelConfig
from .plan import LaunchPlan, PlanKey, make_plan

ARENA_BUDGET = 384 << 20
"""Bytes that one micro-batch takes: 128 images of 256x256 in bfloat16, or 32 of 512x512, to encode."""


def cached_plan(config: ModelConfig, key: PlanKey) -> LaunchPlan:
    """`make_plan`, remembered: planning costs milliseconds of Python."""
    return _cached_plan(config, key, tuning.generation())


@lru_cache(maxsize=512)
def _cached_plan(config: ModelConfig, key: PlanKey, generation: int) -> LaunchPlan:
    return make_plan(config, key)


def micro_batch(config: ModelConfig, key: PlanKey, budget: int) -> int:
    """Images of this key's shape that run together: a power of two whose arena is within `budget`, at least 1."""

    def arena(images: int) -> int:
        return cached_plan(config, replace(key, batch=images)).arena_bytes

    one, two = arena(1), arena(2)
    most = max(1, (budget - one) // max(1, two - one) + 1)
    size = 1 << (most.bit_length() - 1)
    # an arena does not grow quite evenly: alignment, and sums per tile
    while size > 1 and arena(size) > budget:
        size //= 2
    return size


def parts(batch: int, size: int) -> list[int]:
    """Sizes of the runs of a batch: micro-batches of `size`, then what is left."""
    return [size] * (batch // size) + ([batch % size] if batch % size else [])


def branches(key: PlanKey, overlap: bool) -> tuple[PlanKey, int]:
    """The key of each branch of a run, and how many there are: the halves of an even batch with `overlap`, else one.

    A row's bits do not depend on the batch, so a half's are those of the whole.
    """
    if not overlap or key.batch % 2:
        return key, 1
    return replace(key, batch=key.batch // 2), 2


@dataclass
class Limit:
    """Images of one shape that run together: `most`, less where memory ran out, and again more after a while.

    Attributes:
        images: the limit now.
        patience: micro-batches of the limit's size to be served before the double of it is tried; grows with each
            failure, so that a device that stays full is not asked again and again.
    """

    most: int
    images: int = 0
    patience: int = 16
    _served: int = 0

    def __post_init__(self) -> None:
        self.images = self.images or self.most

    def served(self, batch: int) -> None:
        """Count a micro-batch of so many images."""
        if self.images < self.most and batch == self.images:
            self._served += 1
            if self._served >= self.patience:
                self.images, self._served = min(2 * self.images, self.most), 0

    def halve(self, batch: int) -> None:
        """Memory ran out with so many images."""
        self.images, self._served, self.patience = batch // 2, 0, 2 * self.patience


class Limits:
    """How many images of each shape run together.

    Args:
        config: of the model.
        budget: bytes that one micro-batch's arena may take.
    """

    def __init__(self, config: ModelConfig, budget: int):
        self._config, self._budget = config, budget
        self._limits: dict[PlanKey, Limit] = {}

    def images(self, key: PlanKey) -> int:
        """The size of a micro-batch of a batch."""
        return 1 if key.batch == 1 else self._of(key).images

    def served(self, part: PlanKey) -> None:
        """A micro-batch was run."""
        if part.batch > 1:
            self._of(part).served(part.batch)

    def halve(self, part: PlanKey) -> None:
        """Memory ran out for a micro-batch."""
        self._of(part).halve(part.batch)

    def clear(self) -> None:
        """Forget what was learnt from running out of memory."""
        self._limits.clear()

    def _of(self, key: PlanKey) -> Limit:
        one = replace(key, batch=1)
        if one not in self._limits:
            self._limits[one] = Limit(micro_batch(self._config, one, self._budget))
        return self._limits[one]
