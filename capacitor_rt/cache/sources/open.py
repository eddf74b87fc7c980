"""Which kind of source a path is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ...errors import CacheError, InputError
from ...images.scan import EXTENSIONS
from . import Source
from .columns import ColumnsRequest
from .files import folder_source, list_source
from .listing import Listing
from .parquet import parquet_source
from .remote import is_url, remote_folder
from .tar import tar_source

KINDS = ("auto", "folder", "list", "tar", "parquet")
_BY_SUFFIX = {".txt": "list", ".lst": "list", ".list": "list", ".tar": "tar", ".parquet": "parquet"}
_LOOKED_AT = 10_000


def open_source(
    src: str | os.PathLike[str],
    out: Path,
    kind: str = "auto",
    columns: ColumnsRequest | None = None,
    image_column: str | None = None,
    planned: Callable[[], Listing | None] = lambda: None,
) -> Source:
    """List the inputs of a source.

    Args:
        src: a folder of images, an image, a text file with a path in each line, or tar or Parquet files: one, a folder
            of them, or a pattern. A URL that fsspec knows (`s3://`, `hf://`, `https://`) names a folder of images, or
            tar or Parquet files.
        out: the cache, which is left out where it lies below `src`.
        kind: one of `KINDS`; "auto" goes by what `src` is.
        image_column: of Parquet files; None: the one that is named so, or has the type.
        planned: the list of the plan that is there, where listing anew would mean reading everything.

    Raises:
        CacheError: it cannot be listed, or holds no image. InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"source {kind!r} is unknown: use one of {', '.join(KINDS)}")
    columns = columns or ColumnsRequest()
    text = os.fspath(src)
    if is_url(text):
        return _remote(text, out, kind, columns, image_column, planned)
    path = Path(src)
    if kind == "auto":
        kind = _guess(path)
    if kind == "list":
        return list_source(path, columns)
    if kind == "tar":
        return tar_source(path, out, columns)
    if kind == "parquet":
        return parquet_source(path, out, columns, image_column)
    return folder_source(path, out, columns)


def _remote(
    url: str,
    out: Path,
    kind: str,
    columns: ColumnsRequest,
    image_column: str | None,
    planned: Callable[[], Listing | None],
) -> Source:
    """A source by its URL: tar files, Parquet files, as most data sets on the hub are, or a folder of images."""
    if kind == "list" or (kind == "auto" and url.endswith((".txt", ".lst", ".list"))):
        raise CacheError(f"{url}: lists are read from local disks alone: download it")
    if kind == "tar" or (kind == "auto" and url.endswith(".tar")):
        return tar_source(url, out, columns, planned)
    by_name = url.endswith(".parquet") or url.startswith("hf://")
    if kind == "parquet" or (kind == "auto" and by_name):
        return parquet_source(url, out, columns, image_column)
    return remote_folder(url, columns)


def _guess(path: Path) -> str:
    """By the extension; of a folder by what lies in it: tar or Parquet files where there is nothing else to cache."""
    if not path.is_dir():
        # a pattern, too
        return _BY_SUFFIX.get(path.suffix.lower(), "folder")
    found: set[str] = set()
    for n, (_, _, names) in enumerate(os.walk(path)):
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension.encode("utf-8", "surrogateescape") in EXTENSIONS and not name.startswith("._"):
                return "folder"
            found.add(extension)
        if n > _LOOKED_AT:
            break
    return next(
        (kind for extension, kind in ((".tar", "tar"), (".parquet", "parquet")) if extension in found), "folder"
    )
