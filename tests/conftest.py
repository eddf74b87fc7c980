"""Shared fixtures. Without a GPU the Triton kernels run under the interpreter, chosen before triton is imported."""

from __future__ import annotations

import importlib
import os
import signal
from contextlib import contextmanager

import gpu_marks
import pytest
import quick_interpreter
import torch

NOBODY = 65534
HAS_GPU = torch.cuda.is_available()
# configs that a developer tuned are no part of what is tested
os.environ["CAPACITOR_CONFIGS"] = "shipped"
# a shell starts what it leaves in the background deaf to interrupts, and all that is started there with it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    quick_interpreter.install()


def pytest_configure(config):
    # machines with a GPU need not have all that the tests do
    if config.option.markexpr == "gpu" and not config.pluginmanager.has_plugin("bench._missing_packages"):
        config.pluginmanager.import_plugin("bench._missing_packages")


def _gpu_problem() -> str | None:
    if not HAS_GPU:
        return "no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def pytest_collection_modifyitems(config, items):
    # before any is deselected
    config.stash[gpu_marks.FILES] = {item.nodeid.partition("::")[0] for item in items if gpu_marks.has(item)}
    problem = _gpu_problem()
    for item in items:
        if problem and gpu_marks.has(item):
            item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def as_nobody():
    """A context in which file permissions count, also where the tests are run by root."""

    @contextmanager
    def context(folder):
        if os.geteuid() != 0:
            yield
            return
        # resources are read by it, and where root's Python lies nobody may look for it
        importlib.import_module("importlib.readers")
        owned = (p for p in (folder, *folder.parents) if p.stat().st_mode & 0o011 != 0o011 or p == folder)
        for parent in owned:
            # the group's bits too: the group stays root's
            parent.chmod(parent.stat().st_mode | (0o055 if parent == folder else 0o011))
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)

    return context
