"""Numbers of labels that stay as they are when a source grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from . import Source
from .columns import LABEL, Columns


def with_stable_labels(source: Source, names: list[str] | None) -> Source:
    """The source with its labels numbered as in `names`, and new ones behind them.

    Labels are numbered by the order of their names: a new one in the middle would give others new numbers.
    """
    found = source.columns.label_names
    if names is None or found is None or found == names:
        return source
    known = set(names)
    all_names = names + [name for name in found if name not in known]
    number = {name: i for i, name in enumerate(all_names)}
    columns = Columns(source.columns.columns, all_names, _Renumbered(source.columns.read, [number[n] for n in found]))
    return dataclasses.replace(source, columns=columns)  # type: ignore[type-var]


class _Renumbered:
    def __init__(self, read: Callable[[int, int], dict[str, list[Any]]], numbers: list[int]):
        self.read, self.numbers = read, numbers

    def __call__(self, first: int, stop: int) -> dict[str, list[Any]]:
        values = self.read(first, stop)
        return {**values, LABEL: [None if v is None else self.numbers[v] for v in values[LABEL]]}
