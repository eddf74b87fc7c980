"""Shared fixtures. Without a GPU the Triton kernels run under the interpreter, chosen before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _gpu_problem() -> str | None:
    if not HAS_GPU:
        return "no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def pytest_collection_modifyitems(items):
    problem = _gpu_problem()
    for item in items:
        if problem and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
