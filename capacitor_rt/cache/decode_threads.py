"""Inputs to pixels in threads of this process, in chunks of the order in which they are asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ImageError
from ..extras import require_extra
from ..images.geometry import Size
from ..images.load import PixelPolicy, load_image
from .failures import is_retryable
from .hashing import xxh3
from .index import DECODED, OK, QUARANTINED
from .sources import Reader, Source

BACKOFF_SECONDS = (0.2, 1.0, 3.0)
"""How long to wait before a retryable failure is tried again."""
NAMES = ("input", "status", "reason", "message", *DECODED)


@dataclass
class DecodedChunk:
    """Consecutive inputs after decoding.

    Attributes:
        columns: Arrow record batch of `NAMES`, one row per input.
        pixels: of each row, uint8 `[H,W,3]`; None where it failed.
        seconds: that reading and decoding took, added up over the threads.
    """

    columns: Any
    images: list[np.ndarray | None]
    read_seconds: float = 0.0
    decode_seconds: float = 0.0

    def pixels(self, row: int) -> np.ndarray:
        image = self.images[row]
        assert image is not None
        return image

    def release(self) -> None:
        """The pixels are no longer needed."""
        self.images = []


@dataclass
class _Row:
    values: dict[str, Any]
    pixels: np.ndarray | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "decode": 0.0})


class ThreadDecoder:
    """Reads, decodes and resizes inputs in threads.

    Args:
        buckets: an image comes to the nearest of them.
        backoff: seconds to wait before each further attempt at an input that failed for now.
    """

    def __init__(
        self,
        source: Source,
        buckets: Sequence[Size],
        policy: PixelPolicy,
        workers: int,
        backoff: Sequence[float] = BACKOFF_SECONDS,
    ):
        self.source = source
        self.reader: Reader = source.open()
        self.buckets = tuple(buckets)
        self.policy = policy
        self.workers = workers
        self.backoff = tuple(backoff)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __enter__(self) -> ThreadDecoder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def decode(self, ordinals: Iterable[range], ahead: int) -> Iterator[DecodedChunk]:
        """Chunks in the order of the ranges of inputs; `ahead` inputs are under way at a time."""
        ranges = iter(ordinals)
        pending: deque[list[Future[_Row]]] = deque()
        count = 0
        while True:
            while count < ahead and (chosen := next(ranges, None)) is not None:
                pending.append([self._pool.submit(self._patiently, i) for i in chosen])
                count += len(chosen)
            if not pending:
                return
            rows = [future.result() for future in pending.popleft()]
            count -= len(rows)
            yield _chunk(rows)

    def _patiently(self, ordinal: int) -> _Row:
        row = self._one(ordinal)
        for pause in self.backoff:
            if not is_retryable(row.values.get("reason") or "") or self.source.why_gone():
                break
            time.sleep(pause)
            row = self._one(ordinal)
        return row

    def _one(self, ordinal: int) -> _Row:
        row = _Row({"input": ordinal, "status": OK})
        begin = time.perf_counter()
        try:
            data = self.reader.read(ordinal)
            row.values["bytes_hash"] = xxh3(data).digest()
            read = time.perf_counter()
            row.seconds["read"] = read - begin
            row.pixels = self._decode(data, row.values, self.source.listing.id(ordinal))
            row.seconds["decode"] = time.perf_counter() - read
        except ImageError as e:
            row.values |= {"status": QUARANTINED, "reason": e.reason, "message": str(e)}
        return row

    def _decode(self, data: bytes, values: dict[str, Any], name: str) -> np.ndarray:
        image = load_image(data, self.policy, self.buckets, name=name)
        header, placement = image.header, image.placement
        values |= {
            "width": header.width,
            "height": header.height,
            "orientation": header.orientation,
            "bucket": image.bucket,
            "resize_height": placement.resize.height,
            "resize_width": placement.resize.width,
            "crop_top": placement.top,
            "crop_left": placement.left,
        }
        return image.pixels


def _chunk(rows: list[_Row]) -> DecodedChunk:
    pa = require_extra("pyarrow")
    columns = pa.RecordBatch.from_pylist([row.values for row in rows], chunk_schema())
    seconds = {key: sum(row.seconds[key] for row in rows) for key in ("read", "decode")}
    return DecodedChunk(columns, [row.pixels for row in rows], seconds["read"], seconds["decode"])


def chunk_schema() -> Any:
    """Columns of a decoded chunk: those of the index that are known by then."""
    from .index import index_schema

    pa = require_extra("pyarrow")
    schema = index_schema()
    return pa.schema([schema.field(name) for name in NAMES])
