"""Parquet files of a cache: the same table gives the same bytes, and what is read has the columns that it must have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..errors import CacheError
from ..extras import require_extra

MOST_BYTES = 8 << 30
LEAST_ROOM, ROW_ROOM = 64 << 20, 256 << 10
"""Bytes that a table may take in memory: in any case, and for each row. A few kB on disk can say gigabytes."""
_MANY, _PATH = 1 << 16, 4096


def most_bytes(rows: int) -> int:
    """Of a file: as many as `parquet_bytes` writes for a table of so many rows, and 8 GiB."""
    return min(MOST_BYTES, LEAST_ROOM + ROW_ROOM * rows)


def parquet_bytes(table: Any) -> memoryview:
    """A table as Parquet with page checksums.

    Raises:
        CacheError: it takes more memory than a table may that is read back.
    """
    # what Parquet adds to the columns is far less than the sixteenth
    if table.nbytes > (room := (LEAST_ROOM + ROW_ROOM * table.num_rows) // 16 * 15):
        largest = max(table.column_names, key=lambda name: table[name].nbytes)
        raise CacheError(
            f"{table.num_rows} rows take {table.nbytes} bytes, most of them {largest!r}, and {room} is the most that "
            "can be read back: leave captions or columns of such a size out"
        )
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


def parse_table(data: bytes, what: object, schema: Any, most: int | None = None) -> Any:
    """The table that these bytes are, whose columns have the names and types of `schema`, in its order.

    Args:
        most: rows that it may have.

    Raises:
        CacheError: they are no such table; `what` is the file's name in the message.
    """
    with _parsing(what):
        return _read(_opened(data, what, schema, most), schema.names)


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


class _Opened(NamedTuple):
    """A file whose columns are those of the schema.

    Attributes:
        room: bytes that a column may take in memory.
        texts: columns that might take more. They are read as dictionaries, in which a text of many rows is there once.
    """

    file: Any
    what: object
    schema: Any
    room: int
    texts: list[str]


def _opened(data: bytes, what: object, schema: Any, most: int | None = None) -> _Opened:
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    options = {"page_checksum_verification": True, "pre_buffer": False}
    file = pq.ParquetFile(pa.BufferReader(data), **options)
    found, about = file.schema_arrow, file.metadata
    if found.names != schema.names or found.types != schema.types:
        raise CacheError(f"{what} is damaged: its columns are not those of the format")
    if most is not None and about.num_rows > most:
        raise CacheError(f"{what} is damaged: it has {about.num_rows} rows, and {most} is the most")
    room = LEAST_ROOM + ROW_ROOM * about.num_rows
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > room:
        raise CacheError(f"{what} is damaged: it takes more than {room} bytes")
    texts = list[str]()
    if _may_take(groups) > room:
        texts = [field.name for field in schema if field.type in (pa.string(), pa.binary())]
    if texts:
        file = pq.ParquetFile(pa.BufferReader(data), **options, read_dictionary=texts)
    return _Opened(file, what, schema, room, texts)


def _may_take(groups: Sequence[Any]) -> int:
    """Bytes that the texts of a column can be at most, each of which lies in the file once.

    By what is said of whole groups: where what is said of a column is damaged, asking Arrow for it ends the process.
    """
    # of many names, of which none is longer than a path on the average, the dictionary would be all there is
    sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    return sum(count * nbytes for count, nbytes in sizes if count <= _MANY or nbytes > _PATH * count)


def _read(opened: _Opened, columns: Sequence[str]) -> Any:
    # in this thread: one of Arrow's that still held `data` when the interpreter ends would abort the process
    table = opened.file.read(columns=columns, use_threads=False)
    table.validate(full=True)
    texts = [name for name in opened.texts if name in columns]
    if sum(_text_bytes(table[name]) for name in texts) > opened.room:
        raise CacheError(f"{opened.what} is damaged: it takes more than {opened.room} bytes")
    for name in texts:
        at = table.schema.get_field_index(name)
        table = table.set_column(at, opened.schema.field(name), table[name].cast(opened.schema.field(name).type))
    return table


def _text_bytes(column: Any) -> int:
    """Bytes of the texts of a column of dictionaries, each as often as it occurs."""
    pc = require_extra("pyarrow.compute")
    lengths = [pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks]
    return sum(pc.sum(chunk).as_py() or 0 for chunk in lengths)


@contextmanager
def _parsing(what: object) -> Iterator[None]:
    try:
        yield
    except (OSError, require_extra("pyarrow").ArrowException, ValueError, MemoryError) as e:
        raise CacheError(f"{what} is damaged: {str(e)[:200]}") from e
