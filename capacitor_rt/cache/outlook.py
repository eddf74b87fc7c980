"""What a run would do, by the headers of the inputs: nothing is written, and no weights are loaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import ImageError
from ..images.geometry import Size
from ..model import FullCapacitor
from ..printable import counted
from .commits import read_log
from .folder import CacheFolder
from .model_source import ModelSource
from .options import RunOptions
from .plan import PLAN, CachePlan
from .prepare import PreparedRun, as_source, check_folder, prepare, room
from .report import DryRun
from .request import CacheRequest
from .sources import Source
from .update import preview_update
from .update_outlook import fate, nbytes_by_dtype, outlook_of, sample


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
    threads = workers or os.cpu_count() or 1
    notes = []
    try:
        if chosen.update and folder is not None and folder.stat(PLAN) is not None:
            preview = preview_update(os.fspath(src), folder, as_source(model), request, chosen)
            if preview is not None:
                return outlook_of(preview, out, threads, request.dedupe)
            notes = ["the inputs are those of the cache: there is nothing to update"]
        prepared = prepare(os.fspath(src), out, folder, as_source(model), request, chosen, load=False)
        committed = read_log(folder, prepared.plan).commits if folder else {}
    finally:
        if folder:
            folder.close()
    plan, tasks = prepared.plan, prepared.tasks
    todo = [task for task in tasks if task.number not in committed]
    ordinals = sample(np.arange(plan.count))
    buckets, failed = _look(prepared.source, plan, ordinals.tolist(), threads)
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
        notes=notes + prepared.notes + _progress(prepared, len(todo)) + room(out, todo_nbytes),
        files=2 * len(tasks),
        by_dtype=nbytes_by_dtype(plan, counts),
        sampled=len(ordinals) if len(ordinals) < plan.count else None,
    )


def _progress(prepared: PreparedRun, todo: int) -> list[str]:
    done = len(prepared.tasks) - todo
    return [f"going on: {done} of {counted(len(prepared.tasks), 'task')} are done"] if todo and done else []


def _look(source: Source, plan: CachePlan, ordinals: Iterable[int], workers: int) -> tuple[Counter[Size], Counter[str]]:
    """Number of inputs by bucket, and by the reason why they have none."""
    reader = source.open()

    def one(ordinal: int) -> Size | str:
        try:
            return fate(reader.read(ordinal), plan)
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
