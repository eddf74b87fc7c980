"""Shards and their index on disk: safetensors files of one bucket each, and a Parquet table of their inputs.

A shard is an ordinary safetensors file with the tensors of `plan.tensors`, each `[N,C,h,w]` in the stored dtype; the
header is padded with spaces so that tensor data begins on a 4 KiB boundary. The index has one entry per input of the
shard's slice of the plan, cached or not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError
from ..images.geometry import Size
from .durable import (
    Commit,
    CommitLog,
    PendingFile,
    byte_view,
    committed_files,
    hash_file,
    read_commits,
    require_extra,
    xxh3,
)
from .inputs import parquet_bytes
from .plan import FORMAT, CachePlan, Part, Shard, UnplannedInputs

if TYPE_CHECKING:
    import pyarrow

ALIGN = 4096
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
OK, QUARANTINED = "ok", "quarantined"


class _Input(TypedDict):
    input: int
    id: str
    path: bytes
    status: str


class IndexEntry(_Input, total=False):
    """What the index says of one input; what does not apply is left out, and null in the file.

    `input` is the ordinal, `id` the relative path as text (`scan.path_to_id`), `path` its raw bytes. Sizes and crops
    are in pixels. `bytes_hash` is the XXH3-128 (16 bytes, big-endian) of the file, `row_hash` that of the row's bytes,
    all tensors in the order of `plan.tensors`; `row` is its position in `shard`. `min`, `max`, `mean` and `std` are
    those of the row of `latents` as stored.
    """

    reason: str
    message: str
    bytes_hash: bytes
    width: int
    height: int
    orientation: int
    bucket_height: int
    bucket_width: int
    resize_height: int
    resize_width: int
    crop_top: int
    crop_left: int
    shard: str
    row: int
    row_hash: bytes
    min: float
    max: float
    mean: float
    std: float


def index_schema() -> pyarrow.Schema:
    """Columns of `index/*.parquet`, those of `IndexEntry`."""
    pa = require_extra("pyarrow")
    int32, float32, digest = pa.int32(), pa.float32(), pa.binary(16)
    required = [
        ("input", pa.int64()),
        ("id", pa.string()),
        ("path", pa.binary()),
        ("status", pa.string()),
    ]
    optional = [
        ("reason", pa.string()),
        ("message", pa.string()),
        ("bytes_hash", digest),
        ("width", int32),
        ("height", int32),
        ("orientation", int32),
        ("bucket_height", int32),
        ("bucket_width", int32),
        ("resize_height", int32),
        ("resize_width", int32),
        ("crop_top", int32),
        ("crop_left", int32),
        ("shard", pa.string()),
        ("row", int32),
        ("row_hash", digest),
        ("min", float32),
        ("max", float32),
        ("mean", float32),
        ("std", float32),
    ]
    fields = [pa.field(*f, nullable=False) for f in required] + [pa.field(*f) for f in optional]
    return pa.schema(fields)


def row_hashes(tensors: Sequence[Tensor]) -> list[bytes]:
    """XXH3-128 of each row: its tensors' bytes one after the other. `tensors`: contiguous `[N,...]` on the CPU."""
    digests = [xxh3() for _ in range(len(tensors[0]))]
    for t in tensors:
        for digest, row in zip(digests, byte_view(t).reshape(len(t), -1), strict=True):
            digest.update(row.data)
    return [d.digest() for d in digests]


