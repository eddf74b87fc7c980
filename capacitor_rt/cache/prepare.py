"""All that is known before the work of a run starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CacheError
from ..extras import require_extra
from ..model import FullCapacitor
from ..printable import counted
from ..reference import Autoencoder
from .commits import read_log
from .decoding import Helper
from .dedupe import Search, distinct, restricted, subset
from .folder import LEASES, TMP, CacheFolder
from .kept_configs import configs_of
from .model_source import Checkpoint, Loaded, ModelIdentity, ModelSource, with_whitening
from .mutex import HELD, LOCK
from .nvjpeg import CUDA, ENGINE, check_environment, environment
from .options import RunOptions
from .plan import PLAN, CachePlan, Task, load_plan, make_plan, plan_tasks
from .plan_changes import check_plan, version_notes
from .request import CacheRequest
from .resizing import by_device
from .sources import Listing, Source, load_listing
from .sources.changes import changed_inputs
from .sources.listing import SOURCE
from .sources.open import open_source
from .sources.stable_labels import with_stable_labels
from .stamps import STAMPS
from .store import read_index, strange_plan

_BEFORE_A_PLAN = {LOCK, HELD, SOURCE, STAMPS, LEASES}


@dataclass
class PreparedRun:
    """The plan, its tasks, and its inputs as they were found.

    Attributes:
        model: what computes, where it had to be loaded to make the plan.
        notes: what a user may want to know before the work starts.
        restore_listing: whether `source.parquet` is damaged and is to be written anew.
        cc: compute capability of the GPU, where launches of ours may serve.
        helper: what decoding workers are forked from, where it was started before the plan was made.
        rehash: of an update: trust no time of a file.
        whole: of an interim plan, all inputs.
        just_listed: plan whose list was made from the same listing of the source as this one's.
    """

    plan: CachePlan
    tasks: list[Task]
    source: Source
    model: Autoencoder | None = None
    notes: list[str] = field(default_factory=list)
    restore_listing: bool = False
    cc: int | None = None
    helper: Helper | None = None
    rehash: bool = False
    whole: Source | None = None
    just_listed: CachePlan | None = None

    def nbytes(self, tasks: Iterable[Task]) -> int:
        """Most bytes of the latents of `tasks`."""
        return sum(len(task) for task in tasks) * self.row_nbytes

    @property
    def row_nbytes(self) -> int:
        """Bytes of the largest row."""
        return max(self.plan.row_bytes(bucket) for bucket in self.plan.buckets)


def as_source(model: FullCapacitor | ModelSource | str | os.PathLike[str]) -> ModelSource:
    """A model, or the name of a checkpoint (computed on the CPU), as a source."""
    if isinstance(model, FullCapacitor):
        return Loaded(model)
    return Checkpoint(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else model


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something other than a cache, or what a killed planning run has left."""
    try:
        names = set(os.listdir(out))
    except FileNotFoundError:
        return
    except OSError as e:
        raise CacheError(f"cannot use {out}: {e.strerror}: give a folder") from e
    foreign = sorted(n for n in names if n not in _BEFORE_A_PLAN and TMP not in n)
    if PLAN not in names and foreign:
        raise CacheError(
            f"{out} is not empty and no latent cache: it holds {foreign[0]!r} and no {PLAN}: give a new or empty folder"
        )


