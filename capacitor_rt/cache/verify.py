"""Checking a cache against its own hashes: every damaged file is named, and the rows that are damaged with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CacheError
from .durable import COMMITS, LOCK, TMP, Commit, committed_files, hash_file, read_commits
from .inputs import TABLE, Inputs, load_inputs
from .plan import PLAN, CachePlan, Part, load_plan
from .quarantine import QUARANTINE, quarantine_bytes
from .shards import OK, disk_row_hashes, read_index, read_shard_header, rebuild_hint

if TYPE_CHECKING:
    import pyarrow


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        inputs: number of inputs of the plan.
        rows, shards, nbytes: what is committed, in numbers and in bytes of shard files.
        unfinished: planned parts that are not committed yet, which is no damage.
        files: names of the cache's own files, relative to it: what a copy of it needs.
        problems: damage, one line per problem.
        notes: files that do not belong to the cache, one line per file.
    """

    inputs: int = 0
    rows: int = 0
    shards: int = 0
    nbytes: int = 0
    unfinished: int = 0
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    root: str | os.PathLike[str],
    *,
    workers: int = 4,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Read every byte of a cache and compare it with its hash. Nothing is changed.

    Checked: plan.json and inputs.parquet against their hashes; every shard and index file against its commit line,
    and the rows of a damaged shard one by one against the index; that every shard is one of the plan's and its index
    lists just the inputs that the plan gives it; quarantine.jsonl against the index.

    Args:
        workers: threads that read.
        advance: told (shards checked, shards in all).

    Raises:
        CacheError: there is no cache.
    """
    root = Path(root)
    if not root.is_dir() or not any((root / name).exists() for name in (PLAN, COMMITS, TABLE)):
        raise CacheError(f"{root} is no latent cache: it has no {PLAN}")
    found = Verification()
    plan, inputs = _read_plan(root, found)
    try:
        commits = read_commits(root)
    except CacheError as e:
        found.problems.append(str(e))
        return found
    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(lambda commit: _check_files(root, commit), commits.values())
        listed: dict[str, list[int]] = {}
        for done, (commit, (problems, ordinals)) in enumerate(zip(commits.values(), results, strict=True), 1):
            found.problems += problems
            if ordinals is not None:
                listed[commit["index"]] = ordinals
            advance(done, len(commits))
    found.rows = sum(c["rows"] for c in commits.values())
    found.shards = sum(c["shard"] is not None for c in commits.values())
    found.nbytes = sum(c["shard_bytes"] for c in commits.values())
    if plan is not None and inputs is not None:
        _check_membership(found, commits, listed, list(plan.parts(inputs.bucket)))
    if not found.problems:
        _check_quarantine(root, found, commits)
    _look_for_strangers(root, found, commits)
    return found


def _read_plan(root: Path, found: Verification) -> tuple[CachePlan | None, Inputs | None]:
    try:
        plan = load_plan(root)
        if plan is None:
            raise CacheError(f"{root / PLAN} is missing: restore it from a copy, or cache into a new OUT")
        found.inputs = plan.fields["inputs"]["count"]
        return plan, load_inputs(root, plan.fields["inputs"]["sha256"])
    except CacheError as e:
        found.problems.append(str(e))
        return None, None


def _check_files(root: Path, commit: Commit) -> tuple[list[str], list[int] | None]:
    """Problems of one commit's files, and the ordinals of the inputs that its index lists (None if it is damaged)."""
    hint = rebuild_hint(commit)
    try:
        table = read_index(root / commit["index"], commit["index_xxh3"])
    except CacheError as e:
        return [f"{e}: {hint}", *_check_shard(root, commit, None, hint)], None
    problems = _check_shard(root, commit, table, hint)
    counts = (table.num_rows, table["status"].to_pylist().count(OK), (root / commit["index"]).stat().st_size)
    if counts != (commit["inputs"], commit["rows"], commit["index_bytes"]):
        problems.append(f"{COMMITS} is damaged: its line of {commit['index']} does not agree with that file: {hint}")
    return problems, table["input"].to_pylist()


def _check_shard(root: Path, commit: Commit, index: pyarrow.Table | None, hint: str) -> list[str]:
    if commit["shard"] is None:
        return []
    path = root / commit["shard"]
    try:
        if path.stat().st_size == commit["shard_bytes"] and hash_file(path) == commit["shard_xxh3"]:
            return []
    except OSError as e:
        return [f"shard {path} cannot be read ({e.strerror}): {hint}"]
    return [f"shard {path} is damaged: {_damaged_rows(path, index)}: {hint}"]


def _damaged_rows(path: Path, index: pyarrow.Table | None) -> str:
    """Which rows of a shard whose hash is wrong are damaged, in words."""
    if index is None:
        return "its hash is not that of its commit line"
    rows = index.filter(np.array(index["status"].to_pylist()) == OK).select(["id", "row_hash"]).to_pylist()
    try:
        hashes = disk_row_hashes(read_shard_header(path))
    except CacheError as e:
        return str(e)
    if len(hashes) != len(rows):
        return f"it has {len(hashes)} rows, and the index {len(rows)}"
    bad = [
        (n, row["id"]) for n, (row, digest) in enumerate(zip(rows, hashes, strict=True)) if digest != row["row_hash"]
    ]
    if not bad:
        return "its header or its commit line; all rows match their hashes"
    names = ", ".join(f"{n} ({name!r})" for n, name in bad[:3])
    return f"{len(bad)} of {len(rows)} rows do not match their hashes: {names}{', ...' if len(bad) > 3 else ''}"


def _check_membership(
    found: Verification, commits: dict[str, Commit], listed: dict[str, list[int]], planned: list[Part]
) -> None:
    known = {part.index: part for part in planned}
    found.unfinished = sum(index not in commits for index in known)
    for index in commits.keys() - known.keys():
        found.problems.append(f"{COMMITS} has {index}, which is not of this plan: remove its line and its files")
    for index, ordinals in listed.items():
        if index in known and ordinals != known[index].inputs.tolist():
            found.problems.append(f"index {index} does not list the inputs that the plan gives its shard")


def _check_quarantine(root: Path, found: Verification, commits: dict[str, Commit]) -> None:
    path = root / QUARANTINE
    if not found.unfinished and (not path.exists() or path.read_bytes() != quarantine_bytes(root, commits)):
        found.problems.append(f"{path} is missing or does not match the index: the cache command writes it anew")


def _look_for_strangers(root: Path, found: Verification, commits: dict[str, Commit]) -> None:
    own = {PLAN, TABLE, COMMITS, QUARANTINE, LOCK}
    own |= {name for commit in commits.values() for name, _ in committed_files(commit)}
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    names = [p.relative_to(root).as_posix() for p in files]
    found.files = [name for name in names if name in own and name != LOCK]
    strangers = [name for name in names if name not in own]
    for name in strangers[:5]:
        kind = "left by a killed run, the next run removes it" if TMP in name else "not committed, or foreign"
        found.notes.append(f"{name}: {kind}")
    if len(strangers) > 5:
        found.notes.append(f"{len(strangers) - 5} more files that are not of the cache")
