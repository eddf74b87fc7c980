"""What reading a cache costs: opening it, memory per row, and DataLoaders with and without workers.

    python -m bench reading                       a million small rows to open, 4096 of 256x256 to read
    python -m bench reading --rows 5000000 --folder /data/tmp

The caches are made of random numbers. Opening is measured in processes of their own, the first time and again; memory
is what a process has more of after opening, its own and what it maps of files, which all processes share. Reading goes
once through all rows in the order of a shuffled sampler, files in the page cache, with 0 and more workers by turns;
what counts is the ratio. Prints a line for each and appends them as JSON to bench/results/reading-<gpu>.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

READ_ROWS = 4096
PASSES = 3
_OPEN = """
import json, sys, time
import torch, pyarrow.parquet, xxhash
from capacitor_rt.cache import LatentDataset
def memory():
    with open("/proc/self/status") as file:
        found = dict(line.split(":", 1) for line in file)
    return {name: 1024 * int(found[name].split()[0]) for name in ("RssAnon", "RssFile", "VmHWM")}
before, begin = memory(), time.perf_counter()
dataset = LatentDataset(sys.argv[1])
seconds, after = time.perf_counter() - begin, memory()
assert dataset.ids[len(dataset) // 2] and dataset.entries(5)
print(json.dumps({"seconds": seconds, **{name: after[name] - before[name] for name in before}}))
"""


def write_cache(root: Path, rows: int, side: int, task_inputs: int = 8192) -> None:
    """A finished cache of `rows` rows of random latents, as a run would have written it."""
    from capacitor_rt.cache import CacheRequest, ColumnsRequest
    from capacitor_rt.cache.folder import CacheFolder, make_dir
    from capacitor_rt.cache.leases import Leases
    from capacitor_rt.cache.model_source import Loaded
    from capacitor_rt.cache.mutex import Mutex
    from capacitor_rt.cache.plan import make_plan, plan_tasks
    from capacitor_rt.cache.sources.columns import file_columns
    from capacitor_rt.cache.sources.files import FileSource
    from capacitor_rt.cache.sources.listing import Listing
    from capacitor_rt.cache.store import TaskData, TaskStore

    from ._null import null_model

    names = [b"%04d/image-%09d.jpg" % (i // 1000, i) for i in range(rows)]
    sizes = np.full(rows, 50_000, np.int64)
    listing = Listing.of_files(names, sizes, sizes)
    source = FileSource("folder", b"", listing, file_columns(b"", listing, ColumnsRequest()), None)
    request = CacheRequest(side=side, task_inputs=task_inputs)
    identity = Loaded(null_model()).identity()
    plan = make_plan(request, identity, source, request.buckets(identity.multiple))
    make_dir(root)
    with CacheFolder(root) as folder:
        mutex = Mutex(folder)
        listing.save(folder)
        plan.save(folder)
        shape = plan.row_shape(plan.buckets[0])
        with Leases(folder, mutex, plan.plan8) as leases:
            store = TaskStore(folder, plan, mutex, leases)
            for task in plan_tasks(plan, listing.tasks(plan.task_inputs)):
                leases.take(task.number)
                latents = torch.randn(len(task), *shape).to(torch.bfloat16)
                zeros = np.zeros(len(task), np.int32)
                columns: dict[str, Any] = dict.fromkeys(_INT32, zeros) | dict.fromkeys(_FLOAT32, zeros)
                columns |= {"input": np.arange(task.first, task.stop), "status": ["ok"] * len(task)}
                columns |= {"id": [listing.id(i) for i in range(task.first, task.stop)]}
                columns |= {"reason": [None] * len(task), "message": [None] * len(task)}
                columns |= {"bytes_hash": [bytes(16)] * len(task)}
                store.write(task, TaskData(columns, zeros, np.arange(len(task)), {(0, "latents"): [latents]}))
                leases.release(task.number)
        with mutex:
            mutex.remove()


_INT32 = (
    *("width", "height", "orientation", "bucket", "resize_height", "resize_width"),
    *("crop_top", "crop_left"),
)
_FLOAT32 = ("min", "max", "mean", "std")


def opened(root: Path) -> dict[str, float]:
    """Seconds and bytes that opening a cache takes in a new process."""
    done = subprocess.run([sys.executable, "-c", _OPEN, str(root)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def read_rates(dataset: Any, workers: int, batch: int) -> Iterator[tuple[float, float]]:
    """Of each pass over all rows bytes per second, and seconds of CPU time per gigabyte of the process that reads."""
    from torch.utils.data import DataLoader

    from capacitor_rt.cache import BucketBatchSampler

    sampler = BucketBatchSampler(dataset, batch, seed=1)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    while True:
        nbytes, begin, cpu = 0, time.perf_counter(), time.process_time()
        for rows in loader:
            # as a training loop does, look at every byte
            rows["latents"].view(torch.int16).amax()
            nbytes += rows["latents"].nbytes
        yield nbytes / (time.perf_counter() - begin), 1e9 * (time.process_time() - cpu) / nbytes


def run(args: argparse.Namespace) -> int:
    """Measure what the command line asks for."""
    from capacitor_rt.cache import LatentDataset

    from ._device import busy
    from ._records import append_line, default_results
    from ._timing import environment

    device = torch.device("cpu")
    torch.set_num_threads(1)
    line: dict[str, Any] = {"bench": "reading", "rows": args.rows, "batch": args.batch}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="capacitor-bench-") as name:
        root = Path(name)
        write_cache(root / "many", args.rows, 32)
        for label in ("first", "again"):
            line[label] = opened(root / "many")
            _print_opened(label, line[label], args.rows)
        write_cache(root / "large", READ_ROWS, 256, 1024)
        dataset = LatentDataset(root / "large")
        readers = {workers: read_rates(dataset, workers, args.batch) for workers in (0, *args.workers)}
        # the first pass starts the workers
        found = {workers: [next(rates) for rates in [reader] * (1 + PASSES)][1:] for workers, reader in readers.items()}
        for workers, reader in readers.items():
            found[workers] += [next(reader) for _ in range(PASSES)]
        rate = {workers: max(rate for rate, _ in passes) for workers, passes in found.items()}
        cpu = {workers: min(cpu for _, cpu in passes) for workers, passes in found.items()}
        line |= {"bytes_per_s": rate, "cpu_s_per_gb": cpu}
        for workers in rate:
            print(
                f"{workers} workers: {rate[workers] / 1e9:.2f} GB/s, {rate[workers] / rate[0]:.2f} of none; "
                f"{cpu[workers]:.2f} s of CPU time per GB in the process that reads",
                flush=True,
            )
    append_line(args.out or default_results(device, "reading"), line | environment(device) | {"busy": busy(device)})
    return 0


def _print_opened(label: str, found: dict[str, float], rows: int) -> None:
    own, mapped, peak = (found[name] / rows for name in ("RssAnon", "RssFile", "VmHWM"))
    print(
        f"opened {label}: {found['seconds']:.2f} s; bytes per row: {own:.0f} own, {mapped:.0f} mapped, {peak:.0f} peak",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench reading", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the cache that is opened")
    parser.add_argument("--batch", type=int, default=64, help="rows of a batch")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4], help="of the DataLoaders")
    parser.add_argument("--folder", type=Path, help="where the caches are made (default: the system's)")
    parser.add_argument("--out", type=Path, help="file of results")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
