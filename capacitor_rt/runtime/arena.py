"""Memory of a plan: buffers with lifetimes, laid out in one block so that no two live ones share a byte. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch

ALIGNMENT = 256
"""Bytes; what the CUDA allocator gives, so that every buffer is as aligned as a tensor of its own."""


class TensorSpec(NamedTuple):
    """What a tensor will be: enough to plan for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Buffer:
    """A temporary tensor, alive from step `first` to step `last`, both included, at byte `offset` of the arena."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int
    last: int
    offset: int = 0

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes taken in the arena, alignment included."""
        return -(-self.spec.nbytes // ALIGNMENT) * ALIGNMENT

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def alive_with(self, other: Buffer) -> bool:
        """Whether both are alive in some step."""
        return self.first <= other.last and other.first <= self.last


def lay_out(buffers: Iterable[Buffer]) -> tuple[tuple[Buffer, ...], int]:
    """Give every buffer an offset; returns them in the given order, and the size of the arena.

    Greedy by size: each buffer, largest first, goes to the lowest gap left by those alive with it. Optimal where one
    buffer dwarfs the others, which is the case here.
    """
    buffers = list(buffers)
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.first, b.name)):
        offset = 0
        for other in sorted((p for p in placed if p.alive_with(buffer)), key=lambda p: p.offset):
            if offset + buffer.nbytes <= other.offset:
                break
            offset = max(offset, other.end)
        placed.append(replace(buffer, offset=offset))
    where = {b.name: b for b in placed}
    return tuple(where[b.name] for b in buffers), max((b.end for b in placed), default=0)
