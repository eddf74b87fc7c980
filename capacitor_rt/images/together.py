"""Pictures of one size that follow one another are resized together.

Computing the weights takes torch a third of the time that it resizes a picture of 500x375 in; for several pictures of
one size it computes them once. A picture waits only as long as the next one is of its size, so that those of other
sizes are resized as soon as ever, while the caches hold them. The pixels are those of each picture alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .geometry import Size
from .resample import Window, resample, resample_all

TOGETHER_BYTES = 8 << 20
"""What the pictures that wait, and resizing them, may take."""
# more gain nothing that is measured
_MOST = 4


class _Waiting(NamedTuple):
    pixels: np.ndarray
    out: np.ndarray
    token: Any


class Together:
    """Takes decoded pictures and gives them, resized, once `finish` has been called at the latest.

    Args:
        nbytes: of memory for the pictures that wait, and for what resizing them takes.
    """

    def __init__(self, nbytes: int = TOGETHER_BYTES):
        self.nbytes = nbytes
        self._memory = bytearray()
        self._kind: tuple[Size, Window, str] | None = None
        self._fit = 0
        self._waiting: list[_Waiting] = []
        self._failed: list[tuple[Any, Exception]] = []

    def room(self, size: Size, window: Window, filter: str) -> memoryview | None:
        """Memory that a picture `[H,W,3]` is to be decoded into, None if there is none for two of this size.

        Args:
            size: of the picture as it is stored.
            window: what is wanted of it.
        """
        kind, one = (size, window, filter), 3 * size.area
        if kind != self._kind or len(self._waiting) == self._fit:
            self._resize()
            resized = max(size.height * window.width, window.height * size.width) + window.height * window.width
            self._kind, self._fit = kind, min(_MOST, self.nbytes // (one + 3 * resized))
        if self._fit < 2:
            return None
        if len(self._memory) < self._fit * one:
            # nothing waits where the size is another one
            self._memory = bytearray(self._fit * one)
        begin = len(self._waiting) * one
        return memoryview(self._memory)[begin : begin + one]

    def add(self, pixels: np.ndarray, out: np.ndarray, token: Any) -> None:
        """Have a picture resized.

        Args:
            pixels: uint8 `[H,W,3]` in the memory that `room` gave last.
            out: uint8 `[h,w,3]`, contiguous, that takes what is wanted of it.
            token: what `finish` calls it.
        """
        self._waiting.append(_Waiting(pixels, out, token))

    def finish(self) -> list[tuple[Any, Exception]]:
        """Resize what waits; the tokens of all pictures since the last time that could not be resized, and why."""
        self._resize()
        failed, self._failed = self._failed, []
        return failed

    def _resize(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting or self._kind is None:
            return
        (size, window, filter), count = self._kind, len(waiting)
        pictures = np.frombuffer(self._memory, np.uint8, count * 3 * size.area).reshape(
            count, size.height, size.width, 3
        )
        try:
            resample_all(pictures, window, filter, outs=[picture.out for picture in waiting])
            return
        except Exception as e:
            if count == 1:
                self._failed.append((waiting[0].token, e.with_traceback(None)))
                return
        for picture in waiting:
            try:
                resample(picture.pixels, window, filter, out=picture.out)
            except Exception as e:
                self._failed.append((picture.token, e.with_traceback(None)))
