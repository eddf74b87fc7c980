"""A finished cache of many inputs that were never decoded, for measuring what begins anew on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

SIDE = 32
GROUP = 8192
GROUPS_PER_FILE = 4


def write_names(folder: Path, count: int, first: int = 0) -> None:
    """A list of as many paths of files, all of which are links to one tiny image."""
    import io
    import os

    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (16, 16)).save(data, "PNG")
    for number in range(first, first + count):
        sub = folder / f"{number // 1000:06d}"
        if number % 1000 == 0 or number == first:
            sub.mkdir(parents=True, exist_ok=True)
            original = sub / f"{number:09d}.png"
            original.write_bytes(data.getvalue())
            # so old that its time is trusted
            os.utime(original, (1_600_000_000, 1_600_000_000))
        else:
            os.link(original, sub / f"{number:09d}.png")


def write_cache(src: Path, out: Path, model: Any) -> None:
    """The cache of a source as if each of its inputs had been another image; rows are zeros."""
    from capacitor_rt.cache import CacheRequest
    from capacitor_rt.cache.folder import CacheFolder, make_dir
    from capacitor_rt.cache.leases import Leases
    from capacitor_rt.cache.model_source import Loaded
    from capacitor_rt.cache.mutex import Mutex
    from capacitor_rt.cache.options import RunOptions
    from capacitor_rt.cache.prepare import prepare
    from capacitor_rt.cache.store import TaskData, TaskStore

    make_dir(out)
    with CacheFolder(out) as folder:
        mutex = Mutex(folder)
        options = RunOptions(progress=False)
        prepared = prepare(str(src), out, folder, Loaded(model), CacheRequest(side=SIDE), options, load=True)
        prepared.source.listing.save(folder, prepared.plan.source_name)
        prepared.plan.save(folder)
        rng, listing = np.random.default_rng(0), prepared.source.listing
        with Leases(folder, mutex, prepared.plan.plan8) as leases:
            store = TaskStore(folder, prepared.plan, mutex, leases)
            for task in prepared.tasks:
                with mutex:
                    leases.take(task.number)
                n = len(task)
                hashes = rng.bytes(16 * n)
                same: dict[str, Any] = {"status": "ok", "reason": None, "message": None, "bucket": 0}
                same |= {"width": 16, "height": 16, "orientation": 1, "resize_height": SIDE, "resize_width": SIDE}
                same |= {"crop_top": 0, "crop_left": 0, "min": 0.0, "max": 0.0, "mean": 0.0, "std": 0.0}
                columns: dict[str, Any] = {name: [value] * n for name, value in same.items()}
                columns["input"] = np.arange(task.first, task.stop)
                columns["bytes_hash"] = [hashes[i : i + 16] for i in range(0, 16 * n, 16)]
                columns["id"] = [listing.id(i) for i in range(task.first, task.stop)]
                rows = torch.zeros(n, *prepared.plan.row_shape(prepared.plan.buckets[0]), dtype=torch.bfloat16)
                pieces = {(0, part.name): [rows] for part in prepared.plan.parts}
                store.write(task, TaskData(columns, np.zeros(n, np.int64), np.arange(n), pieces))
                with mutex:
                    leases.release(task.number)