def prepare(
    src: str | Path,
    out: Path,
    folder: CacheFolder | None,
    model_source: ModelSource,
    request: CacheRequest,
    options: RunOptions,
    load: bool,
    source: Source | None = None,
    is_checked: bool = False,
    search: Search = distinct,
) -> PreparedRun:
    """Check what can be checked before work starts. The model is loaded only for a new plan, and with `load`.

    Args:
        folder: the cache `out`, None where there is none yet.
        source: the inputs, where they were listed already.
        is_checked: whether they are known to be those of the plan.
        search: finds inputs of equal bytes.

    Raises:
        CacheError: other settings, another model or other inputs than those of the plan that is there.
    """
    for extra in ("pyarrow", "xxhash"):
        require_extra(extra)
    plan = load_plan(folder) if folder else None
    identity = model_source.identity(plan.fields["model"]["compute_dtype"] if plan else None)
    by_device(options.resize, identity.cc, request.decode)
    if plan and folder:
        check_plan(plan, request, identity, folder)
        check_decoder(plan, identity)
    elif request.posterior and identity.config["bottleneck_posterior_kind"] != "diagonal_gaussian":
        raise CacheError(f"{identity.id} is deterministic and has no logsnr to store: leave out posterior")
    gpu_decode = None if plan else decoder_of(request, identity)
    buckets = plan.buckets if plan else request.buckets(identity.multiple)
    source = source or open_source(
        src, out, options.source, options.columns, options.image_column, lambda: planned_listing(folder, plan)
    )
    whole = None
    if plan and folder:
        if plan.is_update:
            source = with_stable_labels(source, plan.fields["label_names"])
        if plan.is_interim and not is_checked:
            whole, source = source, restricted(folder, plan, source) or source
        restore = _check_inputs(folder, plan, source, is_checked)
        _check_files(folder, plan, source)
        notes = source.notes + version_notes(plan)
        return PreparedRun(plan, tasks_of(plan, source), source, None, notes, restore, identity.cc, whole=whole)
    notes = list(source.notes)
    distinct_of = None
    if request.dedupe and load:
        whole, (source, distinct_of) = source, without_copies(source, np.arange(len(source.listing)), notes, search)
    model = model_source.load(identity) if load else None
    if model is not None:
        identity = with_whitening(identity, model)
    configs = configs_of(identity, buckets, request.posterior)
    plan = make_plan(request, identity, source, buckets, configs, distinct_of, gpu_decode)
    notes += _decoding(plan)
    return PreparedRun(plan, tasks_of(plan, source), source, model, notes, cc=identity.cc, whole=whole)


def decoder_of(request: CacheRequest, identity: ModelIdentity) -> dict[str, Any] | None:
    """What decodes on the GPU, for the plan; None where nothing does. Errors as those of `nvjpeg.environment`."""
    return environment(torch.device(identity.where)) if request.decode == "gpu" else None


def check_decoder(plan: CachePlan, identity: ModelIdentity) -> None:
    """Refuse to go on where the GPU may decode otherwise than it did for the plan. Errors as in `nvjpeg`."""
    if (recorded := plan.fields.get("gpu_decode")) is not None:
        check_environment(recorded, torch.device(identity.where))


def without_copies(
    source: Source, candidates: np.ndarray, notes: list[str], search: Search
) -> tuple[Source, dict[str, Any] | None]:
    """The source without inputs whose bytes an earlier one has, and what is to be said of it in an interim plan.

    The source itself, and None, if there are none. `candidates`: as in `distinct`.
    """
    kept, nbytes = search(source, candidates)
    copies = len(source.listing) - len(kept)
    if not copies:
        return source, None
    size = f" ({nbytes / 1e6:.1f} MB)" if nbytes else ""
    notes.append(f"{copies} of {len(source.listing)} inputs{size} have the bytes of an earlier one and share its row")
    return subset(source, kept), {"count": len(source.listing), "sha256": source.listing.digest()}


def tasks_of(plan: CachePlan, source: Source) -> list[Task]:
    """The tasks of a plan whose inputs these are."""
    return plan_tasks(plan, source.listing.tasks(plan.task_inputs))


def planned_listing(folder: CacheFolder | None, plan: CachePlan | None) -> Listing | None:
    """The list of the plan that is there, if it is sound."""
    if folder is None or plan is None:
        return None
    with suppress(CacheError):
        return load_listing(folder, plan.source_name, plan.fields["source"]["sha256"], plan.count)
    return None


