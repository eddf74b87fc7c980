"""The bytes of files: whole, of regular files alone, and every failure an `ImageError`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import BinaryIO

from ..errors import ImageError
from .reasons import EMPTY, UNREADABLE


def read_bytes(path: str | PathLike[str]) -> bytes:
    """The contents of a regular file.

    Raises:
        ImageError: "unreadable" (also for a directory, FIFO or device, which are never opened for reading); "empty".
    """
    with regular_file(path) as file, _os_errors(path):
        data = file.read()
    check_not_empty(data, shown(path))
    return data


@contextmanager
def regular_file(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A regular file, open for reading; whatever else has this name is never opened for reading."""
    with _os_errors(path):
        # O_NONBLOCK: opening a FIFO waits for a writer otherwise; stat first, as opening a device may have effects
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise ImageError(UNREADABLE, f"{shown(path)} is {_kind(mode)}, not a regular file")
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        file = os.fdopen(fd, "rb")
    with file:
        if not stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):
            raise ImageError(UNREADABLE, f"{shown(path)} is {_kind(mode)}, not a regular file")
        yield file


@contextmanager
def _os_errors(path: str | PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ImageError(UNREADABLE, f"{shown(path)} cannot be read: {why}") from error
    except ValueError as error:
        raise ImageError(UNREADABLE, f"{shown(path)} is not a path: {error}") from error


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "special")


def shown(path: str | PathLike[str]) -> str:
    """The path in a form that any terminal and any encoding takes."""
    text = os.fsdecode(path)
    return text if text.isprintable() else ascii(text)


def check_not_empty(data: bytes | bytearray | memoryview, name: str) -> None:
    """Raise ImageError for no bytes."""
    if len(data) == 0:
        raise ImageError(EMPTY, f"{name} has no bytes")
