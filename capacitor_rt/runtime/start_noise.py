"""The noise that decoding starts from. On a GPU that of a seed is kept, since to draw it costs more than to decode."""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..diffusion import unit_noise
from .memory import DeviceMemoryError, amount, free_bytes

NOISE_BYTES = 256 << 20
"""Of noise kept for seeds that come again."""
_drawing = threading.RLock()


class StartNoise:
    """Draws start noise for one model, and keeps that of seeds on a GPU. Threads may share it."""

    def __init__(self) -> None:
        self._drawn: dict[Any, Tensor] = {}
        # what graphs of callers read: it stays as long as the model
        self._lent: list[Tensor] = []

    def draw(self, shape: tuple[int, ...], seed: int | None, source: str, device: torch.device) -> Tensor:
        """Unit noise of `shape` `[B,3,H,W]`, float32; the arguments as in `diffusion.unit_noise`.

        Raises:
            DeviceMemoryError: there is no room for it.
        """
        try:
            if seed is None or device.type != "cuda":
                return unit_noise(shape, seed, device, source)
            return self._of_a_seed((shape, seed, source), device)
        except torch.OutOfMemoryError as error:
            self.clear()
            raise DeviceMemoryError(
                f"the noise for {shape[0]} images of {shape[2]}x{shape[3]} needs {amount(4 * prod(shape))}, and "
                f"{amount(free_bytes(device))} are free on {device}: decode fewer at a time"
            ) from error

    def clear(self) -> None:
        """Free what is kept, but for what a caller's graph reads."""
        with _drawing:
            self._drawn.clear()

    def _of_a_seed(self, what: tuple[tuple[int, ...], int, str], device: torch.device) -> Tensor:
        """Noise of a (shape, seed, source) on a GPU, kept by stream: another one would have to wait for the copy."""
        with _drawing:
            if torch.cuda.is_current_stream_capturing():
                # a copy that is captured reads its source at every replay: better what is there already
                kept = next((noise for (known, _), noise in self._drawn.items() if known == what), None)
                if kept is not None:
                    self._lent.append(kept)
                    return kept
                return unit_noise(*what[:2], device, what[2])
            key = (what, torch.cuda.current_stream(device))
            if key not in self._drawn:
                nbytes = 4 * prod(what[0])
                while self._drawn and nbytes + sum(t.nbytes for t in self._drawn.values()) > NOISE_BYTES:
                    self._drawn.pop(next(iter(self._drawn)))
                self._drawn[key] = unit_noise(*what[:2], device, what[2])
            return self._drawn[key]
