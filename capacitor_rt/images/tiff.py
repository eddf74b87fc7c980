"""libtiff made strict and quiet, as far as it can be reached from here.

It reports damage to stderr and goes on, and where strips are short it leaves the rest of its buffers as malloc gave
them: one file, two pictures. So its complaints about pixels are counted, and a picture is decoded twice, with memory
filled differently; what comes with a complaint, or differs, is corrupt. Both need what there may not be (libtiff as a
shared library; glibc), and do nothing without.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from ..errors import ImageError

CORRUPT = "corrupt"
# of a tag or a directory, which viewers pass over
_METADATA = re.compile(rb"_?TIFF(VSetField|Fetch|Read|SetDir|CheckDir|Advance|ClientOpen|Open)|Missing|.*SetField")
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_M_PERTURB = -6
_FILLS = (0x00, 0xA5)

_counts = threading.local()
# malloc's filling is the whole process's
_filling = threading.Lock()


def strictly(decode: Callable[[], np.ndarray]) -> np.ndarray:
    """The pixels that `decode` gives by libtiff.

    Raises:
        ImageError: "corrupt", if libtiff complained of them or they depend on what memory held before.
    """
    _listen()
    found = []
    with _filling:
        for fill in _FILLS:
            _counts.errors = 0
            with _filled(fill):
                found.append(decode())
            if _counts.errors:
                raise ImageError(CORRUPT, "damaged pixels, of which libtiff made what it could")
    if not np.array_equal(found[0], found[1]):
        raise ImageError(CORRUPT, "part of the pixels is missing")
    return found[0]


@cache
def _listen() -> tuple[Any, ...]:
    """Hear libtiff's complaints instead of stderr. Returns what must not be collected."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "libtiff" in line}
        (path,) = paths
        library = ctypes.CDLL(path)
        error, warning = _HANDLER(_hear), _HANDLER(lambda module, form, values: None)
        for function, handler in ((library.TIFFSetErrorHandler, error), (library.TIFFSetWarningHandler, warning)):
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(ctypes.cast(handler, ctypes.c_void_p))
    except (OSError, ValueError, AttributeError, IndexError):
        return ()
    return library, error, warning


def _hear(module: bytes | None, form: bytes | None, values: int | None) -> None:
    if not _METADATA.match(module or b""):
        _counts.errors = getattr(_counts, "errors", 0) + 1


@contextmanager
def _filled(byte: int) -> Iterator[None]:
    """Have malloc fill what it gives."""
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    # it fills with the complement
    mallopt(_M_PERTURB, byte ^ 0xFF)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


@cache
def _mallopt() -> Any:
    return getattr(ctypes.CDLL(None), "mallopt", None)
