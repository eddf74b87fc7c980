"""A run of the cache: plan it or find what is left of it, do that, and account for every input."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import CacheError, ImageError
from ..images.decode import read_bytes
from ..images.geometry import Size
from ..images.scan import Scan, path_to_id, scan
from ..model import FullCapacitor
from . import durable
from .durable import TMP, CommitLog, Lock, require_extra, xxh3
from .encoder import BatchEncoder
from .inputs import TABLE, Inputs, changed_inputs, load_inputs, read_header, read_headers
from .model_source import Checkpoint, Loaded, ModelIdentity, ModelSource, with_whitening
from .pipeline import Loader, Meters, Pipeline, device_threads
from .plan import PLAN, CachePlan, CacheRequest, Shard, check_plan, code_versions, load_plan, make_plan
from .quarantine import QUARANTINE, write_quarantine
from .shards import ShardStore, read_index


@dataclass
class Report:
    """What a cache holds after a run, and what the run did. With `dry_run` nothing was written."""

    inputs: int
    cached: int
    quarantined: Counter[str]
    shards: int
    nbytes: int
    new_images: int = 0
    seconds: float = 0.0
    meters: Meters | None = None

    @property
    def exit_code(self) -> int:
        """0: every input is cached; 3: some are quarantined."""
        return 3 if self.quarantined.total() else 0


@dataclass
class DryRun:
    """What a run would do: inputs per bucket, failures seen in headers, shards and bytes, in all and still to do."""

    buckets: dict[Size, int]
    quarantined: Counter[str]
    shards: int
    todo: int
    nbytes: int
    todo_nbytes: int
    rows: int
    notes: list[str] = field(default_factory=list)


@dataclass
class Job:
    """A checked plan with its inputs."""

    out: Path
    plan: CachePlan
    inputs: Inputs
    scan: Scan
    model: FullCapacitor | None
    notes: list[str]

    def shards(self) -> list[Shard]:
        return list(self.plan.shards(self.inputs.bucket))

    def nbytes(self, shards: Iterable[Shard]) -> int:
        """Bytes of the latents of `shards` if every input can be cached."""
        return sum(len(s.inputs) * self.plan.row_bytes(s.bucket) for s in shards if s.bucket)


def as_source(model: FullCapacitor | ModelSource | str | os.PathLike[str]) -> ModelSource:
    """A model, or the name of a checkpoint (computed on the CPU), as a source."""
    if isinstance(model, FullCapacitor):
        return Loaded(model)
    return Checkpoint(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else model


def cache_images(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: FullCapacitor | ModelSource | str | os.PathLike[str],
    request: CacheRequest,
    *,
    workers: int | None = None,
    progress: bool = True,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """Encode every image of `src` into the latent cache `out`, or go on with it. Originals are only read.

    Args:
        src: folder (with its subfolders) or file.
        out: folder of the cache; new, empty, or an unfinished or finished cache of the same plan.
        model: a model, the name of a checkpoint, or a `ModelSource`. It is not loaded when nothing is left to do.
        workers: threads for reading and decoding; default every core.
        progress: show a bar on stderr.
        note: told, a line at a time, what a user may want to know before the work starts.

    Raises:
        CacheError: `out` belongs to another plan, other inputs or a running process; a file is damaged; the disk is
            full.
        KeyboardInterrupt: all but the open shard are safe, and the same call goes on from there.
    """
    begin = time.perf_counter()
    source, out = as_source(model), Path(out)
    _check_folder(out)
    with _locked(out):
        durable.remove_stale(out)
        job = _prepare(Path(src), out, source, request, workers, progress, load=True)
        if job.model is not None:
            _save(job)
        log = CommitLog(out)
        try:
            store = ShardStore(out, job.plan, log)
            shards = job.shards()
            todo = [s for s in shards if not (store.is_done(s) or store.recover(s))]
            for line in job.notes + _outlook(job, shards, todo):
                note(line)
            meters, new = None, sum(len(s.inputs) for s in todo if s.bucket)
            try:
                meters = _work(job, store, todo, source, workers, progress)
            except BaseException:
                # what is done so far; the reason why the run ends matters more than this file
                with suppress(CacheError, OSError):
                    write_quarantine(out, log.commits)
                raise
            write_quarantine(out, log.commits)
            report = _account(job, log.commits)
        finally:
            log.close()
    report.new_images, report.meters, report.seconds = new, meters, time.perf_counter() - begin
    return report


def forecast(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: FullCapacitor | ModelSource | str | os.PathLike[str],
    request: CacheRequest,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> DryRun:
    """What `cache_images` with these arguments would do; reads headers only, writes nothing, loads no weights."""
    out = Path(out)
    _check_folder(out)
    job = _prepare(Path(src), out, as_source(model), request, workers, progress, load=False)
    shards = job.shards()
    committed = durable.read_commits(out)[0]
    todo = [s for s in shards if s.index not in committed]
    buckets = Counter({b: 0 for b in job.plan.buckets})
    for s in shards:
        if s.bucket:
            buckets[s.bucket] += len(s.inputs)
    return DryRun(
        {b: n for b, n in sorted(buckets.items()) if n},
        Counter(reason for reason, _ in job.inputs.failures.values()),
        sum(s.bucket is not None for s in shards),
        sum(s.bucket is not None for s in todo),
        job.nbytes(shards),
        job.nbytes(todo),
        job.plan.shard_rows,
        job.notes + _outlook(job, shards, todo),
    )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    new = not out.exists()
    try:
        durable.make_dir(out)
    except OSError as e:
        raise CacheError(f"cannot create {out}: {e.strerror}: give an OUT that you may write to") from e
    try:
        with Lock(out):
            yield
    finally:
        if new:
            # a run that was refused leaves nothing behind
            with suppress(OSError):
                out.rmdir()


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds something other than a cache, or what a killed planning run has left."""
    try:
        names = set(os.listdir(out))
    except FileNotFoundError:
        return
    except OSError as e:
        raise CacheError(f"cannot use {out}: {e.strerror}: give a folder") from e
    own = {durable.LOCK, TABLE}
    foreign = sorted(n for n in names if n not in own and TMP not in n)
    if PLAN not in names and foreign:
        raise CacheError(
            f"{out} is not empty and no latent cache: it holds {foreign[0]!r} and no {PLAN}: give a new or empty folder"
        )


