"""What differs between two caches: their settings, and the rows of inputs with the same id."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ..errors import CacheError
from ..extras import require_extra
from .commits import read_log
from .folder import CacheFolder
from .plan import CachePlan, load_plan
from .plan_changes import differences
from .store import read_index
from .views import no_cache

EXAMPLES = 5
UNCOMPARED = ("source", "code", "generation")
"""Fields of plans that say nothing of rows."""
KINDS = ("added", "removed", "changed", "re-encoded", "failed", "mended")


@dataclass
class Difference:
    """Two caches compared.

    Attributes:
        settings: fields of the plans that differ, one line each.
        same: inputs whose rows are the same to the bit, or that neither has.
        counts: of inputs that are "added" or "removed", whose bytes have "changed", that are "re-encoded" (the same
            bytes, other latents), that have "failed" in the new cache alone, or are "mended" there.
        examples: a few ids of each.
    """

    settings: list[str]
    same: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    examples: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def __bool__(self) -> bool:
        return bool(self.settings or sum(self.counts.values()))

    def add(self, kind: str, id: str) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append(id)


def compare(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> Difference:
    """What differs between two caches, as far as they are committed.

    Raises:
        CacheError: one of them is no cache, or an index is damaged.
    """
    for extra in ("pyarrow", "xxhash"):
        require_extra(extra)
    (plan_a, rows_a), (plan_b, rows_b) = _rows(old), _rows(new)
    fields = [{k: v for k, v in plan.fields.items() if k not in UNCOMPARED} for plan in (plan_a, plan_b)]
    found = Difference(differences("", *fields))
    for id in sorted(rows_a.keys() | rows_b.keys()):
        before, now = rows_a.get(id), rows_b.get(id)
        if before is None or now is None:
            found.add("added" if before is None else "removed", id)
        elif (before[1] is None) != (now[1] is None):
            found.add("failed" if now[1] is None else "mended", id)
        elif before[0] != now[0]:
            found.add("changed", id)
        elif before[1] != now[1]:
            found.add("re-encoded", id)
        else:
            found.same += 1
    return found


def _rows(root: str | os.PathLike[str]) -> tuple[CachePlan, dict[str, tuple[Any, Any]]]:
    """The plan, and by id the hashes of an input's bytes and of its row."""
    with CacheFolder(root) as folder:
        plan = load_plan(folder)
        if plan is None:
            raise CacheError(no_cache(folder.path))
        rows: dict[str, tuple[Any, Any]] = {}
        for _, commit in sorted(read_log(folder, plan).commits.items()):
            table = read_index(folder, plan, commit)
            columns = (table[name].to_pylist() for name in ("id", "bytes_hash", "row_hash"))
            rows |= {id: (content, row) for id, content, row in zip(*columns, strict=True)}
    return plan, rows
