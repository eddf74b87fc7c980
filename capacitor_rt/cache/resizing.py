"""Decoded pictures from the ring to a batch on the device, as they are or resized there: the bits are the same.

Pixels that the workers have resized go up from the ring into their places in the batch that is being filled. Where the
device resizes, the records of a chunk go up in one copy, those of several views together, and the rows of a bucket are
resized by one call into the batch. All of it runs on a stream of its own, so that the bus works while the device
encodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from capacitor_kernels import resize
from capacitor_kernels.launch import INTERPRETED
from capacitor_kernels.pictures import UNIT, Field, between_bytes

from ..errors import InputError
from .decoding import DecodedChunk

RESIZES = ("auto", "cpu", "gpu")
"""Where images are resized; "auto" is the CPU, until a GPU has been measured."""
RECORD_BYTES = 4 << 20
"""Set aside for a decoded picture: one of 1.3 megapixels, and those of a chunk share. What finds no room is resized by
its worker."""
# chunks whose copy may still be under way, and whose place in the ring is taken
_MOST_COPYING = 2


def by_device(resize: str, cc: int | None, decode: str = "exact") -> bool:
    """Whether a run with this choice resizes on the device.

    Args:
        cc: compute capability of the GPU, None where the kernels cannot run.
        decode: how images are decoded: what "gpu" decodes is resized there.

    Raises:
        InputError: no such choice, or no such device.
    """
    if resize not in RESIZES:
        raise InputError(f"resize {resize!r} is unknown: use one of {', '.join(RESIZES)}")
    if decode == "gpu" and resize == "cpu":
        raise InputError("decode gpu resizes on the GPU, and resize is cpu: leave one of the two out")
    if decode == "gpu" and cc is None and not INTERPRETED:
        raise InputError(
            "decode gpu needs an NVIDIA GPU that the kernels run on: use decode exact (other pixels, so another cache)"
        )
    if resize == "gpu" and cc is None and not INTERPRETED:
        raise InputError(
            "resize gpu needs an NVIDIA GPU that the kernels run on: use resize cpu, the bits are the same"
        )
    return "gpu" in (resize, decode)


class Uploader:
    """Copies the pixels of one chunk after another."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copying: deque[tuple[torch.cuda.Event, DecodedChunk]] = deque()

    def buffer(self, rows: int, height: int, width: int) -> Tensor:
        """uint8 `[rows,height,width,3]` on the device."""
        with self._on_stream():
            # of this stream: what was freed on another may still be in use there
            return torch.empty(rows, height, width, 3, dtype=torch.uint8, device=self.device)

    def upload(self, pixels: np.ndarray, batch: Tensor, first: int) -> None:
        """Begin to copy uint8 `[N,H,W,3]` of a chunk that is then held into `batch[first:first + N]`."""
        with self._on_stream():
            batch[first : first + len(pixels)].copy_(torch.from_numpy(pixels), non_blocking=True)

    def hold(self, chunk: DecodedChunk) -> None:
        """Hold a chunk until all that was begun is there, or until `finish`."""
        if self._stream is None:
            return
        with self._on_stream():
            copied = torch.cuda.Event()
            copied.record()
        chunk.hold()
        self._copying.append((copied, chunk))
        self._release(_MOST_COPYING)

    def join(self, batch: Tensor) -> None:
        """Have the current stream wait for what was put into a batch, to use it."""
        if self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._stream)
            batch.record_stream(stream)

    def finish(self) -> None:
        """Release all chunks."""
        self._release(0)

    def _release(self, most: int) -> None:
        while self._copying and (len(self._copying) > most or self._copying[0][0].query()):
            copied, chunk = self._copying.popleft()
            copied.synchronize()
            chunk.release()

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class Resizer(Uploader):
    """Resizes the pictures of one chunk after another."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._records = torch.empty(0, dtype=torch.uint8)
        self._host = self._records

    def ahead(self, chunks: Iterable[DecodedChunk]) -> Iterator[DecodedChunk]:
        """The chunks as they may be taken, in order."""
        yield from chunks

    def take(self, chunk: DecodedChunk) -> None:
        """Begin to copy a chunk's records up; it is held until they are there, or until `finish`."""
        begins, pixels = chunk.records()
        self._host = torch.from_numpy(pixels[: end_of(begins, pixels)])
        if self._stream is None:
            self._records = self._host.clone()
        else:
            with self._on_stream():
                self._records = self._host.to(self.device, non_blocking=True)
            self.hold(chunk)

    def put(self, offsets: np.ndarray, batch: Tensor, first: int) -> None:
        """Resize pictures of the chunk, whose records begin there, into `batch[first:first + len(offsets)]`."""
        table = rows_of(self._host.numpy(), offsets)
        table[:, Field.SOURCE] += (offsets // UNIT).astype(np.int32)
        for field in (Field.WEIGHTS_A, Field.WEIGHTS_B):
            table[:, field] += (offsets // 4).astype(np.int32)
        table[:, Field.IMAGE] = np.arange(first, first + len(offsets))
        self._resize(self._records, table, batch)

    def _resize(self, records: Tensor, table: np.ndarray, batch: Tensor) -> None:
        """Resize the pictures of a table whose places are those in `records`."""
        sizes = torch.from_numpy(table)
        between = between_bytes(sizes)
        sizes[:, Field.BETWEEN] = ((between.cumsum(0) - between) // UNIT).int()
        with self._on_stream():
            images = (sizes.pin_memory() if self._stream else sizes).to(self.device, non_blocking=True)
            workspace = torch.empty(int(between.sum()), dtype=torch.uint8, device=self.device)
            resize(records, records.view(torch.int32), images, workspace, batch, sizes=sizes)


def rows_of(records: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The rows of records that begin there, int32 `[N,FIELDS]`."""
    return records.view(np.int32)[(offsets // 4)[:, None] + np.arange(len(Field))]


def end_of(offsets: np.ndarray, records: np.ndarray) -> int:
    """Where the last of the records that begin there ends: each reads its table and then its pixels."""
    if not len(offsets):
        return 0
    t = rows_of(records[: len(records) // 4 * 4], offsets).astype(np.int64).T
    reach = (t[Field.LENGTH_A] - 1) * t[Field.STEP_A] + (t[Field.LENGTH_B] - 1) * t[Field.STEP_B]
    end = int((offsets + UNIT * t[Field.SOURCE] + t[Field.ORIGIN] + reach).max()) + 3
    return -(-end // UNIT) * UNIT
