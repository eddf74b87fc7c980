"""Parquet files of a cache: the same table gives the same bytes, and what is read has the columns that it must have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import CacheError
from ..extras import require_extra

MOST_BYTES = 8 << 30


def parquet_bytes(table: Any) -> memoryview:
    """A table as Parquet with page checksums."""
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


def parse_table(data: bytes, what: object, schema: Any) -> Any:
    """The table that these bytes are, whose columns have the names and types of `schema`, in its order.

    Raises:
        CacheError: they are no such table; `what` is the file's name in the message.
    """
    with _parsing(what):
        return _read(_opened(data, what, schema), None)


def parse_columns(data: bytes, what: object, schema: Any) -> Iterator[Any]:
    """The columns of such a table, one after the other, so that memory is needed for one. As `parse_table`."""
    with _parsing(what):
        file = _opened(data, what, schema)
    for name in schema.names:
        with _parsing(what):
            column = _read(file, [name])[name]
        yield column
        del column
        # what one column took serves the next
        require_extra("pyarrow").default_memory_pool().release_unused()


def _opened(data: bytes, what: object, schema: Any) -> Any:
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, pre_buffer=False)
    found = file.schema_arrow
    if found.names != schema.names or found.types != schema.types:
        raise CacheError(f"{what} is damaged: its columns are not those of the format")
    return file


def _read(file: Any, columns: Sequence[str] | None) -> Any:
    # in this thread: one of Arrow's that still held `data` when the interpreter ends would abort the process
    table = file.read(columns=columns, use_threads=False)
    table.validate(full=True)
    return table


@contextmanager
def _parsing(what: object) -> Iterator[None]:
    try:
        yield
    except (OSError, require_extra("pyarrow").ArrowException, ValueError, MemoryError) as e:
        raise CacheError(f"{what} is damaged: {str(e)[:200]}") from e
