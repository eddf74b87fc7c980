"""Benchmarks on the CPU: their processes come from one that has imported what each would import."""

from __future__ import annotations

import multiprocessing

import pytest

from bench import _workers

IMPORTED = ["bench._sides", "bench.kernels", "diffusers.models.autoencoders.autoencoder_kl_flux2"]


@pytest.fixture(scope="package")
def _importing_once():
    multiprocessing.set_forkserver_preload(IMPORTED)


@pytest.fixture(autouse=True)
def _forked(request, monkeypatch, _importing_once):
    """As on a GPU the processes get all by pickling; `test_workers` starts them as there."""
    if request.module.__name__ != "test_workers" and not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(_workers, "START", "forkserver")
