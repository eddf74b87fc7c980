"""The latents of a task: a safetensors file with a tensor per bucket and kind, data on 4 KiB boundaries.

The header follows from the plan, the number of rows of each bucket, and the hash of the index: a reader that knows
    these compares bytes and parses nothing.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError
from .folder import CacheFolder
from .hashing import byte_view, xxh3
from .plan import FORMAT, CachePlan
from .quantization import bad_numbers

ALIGN = 4096
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8"}
PADDING = "padding"
# of one system call; the kernel takes 1024
_MOST_PIECES = 512
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Placed:
    """A tensor of a file: `[rows, *shape]` of type `dtype`, whose data begins at byte `begin` of the file."""

    bucket: int
    part: str
    dtype: str
    rows: int
    shape: tuple[int, ...]
    begin: int
    row_nbytes: int

    @property
    def end(self) -> int:
        return self.begin + self.rows * self.row_nbytes


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a task's file.

    Attributes:
        header: the bytes before the data, a multiple of 4 KiB.
        tensors: by (number of the bucket, name of the part), in the order of their data.
        nbytes: size of the file.
    """

    header: bytes
    tensors: dict[tuple[int, str], Placed]
    nbytes: int

    def gaps(self) -> Iterator[tuple[Placed, int]]:
        """The tensors in order, each with the bytes of padding behind it."""
        placed = list(self.tensors.values())
        for tensor, stop in zip(placed, [*(t.begin for t in placed[1:]), self.nbytes], strict=False):
            yield tensor, stop - tensor.end