def _prepare(
    src: Path, out: Path, source: ModelSource, request: CacheRequest, workers: int | None, progress: bool, load: bool
) -> Job:
    """Check what can be checked before work starts. The model is loaded only for a new plan, and with `load`."""
    for extra in ("pyarrow", "xxhash"):
        require_extra(extra)
    plan = load_plan(out)
    identity = source.identity(plan.fields["model"]["compute_dtype"] if plan else None)
    if plan:
        check_plan(plan, request, identity, out)
    elif request.posterior and identity.config["bottleneck_posterior_kind"] != "diagonal_gaussian":
        raise CacheError(f"{identity.id} is deterministic and has no logsnr to store: leave out posterior")
    buckets = plan.buckets if plan else request.buckets(identity.multiple)
    found = scan(src, skip=out)
    notes = _notes(found)
    if plan:
        inputs = load_inputs(out, plan.fields["inputs"]["sha256"])
        _check_inputs(out, inputs, found)
        notes += _version_notes(plan)
        return Job(out, plan, inputs, found, None, notes)
    model = source.load(identity) if load else None
    if model is not None:
        identity = with_whitening(identity, model)
    with tqdm(total=len(found.paths), desc="headers", unit="img", disable=not progress, leave=False) as bar:
        inputs = read_headers(found, buckets, workers or device_threads(identity.device), bar.update)
    plan = make_plan(request, identity, inputs, buckets)
    return Job(out, plan, inputs, found, model, notes)


def _notes(found: Scan) -> list[str]:
    notes = []
    if found.loops:
        links = "1 link leads" if len(found.loops) == 1 else f"{len(found.loops)} links lead"
        notes.append(f"{links} back into a folder above and was not followed: {path_to_id(found.loops[0])!r}")
    if found.ignored:
        kinds = ", ".join(f"{ext or 'no extension'} {n}" for ext, n in found.ignored.most_common(5))
        notes.append(f"left out, as they have no image's extension: {kinds}")
    return notes


def _version_notes(plan: CachePlan) -> list[str]:
    now, planned = code_versions(), plan.fields["code"]
    changed = [f"{k} {planned.get(k)} -> {v}" for k, v in now.items() if planned.get(k) != v]
    return [f"other versions than when the cache was planned: {', '.join(changed)}"] if changed else []


def _save(job: Job) -> None:
    # the plan last: with it the job exists, without it nothing that lies here counts
    job.inputs.save(job.out)
    job.plan.save(job.out)


