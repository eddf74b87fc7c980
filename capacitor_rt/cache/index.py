"""The index of a task: a Parquet table with one row per input, cached or not, and the plan in its metadata."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import CacheError
from ..extras import require_extra
from .parquet_files import parquet_bytes, parse_table
from .plan import FORMAT, CachePlan, Task
from .statuses import DECODED, OK, QUARANTINED

STORED = ("row", "row_hash", "min", "max", "mean", "std")
"""Columns of inputs with latents alone."""

# of the message of an input that could not be cached: none that is written comes near
_MOST_MESSAGE = 1 << 20


def index_schema(columns: Sequence[dict[str, str]] = (), is_update: bool = False) -> Any:
    """Columns of `index/*.parquet`.

    Args:
        columns: those that are kept from the source, as `plan.columns` has them.
        is_update: of an update's, whose rows may lie in another `file` than that of their task.
    """
    pa = require_extra("pyarrow")
    int32, float32, digest = pa.int32(), pa.float32(), pa.binary(16)
    required = [("input", pa.int64()), ("id", pa.string()), ("status", pa.string())]
    optional = [
        ("reason", pa.string()),
        ("message", pa.string()),
        ("bytes_hash", digest),
        ("width", int32),
        ("height", int32),
        ("orientation", int32),
        ("bucket", int32),
        ("resize_height", int32),
        ("resize_width", int32),
        ("crop_top", int32),
        ("crop_left", int32),
        ("row", int32),
        ("row_hash", digest),
        ("min", float32),
        ("max", float32),
        ("mean", float32),
        ("std", float32),
    ]
    if is_update:
        optional.append(("file", pa.string()))
    kinds = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string(), "bool": pa.bool_()}
    kept = [(column["name"], kinds[column["type"]]) for column in columns]
    return pa.schema(
        [pa.field(*f, nullable=False) for f in required] + [pa.field(*f) for f in [*optional, *kept]],
    )


def index_bytes(plan: CachePlan, task: Task, columns: dict[str, Any]) -> memoryview:
    """The file of an index. `columns`: an Arrow array or a list for each column."""
    pa = require_extra("pyarrow")
    schema = index_schema(plan.columns, plan.is_update)
    metadata = {"format": FORMAT, "task": str(task.number), "plan": plan.text().decode()}
    arrays = [_array(columns[field.name], field.type) for field in schema]
    return parquet_bytes(pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata)))


def _array(values: Any, kind: Any) -> Any:
    pa = require_extra("pyarrow")
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return values if isinstance(values, pa.Array) and values.type == kind else pa.array(values, kind)


def parse_index(data: bytes, what: object, plan: CachePlan, task: int) -> Any:
    """The table of an index, checked: what it says is possible under the plan, and agrees with itself.

    Args:
        data: bytes of the file, whose hash has been compared with the one that vouches for it.
        what: the file's name in messages.

    Raises:
        CacheError: it is damaged, or another plan's or task's.
    """
    table = parse_table(data, what, index_schema(plan.columns, plan.is_update), plan.task_inputs)
    metadata = table.schema.metadata or {}
    if metadata.get(b"format") != FORMAT.encode() or metadata.get(b"task") != str(task).encode():
        raise CacheError(f"{what} is damaged: it is not the index of task {task}")
    if metadata.get(b"plan") != plan.text():
        raise CacheError(f"{what} is damaged: it is of another plan than plan.json")
    problem = _problem(table, plan)
    if problem:
        raise CacheError(f"{what} is damaged: {problem}")
    return table


def plan_in_index(data: bytes) -> bytes | None:
    """The bytes of `plan.json` that an index holds, None where there are none."""
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    try:
        return (pq.read_schema(pa.BufferReader(data)).metadata or {}).get(b"plan")
    except (OSError, pa.ArrowException, ValueError, MemoryError):
        return None


def _problem(table: Any, plan: CachePlan) -> str | None:
    pc = require_extra("pyarrow.compute")
    n = table.num_rows
    if any(table[name].null_count for name in ("input", "id", "status")):
        return "a row is not named"
    inputs = table["input"].to_numpy()
    if not n or inputs[0] < 0 or (inputs != inputs[0] + np.arange(n)).any() or inputs[-1] >= plan.count:
        return "its inputs are no slice of the plan's"
    ok = is_ok(table)
    if not (ok | pc.equal(table["status"], QUARANTINED).to_numpy()).all():
        return f"a status is neither {OK} nor {QUARANTINED}"
    for name, wanted in (("reason", ~ok), ("message", ~ok), ("row", ok), ("row_hash", ok)):
        if (table[name].is_valid().to_numpy() != wanted).any():
            return f"{name} and status do not agree"
    if (pc.max(pc.binary_length(table["message"])).as_py() or 0) > _MOST_MESSAGE:
        return f"a message has more than {_MOST_MESSAGE} bytes"
    kept = table.filter(ok)
    if any(kept[name].null_count for name in (*DECODED, *STORED)):
        return "a cached row is not described"
    bucket = kept["bucket"].to_numpy()
    if len(bucket) and (bucket.min() < 0 or bucket.max() >= len(plan.buckets)):
        return "a bucket is not of the plan"
    own, row = is_own(kept), kept["row"].to_numpy()
    if (row[own] != rows_within(bucket[own])).any() or (len(row) and row.min() < 0):
        return "its rows are not numbered in their order"
    if "file" in table.column_names and table.filter(~ok)["file"].null_count < n - len(kept):
        return "file and status do not agree"
    return None


def is_ok(table: Any) -> np.ndarray:
    """Which rows have latents, bool `[N]`."""
    pc = require_extra("pyarrow.compute")
    return pc.equal(table["status"], OK).to_numpy()


def is_own(table: Any) -> np.ndarray:
    """Which rows have latents in the file of their own task, bool `[N]`."""
    ok = is_ok(table)
    return ok & table["file"].is_null().to_numpy() if "file" in table.column_names else ok


def digests(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """The halves of hashes of 128 bits as uint64 `[N,2]`, and which of them are there, bool `[N]`."""
    pa = require_extra("pyarrow")
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    if not len(array):
        return np.zeros((0, 2), np.uint64), valid
    data = np.frombuffer(array.buffers()[1], np.uint64).reshape(-1, 2)[array.offset : array.offset + len(array)]
    return data, valid


def rows_within(bucket: np.ndarray) -> np.ndarray:
    """How many earlier ones are of the same bucket, int32 `[N]`: the number of the row in its bucket's tensors."""
    order = np.argsort(bucket, kind="stable")
    ranked = bucket[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[starts, len(ranked)])
    rows = np.empty(len(bucket), np.int32)
    rows[order] = np.arange(len(ranked)) - np.repeat(starts, counts)
    return rows


def bucket_counts(bucket: np.ndarray) -> dict[int, int]:
    """Rows of each bucket that has any, in the order of the buckets."""
    numbers, counts = np.unique(bucket, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def cached_counts(table: Any) -> dict[int, int]:
    """Rows of each bucket in the file of a task, by its index."""
    return bucket_counts(table["bucket"].to_numpy(zero_copy_only=False)[is_own(table)].astype(np.int64))


def cached_rows(table: Any) -> int:
    """Number of rows with latents, wherever they lie."""
    return int(is_ok(table).sum())
