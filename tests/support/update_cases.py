"""Sources that change, and their caches, for the tests of updates and of shared rows."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import kill_driver
import pytest
import torch
from cache_cases import index_rows, pixels, write_images
from models import random_model
from PIL import Image
from waiting import HANG_SECONDS

from capacitor_rt.cache import CacheRequest, Checkpoint, LatentDataset, RunOptions, cache_images, cache_views
from capacitor_rt.cache.compare import compare
from capacitor_rt.cache.decoding import work
from capacitor_rt.cache.decoding.reading import Ahead
from capacitor_rt.cache.verify import verify
from capacitor_rt.cli.app import _run

REQUEST = CacheRequest(32, area=True, dtype="fp32", posterior=True, task_inputs=3, batch=2)
SIZES = ((40, 40), (20, 80), (90, 24))
OLD = 1_600_000_000


def change(src: Path) -> None:
    """Files that are new, gone, changed, renamed, copied and touched, and one more that is no image."""
    image(src / "000a.png", 50)
    image(src / "zz.png", 51, (90, 24))
    (src / "001.png").unlink()
    image(src / "005.png", 70, SIZES[2])
    os.rename(src / "002.png", src / "900.png")
    shutil.copy(src / "004.png", src / "004-copy.png")
    os.utime(src / "007.png")
    (src / "bad.png").write_bytes(b"no image either")


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
    attempt, load = Ahead._attempt, work.load_views
    monkeypatch.setattr(Ahead, "_attempt", lambda self, i: found["read"].append(i) or attempt(self, i))
    monkeypatch.setattr(
        work, "load_views", lambda data, *args, **kw: found["decoded"].append(kw["name"]) or load(data, *args, **kw)
    )
    return found


def rows_of(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    ds = LatentDataset(out, verify=True)
    return {ds.ids[i]: ds.tensors(i) for i in range(len(ds))}


def assert_as_fresh(src: Path, out: Path, tmp_path: Path, **options) -> None:
    """An updated cache has the rows of one that is made anew, in the same order, and is sound."""
    fresh = tmp_path / f"fresh-{len(list(tmp_path.iterdir()))}"
    cache(src, fresh, **options)
    wanted, found = rows_of(fresh), rows_of(out)
    assert list(found) == list(wanted)
    for id, tensors in wanted.items():
        assert all(torch.equal(tensors[kind], found[id][kind]) for kind in tensors), id
    left_out = {"row", "file"}
    strip = lambda rows: [{k: v for k, v in row.items() if k not in left_out} for row in rows]  # noqa: E731
    assert strip(index_rows(out)) == strip(index_rows(fresh))
    assert (out / "quarantine.jsonl").read_bytes() == (fresh / "quarantine.jsonl").read_bytes()
    assert not compare(fresh, out)
    found = verify(out)
    assert found.problems == [] and not found.unfinished


COPIES = {name: replace(request, dedupe=True) for name, request in kill_driver.VIEWS.items()}


def changed_caches(folder: Path) -> Path:
    """`src` that has changed, the model, and of a cache by `kill_driver.REQUEST` and of views by `COPIES` what was
    cached before, in `old`, and what one process makes of that now, in `whole`."""
    src = folder / "src"
    write_images(src, 30, sizes=SIZES)
    (src / "004b.png").write_bytes(b"no image")
    age(src)
    random_model().save_pretrained(folder / "model")
    model, options = Checkpoint(str(folder / "model")), RunOptions(workers=0, progress=False)
    cache_images(src, folder / "old" / "one", model, kill_driver.REQUEST, options=options)
    cache_views(src, folder / "old" / "views", model, COPIES, note=str, options=options)
    for i in range(24):
        image(src / f"{i:03d}-new.png", 100 + i % 18, SIZES[i % 3])
    (src / "003.png").unlink()
    image(src / "022.png", 200, SIZES[1])
    shutil.copytree(folder / "old", folder / "whole")
    options = replace(options, update=True)
    cache_images(src, folder / "whole" / "one", model, kill_driver.REQUEST, options=options)
    cache_views(src, folder / "whole" / "views", model, COPIES, note=str, options=options)
    return folder


HERE = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def drive(*args: object) -> str:
    command = [sys.executable, str(HERE / "kill_driver.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=2 * HANG_SECONDS)
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