def layout(plan: CachePlan, task: int, counts: dict[int, int], index_xxh3: str, plan_id: str | None = None) -> Layout:
    """The layout of a task's file.

    Args:
        counts: rows of each bucket that has any, by its number.
        index_xxh3: hash of the task's index.
        plan_id: identity of the plan that the file was written for; None: `plan`'s.
    """
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "plan": plan_id or plan.id,
            "task": str(task),
            "index_xxh3": index_xxh3,
            "latent_space": plan.fields["model"]["latent_space"],
        }
    }
    places: list[Placed] = []
    at = 0
    order = [(number, part) for number in sorted(counts) for part in plan.parts]
    for number, part in order:
        bucket, rows = plan.buckets[number], counts[number]
        shape, row_nbytes = part.shape(plan.row_shape(bucket)), part.nbytes(plan.row_shape(bucket))
        stop = at + rows * row_nbytes
        entries[f"{part.name}/{bucket}"] = {
            "dtype": CODES[part.dtype],
            "shape": [rows, *shape],
            "data_offsets": [at, stop],
        }
        places.append(Placed(number, part.name, part.dtype, rows, shape, at, row_nbytes))
        at = stop
        gap = -at % ALIGN
        if gap and (number, part) != order[-1]:
            # a hole would be no safetensors file
            entries[f"{PADDING}/{len(places) - 1}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            at += gap
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    header = len(text).to_bytes(8, "little") + text
    tensors = {(p.bucket, p.part): replace(p, begin=len(header) + p.begin) for p in places}
    return Layout(header, tensors, len(header) + at)


def file_chunks(placed: Layout, pieces: Mapping[tuple[int, str], Sequence[Tensor]]) -> Iterator[bytes | memoryview]:
    """The bytes of a task's file. `pieces`: rows of each part in order, contiguous `[n,...]` on the CPU."""
    yield placed.header
    for tensor, gap in placed.gaps():
        yield from (byte_view(piece).data for piece in pieces[tensor.bucket, tensor.part])
        if gap:
            yield bytes(gap)


def row_hashes(tensors: Sequence[Tensor]) -> list[bytes]:
    """XXH3-128 of each row: its tensors' bytes one after the other. `tensors`: contiguous `[N,...]` on the CPU."""
    digests = [xxh3() for _ in range(len(tensors[0]))]
    for t in tensors:
        for digest, row in zip(digests, byte_view(t).reshape(len(t), -1), strict=True):
            digest.update(row.data)
    return [d.digest() for d in digests]


def read_rows(fd: int, tensor: Placed, start: int, count: int, what: object) -> Tensor:
    """Rows `start` to `start + count` of a tensor, `[count,...]`, in memory of their own. As `read_into`."""
    rows = torch.empty(count, *tensor.shape, dtype=getattr(torch, tensor.dtype))
    read_into(fd, tensor, start, [byte_view(rows).data], what)
    return rows


def read_into(fd: int, tensor: Placed, start: int, into: Sequence[memoryview], what: object) -> None:
    """Read a tensor from row `start` on into one piece of memory after the other.

    Plain reads, not a memory map: safe from any number of threads, quick on network file systems, and a file cut
    short is an error rather than a signal.

    Raises:
        CacheError: the file cannot be read, or ends before.
    """
    at, left = tensor.begin + start * tensor.row_nbytes, deque(into)
    rows = sum(piece.nbytes for piece in into) // tensor.row_nbytes
    while left:
        try:
            n = os.preadv(fd, list(islice(left, _MOST_PIECES)), at)
        except OSError as e:
            raise CacheError(f"{what} cannot be read: {e.strerror}") from e
        if n == 0:
            raise CacheError(f"{what} is damaged: it ends before row {start + rows - 1} of {tensor.part}")
        at += n
        while left and n >= left[0].nbytes:
            n -= left.popleft().nbytes
        if n:
            left[0] = left[0][n:]


def has_header(fd: int, placed: Layout) -> bool:
    """Whether a file begins as the layout says and is as long."""
    if os.fstat(fd).st_size != placed.nbytes:
        return False
    return os.pread(fd, len(placed.header), 0) == placed.header


class Hashes(NamedTuple):
    """XXH3-128 of a file of latents as it lies on disk: of all its bytes, in hex, and of each row.

    `rows`: by the number of their bucket, uint64 `[N,2]`. `is_padded`: whether all that lies between tensors is zero.
    """

    file: str
    rows: dict[int, np.ndarray]
    is_padded: bool


def file_hashes(folder: CacheFolder, name: str, placed: Layout) -> Hashes:
    """What a file holds, read once from front to back. It is as long as its layout says.

    Raises:
        FileNotFoundError; CacheError: it cannot be read, or is cut short.
    """
    whole, what, is_padded = xxh3(), folder.path / name, True
    rows: dict[int, list[Any]] = {}
    with folder.open(name) as file:
        fd = file.fileno()
        whole.update(_read(fd, 0, len(placed.header), what))
        for tensor, gap in placed.gaps():
            digests = rows.setdefault(tensor.bucket, [xxh3() for _ in range(tensor.rows)])
            most = max(1, _BLOCK // tensor.row_nbytes)
            buffer = memoryview(bytearray(min(most, tensor.rows) * tensor.row_nbytes))
            for start in range(0, tensor.rows, most):
                chosen = digests[start : start + most]
                data = buffer[: len(chosen) * tensor.row_nbytes]
                read_into(fd, tensor, start, [data], what)
                whole.update(data)
                for at, digest in enumerate(chosen):
                    digest.update(data[at * tensor.row_nbytes : (at + 1) * tensor.row_nbytes])
            padding = _read(fd, tensor.end, gap, what)
            is_padded &= padding == bytes(gap)
            whole.update(padding)
    found = {bucket: b"".join(d.digest() for d in digests) for bucket, digests in rows.items()}
    halves = {bucket: np.frombuffer(data, np.uint64).reshape(-1, 2) for bucket, data in found.items()}
    return Hashes(whole.hexdigest(), halves, is_padded)


def numbers_problem(folder: CacheFolder, name: str, plan: CachePlan, placed: Layout) -> str | None:
    """What is wrong with the scales and offsets of a file, which no hash of theirs can tell."""
    names = {part.name for part in plan.parts if part.per_channel}
    with folder.open(name) as file:
        for (number, part), tensor in placed.tensors.items():
            if part in names:
                numbers = read_rows(file.fileno(), tensor, 0, tensor.rows, folder.path / name)
                if why := bad_numbers({part: numbers}):
                    return f"in {plan.buckets[number]}, {why}"
    return None


def _read(fd: int, begin: int, size: int, what: object) -> bytes:
    try:
        return os.pread(fd, size, begin)
    except OSError as e:
        raise CacheError(f"{what} cannot be read: {e.strerror}") from e


def index_hash_in_header(fd: int) -> str | None:
    """The hash of the index that a file's header names; None where the header is none.

    For a task whose commit line was lost. The header itself is then compared with the one that follows from that index.
    """
    try:
        digest = (read_header(fd) or {})["__metadata__"]["index_xxh3"]
    except (KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) else None


def read_header(fd: int) -> dict[str, Any] | None:
    """The JSON that a file begins with; None where there is none. Nothing of it is checked."""
    from ..strict_json import StrictJSONError, parse

    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 0 < length <= 1 << 27 or length > os.fstat(fd).st_size - 8:
        return None
    try:
        header = parse(os.pread(fd, length, 8).rstrip(b" "))
    except StrictJSONError:
        return None
    return header if isinstance(header, dict) else None
