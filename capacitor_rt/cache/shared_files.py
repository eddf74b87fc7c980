"""What an index says of rows, wherever they lie: in the file of its task, or in those of earlier generations."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from ..errors import CacheError
from .carried import Carried, CarriedFile, load_carried
from .commits import Commit
from .folder import CacheFolder
from .index import cached_counts, digests, is_ok
from .plan import CachePlan
from .soundness import Soundness

SHOWN = 3
"""Rows that a message names."""


def own_file(plan: CachePlan, commit: Commit, table: Any) -> CarriedFile:
    """The file of latents of a committed task, as its commit line and its index describe it."""
    counts = tuple(cached_counts(table).items())
    return CarriedFile(plan.id, commit.task, commit.index_xxh3, commit.data_bytes, commit.data_xxh3, counts)


class SharedFiles:
    """The files that rows of a plan lie in beside those of its tasks. Several threads may use one instance.

    Attributes:
        files: that rows may lie in, by their stems.
        tasks: numbers of the tasks that have rows in each, by the file's stem.
        problem: what is wrong with the list of the files.
    """

    def __init__(self, folder: CacheFolder, plan: CachePlan, sound: Soundness):
        self.plan = plan
        self.sound = sound
        self.tasks: dict[str, set[int]] = {}
        self.problem: str | None = None
        self._lock = threading.Lock()
        try:
            self.files = load_carried(folder, plan)
        except CacheError as e:
            self.files, self.problem = Carried(), str(e)

    def look(self, table: Any, own: CarriedFile) -> str | None:
        """What is wrong with what an index says of its rows, None if nothing is. Takes note of where they lie.

        They are there, and have the hashes that it has; rows of damaged files, which `problem_of` tells of, are not
        looked at. Nor are hashes if this machine has compared the task's file with its index before.

        Args:
            own: the file of the index's task.
        """
        plan, ok = self.plan, is_ok(table)
        stems = np.full(len(table), None, object)
        if plan.is_update:
            stems[:] = table["file"].to_pylist()
        hashes, _ = digests(table["row_hash"])
        bucket, row = (table[name].fill_null(0).to_numpy() for name in ("bucket", "row"))
        is_known = self.sound.is_known(own)
        for stem in dict.fromkeys(stems[ok].tolist()):
            # without the list nothing can be said of them, and that is said of the list
            if stem is not None and self.problem is not None:
                continue
            file = own if stem is None else self.files.get(stem)
            if file is None:
                return f"it names {stem!r}, which {plan.carried_name} has not"
            at = np.flatnonzero(ok & (stems == stem))
            most = np.zeros(len(plan.buckets), np.int64)
            most[list(file.counts)] = list(file.counts.values())
            if (row[at] >= most[bucket[at]]).any():
                return f"it names rows that {file.name} has not"
            if not is_known and self.sound.problem(file, plan) is None:
                try:
                    at = at[self.sound.differing(file, plan, bucket[at], row[at], hashes[at])]
                except (FileNotFoundError, CacheError) as e:
                    return str(e)
                if len(at):
                    return f"{len(at)} rows of {file.name} do not match their hashes: {self._shown(table, at)}"
            if stem is not None:
                with self._lock:
                    self.tasks.setdefault(stem, set()).add(own.task)
        return None

    def used(self) -> list[CarriedFile]:
        """Those that rows lie in."""
        return [file for stem, file in self.files.items() if stem in self.tasks]

    def problem_of(self, file: CarriedFile) -> str | None:
        """What is wrong with a file of latents, None if it is sound."""
        return self.sound.problem(file, self.plan)

    def _shown(self, table: Any, at: np.ndarray) -> str:
        rows = table.take(at[:SHOWN]).select(["id", "bucket", "row"]).to_pylist()
        named = [f"{row['row']} of {self.plan.buckets[row['bucket']]} ({row['id']!r})" for row in rows]
        return ", ".join(named) + (", ..." if len(at) > SHOWN else "")
