"""Images of one row group of a Parquet file, streamed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import ImageError
from ...images.reasons import UNREADABLE
from ..failures import CHANGED, IO_ERROR, OUT_OF_MEMORY
from .containers import LocalFiles
from .parquet_opening import parquet_file
from .remote import Files

BATCH_ROWS = 16
BATCH_BYTES = 16 << 20
"""Of the images of a batch, unless it is a single one."""
BUFFER_BYTES = 1 << 20


class RowGroup:
    """The images of a row group, from the first row on.

    Args:
        name, number, mtime: the file, the group's number in it, and the file's time when it was listed.
        column: of the images.
        first: ordinal of its first row.
        rows: how many it has.
    """

    def __init__(self, files: Files, name: bytes, number: int, mtime: int, column: str, first: int, rows: int):
        self.files, self.name, self.number, self.mtime = files, name, number, mtime
        self.column, self.first, self.rows = column, first, rows
        self.lock = threading.Lock()
        self._batches: Iterator[Any] | None = None
        # the rows that were read last, and those before them that are expected
        self._begin = 0
        self._rows: Any = ()
        self._kept: dict[int, Any] = {}

    def take(self, row: int, expected: set[int]) -> Any:
        """What the group has in a row; what is passed and expected is kept. Under the lock."""
        if row in self._kept:
            return self._kept.pop(row)
        if row < self._begin:
            self._batches = None
        if self._batches is None:
            self._batches, self._begin, self._rows = self._open(), 0, ()
        while row >= self._begin + len(self._rows):
            for at in range(len(self._rows)):
                if self.first + self._begin + at in expected and self._begin + at not in self._kept:
                    self._kept[self._begin + at] = self._rows[at].as_py()
            self._begin += len(self._rows)
            self._rows = self._next(row)
        value = self._rows[row - self._begin].as_py()
        if row + 1 == self.rows:
            # the last: what lies before it and is expected still was kept
            for at in range(len(self._rows) - 1):
                if self.first + self._begin + at in expected:
                    self._kept[self._begin + at] = self._rows[at].as_py()
            self._batches, self._rows, self._begin = None, (), self.rows
        return value

    def _open(self) -> Iterator[Any]:
        with self._failing():
            if self.files.has_changed(self.name, self.mtime):
                raise ImageError(CHANGED, "its file is another one than when it was listed")
            # not the whole column at once, which is what pyarrow prefers
            handle = self.files.open(self.name)
            file = parquet_file(handle, pre_buffer=False, buffer_size=BUFFER_BYTES)
            rows = batch_rows(file, handle, self.number, self.column)
            return file.iter_batches(rows, row_groups=[self.number], columns=[self.column], use_threads=False)

    def _next(self, row: int) -> Any:
        assert self._batches is not None
        try:
            with self._failing():
                batch = next(self._batches, None)
            if batch is None:
                raise ImageError(UNREADABLE, f"its row group ends before row {row}, of which its file tells")
        except ImageError:
            self._batches, self._rows = None, ()
            raise
        return batch.column(0)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What a file system raises, as a failure of the image."""
        what = f"row group {self.number}"
        try:
            yield
        except ImageError:
            raise
        except FileNotFoundError as e:
            raise ImageError(CHANGED, "its file was there when it was listed, and is gone") from e
        except MemoryError as e:
            raise ImageError(OUT_OF_MEMORY, f"no memory for {what}") from e
        except Exception as e:
            # a network's libraries have errors of their own; on a disk, what is no error of the system's is damage
            damaged = isinstance(self.files, LocalFiles) and getattr(e, "errno", None) is None
            reason = UNREADABLE if damaged else IO_ERROR
            raise ImageError(reason, f"{what} cannot be read: {type(e).__name__}: {str(e)[:200]}") from e


def batch_rows(file: Any, handle: Any, group: int, column: str) -> int:
    """How many rows of a group are read at a time: as many as `BATCH_BYTES` may be expected to hold.

    Args:
        handle: of the file, which must not be read meanwhile.
    """
    # it raises where what is said of the column is damaged; asked for that, Arrow would end the process
    next(file.iter_batches(1, row_groups=[group], columns=[column], use_threads=False), None)
    found, schema = file.metadata.row_group(group), file.schema
    chunks = [found.column(i) for i in range(found.num_columns) if schema.column(i).path.partition(".")[0] == column]
    mean = sum(max(chunk.total_uncompressed_size, 0) for chunk in chunks) / max(found.num_rows, 1)
    # what all rows repeat is stored once, so that a small file becomes a large batch
    most = max([mean, 1, *(_dictionary_bytes(handle, chunk) for chunk in chunks)])
    return int(min(max(BATCH_BYTES // most, 1), BATCH_ROWS))


def _dictionary_bytes(handle: Any, chunk: Any) -> int:
    """Bytes of the dictionary of a column chunk, as the header of its page says; 0 where it has none."""
    if not chunk.has_dictionary_page or chunk.dictionary_page_offset is None:
        return 0
    handle.seek(chunk.dictionary_page_offset)
    head = handle.read(16)
    # Thrift's compact form: kind and size of the page come first, a byte that says so before either
    at, number = 0, 0
    try:
        for _ in range(2):
            if head[at] != 0x15:
                return BATCH_BYTES
            at, number, shift = at + 1, 0, 0
            while True:
                number |= (head[at] & 0x7F) << shift
                at, shift = at + 1, shift + 7
                if head[at - 1] < 0x80:
                    break
    except IndexError:
        return BATCH_BYTES
    return number >> 1
