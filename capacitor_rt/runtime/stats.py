"""Counters of a model's runtime."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """What a model's runtime has done, and what it holds; all zero where the torch backend serves.

    Attributes:
        hits: micro-batches served by a plan already bound; captures: CUDA graphs captured; replays: of them.
        eager: micro-batches run by single launches (no CUDA, or inside another capture).
        evictions: of bound plans; folds: times that weights were folded and packed.
        nbytes: of arenas now; weight_nbytes: of packed weights now.
        capture_seconds: spent in planning, binding and capturing.
        compile_seconds: spent by `warmup` in making kernels ready.
    """

    hits: int = 0
    captures: int = 0
    replays: int = 0
    eager: int = 0
    evictions: int = 0
    folds: int = 0
    nbytes: int = 0
    weight_nbytes: int = 0
    capture_seconds: float = 0.0
    compile_seconds: float = 0.0
