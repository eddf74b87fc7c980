"""Which kind of source a path is."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import CacheError, InputError
from . import Source
from .columns import ColumnsRequest
from .files import folder_source, list_source

KINDS = ("auto", "folder", "list", "tar", "parquet")
_LISTS = (".txt", ".lst", ".list")


def open_source(
    src: str | os.PathLike[str],
    out: Path,
    kind: str = "auto",
    columns: ColumnsRequest | None = None,
) -> Source:
    """List the inputs of a source.

    Args:
        src: a folder of images, an image, or a text file with a path in each line.
        out: the cache, which is left out where it lies below `src`.
        kind: one of `KINDS`; "auto" goes by what `src` is.

    Raises:
        CacheError: it cannot be listed, or holds no image. InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"source {kind!r} is unknown: use one of {', '.join(KINDS)}")
    columns = columns or ColumnsRequest()
    path = Path(src)
    if kind == "auto":
        kind = _guess(path)
    if kind == "list":
        return list_source(path, columns)
    if kind == "folder":
        return folder_source(path, out, columns)
    raise CacheError(f"source {kind!r} cannot be read: use a folder or a list")


def _guess(path: Path) -> str:
    return "list" if path.suffix.lower() in _LISTS and path.is_file() else "folder"
