"""The bytes of MDS shards (MosaicML streaming 0.13, version 2 of its index), written and read.

A shard is `uint32 n`, `uint32 offsets[n + 1]`, the JSON of its columns, then the samples; a sample is the uint32 sizes
of its columns without a fixed size, then the columns in the order of their names. It is written here because
streaming's writer can neither resume nor be installed without the clients of five clouds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .base import Record


def shard_config(columns: dict[str, str], size_limit: int) -> dict[str, Any]:
    """What a shard says of itself. `columns`: encodings by name, in the order of the names."""
    return {
        "column_encodings": list(columns.values()),
        "column_names": list(columns),
        "column_sizes": [fixed_size(encoding) for encoding in columns.values()],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": size_limit,
        "version": 2,
    }


def shard_info(config: dict[str, Any], basename: str, nbytes: int, samples: int) -> dict[str, Any]:
    """The entry of a shard in index.json."""
    raw = {"basename": basename, "bytes": nbytes, "hashes": {}}
    return {**config, "raw_data": raw, "samples": samples, "zip_data": None}


def index_bytes(shards: Sequence[dict[str, Any]]) -> bytes:
    """index.json."""
    return json.dumps({"shards": list(shards), "version": 2}, sort_keys=True).encode()


def shard_head(config: dict[str, Any], sizes: Sequence[int]) -> bytes:
    """A shard up to its samples, of `sizes` bytes each."""
    text = json.dumps(config, sort_keys=True).encode()
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    offsets += 4 + 4 * len(offsets) + len(text)
    return np.uint32(len(sizes)).tobytes() + offsets.astype("<u4").tobytes() + text


def encode_sample(record: Record, columns: dict[str, str]) -> bytes:
    """A sample as bytes: sizes of the columns without a fixed one, then all columns."""
    sizes, body = [], []
    for name, encoding in columns.items():
        value = record[name]
        if isinstance(value, Tensor):
            data = value.numpy().tobytes()
        elif isinstance(value, str):
            data = value.encode()
        elif isinstance(value, int):
            data = np.int64(value).tobytes()
        elif isinstance(value, float):
            data = np.float64(value).tobytes()
        else:
            data = value
        if fixed_size(encoding) is None:
            sizes.append(len(data))
        body.append(data)
    return np.array(sizes, np.uint32).tobytes() + b"".join(body)


def read_shard(path: Path, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The samples of a shard, read without streaming."""
    with open(path, "rb") as f:
        (count,) = np.frombuffer(f.read(4), "<u4")
        offsets = np.frombuffer(f.read(4 * (int(count) + 1)), "<u4").tolist()
        for start, stop in pairwise(offsets):
            f.seek(start)
            yield _decode_sample(f.read(stop - start), columns)


def _decode_sample(data: bytes, columns: dict[str, str]) -> dict[str, Any]:
    free = [name for name, encoding in columns.items() if fixed_size(encoding) is None]
    sizes = dict(zip(free, np.frombuffer(data[: 4 * len(free)], "<u4").tolist(), strict=True))
    at, sample = 4 * len(free), {}
    for name, encoding in columns.items():
        size = fixed_size(encoding)
        size = sizes[name] if size is None else size
        sample[name] = _decode(data[at : at + size], encoding)
        at += size
    return sample


def _decode(data: bytes, encoding: str) -> Any:
    if encoding == "str":
        return data.decode()
    if encoding == "int":
        return int(np.frombuffer(data, "<i8")[0])
    if encoding == "float64":
        return float(np.frombuffer(data, "<f8")[0])
    if encoding == "bytes":
        return data
    _, dtype, shape = encoding.split(":")
    return np.frombuffer(data, dtype).reshape(tuple(map(int, shape.split(","))))


def fixed_size(encoding: str) -> int | None:
    """Bytes of a column, None where each row has its own."""
    if encoding in ("int", "float64"):
        return 8
    if not encoding.startswith("ndarray"):
        return None
    _, dtype, shape = encoding.split(":")
    return int(np.prod(list(map(int, shape.split(","))))) * np.dtype(dtype).itemsize
