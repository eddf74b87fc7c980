"""Chunks that were ordered of a pool, and the places of the workers that decode them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from .ring import Span
from .work import Meter

DEPTH = 2
"""Chunks that a worker has at a time, so that it reads the next while it decodes one."""


class Result(NamedTuple):
    """A decoded chunk: Arrow columns, its part of the ring, and where in it the pixels of each row begin."""

    columns: Any
    pixels: np.ndarray
    offsets: np.ndarray
    meter: Meter


@dataclass
class Order:
    """A chunk that was ordered.

    Attributes:
        failed: reason and message of inputs that are given up.
        deaths: of workers, by the input that they were at.
        is_doubted: whether a worker has died with it between two inputs, so perhaps while it read ahead.
        views: numbers of those that are wanted.
        container: of a source that streams its containers, the number of the first input's.
    """

    number: int
    ordinals: Sequence[int]
    span: Span
    result: Result | None = None
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)
    is_abandoned: bool = False
    is_doubted: bool = False
    views: tuple[int, ...] = (0,)
    container: int = -1

    @property
    def is_suspect(self) -> bool:
        """Whether a worker has died or hung with it."""
        return bool(self.failed or self.deaths or self.is_doubted)


@dataclass
class Seat:
    """A worker's place, in which another follows one that has died."""

    connection: Connection | None = None
    orders: list[Order] = field(default_factory=list)
    # the input for which its worker is being ended
    late: int | None = None
    # of the chunk that it was given last
    container: int = -1

    def takes(self, order: Order) -> bool:
        """Whether its worker may have the chunk. One that a worker died of, or perhaps did, is decoded beside no
        other.
        """
        if self.connection is None or len(self.orders) >= DEPTH:
            return False
        return not self.orders or not (order.is_suspect or self.orders[0].is_suspect)
