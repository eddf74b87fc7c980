"""The tasks that this process works on: those that are not committed, and that no other process has."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import CacheError
from .folder import TMP, CacheFolder
from .leases import Leases
from .plan import Task
from .store import TaskStore


class TaskQueue:
    """Takes leases as it is iterated over, which ends when nothing can be taken now.

    Args:
        start: number of the task to begin with, where several processes share the work.
    """

    def __init__(self, store: TaskStore, tasks: list[Task], start: int = 0):
        self.store = store
        self.order = tasks[start:] + tasks[:start]
        self.given_up: set[int] = set()

    def __iter__(self) -> Iterator[Task]:
        for task in self.order:
            if self.take(task):
                yield task

    def take(self, task: Task) -> bool:
        """Whether this process is to do a task, and has its lease now."""
        store = self.store
        if task.number in store.commits or task.number in self.given_up:
            return False
        with store.mutex:
            store.refresh()
            if task.number in store.commits or not store.leases.take(task.number):
                return False
        try:
            if not store.recover(task):
                return True
        except CacheError:
            if store.is_draft:
                with store.mutex:
                    store.set_aside([task.number])
                return True
            self._release(task)
            raise
        except BaseException:
            self._release(task)
            raise
        self._release(task)
        return False

    def _release(self, task: Task) -> None:
        with self.store.mutex:
            self.store.leases.release(task.number)

    def left(self) -> list[Task]:
        """Tasks that others are at work on, or have left."""
        self.store.refresh()
        return [t for t in self.order if t.number not in self.store.commits and t.number not in self.given_up]


def remove_stale(folder: CacheFolder, leases: Leases | None) -> int:
    """Remove the temporary files of killed runs. Under the mutex.

    Those of tasks that a living process has are its own.
    """
    living = leases.living_stems() if leases else set()
    count = 0
    for name in list(folder.temporary()):
        task = re.fullmatch(rf"\w+/([0-9a-f]{{8}}-\d+)\.\w+{TMP}\w+", name)
        if task is None or task[1] not in living:
            folder.discard(name)
            count += 1
    return count
