"""Rows of a cache out of its files of latents, a batch at a time and straight into the memory of the batch."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from io import FileIO
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..errors import CacheError
from .folder import CacheFolder
from .hashing import byte_view
from .latent_files import Layout, Placed, has_header, read_into
from .shared_batches import SharedBatch, SharedBatches, is_shared

OPEN_FILES = 128
"""Files of latents that one process keeps open at a time."""
LAYOUTS = 4096
"""Files whose header, once compared, is not compared again while they are the same files."""

Place = tuple[int, int, int]
"""File, number of the bucket, and row in the file's tensors of that bucket."""
_Identity = tuple[int, int, int, int, int]


class Batch(NamedTuple):
    """Rows of one bucket.

    Attributes:
        number: of the bucket in the plan.
        positions: of the rows among those that were asked for.
        tensors: by the name of the part, `[B,...]`, row after row of `positions`.
    """

    number: int
    positions: list[int]
    tensors: dict[str, Tensor]


class LatentReader:
    """The files of latents of a cache, of which a few are open. Threads may share it.

    Args:
        folder: opened when it is needed, in each process.
        parts: names of what is stored of a row, in order.
        name: of a file by its number, relative to the folder.
        layout: of a file by its number, as it follows from its index.
        shared: where a data loader's workers leave batches.
    """

    def __init__(
        self,
        folder: Callable[[], CacheFolder],
        parts: Sequence[str],
        name: Callable[[int], str],
        layout: Callable[[int], Layout],
        shared: SharedBatches | None = None,
    ):
        self.folder = folder
        self.parts = parts
        self.name = name
        self.layout = layout
        self.shared = shared
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        self._known: OrderedDict[int, tuple[_Identity, dict[tuple[int, str], Placed]]] = OrderedDict()
        self._lock = threading.Lock()

    def batches(self, places: Sequence[Place]) -> list[Batch]:
        """The rows at `places`, those of each bucket in memory of their own; runs of a file are read at once.

        Raises:
            CacheError: a file is missing, damaged or cut short, or there is no memory for the rows.
        """
        by_bucket: dict[int, list[int]] = {}
        for position, (_, number, _) in enumerate(places):
            by_bucket.setdefault(number, []).append(position)
        return [self._batch(number, positions, places) for number, positions in by_bucket.items()]

    def placed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What was computed of a batch, as it is, but in a data loader's worker where its batches lie."""
        if get_worker_info() is None or self.shared is None:
            return tensors
        own = {kind: t for kind, t in tensors.items() if not is_shared(t)}
        return tensors | {kind: self._empty(tuple(t.shape), t.dtype).copy_(t) for kind, t in own.items()}

    def _batch(self, number: int, positions: list[int], places: Sequence[Place]) -> Batch:
        # what has been opened stays open until it is read, whatever others open meanwhile
        opened = {file: self._open(file) for file in dict.fromkeys(places[p][0] for p in positions)}
        first = [self._placed(opened, places[positions[0]], part) for part in self.parts]
        tensors = {p.part: self._empty((len(positions), *p.shape), getattr(torch, p.dtype)) for p in first}
        rows = {part: byte_view(t).reshape(len(positions), -1) for part, t in tensors.items()}
        order = sorted(range(len(positions)), key=lambda at: places[positions[at]])
        start = 0
        while start < len(order):
            place = file, _, row = places[positions[order[start]]]
            stop = start + 1
            while stop < len(order) and places[positions[order[stop]]] == (file, number, row + stop - start):
                stop += 1
            what = self.folder().path / self.name(file)
            for part in self.parts:
                placed = self._placed(opened, place, part)
                if row + stop - start > placed.rows:
                    raise CacheError(f"{what} has {placed.rows} rows of its bucket, and its index names row {row}")
                into = [rows[part][at].data for at in order[start:stop]]
                read_into(opened[file][0].fileno(), placed, row, into, what)
            start = stop
        return Batch(number, positions, tensors)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a batch; that of a data loader's worker is shared, as its batches go to another process."""
        nbytes, in_worker = math.prod(shape) * dtype.itemsize, get_worker_info() is not None
        try:
            if not in_worker:
                return torch.empty(shape, dtype=dtype)
            tensor = self.shared.empty(shape, dtype) if self.shared is not None else None
            if tensor is not None:
                return tensor
            storage = torch.UntypedStorage._new_shared(nbytes)
        except RuntimeError as e:
            # torch has no kind of its own for it
            kind = "shared memory" if in_worker else "memory"
            also = ", or give the container more of it (--shm-size)" if in_worker else ""
            raise CacheError(
                f"no {kind} for a batch of {shape[0]} rows, {nbytes / 2**20:,.0f} MiB: take smaller batches{also}"
            ) from e
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape, torch.empty(shape, device="meta").stride())

    def _placed(self, opened: dict[int, tuple[FileIO, Any]], place: Place, part: str) -> Placed:
        placed = opened[place[0]][1].get((place[1], part))
        if placed is None:
            what = self.folder().path / self.name(place[0])
            raise CacheError(f"{what} has no {part} of the bucket that its index names")
        return placed

    def _open(self, file: int) -> tuple[FileIO, dict[tuple[int, str], Placed]]:
        with self._lock:
            if file in self._files:
                self._files.move_to_end(file)
                return self._files[file], self._known[file][1]
        name = self.name(file)
        folder = self.folder()
        try:
            # closed when the last reader lets go of it
            opened = folder.open(name)
        except FileNotFoundError:
            raise CacheError(f"{folder.path / name} cannot be read: No such file or directory") from None
        info = os.fstat(opened.fileno())
        identity = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        with self._lock:
            known = self._known.get(file)
        if known is None or known[0] != identity:
            layout = self.layout(file)
            if not has_header(opened.fileno(), layout):
                opened.close()
                raise CacheError(f"{folder.path / name} is damaged: its header or its size is not that of its index")
            known = identity, layout.tensors
        with self._lock:
            self._known[file] = known
            self._known.move_to_end(file)
            opened = self._files.setdefault(file, opened)
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
            while len(self._known) > max(LAYOUTS, OPEN_FILES):
                self._known.popitem(last=False)
        return opened, known[1]


