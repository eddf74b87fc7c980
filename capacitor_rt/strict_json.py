"""JSON of files from anywhere: bounded, UTF-8, finite numbers, every key once. One error for whatever is wrong."""

from __future__ import annotations

import json
import math
import os
import stat
import uuid
from pathlib import Path
from typing import Any, BinaryIO

# more digits than any number of 64 bits has
_DIGITS = 20


class StrictJSONError(ValueError):
    """Why a text is refused; the message completes "is not valid JSON (...)"."""


def open_regular(path: str | bytes | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, without waiting for the other end of a pipe.

    Raises:
        OSError: not there, not readable, or a directory, a pipe or a device.
    """
    # a device may act on being opened, so it is looked at first; and again, because it may have been replaced
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{os.fsdecode(path)} is no regular file")
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{os.fsdecode(path)} is no regular file")
    return os.fdopen(fd, "rb")


def parse(data: bytes) -> Any:
    """The value of a JSON text in UTF-8, objects as dicts.

    Raises:
        StrictJSONError: not UTF-8, not JSON, nested too deep, a key twice, half of a surrogate pair, or a number that
            is NaN, infinite or longer than 20 digits.
    """
    try:
        text = data.decode("utf-8")
        return json.loads(
            text,
            # only an escape can be half of a surrogate pair
            object_pairs_hook=_whole if "\\u" in text else _unique,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
        )
    except RecursionError:
        raise StrictJSONError("it is nested too deep") from None
    except StrictJSONError:
        raise
    except ValueError as error:
        raise StrictJSONError(str(error)) from error


def read(path: str | os.PathLike[str], limit: int) -> Any:
    """The value of the JSON file at `path`, of at most `limit` bytes.

    Raises:
        OSError: see `open_regular`.
        StrictJSONError: see `parse`; or larger than `limit`.
    """
    with open_regular(path) as file:
        data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(data) > limit:
        raise StrictJSONError(f"it is larger than {limit} bytes")
    return parse(data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        key = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise StrictJSONError(f"key {key[:80]!r} is there twice")
    return found


def _whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in pairs:
        _check_text(key)
        if isinstance(value, str):
            _check_text(value)
    return _unique(pairs)


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise StrictJSONError(f"{text[:80]!r} holds half of a surrogate pair") from None


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise StrictJSONError(f"{text[:_DIGITS]}... has {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJSONError(f"{text[:_DIGITS]} is too large for a number")
    return value


def _constant(text: str) -> float:
    raise StrictJSONError(f"{text} is no JSON number")


def write_new(path: Path, document: Any) -> None:
    """Write a document as JSON, whole or not at all.

    Raises:
        FileExistsError: the file exists; it is never replaced. OSError: it cannot be written. ValueError: a number is
            not finite.
    """
    part = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        # a rename would replace what was written in the meantime
        os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
