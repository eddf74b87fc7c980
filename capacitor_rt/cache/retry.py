"""`--retry-quarantined`: what could not be cached is tried again, and tasks of what can be decoded now are redone."""

from __future__ import annotations

from collections import Counter

from .decoding import DecodePool
from .folder import GENERATIONS
from .plan import Task
from .statuses import OK
from .store import TaskStore, read_index


def quarantined(store: TaskStore, tasks: list[Task]) -> dict[int, int]:
    """The quarantined inputs of committed tasks, by ordinal, and the number of the task of each."""
    found: dict[int, int] = {}
    for task in tasks:
        commit = store.commits.get(task.number)
        if commit is None or commit.inputs == commit.rows:
            continue
        table = read_index(store.folder, store.plan, commit).select(["input", "status"]).to_pylist()
        found |= {row["input"]: task.number for row in table if row["status"] != OK}
    return found


def try_again(store: TaskStore, inputs: dict[int, int], pool: DecodePool) -> Counter[int]:
    """Decode quarantined inputs once more; how many of each task can be decoded now."""
    better: Counter[int] = Counter()
    with pool:
        for chunk in pool.decode(range(i, i + 1) for i in sorted(inputs)):
            for row in chunk.columns.select(["input", "status"]).to_pylist():
                better[inputs[row["input"]]] += row["status"] == OK
            chunk.release()
    return +better


def reopen(store: TaskStore, tasks: Counter[int]) -> list[int]:
    """Move the files of committed tasks to `generations/`, so that the tasks are done again; their numbers.

    A crash in between leaves a commit line without files: the next run does the task again.
    """
    done: list[int] = []
    if not tasks:
        return done
    with store.mutex:
        store.refresh()
        living = store.leases.living()
        for number in sorted(tasks):
            if number in store.commits and number not in living:
                for name in (store.plan.index_name(number), store.plan.data_name(number)):
                    store.folder.set_aside(name, GENERATIONS)
                done.append(number)
        store.forget(done)
    return done