def shard_header(plan: CachePlan, bucket: Size, rows: int) -> bytes:
    """The safetensors header with its length field, a multiple of 4 KiB."""
    shape = (rows, *plan.row_shape(bucket))
    size = plan.row_bytes(bucket) // len(plan.tensors) * rows
    metadata = {
        "format": FORMAT,
        "plan": plan.id,
        "bucket": str(bucket),
        "latent_space": plan.fields["model"]["latent_space"],
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    for i, name in enumerate(plan.tensors):
        offsets = [i * size, (i + 1) * size]
        header[name] = {"dtype": CODES[plan.dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class ShardFile:
    """A shard as its header describes it: where each tensor begins, in bytes from the start of the file."""

    path: Path
    rows: int
    offsets: dict[str, int]
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of one tensor."""
        return int(np.prod(self.row_shape)) * self.dtype.itemsize


def read_shard_header(path: Path) -> ShardFile:
    """Parse the header of a shard.

    Raises:
        CacheError: missing, damaged, or not written by this package.
    """
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 0 < length <= os.fstat(f.fileno()).st_size:
                raise ValueError(f"its header length {length} is impossible")
            header = json.loads(f.read(length))
        if header.pop("__metadata__")["format"] != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        codes = {code: getattr(torch, name) for name, code in CODES.items()}
        (rows, *row_shape), dtype = header["latents"]["shape"], codes[header["latents"]["dtype"]]
        offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
        end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    except OSError as e:
        raise CacheError(f"shard {path} cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CacheError(f"shard {path} is damaged: its header cannot be read ({e})") from e
    return ShardFile(path, rows, offsets, tuple(row_shape), dtype, end)


def read_rows(fd: int, shard: ShardFile, name: str, start: int, count: int) -> Tensor:
    """Rows `start` to `start + count` of a tensor, `[count,C,h,w]`, in memory of their own.

    Plain reads, not a memory map: safe from any number of threads, quick on network file systems, and a file cut
    short is an error rather than a signal.
    """
    rows = torch.empty(count, *shard.row_shape, dtype=shard.dtype)
    view = byte_view(rows).data
    at = shard.offsets[name] + start * shard.row_nbytes
    while view:
        n = os.preadv(fd, [view], at)
        if n == 0:
            raise CacheError(f"shard {shard.path} is damaged: it ends before row {start + count - 1} of {name}")
        view, at = view[n:], at + n
    return rows


def disk_row_hashes(shard: ShardFile, block: int = 256) -> list[bytes]:
    """Hash of every row of a shard as it lies on disk."""
    hashes: list[bytes] = []
    with open(shard.path, "rb") as f:
        for start in range(0, shard.rows, block):
            count = min(block, shard.rows - start)
            hashes += row_hashes([read_rows(f.fileno(), shard, name, start, count) for name in shard.offsets])
    return hashes


def read_index(path: Path, digest: str | None = None) -> pyarrow.Table:
    """An index file as an Arrow table.

    Args:
        digest: its XXH3-128 (hex) by the commit line; None leaves it unchecked.

    Raises:
        CacheError: missing or damaged.
    """
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise CacheError(f"index {path} cannot be read: {e.strerror}") from e
    if digest is not None and xxh3(data).hexdigest() != digest:
        raise CacheError(f"index {path} is damaged: its hash is not that of its commit line")
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (OSError, pa.ArrowException) as e:
        raise CacheError(f"index {path} is damaged: {e}") from e
    if table.schema.names != index_schema().names:
        raise CacheError(f"index {path} is damaged: its columns are not those of {FORMAT}")
    return table


def committed_hashes(out: Path, ordinals: Sequence[int]) -> dict[int, bytes]:
    """`bytes_hash` of those of the inputs `ordinals` whose files have been read for what is committed."""
    hashes: dict[int, bytes] = {}
    for commit in read_commits(out).values():
        path = out / commit["index"]
        if not path.exists():
            continue
        table = read_index(path, commit["index_xxh3"])
        inputs = table["input"].to_numpy()
        for at in np.flatnonzero(np.isin(inputs, ordinals)).tolist():
            digest = table["bytes_hash"][at].as_py()
            if digest is not None:
                hashes[int(inputs[at])] = digest
    return hashes


class ShardStore:
    """Writes the parts of a cache and knows which are done. One per run, under the writer's lock."""

    def __init__(self, out: Path, plan: CachePlan, log: CommitLog):
        self.out = out
        self.plan = plan
        self.log = log

    def is_done(self, part: Part) -> bool:
        """Whether a part is committed and its files are there, by name and size.

        Raises:
            CacheError: a committed file has another size than its commit line says.
        """
        commit = self.log.commits.get(part.index)
        if commit is None:
            return False
        for name, nbytes in committed_files(commit):
            path = self.out / name
            if not path.exists():
                return False
            if (size := path.stat().st_size) != nbytes:
                raise CacheError(
                    f"{path} is damaged: it has {size} bytes, and {nbytes} were committed: {rebuild_hint(commit)}"
                )
        return True

    def recover(self, part: Part) -> bool:
        """Commit a part whose files are whole but have no commit line: a crash came between, or the log was lost.

        An index alone is removed if its shard should be there: it was published for a shard that never was.

        Raises:
            CacheError: shard and index are there and do not fit each other.
        """
        index = self.out / part.index
        if part.index in self.log.commits or not index.exists():
            return False
        table = read_index(index)
        cached = table["status"].to_pylist().count(OK)
        possible = len(part.inputs) if isinstance(part, Shard) else 0
        if table["input"].to_pylist() != part.inputs.tolist() or cached > possible:
            raise CacheError(f"{index} does not list the inputs of its shard: delete it, and run the command again")
        if cached and isinstance(part, Shard):
            path = self.out / part.name
            if not path.exists():
                index.unlink()
                return False
            file = read_shard_header(path)
            expected = [h for h in table["row_hash"].to_pylist() if h is not None]
            if file.rows != cached or disk_row_hashes(file) != expected:
                raise CacheError(
                    f"{path} does not match its index {index}, and neither is committed: "
                    "delete both, and run the command again"
                )
        self._commit(part, cached)
        return True

    def write_unplanned(self, unplanned: UnplannedInputs, entries: list[IndexEntry]) -> None:
        """Write, publish and commit the index of the inputs without a bucket. Errors as in `write`."""
        index = self._index_file(unplanned, entries)
        index.publish()
        self._commit(unplanned, 0, index)

    def write(self, shard: Shard, entries: list[IndexEntry], pieces: dict[str, list[Tensor]]) -> None:
        """Write, publish and commit one shard.

        Args:
            entries: of the shard's inputs in order, without `shard`, `row` and `row_hash`, which are added.
            pieces: for each tensor of the plan a list of contiguous `[n,C,h,w]` on the CPU: the rows of the entries
                with status "ok", in order.

        Raises:
            DiskFull: no space left; nothing of this shard remains.
            CacheError: a file of that name and other contents is there.
        """
        cached = [entry for entry in entries if entry["status"] == OK]
        names = self.plan.tensors
        hashes = [h for group in zip(*(pieces.get(name, []) for name in names), strict=True) for h in row_hashes(group)]
        for row, (entry, digest) in enumerate(zip(cached, hashes, strict=True)):
            entry["shard"], entry["row"], entry["row_hash"] = shard.name, row, digest
        index = self._index_file(shard, entries)
        try:
            data = PendingFile(self.out / shard.name, self._chunks(shard, len(cached), pieces)) if cached else None
        except BaseException:
            index.discard()
            raise
        try:
            # the index first: a shard without one would be rows that nobody can name
            index.publish()
            if data is not None:
                data.publish()
        except BaseException:
            if data is not None:
                data.discard()
            raise
        self._commit(shard, len(cached), index, data)

    def _index_file(self, part: Part, entries: list[IndexEntry]) -> PendingFile:
        table = require_extra("pyarrow").Table.from_pylist(entries, index_schema())
        return PendingFile(self.out / part.index, [parquet_bytes(table)])

    def _chunks(self, shard: Shard, rows: int, pieces: dict[str, list[Tensor]]) -> Iterator[bytes | memoryview]:
        yield shard_header(self.plan, shard.bucket, rows)
        for name in self.plan.tensors:
            yield from (byte_view(t).data for t in pieces[name])

    def _commit(
        self, part: Part, cached: int, index: PendingFile | None = None, data: PendingFile | None = None
    ) -> None:
        index_bytes, index_xxh3 = self._size_and_digest(part.index, index)
        commit: Commit = {
            "index": part.index,
            "index_bytes": index_bytes,
            "index_xxh3": index_xxh3,
            "inputs": len(part.inputs),
            "rows": cached,
            "shard": None,
            "shard_bytes": 0,
            "shard_xxh3": None,
        }
        if cached and isinstance(part, Shard):
            commit["shard"] = part.name
            commit["shard_bytes"], commit["shard_xxh3"] = self._size_and_digest(part.name, data)
        self.log.append(commit)

    def _size_and_digest(self, name: str, pending: PendingFile | None) -> tuple[int, str]:
        """Of a file of the cache, as it was written or else as it lies on disk."""
        if pending is not None:
            return pending.size, pending.digest
        path = self.out / name
        return path.stat().st_size, hash_file(path)


def rebuild_hint(commit: Commit) -> str:
    """How to make a damaged shard anew."""
    files = " and ".join(name for name in (commit["shard"], commit["index"]) if name)
    return f"delete {files}, and run the cache command again"
