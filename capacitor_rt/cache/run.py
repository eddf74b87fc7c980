"""A run of the cache: make a plan or find what is left of one, do that, and account for every input."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ..errors import CacheError
from ..images.geometry import Size
from ..images.scan import Scan, path_to_id, scan
from ..model import FullCapacitor
from ..reference import Autoencoder
from . import durable
from .durable import TMP, Commit, CommitLog, Lock, read_commits, require_extra
from .encoder import BatchEncoder
from .inputs import TABLE, Inputs, changed_inputs, load_inputs, read_headers
from .model_source import Checkpoint, Loaded, ModelSource, with_whitening
from .pipeline import Loader, Meters, Pipeline, device_threads
from .plan import (
    PLAN,
    CachePlan,
    CacheRequest,
    Part,
    Shard,
    UnplannedInputs,
    check_plan,
    code_versions,
    load_plan,
    make_plan,
)
from .quarantine import QUARANTINE, write_quarantine
from .shards import ShardStore, committed_hashes

_log = logging.getLogger("capacitor_rt")


@dataclass
class Report:
    """What a cache holds after a run, and what the run did.

    Attributes:
        inputs, cached, shards, nbytes: numbers of inputs, of rows and of shard files, and the bytes of the latter.
        quarantined: number of inputs by reason.
        new_images: inputs that this run has read.
        seconds: wall time of the run, planning included.
        meters: what its stages did; None if there was nothing to encode.
    """

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
    """What a run would do.

    Attributes:
        buckets: number of inputs by bucket.
        quarantined: number of inputs by the reason seen in their header.
        shards, nbytes: number of shards in all, and the bytes of their latents if every input can be cached.
        todo, todo_nbytes: the same of what is still to be written.
        rows: most inputs per shard.
        notes: what a user may want to know before the work starts, one line per note.
    """

    buckets: dict[Size, int]
    quarantined: Counter[str]
    shards: int
    todo: int
    nbytes: int
    todo_nbytes: int
    rows: int
    notes: list[str] = field(default_factory=list)


@dataclass
class PreparedRun:
    """All that is known before the work starts: the plan, its inputs, and where they were found.

    Attributes:
        model: what computes, where it had to be loaded to make the plan.
        notes: as in `DryRun`.
    """

    out: Path
    plan: CachePlan
    inputs: Inputs
    scan: Scan
    model: Autoencoder | None
    notes: list[str]

    def parts(self) -> list[Part]:
        return list(self.plan.parts(self.inputs.bucket))

    def nbytes(self, parts: Iterable[Part]) -> int:
        """Bytes of the latents of `parts` if every input can be cached."""
        return sum(len(shard.inputs) * self.plan.row_bytes(shard.bucket) for shard in _shards(parts))


def _shards(parts: Iterable[Part]) -> list[Shard]:
    return [part for part in parts if isinstance(part, Shard)]


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
    note: Callable[[str], None] = _log.info,
) -> Report:
    """Encode every image of `src` into the latent cache `out`, or go on with it. Originals are only read.

    Args:
        src: folder (with its subfolders) or file.
        out: folder of the cache; new, empty, or an unfinished or finished cache of the same plan.
        model: a model, the name of a checkpoint, or a `ModelSource`. It is not loaded when nothing is left to do.
        workers: threads for reading and decoding; default every core.
        progress: show a bar on stderr.
        note: told, line by line, what a user may want to know before the work starts; default the logger
            `capacitor_rt`.

    Raises:
        CacheError: `out` belongs to another plan, to other inputs or to a running process; a file is damaged; the disk
            is full.
        KeyboardInterrupt: all but the open shard are safe, and the same call goes on from there.
    """
    begin = time.perf_counter()
    source, out = as_source(model), Path(out)
    _check_folder(out)
    with _locked(out):
        durable.remove_stale(out)
        prepared = _prepare(Path(src), out, source, request, workers, progress, load=True)
        if prepared.model is not None:
            # a new plan is written last: with it the cache exists, without it nothing that lies here counts
            prepared.inputs.save(out)
            prepared.plan.save(out)
        log = CommitLog(out)
        try:
            store = ShardStore(out, prepared.plan, log)
            parts = prepared.parts()
            todo = [part for part in parts if not (store.is_done(part) or store.recover(part))]
            for line in prepared.notes + _outlook(prepared, parts, todo):
                note(line)
            try:
                meters = _write_parts(prepared, store, todo, source, workers, progress, note)
            except BaseException:
                # what is done so far; the reason why the run ends matters more than this file
                with suppress(CacheError, OSError):
                    write_quarantine(out, log.commits)
                raise
            write_quarantine(out, log.commits)
            report = _account(out, len(prepared.inputs), log.commits)
        finally:
            log.close()
    report.new_images = sum(len(shard.inputs) for shard in _shards(todo))
    report.meters, report.seconds = meters, time.perf_counter() - begin
    return report


def dry_run(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: FullCapacitor | ModelSource | str | os.PathLike[str],
    request: CacheRequest,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> DryRun:
    """What `cache_images` with these arguments would do. It reads headers only, writes nothing and loads no weights."""
    out = Path(out)
    _check_folder(out)
    prepared = _prepare(Path(src), out, as_source(model), request, workers, progress, load=False)
    parts, committed = prepared.parts(), read_commits(out)
    todo = [part for part in parts if part.index not in committed]
    buckets: Counter[Size] = Counter()
    for shard in _shards(parts):
        buckets[shard.bucket] += len(shard.inputs)
    return DryRun(
        buckets=dict(sorted(buckets.items())),
        quarantined=Counter(failure.reason for failure in prepared.inputs.failures.values()),
        shards=len(_shards(parts)),
        todo=len(_shards(todo)),
        nbytes=prepared.nbytes(parts),
        todo_nbytes=prepared.nbytes(todo),
        rows=prepared.plan.shard_rows,
        notes=prepared.notes + _outlook(prepared, parts, todo),
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
) -> PreparedRun:
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
        return PreparedRun(out, plan, inputs, found, None, notes)
    model = source.load(identity) if load else None
    if model is not None:
        identity = with_whitening(identity, model)
    with tqdm(total=len(found.paths), desc="headers", unit="img", disable=not progress, leave=False) as bar:
        inputs = read_headers(found, buckets, workers or device_threads(identity.device), bar.update)
    plan = make_plan(request, identity, inputs, buckets)
    return PreparedRun(out, plan, inputs, found, model, notes)


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


def _check_inputs(out: Path, inputs: Inputs, found: Scan) -> None:
    changes = changed_inputs(inputs, found, lambda ordinals: committed_hashes(out, ordinals))
    if changes:
        raise CacheError(
            f"{out} was planned for other inputs, and a finished plan is never changed:\n  "
            + "\n  ".join(changes)
            + "\nput the old files back, or cache into a new OUT"
        )


def _write_parts(
    prepared: PreparedRun,
    store: ShardStore,
    todo: list[Part],
    source: ModelSource,
    workers: int | None,
    progress: bool,
    note: Callable[[str], None],
) -> Meters | None:
    """Write the parts `todo`. None if there was nothing to encode."""
    plan, inputs = prepared.plan, prepared.inputs
    loader = Loader(prepared.scan, inputs, tuple(plan.fields["geometry"]["background"]))
    for part in todo:
        if isinstance(part, UnplannedInputs):
            store.write_unplanned(part, [loader.describe_unplanned(int(i)) for i in part.inputs])
    shards = _shards(todo)
    if not shards:
        return None
    model = prepared.model or source.load(source.identity(plan.fields["model"]["compute_dtype"]))
    encoder = BatchEncoder(model, plan.tensors, plan.dtype)
    sizes = {(shard.bucket.height, shard.bucket.width, min(plan.batch, len(shard.inputs))) for shard in shards}
    seconds = encoder.warmup(sorted(sizes))
    if seconds > 1:
        note(f"kernels for {len(sizes)} sizes of batches were made ready in {seconds:.1f} s")
    threads = workers or device_threads(str(model.device))
    total = int((inputs.bucket >= 0).sum())
    left = sum(len(shard.inputs) for shard in shards)
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
        pipeline.run(shards)
    return pipeline.meters


def _outlook(prepared: PreparedRun, parts: list[Part], todo: list[Part]) -> list[str]:
    lines, out = [], prepared.out
    if todo and len(todo) < len(parts):
        lines.append(f"going on: {len(parts) - len(todo)} of {len(parts)} shards are done")
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    need, free = prepared.nbytes(todo), shutil.disk_usage(existing).free
    if need > free:
        lines.append(
            f"{need / 1e9:.2f} GB are to be written and {out} has {free / 1e9:.2f} GB free: "
            "the run will stop when it is full, and go on when there is more"
        )
    return lines


def _account(out: Path, inputs: int, commits: dict[str, Commit]) -> Report:
    text = (out / QUARANTINE).read_bytes()
    reasons = Counter(json.loads(line)["reason"] for line in text.splitlines())
    return Report(
        inputs=inputs,
        cached=sum(c["rows"] for c in commits.values()),
        quarantined=reasons,
        shards=sum(c["shard"] is not None for c in commits.values()),
        nbytes=sum(c["shard_bytes"] for c in commits.values()),
    )
