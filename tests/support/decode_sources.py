"""Sources for tests of the decode pool: encoded images in memory, some of which do harm."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import image_files as files
import numpy as np
from waiting import HANG_SECONDS, until

from capacitor_rt.errors import ImageError


@dataclass(frozen=True)
class Images:
    """Encoded images. `harm` names what befalls an input: see `do`; `marks` is a folder for what happens once."""

    data: tuple[bytes, ...]
    harm: Mapping[int, str] = field(default_factory=dict)
    marks: Path | None = None

    def open(self) -> Images:
        return self

    def read(self, ordinal: int) -> bytes:
        word = self.harm.get(ordinal, "")
        if word.startswith("read:"):
            self.do(word.removeprefix("read:"), ordinal)
        return self.data[ordinal % len(self.data)]

    @property
    def listing(self) -> Images:
        return self

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.resize([len(data) for data in self.data], 1 << 12)

    def why_gone(self) -> None:
        return None

    def id(self, ordinal: int) -> str:
        # asked for in the thread that decodes
        word = self.harm.get(ordinal, "")
        if word and not word.startswith("read:"):
            self.do(word, ordinal)
        return f"images/{ordinal}"

    def do(self, word: str, ordinal: int) -> None:
        if word.endswith(" once"):
            assert self.marks is not None
            try:
                (self.marks / f"{ordinal}").touch(exist_ok=False)
            except FileExistsError:
                return
            word = word.removesuffix(" once")
        if word == "segfault":
            ctypes.string_at(0)
        if word == "kill":
            os.kill(os.getpid(), 9)
        if word == "hang":
            while True:
                time.sleep(HANG_SECONDS)
        if word == "eio":
            raise ImageError("io_error", f"images/{ordinal} cannot be read: Input/output error")
        if word == "raise":
            raise ZeroDivisionError("unforeseen")
        if word == "sleep":
            time.sleep(0.05)
        if word == "turn":
            # of two inputs of a chunk at a time, and of chunks those that come next
            assert self.marks is not None
            until(lambda: ordinal // 2 < self._released() + 3)

    def _released(self) -> int:
        """Chunks that the test says it has done with: bytes of a file."""
        return (self.marks / "released").stat().st_size


@dataclass(frozen=True)
class Files:
    """Files of these lengths that are no images, made when they are read, on each of which a decoder takes its time.

    `known`: whether their lengths are known beforehand.
    """

    lengths: tuple[int, ...]
    known: bool = True
    seconds: float = 0.0
    dies_at: int = -1

    def open(self) -> Files:
        return self

    @property
    def listing(self) -> Files:
        return self

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.array(self.lengths if self.known else [-1] * len(self.lengths), np.int64)

    def read(self, ordinal: int) -> bytes:
        return bytes([1 + ordinal % 200]) * self.lengths[ordinal]

    def why_gone(self) -> None:
        return None

    def id(self, ordinal: int) -> str:
        if ordinal == self.dies_at:
            os.kill(os.getpid(), 9)
        time.sleep(self.seconds)
        return f"files/{ordinal}"


def mixed(count: int) -> tuple[bytes, ...]:
    """`count` small images of several formats and aspects; every ninth is damaged."""
    found = []
    for i in range(count):
        height, width = 40 + 7 * (i % 5), 40 + 11 * (i % 4)
        data = files.encoded(files.texture(height, width, i), ("JPEG", "PNG", "WEBP")[i % 3])
        found.append(data[: len(data) // 2] if i % 9 == 5 else data)
    return tuple(found)


def ranges(count: int, length: int) -> Sequence[range]:
    return [range(first, min(first + length, count)) for first in range(0, count, length)]


def contents(chunks) -> list[tuple]:
    """Everything that chunks say, row by row, and the bytes of their pixels; releases them."""
    rows = []
    for chunk in chunks:
        for i, row in enumerate(chunk.columns.to_pylist()):
            pixels = np.array(chunk.pixels(i)) if row["status"] == "ok" else None
            rows.append((row, None if pixels is None else (pixels.shape, pixels.tobytes())))
        chunk.release()
    return rows
