"""Processes that answer questions: what ends one costs one answer."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from bench._workers import FAULT, LOST, MEMORY, REFUSED, Failure, Worker, ended
from capacitor_rt.errors import InputError


class Counter:
    """Answers, or goes wrong on request."""

    def __init__(self, start: int):
        self.count = start

    def next(self) -> int:
        self.count += 1
        return self.count

    def fail(self, how: str) -> None:
        if how == "abort":
            os.abort()
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(600)
        raise {
            "memory": torch.OutOfMemoryError("2 GiB\nmore"),
            "refused": InputError("height 500"),
            "fault": RuntimeError("CUDA error: an illegal memory access was encountered"),
        }[how]


@pytest.fixture(scope="module")
def worker():
    worker = Worker(Counter, 7)
    yield worker
    worker.stop()


@pytest.mark.parametrize(
    ("how", "kind", "reason", "survives"),
    [
        ("memory", MEMORY, "out of memory: 2 GiB", True),
        ("refused", REFUSED, "InputError: height 500", True),
        ("fault", FAULT, "RuntimeError: CUDA error: an illegal memory access was encountered", False),
        ("abort", LOST, "its process was ended by SIGABRT", False),
        ("exit", LOST, "its process was ended with exit code 3", False),
        ("hang", LOST, "no answer within 1 s", False),
    ],
)
def test_a_failure_costs_one_answer(worker, how, kind, reason, survives):
    before, pid = worker.ask("next"), worker.pid
    with pytest.raises(Failure) as raised:
        worker.ask("fail", how, **({"seconds": 1.0} if how == "hang" else {}))
    assert (raised.value.kind, raised.value.reason) == (kind, reason)
    # the next question finds the same process, or a fresh one
    assert worker.ask("next") == (before + 1 if survives else 8)
    assert (worker.pid == pid) is survives
    if not survives:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_that_is_killed_between_questions_is_noticed(worker):
    worker.ask("next")
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(Failure, match="ended by SIGKILL"):
        worker.ask("next")
    assert worker.ask("next") == 8


@pytest.mark.parametrize(
    ("code", "words"), [(0, "with exit code 0"), (-6, "by SIGABRT"), (-11, "by SIGSEGV"), (-99, "by signal 99")]
)
def test_ends_in_words(code, words):
    assert ended(code) == f"ended {words}"
