"""Sources that change, and their caches, for the tests of updates and of shared rows."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from cache_cases import pixels, write_images
from models import random_model
from PIL import Image

from capacitor_rt.cache import CacheRequest, LatentDataset, RunOptions, cache_images
from capacitor_rt.cache.decoding import work
from capacitor_rt.cache.decoding.work import Worker
from capacitor_rt.cli.app import _run

REQUEST = CacheRequest(32, area=True, dtype="fp32", posterior=True, task_inputs=3, batch=2)
SIZES = ((40, 40), (20, 80), (90, 24))
OLD = 1_600_000_000


def cache(src, out, model=None, request=REQUEST, told=None, **options):
    chosen = RunOptions(**{"workers": 0, "progress": False, "backoff": (0.0,), **options})
    note = (lambda line: None) if told is None else told.append
    return cache_images(src, out, model or random_model(), request, options=chosen, note=note)


def update(src, out, model=None, request=REQUEST, told=None, **options):
    return cache(src, out, model, request, told, update=True, **options)


def age(src: Path) -> None:
    """Make all files old enough for their times to be trusted."""
    for path in src.rglob("*"):
        os.utime(path, (OLD, OLD))


def image(path: Path, seed: int, size=(40, 40)) -> Path:
    Image.fromarray(pixels(*size, seed=seed)).save(path)
    os.utime(path, (OLD, OLD))
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


@pytest.fixture
def src(tmp_path) -> Path:
    write_images(tmp_path / "src", 10, sizes=SIZES)
    (tmp_path / "src" / "003b.png").write_bytes(b"no image")
    age(tmp_path / "src")
    return tmp_path / "src"


@pytest.fixture
def out(tmp_path, src) -> Path:
    cache(src, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def reads(monkeypatch) -> dict[str, list]:
    """Inputs that are read, and images that are decoded."""
    found: dict[str, list] = {"read": [], "decoded": []}
    attempt, load = Worker._attempt, work.load_views
    monkeypatch.setattr(Worker, "_attempt", lambda self, i: found["read"].append(i) or attempt(self, i))
    monkeypatch.setattr(
        work, "load_views", lambda data, *args, **kw: found["decoded"].append(kw["name"]) or load(data, *args, **kw)
    )
    return found


def rows_of(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    ds = LatentDataset(out, verify=True)
    return {ds.ids[i]: ds.tensors(i) for i in range(len(ds))}


HERE = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def drive(*args: object) -> str:
    command = [sys.executable, str(HERE / "kill_driver.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", *map(str, args)])
        try:
            code = _run()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run
