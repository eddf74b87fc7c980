"""Contenders of the end-to-end benchmarks that go wrong; importable, for they run in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import torch

from bench._cases import TINY_IMAGES
from bench._contenders import CAPACITOR, EAGER, Contender
from bench.kernels import OpBench
from capacitor_rt.errors import InputError

ERRORS = {
    "memory": torch.OutOfMemoryError("3 GiB\nmore"),
    "input": InputError("compute capability 7.5"),
    "launch": RuntimeError("launch failed"),
}


def _raise(which, setting, shape, example):
    raise ERRORS[which]


def _off_by_a_percent(setting, shape, example):
    run = EAGER.build(setting, shape, example)
    return lambda x: 1.01 * run(x)


def _after_calls(calls, what, setting, shape, example):
    """Eager torch, slow enough that a sample is one call, until `what` happens at the call after so many."""
    run, done = EAGER.build(setting, shape, example), []

    def call(x):
        done.append(x)
        if len(done) > calls:
            what()
        time.sleep(0.025)
        return run(x)

    return call


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(600)


def raising(which: str, name: str = "ours") -> Contender:
    """Fails to be built."""
    return Contender(CAPACITOR, name, partial(_raise, which))


def wrong(name: str) -> Contender:
    """A result that is off by a percent."""
    return Contender(CAPACITOR, name, _off_by_a_percent)


def dying(name: str, calls: int, what=os.abort) -> Contender:
    """Takes its process with it, or does something else, after so many calls; the first one is the check."""
    return Contender(CAPACITOR, name, partial(_after_calls, calls, what))


class DyingOpBench(OpBench):
    """Aborts at the first size of one op."""

    def measure(self, op, images, compiled, replays):
        if op == "grn" and images == TINY_IMAGES[0]:
            os.abort()
        return super().measure(op, images, compiled, replays)
