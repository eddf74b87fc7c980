"""Parquet files of a cache: the same table gives the same bytes, and what is read has the columns that it must have."""

from __future__ import annotations

from typing import Any

from ..errors import CacheError
from ..extras import require_extra
from .folder import CacheFolder

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
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, pre_buffer=False)
        found = file.schema_arrow
        if found.names != schema.names or found.types != schema.types:
            raise CacheError(f"{what} is damaged: its columns are not those of the format")
        # in this thread: one of Arrow's that still held `data` when the interpreter ends would abort the process
        table = file.read(use_threads=False)
        table.validate(full=True)
    except (OSError, pa.ArrowException, ValueError, MemoryError) as e:
        raise CacheError(f"{what} is damaged: {str(e)[:200]}") from e
    return table


def read_table(folder: CacheFolder, name: str, schema: Any) -> Any:
    """A table of the cache. Raises FileNotFoundError; otherwise as `parse_table`."""
    return parse_table(folder.read(name, MOST_BYTES), folder.path / name, schema)
