"""The inputs of a planned cache, `OUT/inputs.parquet`: names, sizes, headers, buckets, failures seen in headers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheError, ImageError
from ..images.decode import TOO_LARGE, UNREADABLE, probe
from ..images.geometry import Size, assign, place
from ..images.scan import Scan, path_to_id
from .durable import PendingFile, canonical_json, require_extra

TABLE = "inputs.parquet"
MAX_FILE_BYTES = 2 << 30
"""A larger file is quarantined: it would be read into memory whole."""

_CHUNK = 256


@dataclass
class Inputs:
    """Columns over the N inputs in the order of the plan.

    `sizes` (bytes), `mtimes` (ns): int64. `width`, `height` as displayed, `orientation` (EXIF, 1-8): int32, 0 where
    the header could not be read. `bucket`: int32 position in the plan's buckets, -1 without one. `failures`: ordinal
    -> (reason, message).
    """

    paths: list[bytes]
    sizes: np.ndarray
    mtimes: np.ndarray
    width: np.ndarray
    height: np.ndarray
    orientation: np.ndarray
    bucket: np.ndarray
    failures: dict[int, tuple[str, str]]

    def __len__(self) -> int:
        return len(self.paths)

    def size(self, i: int) -> Size:
        """Displayed size in pixels of input `i`."""
        return Size(int(self.height[i]), int(self.width[i]))

    def digest(self) -> str:
        """SHA-256 (hex) of names, sizes, headers and failures; not of times, which differ between machines."""
        digest = hashlib.sha256(b"\0".join(self.paths) + b"\0\0")
        for column in (self.sizes, self.width, self.height, self.orientation):
            digest.update(np.ascontiguousarray(column, dtype="<i8"))
        digest.update(canonical_json(sorted((i, reason) for i, (reason, _) in self.failures.items())))
        return digest.hexdigest()

    def save(self, out: Path) -> None:
        pa = require_extra("pyarrow")
        reasons, messages = [None] * len(self), [None] * len(self)
        for i, (reason, message) in self.failures.items():
            reasons[i], messages[i] = reason, message
        table = pa.table(
            {
                "path": pa.array(self.paths, pa.binary()),
                "size": self.sizes,
                "mtime_ns": self.mtimes,
                "width": self.width,
                "height": self.height,
                "orientation": self.orientation,
                "bucket": self.bucket,
                "reason": pa.array(reasons, pa.string()),
                "message": pa.array(messages, pa.string()),
            }
        )
        PendingFile(out / TABLE, [parquet_bytes(table)]).replace()


def parquet_bytes(table: Any) -> memoryview:
    """A table as Parquet with page checksums; the same table gives the same bytes."""
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


def load_inputs(out: Path, sha256: str) -> Inputs:
    """Read the table back.

    Raises:
        CacheError: it is missing, damaged, or does not match `sha256`, the plan's hash of it.
    """
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    path = out / TABLE
    way_out = "restore it from a copy, or cache into a new OUT"
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        columns = {name: table[name].to_numpy() for name in table.column_names if name not in _OBJECTS}
        paths = table["path"].to_pylist()
        failed = np.flatnonzero(table["reason"].is_valid().to_numpy())
        texts = table.select(["reason", "message"]).take(pa.array(failed)).to_pylist()
    except (OSError, KeyError, pa.ArrowException) as e:
        raise CacheError(f"{path} is missing or damaged ({e}): {way_out}") from e
    failures = {int(i): (t["reason"], t["message"]) for i, t in zip(failed, texts, strict=True)}
    inputs = Inputs(
        paths,
        columns["size"],
        columns["mtime_ns"],
        columns["width"],
        columns["height"],
        columns["orientation"],
        columns["bucket"],
        failures,
    )
    if inputs.digest() != sha256:
        raise CacheError(f"{path} is damaged (it does not match the hash in plan.json): {way_out}")
    return inputs


_OBJECTS = ("path", "reason", "message")


def read_headers(
    scan: Scan, buckets: Sequence[Size], workers: int, advance: Callable[[int], None] = lambda n: None
) -> Inputs:
    """Read the header of every file found and assign it to a bucket. `advance` is told how many more are done."""
    n = len(scan.paths)
    columns = [np.zeros(n, np.int32) for _ in range(3)]
    bucket = np.full(n, -1, np.int32)
    position = {b: i for i, b in enumerate(buckets)}
    failures: dict[int, tuple[str, str]] = {}

    def some(start: int) -> tuple[int, list[tuple[int, int, int] | tuple[str, str]]]:
        return start, [read_header(scan, i) for i in range(start, min(start + _CHUNK, n))]

    with ThreadPoolExecutor(workers) as pool:
        try:
            for start, headers in pool.map(some, range(0, n, _CHUNK)):
                for i, header in enumerate(headers, start):
                    if len(header) == 2:
                        failures[i] = header
                        continue
                    for column, value in zip(columns, header, strict=True):
                        column[i] = value
                    size = Size(header[1], header[0])
                    best = assign(size, buckets)
                    try:
                        place(size, best)
                        bucket[i] = position[best]
                    except ImageError as e:
                        failures[i] = (e.reason, str(e))
                advance(len(headers))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Inputs(scan.paths, scan.sizes, scan.mtimes, *columns, bucket, failures)


def read_header(scan: Scan, i: int) -> tuple[int, int, int] | tuple[str, str]:
    """(width, height, orientation) of file `i` of a scan, or (reason, message) of its failure."""
    path = scan.paths[i]
    if path in scan.errors:
        return UNREADABLE, scan.errors[path]
    if scan.sizes[i] > MAX_FILE_BYTES:
        return TOO_LARGE, f"file of {scan.sizes[i]} bytes: the limit is {MAX_FILE_BYTES}"
    where = os.fsdecode(scan.locate(path))
    try:
        header = probe(where)
    except ImageError as e:
        return e.reason, name_in_message(str(e), where, path)
    return header.width, header.height, header.orientation


def name_in_message(message: str, where: str, path: bytes) -> str:
    """A message about the file at `where`, told of its relative path: it must be the same on every machine."""
    return message.replace(where, path_to_id(path)).replace(ascii(where), path_to_id(path))


def changed_inputs(inputs: Inputs, scan: Scan, same_bytes: Callable[[list[int]], list[int]]) -> list[str]:
    """What differs between the planned inputs and those found now, one line per kind; empty if nothing does.

    Files whose time alone differs are given to `same_bytes`, which returns those of other contents.
    """
    if inputs.paths == scan.paths:
        resized = np.flatnonzero(inputs.sizes != scan.sizes)
        touched = np.flatnonzero((inputs.mtimes != scan.mtimes) & (inputs.sizes == scan.sizes))
        changed = sorted([*resized.tolist(), *same_bytes(touched.tolist())])
        return _examples("changed", [inputs.paths[i] for i in changed])
    before, now = dict(zip(inputs.paths, inputs.sizes, strict=True)), dict(zip(scan.paths, scan.sizes, strict=True))
    return [
        *_examples("added", sorted(now.keys() - before.keys())),
        *_examples("removed", sorted(before.keys() - now.keys())),
        *_examples("changed", sorted(p for p in before.keys() & now.keys() if before[p] != now[p])),
    ]


def _examples(kind: str, paths: list[bytes]) -> list[str]:
    if not paths:
        return []
    names = ", ".join(repr(path_to_id(p)) for p in paths[:3])
    return [f"{len(paths)} {kind}: {names}{', ...' if len(paths) > 3 else ''}"]
