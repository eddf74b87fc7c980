"""The inputs of a planned cache, `OUT/inputs.parquet`: names, sizes, headers, buckets and failures seen in headers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import CacheError, ImageError
from ..images.decode import TOO_LARGE, UNREADABLE, ImageHeader, probe, read_bytes
from ..images.geometry import Size, assign, place
from ..images.scan import Scan, path_to_id
from .durable import PendingFile, canonical_json, require_extra, xxh3

if TYPE_CHECKING:
    import pyarrow

TABLE = "inputs.parquet"
MAX_FILE_BYTES = 2 << 30
"""A larger file is quarantined: it would be read into memory whole."""

_CHUNK = 256


class Failure(NamedTuple):
    """Why an input cannot be cached: a typed reason, and a message for people."""

    reason: str
    message: str


@dataclass
class Inputs:
    """Columns over the N inputs in the order of the plan.

    Attributes:
        paths: relative to the source.
        sizes, mtimes: of the files, in bytes and in nanoseconds, int64.
        width, height, orientation: as in `ImageHeader`, int32; 0 where the header could not be read.
        bucket: position in the plan's buckets, -1 without one, int32.
        failures: of the inputs without a bucket, by ordinal.
    """

    paths: list[bytes]
    sizes: np.ndarray
    mtimes: np.ndarray
    width: np.ndarray
    height: np.ndarray
    orientation: np.ndarray
    bucket: np.ndarray
    failures: dict[int, Failure]

    def __len__(self) -> int:
        return len(self.paths)

    def size(self, i: int) -> Size:
        """Displayed size in pixels of input `i`."""
        return Size(int(self.height[i]), int(self.width[i]))

    def digest(self) -> str:
        """SHA-256 (hex) of names, sizes, headers and failures, but not of times, which differ between machines."""
        digest = hashlib.sha256(b"\0".join(self.paths) + b"\0\0")
        for column in (self.sizes, self.width, self.height, self.orientation):
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
        digest.update(canonical_json(sorted((i, reason) for i, (reason, _) in self.failures.items())))
        return digest.hexdigest()

    def save(self, out: Path) -> None:
        """Write `inputs.parquet`, durably, in place of what a run that was killed while planning may have left."""
        pa = require_extra("pyarrow")
        failures = [self.failures.get(i) for i in range(len(self))]
        table = pa.table(
            {
                "path": pa.array(self.paths, pa.binary()),
                "size": self.sizes,
                "mtime_ns": self.mtimes,
                "width": self.width,
                "height": self.height,
                "orientation": self.orientation,
                "bucket": self.bucket,
                "reason": pa.array([f and f.reason for f in failures], pa.string()),
                "message": pa.array([f and f.message for f in failures], pa.string()),
            }
        )
        PendingFile(out / TABLE, [parquet_bytes(table)]).replace()


def parquet_bytes(table: pyarrow.Table) -> memoryview:
    """A table as Parquet with page checksums. The same table gives the same bytes."""
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
        # by handle: pyarrow takes no path that is not UTF-8
        with path.open("rb") as file:
            table = pq.read_table(file, page_checksum_verification=True)
        columns = {name: table[name].to_numpy() for name in table.column_names if name not in _OBJECTS}
        paths = table["path"].to_pylist()
        failed = np.flatnonzero(table["reason"].is_valid().to_numpy())
        texts = table.select(["reason", "message"]).take(pa.array(failed)).to_pylist()
    except (OSError, KeyError, pa.ArrowException) as e:
        raise CacheError(f"{path} is missing or damaged ({e}): {way_out}") from e
    failures = {int(i): Failure(t["reason"], t["message"]) for i, t in zip(failed, texts, strict=True)}
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
    width, height, orientation = (np.zeros(n, np.int32) for _ in range(3))
    bucket = np.full(n, -1, np.int32)
    position = {b: i for i, b in enumerate(buckets)}
    failures: dict[int, Failure] = {}

    def some(start: int) -> tuple[int, list[ImageHeader | Failure]]:
        return start, [read_header(scan, i) for i in range(start, min(start + _CHUNK, n))]

    with ThreadPoolExecutor(workers) as pool:
        try:
            for start, headers in pool.map(some, range(0, n, _CHUNK)):
                for i, header in enumerate(headers, start):
                    if isinstance(header, Failure):
                        failures[i] = header
                        continue
                    width[i], height[i], orientation[i] = header.width, header.height, header.orientation
                    size = Size(header.height, header.width)
                    best = assign(size, buckets)
                    try:
                        place(size, best)
                        bucket[i] = position[best]
                    except ImageError as e:
                        failures[i] = Failure(e.reason, str(e))
                advance(len(headers))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Inputs(scan.paths, scan.sizes, scan.mtimes, width, height, orientation, bucket, failures)


def read_header(scan: Scan, i: int) -> ImageHeader | Failure:
    """The header of file `i` of a scan, or why it cannot be read."""
    path = scan.paths[i]
    if path in scan.errors:
        return Failure(UNREADABLE, scan.errors[path])
    if scan.sizes[i] > MAX_FILE_BYTES:
        return Failure(TOO_LARGE, f"file of {scan.sizes[i]} bytes: the limit is {MAX_FILE_BYTES}")
    where = os.fsdecode(scan.locate(path))
    try:
        return probe(where)
    except ImageError as e:
        return Failure(e.reason, name_in_message(str(e), where, path))


def name_in_message(message: str, where: str, path: bytes) -> str:
    """A message about the file at `where`, told of its relative path: it must be the same on every machine."""
    return message.replace(where, path_to_id(path)).replace(ascii(where), path_to_id(path))


def changed_inputs(inputs: Inputs, scan: Scan, known_hashes: Callable[[list[int]], dict[int, bytes]]) -> list[str]:
    """What differs between the planned inputs and those found now, one line per kind; empty if nothing does.

    A file whose time alone differs is read again.

    Args:
        known_hashes: XXH3-128 of those of the given inputs that have been read before, by ordinal.
    """
    if inputs.paths == scan.paths:
        resized = np.flatnonzero(inputs.sizes != scan.sizes).tolist()
        touched = np.flatnonzero((inputs.mtimes != scan.mtimes) & (inputs.sizes == scan.sizes)).tolist()
        known = known_hashes(touched) if touched else {}
        edited = [i for i in touched if not _unchanged(inputs, scan, i, known.get(i))]
        changed = sorted(resized + edited)
        return _examples("changed", [inputs.paths[i] for i in changed])
    before, now = dict(zip(inputs.paths, inputs.sizes, strict=True)), dict(zip(scan.paths, scan.sizes, strict=True))
    return [
        *_examples("added", sorted(now.keys() - before.keys())),
        *_examples("removed", sorted(before.keys() - now.keys())),
        *_examples("changed", sorted(p for p in before.keys() & now.keys() if before[p] != now[p])),
    ]


def _unchanged(inputs: Inputs, scan: Scan, i: int, known: bytes | None) -> bool:
    """Whether a file with a new time is still what was planned: by its bytes if they were read, else by its header."""
    if known is None:
        header = read_header(scan, i)
        if isinstance(header, Failure):
            return i in inputs.failures and inputs.failures[i].reason == header.reason
        now = header.width, header.height, header.orientation
        return now == (inputs.width[i], inputs.height[i], inputs.orientation[i])
    try:
        return xxh3(read_bytes(os.fsdecode(scan.locate(scan.paths[i])))).digest() == known
    except ImageError:
        return False


def _examples(kind: str, paths: list[bytes]) -> list[str]:
    if not paths:
        return []
    names = ", ".join(repr(path_to_id(p)) for p in paths[:3])
    return [f"{len(paths)} {kind}: {names}{', ...' if len(paths) > 3 else ''}"]
