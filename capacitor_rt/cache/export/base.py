"""What a format is: records out of rows, files out of pieces, and the way back."""

from __future__ import annotations

import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...images.names import id_to_relative
from .files import OutFile, tensor_bytes
from .pieces import Piece, split
from .request import FLUX2, ExportRequest
from .rows import Rows

Record: TypeAlias = dict[str, Any]
"""What one row is in a format: tensors, numbers and text by their names there."""

CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Dtypes by their names in safetensors."""
ROW_FILES = 1024
"""Rows of a piece where each row is a file."""


class Format(ABC):
    """One format over the rows of one cache. The constructor refuses what the reader would not take.

    Attributes:
        reader: name and version of the library that reads pieces back.
        conversion: what becomes of the cached values beside a change of dtype, in words.
        rounding: largest difference that the dtype makes to a cached value so far.
    """

    reader = "this package"
    conversion: str | None = None

    def __init__(self, rows: Rows):
        self.rows = rows
        self.rounding = 0.0
        if rows.request.space == FLUX2:
            self.conversion = "converted to FLUX.2's space, approximately"
        elif rows.request.scale != 1.0:
            self.conversion = f"multiplied by {rows.request.scale:g}"
        self.check()

    @property
    def request(self) -> ExportRequest:
        return self.rows.request

    def check(self) -> None:
        """Refuse, by InputError, what the reader would not take. Nothing has been written yet."""
        return

    @cached_property
    def pieces(self) -> Sequence[Piece]:
        """Every piece in order; a function of cache and request."""
        return list(self.plan())

    @abstractmethod
    def plan(self) -> Iterator[Piece]:
        """See `pieces`."""

    def names(self, piece: Piece) -> list[str]:
        """The files of a piece, relative to the export."""
        return [piece.name]

    @abstractmethod
    def record(self, i: int) -> Record:
        """What row `i` is, as it is written and as it must be read back."""

    @abstractmethod
    def files(self, piece: Piece) -> Iterator[OutFile]:
        """The files of a piece."""

    @abstractmethod
    def read(self, out: Path, piece: Piece) -> Iterator[Record]:
        """The records of a written piece as the reader sees them, in order."""

    def last_files(self, out: Path) -> Iterator[OutFile]:
        """Files of the whole, written after every piece: indices, statistics."""
        return iter(())

    def finish(self, out: Path) -> None:
        """Run the reader's own preparation, where it has one and is installed. Every file is there."""
        return

    def advice(self, out: Path) -> list[str]:
        """What to tell the trainer, line by line."""
        return []

    def cast(self, tensors: dict[str, Tensor], name: str, i: int) -> Tensor:
        """A tensor of row `i` in the dtype of the export; keeps account of the rounding of what was cached."""
        out, difference = self.rows.cast(tensors[name], i)
        if name.startswith("latents"):
            self.rounding = max(self.rounding, difference)
        return out

    def chunk(self, tensor: Tensor) -> memoryview:
        """Bytes of a contiguous tensor."""
        return tensor_bytes(tensor).data


class RowFiles(Format):
    """A format with a file per row, whose path is `row_name`."""

    def plan(self) -> Iterator[Piece]:
        for number, rows in enumerate(split(np.arange(len(self.rows)), ROW_FILES)):
            yield Piece(number, rows)

    def names(self, piece: Piece) -> list[str]:
        return [self.row_name(i) for i in piece.rows.tolist()]

    def files(self, piece: Piece) -> Iterator[OutFile]:
        for i in piece.rows.tolist():
            yield OutFile(self.row_name(i), [self.encode(self.record(i))])

    def read(self, out: Path, piece: Piece) -> Iterator[Record]:
        for i in piece.rows.tolist():
            yield self.decode(out / self.row_name(i))

    @abstractmethod
    def row_name(self, i: int) -> str:
        """Path of row `i`, relative to the export."""

    @abstractmethod
    def encode(self, record: Record) -> bytes:
        """A record as the bytes of its file."""

    @abstractmethod
    def decode(self, path: Path) -> Record:
        """The record in a file."""

    def check_names(self, way_out: str) -> None:
        """Refuse two rows of one name, and names that no file system takes."""
        seen: dict[str, int] = {}
        for i in range(len(self.rows)):
            name = self.row_name(i)
            other = seen.setdefault(name, i)
            if other != i:
                raise InputError(
                    f"{self.rows.ids[other]!r} and {self.rows.ids[i]!r} would both be written to {name}: {way_out}"
                )


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file whose bytes depend on its contents alone: the library's own order of metadata does not."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data, at = [], 0
    for name, tensor in tensors.items():
        raw = tensor_bytes(tensor).tobytes()
        code = CODES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data)


def torch_bytes(value: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def relative_path(id: str) -> PurePosixPath:
    """The path of an id, for a file of an export.

    Raises:
        InputError: it leads out of the folder, or cannot be a file's name.
    """
    try:
        return id_to_relative(id)
    except InputError as e:
        raise InputError(f"{e}: use mds or wds, which number their rows") from None


def same(a: Any, b: Any) -> bool:
    """Equality of records' values, of tensors to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(tensor_bytes(a), tensor_bytes(b)))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or (type(a) is type(b) and a == b)


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor of the same dtype with memory of its own."""
    return torch.from_numpy(np.array(array))
