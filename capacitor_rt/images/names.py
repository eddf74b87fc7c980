"""Ids of inputs as names of files, where something is written for each."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from ..errors import InputError
from .scan import id_to_path

MOST_NAME_BYTES = 200
"""Of a file's name; file systems take 255, and what is added to it needs some."""


def id_to_relative(id: str) -> PurePosixPath:
    """The path of an id below a folder, as `os` functions take it.

    Raises:
        InputError: it would lead out of the folder, or cannot be a file's name.
    """
    raw = id_to_path(id)
    parts = raw.split(b"/")
    if raw.startswith(b"/") or any(part in (b"", b".", b"..") for part in parts) or b"\0" in raw:
        raise InputError(f"the id {id!r} is no path inside a folder, so no file can be named by it")
    if max(map(len, parts)) > MOST_NAME_BYTES:
        raise InputError(f"the id {id!r} is too long for a file's name")
    return PurePosixPath(os.fsdecode(raw))
