"""Batches of uint8 pixels to rows ready to be stored."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model import FullCapacitor
from ..reference import posterior_mode


@dataclass
class Encoded:
    """A batch under way: on the host once `BatchEncoder.fetch` has returned it.

    `tensors`: name -> stored dtype `[B,C,h,w]`; `stats`: float32 `[B,4]`, min, max, mean and standard deviation of
    each row of `latents` as stored; `finite`: bool `[B]`, of all tensors of the row.
    """

    tensors: dict[str, Tensor]
    stats: Tensor
    finite: Tensor
    events: tuple[Any, Any] | None = None


class BatchEncoder:
    """uint8 pixels to the tensors of a shard. On CUDA `submit` returns while the GPU works, `fetch` waits for it.

    `busy` counts the seconds that the device has computed.
    """

    def __init__(self, model: FullCapacitor, tensors: tuple[str, ...], dtype: str):
        self.model = model
        self.names = tensors
        self.dtype = getattr(torch, dtype)
        self.on_gpu = model.device.type == "cuda"
        self.busy = 0.0

    def buffer(self, rows: int, height: int, width: int) -> Tensor:
        """uint8 `[rows,height,width,3]` to be filled with pixels, page-locked for a GPU."""
        return torch.empty(rows, height, width, 3, dtype=torch.uint8, pin_memory=self.on_gpu)

    @torch.no_grad()
    def submit(self, pixels: Tensor) -> Encoded:
        """Begin to encode uint8 `[B,H,W,3]`, B at least 1."""
        if not self.on_gpu:
            begin = time.perf_counter()
            encoded = self._compute(pixels)
            self.busy += time.perf_counter() - begin
            return encoded
        with torch.cuda.device(self.model.device):
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            pixels = pixels.to(self.model.device, non_blocking=True)
            events[0].record()
            encoded = self._compute(pixels)
            events[1].record()
            return self._to_host(encoded, events)

    def fetch(self, encoded: Encoded) -> Encoded:
        """Wait until a submitted batch is on the host."""
        if encoded.events:
            (begin, end), done = encoded.events
            done.synchronize()
            self.busy += begin.elapsed_time(end) / 1e3
        return encoded

    def _compute(self, pixels: Tensor) -> Encoded:
        tensors = self._encode(pixels, "")
        if "latents_flip" in self.names:
            tensors |= self._encode(pixels.flip(2), "_flip")
        tensors = {name: tensors[name].to(self.dtype).contiguous() for name in self.names}
        rows = tensors["latents"].float().flatten(1)
        low, high = rows.aminmax(dim=1)
        stats = torch.stack((low, high, rows.mean(1), rows.std(1, correction=0)), 1)
        finite = torch.stack([t.isfinite().flatten(1).all(1) for t in tensors.values()]).all(0)
        return Encoded(tensors, stats, finite)

    def _encode(self, pixels: Tensor, suffix: str) -> dict[str, Tensor]:
        if "logsnr" not in self.names:
            return {f"latents{suffix}": self.model.encode(pixels)}
        mean, logsnr = self.model.encode_posterior(pixels)
        latents = self.model.whiten(self._fold(posterior_mode(mean, logsnr)))
        return {f"latents{suffix}": latents, f"logsnr{suffix}": self._fold(logsnr)}

    def _fold(self, t: Tensor) -> Tensor:
        """The family's 2x2 latent patches, so that logsnr lies element by element under the latents."""
        patch = self.model.config.latent_patch
        return t if patch == 1 else nn.functional.pixel_unshuffle(t, patch)

    def _to_host(self, encoded: Encoded, events: tuple[Any, ...]) -> Encoded:
        def copy(t: Tensor) -> Tensor:
            host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
            return host.copy_(t, non_blocking=True)

        done = torch.cuda.Event()
        host = Encoded(
            {name: copy(t) for name, t in encoded.tensors.items()}, copy(encoded.stats), copy(encoded.finite)
        )
        done.record()
        host.events = (events, done)
        return host
