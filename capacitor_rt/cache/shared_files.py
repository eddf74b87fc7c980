"""Checking the files of earlier generations that rows of an update lie in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import CacheError
from .carried import Carried, CarriedFile, load_carried
from .folder import CacheFolder
from .index import is_ok, is_own
from .latent_files import has_header
from .plan import CachePlan
from .reuse import check_file
from .store import TaskStore, repair_hint


def look_at_shared(store: TaskStore) -> Callable[[Any, int], str | None]:
    """What says whether rows of an index that lie in files of earlier generations are there and sound."""

    def look(table: Any, task: int) -> str | None:
        shared = SharedFiles(store.folder, store.plan)
        if shared.problem is not None or (why := shared.add(table, task)):
            return shared.problem or why
        found = (check_file(store.folder, file, store.plan, store.stamps) for file in shared.used())
        return next((why for why in found if why), None)

    return look


class SharedFiles:
    """The files that rows of a plan lie in beside those of its tasks. Several threads may use one instance.

    Attributes:
        tasks: numbers of the tasks that have rows in each, by the file's stem.
        problem: what is wrong with the list of the files.
    """

    def __init__(self, folder: CacheFolder, plan: CachePlan):
        self.folder, self.plan = folder, plan
        self.tasks: dict[str, set[int]] = {}
        self.problem: str | None = None
        self._lock = threading.Lock()
        try:
            self.files = load_carried(folder, plan)
        except CacheError as e:
            self.files, self.problem = Carried(), str(e)

    def add(self, table: Any, task: int) -> str | None:
        """Take note of the rows of an index that lie elsewhere; what is wrong with them, None if nothing is."""
        if not self.plan.is_update or self.problem is not None:
            return None
        rows = table.filter(is_ok(table) & ~is_own(table))
        stems = np.array(rows["file"].to_pylist(), object)
        bucket, row = (rows[name].to_numpy() for name in ("bucket", "row"))
        for stem in sorted(set(stems)):
            file = self.files.get(stem)
            if file is None:
                return f"it names {stem!r}, which {self.plan.carried_name} has not"
            here = stems == stem
            most = np.zeros(len(self.plan.buckets), np.int64)
            most[list(file.counts)] = list(file.counts.values())
            if (row[here] >= most[bucket[here]]).any():
                return f"it names rows that {file.name} has not"
            with self._lock:
                self.tasks.setdefault(stem, set()).add(task)
        return None

    def used(self) -> list[CarriedFile]:
        """Those that rows lie in."""
        return [file for stem, file in self.files.items() if stem in self.tasks]

    def check(self, file: CarriedFile) -> str | None:
        """What is wrong with a file, which is read to the end; None if it is sound."""
        path, hint = self.folder.path / file.name, repair_hint(self.folder)
        rows = f"rows of {len(self.tasks[file.stem])} tasks lie in it"
        try:
            with self.folder.open(file.name) as opened:
                whole = has_header(opened.fileno(), file.layout(self.plan))
            if whole and self.folder.hash(file.name) == file.data_xxh3:
                return None
        except FileNotFoundError:
            return f"{path} cannot be read (No such file or directory): {rows}: {hint}"
        except CacheError as e:
            return f"{e}: {rows}: {hint}"
        why = "its hash is not that of its commit line" if whole else "its header or its size is not that of its index"
        return f"{path} is damaged: {why}: {rows}: {hint}"