class BatchRow(dict[str, Any]):
    """A row, of which `collate_rows` knows whether it still lies in its batch."""

    __slots__ = ("at", "batch")
    batch: dict[str, Tensor]
    at: int

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def collate_rows(rows: Sequence[BatchRow], *, collate_fn_map: Any = None) -> dict[str, Any]:
    """As torch's own `default_collate`; tensors that lie in one batch, in its order, are not copied."""
    from torch.utils.data._utils.collate import collate

    batch = rows[0].batch
    whole = all(row.batch is batch and row.at == at for at, row in enumerate(rows))
    found: dict[str, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        tensor = batch.get(key)
        if whole and tensor is not None and len(tensor) == len(rows) and _are_rows(values, tensor):
            found[key] = tensor
        else:
            found[key] = collate(values, collate_fn_map=collate_fn_map)
    return SharedBatch(found) if any(map(is_shared, found.values())) else found


def _are_rows(values: Sequence[Any], tensor: Tensor) -> bool:
    """Whether the values are the rows of a tensor and have not been put in the place of them."""
    step, begin = tensor.stride(0) * tensor.element_size(), tensor.data_ptr()
    return all(
        isinstance(v, Tensor)
        and v.data_ptr() == begin + at * step
        and v.shape == tensor.shape[1:]
        and v.dtype == tensor.dtype
        and v.stride() == tensor.stride()[1:]
        for at, v in enumerate(values)
    )


def _register() -> None:
    """Have data loaders collate rows so."""
    try:
        from torch.utils.data._utils.collate import default_collate_fn_map
    except ImportError:
        return
    default_collate_fn_map[BatchRow] = collate_rows


_register()
