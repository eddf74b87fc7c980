"""What becomes of inputs by their headers, and what an update would change: nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import ImageError
from ..images.decode import probe
from ..images.geometry import Size, assign
from .hashing import xxh3
from .parts import row_nbytes
from .plan import CachePlan
from .prepare import room
from .report import Changes, DryRun
from .request import DTYPES
from .sources import Listing
from .update import Preview

SAMPLE = 4096
"""Inputs that are read at most, spread evenly over those that are asked about."""


def fate(data: bytes, plan: CachePlan) -> Size:
    """The bucket that an image file would come to, by its header.

    Raises:
        ImageError: why it would come to none.
    """
    header = probe(data)
    size = Size(header.height, header.width)
    bucket = assign(size, plan.buckets)
    plan.policy.place(size, bucket)
    return bucket


def sample(ordinals: np.ndarray) -> np.ndarray:
    """`SAMPLE` of these at most, int64 in their order."""
    at = np.linspace(0, len(ordinals) - 1, min(len(ordinals), SAMPLE)).round().astype(int)
    return ordinals[np.unique(at)]


def nbytes_by_dtype(plan: CachePlan, counts: Mapping[Size, int]) -> dict[str, int]:
    """Bytes of so many rows of each bucket, in each storage type."""
    return {
        name: sum(n * row_nbytes(plan.tensors, dtype, plan.row_shape(bucket)) for bucket, n in counts.items())
        for name, dtype in DTYPES.items()
    }


class _Seen(NamedTuple):
    """An input that was read: the hash of its bytes, and its bucket or why it has none."""

    digest: bytes | None
    fate: Size | str


def outlook_of(preview: Preview, out: Path, threads: int, dedupe: bool) -> DryRun:
    """What a run of the update would do.

    Args:
        threads: that read inputs.
        dedupe: whether inputs of the same bytes are encoded once.
    """
    plan, refs, now = preview.plan, preview.reuse.refs, preview.source.listing
    unknown = np.zeros(len(now), bool)
    for task in preview.todo:
        unknown[task.first : task.stop] = refs[task.first : task.stop] < 0
    asked = np.flatnonzero(unknown)
    read = sample(asked)
    scale = len(asked) / max(len(read), 1)
    has_name = _named(preview.before, now)
    found: Counter[str] = Counter()
    buckets: Counter[Size] = Counter()
    failed: Counter[str] = Counter()
    digests: set[bytes] = set()
    for ordinal, seen in zip(read.tolist(), _look(preview, read, threads), strict=True):
        is_copy = dedupe and seen.digest in digests
        if seen.digest is not None and (is_copy or preview.reuse.find(seen.digest) >= 0):
            found["same" if has_name[ordinal] else "moved"] += 1
            continue
        digests |= {seen.digest} if seen.digest is not None else set()
        found["changed" if has_name[ordinal] else "new"] += 1
        if isinstance(seen.fate, Size):
            buckets[seen.fate] += 1
        else:
            failed[seen.fate] += 1
    count = {kind: round(n * scale) for kind, n in found.items()}
    counts = {bucket: round(n * scale) for bucket, n in sorted(buckets.items())}
    nbytes = sum(n * plan.row_bytes(bucket) for bucket, n in counts.items())
    changes = Changes(
        before=None if preview.before is None else len(preview.before),
        inputs=len(now),
        new=count.get("new", 0),
        changed=count.get("changed", 0),
        gone=None if preview.before is None else len({*preview.before.locators} - {*now.locators}),
        reused=len(now) - count.get("new", 0) - count.get("changed", 0),
        moved=count.get("moved", 0),
        read=len(asked),
    )
    return DryRun(
        buckets=counts,
        quarantined=Counter({reason: round(n * scale) for reason, n in failed.items()}),
        tasks=plan.task_count,
        todo=len(preview.todo),
        nbytes=nbytes,
        todo_nbytes=nbytes,
        inputs=plan.task_inputs,
        notes=preview.notes + room(out, nbytes),
        files=2 * len(preview.todo),
        by_dtype=nbytes_by_dtype(plan, counts),
        sampled=len(read) if len(read) < len(asked) else None,
        update=changes,
    )


def _named(before: Listing | None, now: Listing) -> np.ndarray:
    """Whether the cache has an input of this name, bool `[N]`."""
    names = {*before.locators} if before is not None else set()
    return np.array([locator in names for locator in now.locators], bool)


def _look(preview: Preview, ordinals: np.ndarray, threads: int) -> list[_Seen]:
    reader, plan = preview.source.open(), preview.plan

    def one(ordinal: int) -> _Seen:
        digest = None
        try:
            data = reader.read(ordinal)
            digest = xxh3(data).digest()
            return _Seen(digest, fate(data, plan))
        except ImageError as e:
            return _Seen(digest, e.reason)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, ordinals.tolist()))
