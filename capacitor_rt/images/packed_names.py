"""Many names in little memory: their bytes one behind the other, and where each ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, overload

import numpy as np

from ..extras import require_extra

_BLOCK = 1 << 14
_MIXED = 16
# odd, and without a pattern
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Names(Sequence[bytes]):
    """Byte strings in order, equal to any sequence of the same ones; 8 bytes each beside their own.

    Lists of a million `bytes` take 62 bytes a name of 21, and are pickled one by one.

    Args:
        names: taken one after the other.
    """

    __slots__ = ("_blob", "_ends")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, names: Iterable[bytes] = ()):
        rest = iter(names)
        blobs: list[bytes] = []
        lengths: list[np.ndarray] = []
        while block := list(islice(rest, _BLOCK)):
            blobs.append(b"".join(block))
            lengths.append(np.fromiter(map(len, block), np.int64, len(block)))
        self._blob = b"".join(blobs)
        self._ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))

    @staticmethod
    def of_arrow(column: Any) -> Names:
        """Those of a chunked binary column that has no nulls."""
        names = Names()
        parts = [chunk for chunk in column.chunks if len(chunk)]
        starts, blobs = [np.zeros(1, np.int64)], []
        for part in parts:
            _, offsets, data = part.buffers()
            wide = np.int64 if require_extra("pyarrow").types.is_large_binary(part.type) else np.int32
            ends = np.frombuffer(offsets, wide)[part.offset : part.offset + len(part) + 1].astype(np.int64)
            blobs.append(bytes(memoryview(data)[ends[0] : ends[-1]]) if data is not None else b"")
            starts.append(ends[1:] - ends[0] + starts[-1][-1])
        names._blob, names._ends = b"".join(blobs), np.concatenate(starts)
        return names

    def arrow(self) -> Any:
        """As a `pyarrow.LargeBinaryArray`, which shares their memory."""
        pa = require_extra("pyarrow")
        buffers = [None, pa.py_buffer(self._ends), pa.py_buffer(self._blob)]
        return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self), buffers)

    @property
    def lengths(self) -> np.ndarray:
        """Bytes of each, int64."""
        return np.diff(self._ends)

    def mixed(self) -> np.ndarray:
        """A number that equal names have in common, uint8, of the length and the last 16 bytes; none is frequent."""
        found = np.empty(len(self), np.uint8)
        blob = np.frombuffer(self._blob, np.uint8)
        for first in range(0, len(self), _BLOCK):
            ends = self._ends[first : first + _BLOCK + 1]
            lengths = np.diff(ends)
            keys = lengths.astype(np.uint64)
            for back in range(1, _MIXED + 1):
                there = lengths >= back
                byte = np.zeros(len(keys), np.uint64)
                byte[there] = blob[ends[1:][there] - back]
                keys = keys * _FACTOR ^ byte
            # the first bits depend on all of them
            found[first : first + _BLOCK] = (keys ^ keys >> np.uint64(29)) * _FACTOR >> np.uint64(56)
        return found

    def joined(self) -> bytes:
        """All of them, one behind the other."""
        return self._blob

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> bytes: ...
    @overload
    def __getitem__(self, i: slice) -> list[bytes]: ...
    def __getitem__(self, i: int | slice) -> bytes | list[bytes]:
        if isinstance(i, slice):
            return [self[at] for at in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"name {i} of {len(self)}")
        at = i % len(self)
        return self._blob[self._ends[at] : self._ends[at + 1]]

    def __iter__(self) -> Iterator[bytes]:
        for first in range(0, len(self), _BLOCK):
            ends = self._ends[first : first + _BLOCK + 1].tolist()
            for begin, end in pairwise(ends):
                yield self._blob[begin:end]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return np.array_equal(self._ends, other._ends) and self._blob == other._blob
        if isinstance(other, Sequence) and not isinstance(other, (bytes, str)):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __repr__(self) -> str:
        return f"Names({len(self)} of {len(self._blob)} bytes)"
