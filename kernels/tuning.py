"""Which launch parameters are in force: lookup of rows by shape, nearest rows, defaults, and what stands in for them.

`lookup` answers with the row of exactly this shape, else with the row of the nearest shape within reach, else with the
family's analytical default, which follows from shared memory and register limits alone. It never measures
anything, so a first call costs nothing and can be captured in a CUDA graph. Rows that a user measured
(`user_rows`) come before shipped ones that are no nearer.

`use` keeps bits apart from speed: "throughput" rows depend on the shape of one image alone, so an image's
bits do not depend on the batch around it; "latency" rows are for one image at a time, chosen by the
caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import torch

from . import user_rows
from .config_rows import USES, ConfigRow, Family, Shape, get_family, parse_user_rows, rows
from .gpu_limits import base_cc
from .launch import dtype_name

# rows further away than this, in octaves summed over the near keys, lose to the analytical default. What suits one
# image at a time depends on how few programs there are: of 1024 tokens' rows four times as many would be 20 % slower.
REACH_OCTAVES = {"throughput": 4.0, "latency": 1.0}

_forced: dict[str, tuple[Any, list[dict[str, int]]]] = {}
# compute capability -> rows in the place of the user's file; and who is told which of the user's rows answered
_kept: dict[int, tuple[ConfigRow, ...]] = {}
_watchers: list[list[ConfigRow]] = []
_listeners: list[list[tuple[str, dict[str, int], torch.dtype]]] = []
_generation = 0


def lookup(
    family: str,
    cc: int,
    shape: Mapping[str, int],
    dtype: torch.dtype,
    use: str = "throughput",
    images: int | None = None,
) -> Any:
    """The config of `family` for a shape: exact row, else nearest row, else the analytical default.

    It follows from the shape of one image, so that many images fill the GPU. With `images`, so few that they do not are
    launched by narrower tiles of the same bit class (`Family.bits`): an image's bits stay what they are in any batch.
    For latency, too, where what serves throughput stands in.

    Args:
        cc: compute capability, e.g. 90.
        shape: the family's shape keys, e.g. {"tokens_per_image": 256, "dim": 896, "hidden": 3584}.
        dtype: dtype of the activations.
        use: "throughput" (bits independent of the batch) or "latency".
        images: that run together; the config is that of many when None.

    Raises:
        ValueError: unknown family or use, or a shape that lacks one of the family's keys.
    """
    config, row, answered = _cached_lookup(family, cc, tuple(sorted(shape.items())), dtype, use)
    known = get_family(family)
    if known.choose is not None:
        config = known.choose(config, base_cc(cc), shape, dtype, use)
    if images is not None and known.few is not None and answered == "throughput":
        few = known.few(config, base_cc(cc), shape, dtype, images)
        config = few if known.same_bits(few, config, cc, dtype) else config
    if family in _forced:
        config, seen = _forced[family]
        seen.append(dict(shape))
    elif row is not None and row.path is not None:
        for watcher in _watchers:
            watcher.append(row)
    for listener in _listeners:
        listener.append((family, dict(shape), dtype))
    return config


@lru_cache(maxsize=4096)
def _cached_lookup(
    name: str, cc: int, items: tuple[tuple[str, int], ...], dtype: torch.dtype, use: str
) -> tuple[Any, ConfigRow | None, str]:
    """The config, its row where it has one, and the use that it is for."""
    family, shape = get_family(name), dict(items)
    if use not in USES:
        raise ValueError(f"use is {use!r}, expected one of {USES}")
    missing = [key for key in (*family.exact, *family.near) if key not in shape]
    if missing:
        raise ValueError(f"shape of {name} lacks {missing}: it has {sorted(shape)}")
    candidates = [
        row
        # of rows equally near the first counts
        for row in (*in_force(cc, name), *rows(base_cc(cc), name))
        if row.dtype == dtype_name(dtype)
        and row.use == use
        and all(row.shape[key] == shape[key] for key in family.exact)
        and (dict(row.shape) == shape or family.accepts is None or family.accepts(row.config, shape))
    ]
    if candidates:
        best = min(candidates, key=lambda row: _distance(family, row, shape))
        if _distance(family, best, shape) <= REACH_OCTAVES[use]:
            return best.config, best, use
    config = family.default(base_cc(cc), shape, dtype, use)
    if use == "latency" and config == family.default(base_cc(cc), shape, dtype, "throughput"):
        # one image of this size fills a GPU as well as many do, or by narrower tiles
        return _cached_lookup(name, cc, items, dtype, "throughput")
    return config, None, use


@contextmanager
def using(family: str, config: Any) -> Iterator[list[dict[str, int]]]:
    """Answer every lookup of `family` with `config`; yields the list of shapes that were asked for.

    For measuring candidates and for tests; it holds for all threads of the process.
    """
    # a misspelt name would force nothing
    get_family(family)
    seen: list[dict[str, int]] = []
    before = _forced.get(family)
    _forced[family] = (config, seen)
    try:
        yield seen
    finally:
        if before is None:
            del _forced[family]
        else:
            _forced[family] = before


@contextmanager
def listening() -> Iterator[list[tuple[str, dict[str, int], torch.dtype]]]:
    """Collect family, shape and dtype of every lookup in order, those of all threads of the process."""
    asked: list[tuple[str, dict[str, int], torch.dtype]] = []
    _listeners.append(asked)
    try:
        yield asked
    finally:
        _listeners[:] = [listener for listener in _listeners if listener is not asked]


@contextmanager
def watching() -> Iterator[list[ConfigRow]]:
    """Collect the user's rows that lookups answer with, those of all threads of the process."""
    found: list[ConfigRow] = []
    _watchers.append(found)
    try:
        yield found
    finally:
        # by identity: two of them may hold the same rows
        _watchers[:] = [watcher for watcher in _watchers if watcher is not found]


@contextmanager
def keeping(cc: int, families: Mapping[str, Any]) -> Iterator[None]:
    """Let these rows be in force for `cc` in the place of the user's file, for all threads of the process.

    Args:
        families: rows by family, as in a config file; none for the shipped rows alone.

    Raises:
        UserRowsError: a row that no launch can have.
    """
    before = _kept.get(cc)
    _kept[cc] = parse_user_rows("a plan", cc, families)
    reload()
    try:
        yield
    finally:
        if before is None:
            del _kept[cc]
        else:
            _kept[cc] = before
        reload()


def reload() -> None:
    """Forget what was read of the user's files: the next lookup reads them again."""
    global _generation
    _generation += 1
    _user_rows.cache_clear()
    _cached_lookup.cache_clear()


def generation() -> int:
    """Grows whenever lookups may answer otherwise than before; for callers that remember the answers."""
    return _generation


def in_force(cc: int, family: str | None = None) -> tuple[ConfigRow, ...]:
    """The user's rows for exactly this compute capability, of one family or of all.

    Raises:
        UserRowsError: the user's file is damaged.
    """
    found = _kept[cc] if cc in _kept else _user_rows(cc)
    return tuple(row for row in found if family in (None, row.family))


@cache
def _user_rows(cc: int) -> tuple[ConfigRow, ...]:
    path = user_rows.path_of(cc)
    return () if path is None else parse_user_rows(str(path), cc, user_rows.read(path, cc))


def _distance(family: Family, row: ConfigRow, shape: Shape) -> float:
    return sum(abs(math.log2(row.shape[key] / shape[key])) for key in family.near)
