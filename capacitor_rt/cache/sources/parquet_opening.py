"""Opening Parquet files that came from elsewhere, on a disk or over a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import CacheError, CapacitorError
from ...extras import require_extra
from .remote import Files


def open_parquet(files: Files, name: bytes, **options: Any) -> Any:
    return parquet_file(files.open(name), **options)


def parquet_file(handle: Any, **options: Any) -> Any:
    # by handle: pyarrow takes no path that is not UTF-8
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    return pq.ParquetFile(pa.PythonFile(handle, mode="r"), **{"pre_buffer": False} | options)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Whatever is wrong with a file, or with what its columns hold, as CacheError."""
    pa = require_extra("pyarrow")
    try:
        yield
    except CapacitorError:
        raise
    except (OSError, pa.ArrowException, ValueError, LookupError, OverflowError, MemoryError) as e:
        raise CacheError(f"{path} cannot be read as Parquet: {str(e)[:200] or type(e).__name__}") from e
