"""A task under way: what is known of its inputs so far, and at its end all that is written of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..extras import require_extra
from .decoding.work import chunk_schema
from .encoder import Encoded
from .failures import NAN_LATENT
from .plan import CachePlan, Task
from .reuse import UNKNOWN, Reuse
from .sources import Source
from .statuses import DECODED, KNOWN, QUARANTINED
from .store import SharedRows, TaskData

NAMES = ("input", "status", "reason", "message", *DECODED)
STATISTICS = ("min", "max", "mean", "std")
NOT_FINITE = "a latent is not finite in the stored dtype: try another compute or storage dtype"


@dataclass
class Waiting:
    """A batch that is being filled: pixels `[batch,H,W,3]`, and the positions of its `count` images in the task.

    `is_own`: whether the pixels lie in a buffer of the encoder's, to be given back.
    """

    pixels: Tensor
    positions: np.ndarray
    count: int = 0
    is_own: bool = True


class OpenTask:
    """A task under way.

    Attributes:
        refs: of an update, the row of an earlier generation that each input is, int64, `UNKNOWN` for the others.
    """

    def __init__(self, task: Task, plan: CachePlan, reuse: Reuse | None = None):
        self.task = task
        self.plan = plan
        self.reuse = reuse
        self.refs = (
            np.full(len(task), UNKNOWN, np.int64) if reuse is None else reuse.refs[task.first : task.stop].copy()
        )
        self.chunks: list[Any] = []
        self.waiting: dict[int, Waiting] = {}
        self.status = np.full(len(task), False)
        self.bucket = np.full(len(task), -1, np.int32)
        self.statistics = np.zeros((len(task), 4), np.float32)
        self.overflowed: list[int] = []
        self.pieces: dict[tuple[int, str], list[Tensor]] = {}

    def add(self, bucket: int, at: np.ndarray, encoded: Encoded) -> None:
        """Add an encoded batch, of images at these positions; rows that are not finite are left out."""
        finite = encoded.finite.numpy()
        self.status[at] = finite
        self.bucket[at] = bucket
        self.statistics[at] = encoded.stats.numpy()
        are_finite = bool(finite.all())
        if not are_finite:
            self.overflowed += at[~finite].tolist()
            if not finite.any():
                return
        for name, t in encoded.tensors.items():
            self.pieces.setdefault((bucket, name), []).append(t if are_finite else t[encoded.finite])

    def data(self, source: Source) -> TaskData:
        """All that is written of the task, the columns of the source included."""
        pa, pc = require_extra("pyarrow"), require_extra("pyarrow.compute")
        table = pa.Table.from_batches(self.chunks, chunk_schema())
        reused = self._reused()
        if reused is not None:
            table = self._merged(table.filter(pc.not_equal(table["status"], KNOWN)), reused)
        columns: dict[str, Any] = {name: table[name] for name in NAMES}
        for name, value in (("status", QUARANTINED), ("reason", NAN_LATENT), ("message", NOT_FINITE)):
            if self.overflowed:
                values = columns[name].to_pylist()
                for at in self.overflowed:
                    values[at] = value
                columns[name] = values
        shared = None if reused is None else self._share(reused)
        has_row = self.status if shared is None else self.status | shared.is_here
        for i, name in enumerate(STATISTICS):
            columns[name] = pa.array(self.statistics[:, i], pa.float32(), mask=~has_row)
        listing = source.listing
        columns["id"] = [listing.id(i) for i in range(self.task.first, self.task.stop)]
        columns |= source.columns.read(self.task.first, self.task.stop)
        cached = np.flatnonzero(self.status)
        return TaskData(columns, self.bucket[cached], cached, self.pieces, shared)

    def _reused(self) -> Any:
        """The rows of earlier generations, as an Arrow table in the order of the inputs; None if there are none."""
        chosen = self.refs[self.refs >= 0]
        if self.reuse is None or not len(chosen):
            return None
        return self.reuse.survey.rows(chosen)

    def _merged(self, decoded: Any, reused: Any) -> Any:
        """Both tables as one, in the order of the inputs."""
        pa = require_extra("pyarrow")
        positions = np.flatnonzero(self.refs >= 0)
        inputs = pa.array(positions + self.task.first, pa.int64())
        tables = [t.select(NAMES) for t in (decoded, reused.set_column(0, "input", inputs))]
        table = pa.concat_tables([t.cast(tables[0].schema) for t in tables])
        order = np.argsort(table["input"].to_numpy(), kind="stable")
        return table.take(pa.array(order))

    def _share(self, reused: Any) -> SharedRows:
        positions = np.flatnonzero(self.refs >= 0)
        for i, name in enumerate(STATISTICS):
            self.statistics[positions, i] = reused[name].fill_null(0).to_numpy()
        is_here = np.zeros(len(self.task), bool)
        is_here[positions] = reused["file"].is_valid().to_numpy()
        columns = {name: [None] * len(self.task) for name in ("row", "row_hash", "file")}
        for name, values in columns.items():
            for at, value in zip(positions.tolist(), reused[name].to_pylist(), strict=True):
                values[at] = value
        return SharedRows(is_here, columns)