def _check_inputs(out: Path, inputs: Inputs, found: Scan) -> None:
    def same_bytes(touched: list[int]) -> list[int]:
        known = _cached_hashes(out, touched) if touched else {}
        return [i for i in touched if not _unchanged(inputs, found, i, known.get(i))]

    changes = changed_inputs(inputs, found, same_bytes)
    if changes:
        raise CacheError(
            f"{out} was planned for other inputs, and a finished plan is never changed:\n  "
            + "\n  ".join(changes)
            + "\nput the old files back, or cache into a new OUT"
        )


def _cached_hashes(out: Path, wanted: list[int]) -> dict[int, bytes]:
    hashes: dict[int, bytes] = {}
    for commit in durable.read_commits(out)[0].values():
        if not (out / commit["index"]).exists():
            continue
        table = read_index(out / commit["index"], commit["index_xxh3"])
        ordinals = table["input"].to_numpy()
        for at in np.flatnonzero(np.isin(ordinals, wanted)):
            digest = table["bytes_hash"][int(at)].as_py()
            if digest is not None:
                hashes[int(ordinals[at])] = digest
    return hashes


def _unchanged(inputs: Inputs, found: Scan, i: int, known: bytes | None) -> bool:
    """Whether a file with a new time is still what was planned: by its bytes if they were read, else by its header."""
    if known is None:
        header = read_header(found, i)
        if len(header) == 2:
            return i in inputs.failures and inputs.failures[i][0] == header[0]
        return header == (inputs.width[i], inputs.height[i], inputs.orientation[i])
    try:
        digest = xxh3()
        digest.update(read_bytes(os.fsdecode(found.locate(found.paths[i]))))
    except ImageError:
        return False
    return digest.digest() == known


def _work(
    job: Job, store: ShardStore, todo: list[Shard], source: ModelSource, workers: int | None, progress: bool
) -> Meters | None:
    """Do the shards `todo`. None if there was nothing to encode."""
    loader = Loader(job.scan, job.inputs, tuple(job.plan.fields["geometry"]["background"]))
    for shard in todo:
        if shard.bucket is None:
            store.write(shard, [loader.describe(int(i), None) for i in shard.inputs], {})
    images = [s for s in todo if s.bucket is not None]
    if not images:
        return None
    model = job.model or source.load(_identity_of(job.plan, source))
    encoder = BatchEncoder(model, job.plan.tensors, job.plan.dtype)
    threads = workers or device_threads(str(model.device))
    total = int((job.inputs.bucket >= 0).sum())
    left = sum(len(s.inputs) for s in images)
    quarantined = 0
    # a bar for a person, a line now and then for a log
    interval = 0.2 if os.isatty(2) else 30
    with tqdm(
        total=total, initial=total - left, desc="cache", unit="img", disable=not progress, mininterval=interval
    ) as bar:

        def advance(count: int, failed: int) -> None:
            nonlocal quarantined
            quarantined += failed
            if quarantined:
                bar.set_postfix(quarantined=quarantined, refresh=False)
            bar.update(count)

        pipeline = Pipeline(store, loader, encoder, threads, advance)
        pipeline.run(images)
    return pipeline.meters


def _identity_of(plan: CachePlan, source: ModelSource) -> ModelIdentity:
    return source.identity(plan.fields["model"]["compute_dtype"])


def _outlook(job: Job, shards: list[Shard], todo: list[Shard]) -> list[str]:
    lines = []
    if todo and len(todo) < len(shards):
        lines.append(f"going on: {len(shards) - len(todo)} of {len(shards)} shards are done")
    existing = next(folder for folder in (job.out.absolute(), *job.out.absolute().parents) if folder.exists())
    need, free = job.nbytes(todo), shutil.disk_usage(existing).free
    if need > free:
        lines.append(
            f"{need / 1e9:.2f} GB are to be written and {job.out} has {free / 1e9:.2f} GB free: "
            "the run will stop when it is full, and go on when there is more"
        )
    return lines


def _account(job: Job, commits: dict[str, dict[str, Any]]) -> Report:
    text = (job.out / QUARANTINE).read_bytes()
    reasons = Counter(json.loads(line)["reason"] for line in text.splitlines())
    return Report(
        inputs=len(job.inputs),
        cached=sum(c["rows"] for c in commits.values()),
        quarantined=reasons,
        shards=sum(c["shard"] is not None for c in commits.values()),
        nbytes=sum(c["shard_bytes"] for c in commits.values()),
    )
