"""Images and whole-folder snapshots for the tests of the cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from capacitor_rt import FullCapacitor
from capacitor_rt.cache.commits import Commit, read_log
from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.hashing import xxh3
from capacitor_rt.cache.index import cached_counts
from capacitor_rt.cache.latent_files import Layout, layout
from capacitor_rt.cache.plan import CachePlan, load_plan
from capacitor_rt.cache.store import read_index

SHOWN_BYTES = 60


class Forbidden:
    """A source that can say what its model is but must not be asked for it."""

    def __init__(self, model: FullCapacitor):
        from capacitor_rt.cache.model_source import Loaded

        self.identity = Loaded(model).identity

    def load(self, identity):
        raise AssertionError("the model was loaded although nothing was left to do")


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, uint8 `[H,W,3]`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 32
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-2, 2, (3, 3))]
    return np.clip(128 + 90 * np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def write_images(folder: Path, count: int, sizes=((48, 64), (64, 48), (40, 40)), suffix: str = ".png") -> list[Path]:
    """`count` images 000.png, 001.png, ... whose sizes go round `sizes` (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        path = folder / f"{i:03d}{suffix}"
        Image.fromarray(pixels(*sizes[i % len(sizes)], seed=i)).save(path)
        paths.append(path)
    return paths


class FileBytes(bytes):
    """The bytes of a file, which a failed comparison tells of in a line: what CI keeps of its output is short."""

    def __repr__(self) -> str:
        shown = bytes(self[:SHOWN_BYTES])
        return (
            repr(shown) if len(shown) == len(self) else f"<{len(self)} bytes, {xxh3(self).hexdigest()}: {shown!r}...>"
        )


def snapshot(folder: Path) -> dict[str, FileBytes]:
    """Every file under `folder`: relative name -> bytes. What a machine notes for itself in a cache is left out."""
    root = os.fsencode(folder)
    files = {}
    for where, _, names in os.walk(root):
        for name in names:
            if name in (b".stamps", b".rows"):
                continue
            path = os.path.join(where, name)
            with open(path, "rb") as f:
                files[os.fsdecode(os.path.relpath(path, root))] = FileBytes(f.read())
    return files


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file under `folder`: relative name -> (inode, size, mtime in ns)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        found[str(path.relative_to(folder))] = (info.st_ino, info.st_size, info.st_mtime_ns)
    return found


def open_cache(out: Path) -> tuple[CacheFolder, CachePlan]:
    """The folder and the plan of a cache."""
    folder = CacheFolder(out)
    plan = load_plan(folder)
    assert plan is not None
    return folder, plan


def commits_of(out: Path) -> dict[int, Commit]:
    """The commit lines of a cache by task; none where there is no cache."""
    if not out.exists():
        return {}
    with CacheFolder(out) as folder:
        plan = load_plan(folder)
        return read_log(folder, plan).commits if plan else {}


def task_files(out: Path, task: int) -> tuple[Path, Path]:
    """Index and latents of a task."""
    folder, plan = open_cache(out)
    folder.close()
    return out / plan.index_name(task), out / plan.data_name(task)


def index_rows(out: Path) -> list[dict[str, Any]]:
    """Every row of the index, in the order of the inputs."""
    folder, plan = open_cache(out)
    with folder:
        commits = sorted(read_log(folder, plan).commits.items())
        return [row for _, commit in commits for row in read_index(folder, plan, commit).to_pylist()]


def task_layout(out: Path, task: int) -> Layout:
    """Where everything lies in a task's file of latents."""
    folder, plan = open_cache(out)
    with folder:
        commit = read_log(folder, plan).commits[task]
        return layout(plan, task, cached_counts(read_index(folder, plan, commit)), commit.index_xxh3)


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
