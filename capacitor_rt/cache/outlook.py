"""What a run would do, by the headers of the inputs: nothing is written, and no weights are loaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import ImageError
from ..images.decode import probe
from ..images.geometry import Size, assign
from ..model import FullCapacitor
from ..printable import counted
from .commits import read_log
from .folder import CacheFolder
from .model_source import ModelSource
from .options import RunOptions
from .parts import row_nbytes
from .plan import DTYPES, CachePlan, CacheRequest
from .prepare import PreparedRun, as_source, check_folder, prepare, room
from .report import DryRun
from .sources import Source

SAMPLE = 4096
"""Headers that are read at most, spread evenly over the inputs."""


def dry_run(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: FullCapacitor | ModelSource | str | os.PathLike[str],
    request: CacheRequest,
    *,
    workers: int | None = None,
    progress: bool = True,
    options: RunOptions | None = None,
) -> DryRun:
    """What `cache_images` with these arguments would do."""
    out = Path(out)
    check_folder(out)
    chosen = options or RunOptions(progress=progress)
    folder = CacheFolder(out) if out.exists() else None
    try:
        prepared = prepare(os.fspath(src), out, folder, as_source(model), request, chosen, load=False)
        committed = read_log(folder, prepared.plan.log_name).commits if folder else {}
    finally:
        if folder:
            folder.close()
    plan, tasks = prepared.plan, prepared.tasks
    todo = [task for task in tasks if task.number not in committed]
    ordinals = np.unique(np.linspace(0, plan.count - 1, min(plan.count, SAMPLE)).round().astype(int))
    buckets, failed = _look(prepared.source, plan, ordinals.tolist(), workers or os.cpu_count() or 1)
    scale = plan.count / len(ordinals)
    counts = {bucket: round(n * scale) for bucket, n in sorted(buckets.items())}
    nbytes = sum(n * plan.row_bytes(bucket) for bucket, n in counts.items())
    share = sum(map(len, todo)) / plan.count
    todo_nbytes = round(nbytes * share)
    return DryRun(
        buckets=counts,
        quarantined=Counter({reason: round(n * scale) for reason, n in failed.items()}),
        tasks=len(tasks),
        todo=len(todo),
        nbytes=nbytes,
        todo_nbytes=todo_nbytes,
        inputs=plan.task_inputs,
        notes=prepared.notes + _progress(prepared, len(todo)) + room(out, todo_nbytes),
        files=2 * len(tasks),
        by_dtype={
            name: sum(n * row_nbytes(plan.tensors, dtype, plan.row_shape(bucket)) for bucket, n in counts.items())
            for name, dtype in DTYPES.items()
        },
        sampled=len(ordinals) if len(ordinals) < plan.count else None,
    )


def _progress(prepared: PreparedRun, todo: int) -> list[str]:
    done = len(prepared.tasks) - todo
    return [f"going on: {done} of {counted(len(prepared.tasks), 'task')} are done"] if todo and done else []


def _look(source: Source, plan: CachePlan, ordinals: Iterable[int], workers: int) -> tuple[Counter[Size], Counter[str]]:
    """Number of inputs by bucket, and by the reason why they have none."""
    reader, policy = source.open(), plan.policy

    def one(ordinal: int) -> Size | str:
        try:
            header = probe(reader.read(ordinal))
            size = Size(header.height, header.width)
            bucket = assign(size, plan.buckets)
            policy.place(size, bucket)
            return bucket
        except ImageError as e:
            return e.reason

    found: Counter[Size] = Counter()
    failed: Counter[str] = Counter()
    with ThreadPoolExecutor(workers) as pool:
        for result in pool.map(one, ordinals):
            if isinstance(result, Size):
                found[result] += 1
            else:
                failed[result] += 1
    return found, failed