def _check_inputs(folder: CacheFolder, plan: CachePlan, source: Source, is_checked: bool) -> bool:
    """Refuse other inputs, or other columns of them. Whether the list on disk is damaged and can be restored."""
    fields = source.fields()
    planned = {k: v for k, v in plan.fields["source"].items() if k != "tasks"}
    if (source.columns.fields(), source.columns.label_names) != (plan.columns, plan.fields["label_names"]):
        before, now = (
            [f"{c['name']} from {c['from'][:24]}" for c in x] for x in (plan.columns, source.columns.fields())
        )
        raise CacheError(
            f"{folder.path} was planned with other labels, captions or columns: {', '.join(before) or 'none'} -> "
            f"{', '.join(now) or 'none'}: use the old ones, add --update, or cache into a new OUT"
        )
    try:
        listing = load_listing(folder, plan.source_name, planned["sha256"], planned["count"])
    except CacheError:
        if fields == planned:
            return True
        raise
    if is_checked:
        return False
    changes = changed_inputs(listing, source, lambda ordinals: committed_hashes(folder, plan, ordinals))
    if fields["kind"] != planned["kind"]:
        changes = [f"source {planned['kind']} -> {fields['kind']}"]
    if changes:
        raise CacheError(
            f"{folder.path} was planned for other inputs, and a plan is never changed: put the old files back, add "
            "--update (which keeps every row whose input is the same), or cache into a new OUT",
            changes,
        )
    return False


def _check_files(folder: CacheFolder, plan: CachePlan, source: Source) -> None:
    """Refuse a plan that is not the one of the files that are there: it would be begun anew beside them."""
    why = strange_plan(folder, plan)
    if (len(source.listing), len(tasks_of(plan, source))) != (plan.count, plan.task_count):
        why = "its numbers of inputs and tasks do not fit its list of inputs"
    if why:
        raise CacheError(
            f"{folder.path / PLAN} is not that of the cache ({why}): `capacitor-rt verify --repair "
            f"{folder.path}` restores it from the index; or cache into a new OUT"
        )


def committed_hashes(folder: CacheFolder, plan: CachePlan, ordinals: list[int]) -> dict[int, bytes]:
    """`bytes_hash` of those of the inputs that have been read for what is committed."""
    wanted, hashes = set(ordinals), {}
    for commit in read_log(folder, plan).commits.values():
        try:
            table = read_index(folder, plan, commit)
        except CacheError:
            # what builds on it reports that
            continue
        for ordinal, digest in zip(table["input"].to_pylist(), table["bytes_hash"].to_pylist(), strict=True):
            if ordinal in wanted and digest is not None:
                hashes[ordinal] = digest
    return hashes


def outlook(prepared: PreparedRun, out: Path, todo: list[Task], most: int | None = None) -> list[str]:
    """What may be said before the work begins: how much is done, and whether there is room for the rest.

    Args:
        most: inputs to be encoded, where that is known to be fewer than `todo` has.
    """
    need = prepared.nbytes(todo) if most is None else prepared.row_nbytes * most
    return [*_progress(prepared, todo, need), *room(out, need)]


def _progress(prepared: PreparedRun, todo: list[Task], most: int) -> list[str]:
    done, tasks = len(prepared.tasks) - len(todo), len(prepared.tasks)
    if not todo:
        return []
    if done:
        return [f"going on: {done} of {counted(tasks, 'task')} are done"]
    size = f"{most / 1e9:.4g} GB" if most >= 1e9 else f"{most / 1e6:.4g} MB" if most >= 1e6 else f"{most / 1e3:.4g} kB"
    begin = f"to be written: {counted(tasks, 'task')}, {2 * tasks} files, up to {size} of latents in "
    return [begin + prepared.plan.dtype]


def _decoding(plan: CachePlan) -> list[str]:
    """A line where the GPU decodes: what that ties the cache to."""
    if (by := plan.fields.get("gpu_decode")) is None:
        return []
    what = {ENGINE: "the JPEG engine", CUDA: "CUDA"}[by["decoded_by"]]
    return [
        f"the usual JPEGs are decoded by nvJPEG {by['nvjpeg']} on {what} of compute capability "
        f"{by['compute_capability'] / 10}, all other images by the workers: the cache goes on where that is the same"
    ]


def room(out: Path, need: int) -> list[str]:
    """A line if the disk is too full for `need` bytes."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if need <= free:
        return []
    return [
        f"up to {need / 1e9:.2f} GB are to be written and {out} has {free / 1e9:.2f} GB free: "
        "the run will stop when it is full, and go on when there is more"
    ]
