"""A model and a GPU that compute nothing: what is left of a run that encodes, decodes or resizes there is the CPU's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor


def null_model() -> Any:
    """A model of the published shape of latents that computes nothing."""
    import dataclasses

    from capacitor_rt import FullCapacitor, ModelConfig

    from ._contenders import TINY

    class NullCapacitor(FullCapacitor):
        def encode(self, image: Tensor) -> Tensor:
            batch, height, width, _ = image.shape
            return image.new_zeros(batch, self.latent_channels, height // 16, width // 16, dtype=torch.float32)

    model = NullCapacitor(dataclasses.replace(TINY, bottleneck_dim=ModelConfig().bottleneck_dim))
    model.backend = "torch"
    return model


def null_latents(pixels: Tensor) -> Tensor:
    """float16 latents for pixels `[B,H,W,3]` that are there before they are asked for."""
    return _latents(*pixels.shape[:3])


@cache
def _latents(batch: int, height: int, width: int) -> Tensor:
    return torch.zeros(batch, 128, height // 16, width // 16, dtype=torch.float16)


def null_encoder() -> Any:
    """A class of encoders that have the latents of their null model before they are asked for them."""
    from capacitor_rt.cache.encoder import BatchEncoder, Encoded

    class NullEncoder(BatchEncoder):
        known: dict[Any, Encoded] = {}  # noqa: RUF012

        def submit(self, pixels: Tensor) -> Encoded:
            key = tuple(pixels.shape)
            if key not in self.known:
                self.known[key] = super().submit(pixels)
            return self.known[key]

    return NullEncoder


@contextmanager
def null_gpu(decode: str, resize: str) -> Iterator[None]:
    """Have runs on a CPU leave to a GPU what these choices leave to one, which takes no time.

    What the run does for its GPU it does: pictures are sorted into pieces, tables are put together and copied, each
    window of a decoded picture is a tensor. Tensors of the GPU have no memory (torch's device "meta").
    """
    import capacitor_rt.cache.prepare as prepare
    import capacitor_rt.cache.resizing as resizing
    import capacitor_rt.cache.run as run
    from capacitor_rt.cache.decoding import DecodedChunk
    from capacitor_rt.cache.gpu_decoding import GpuDecoder

    class NullDecoder(GpuDecoder):
        def __init__(self, budget: int):
            super().__init__(torch.device("meta"), None, budget // 4)  # type: ignore[arg-type]

        def _decoded(self, pictures: Sequence[Any], failed: Any) -> dict[int, Tensor]:
            return {p.source: torch.empty(3, *p.encoded.shape, dtype=torch.uint8, device="meta") for p in pictures}

        def _resize(self, records: Tensor, table: np.ndarray, batch: Tensor) -> None:
            pass

        def buffer(self, rows: int, height: int, width: int) -> Tensor:
            # the encoder's, and never touched
            return torch.empty(rows, height, width, 3, dtype=torch.uint8)

        def put(self, offsets: np.ndarray, batch: Tensor, first: int) -> None:
            pass

    class NullResizer(resizing.Resizer):
        def take(self, chunk: DecodedChunk) -> None:
            # a GPU copies records up by itself, out of the page-locked ring
            begins, pixels = chunk.records()
            self._host = self._records = torch.from_numpy(pixels[: resizing.end_of(begins, pixels)])

        def _resize(self, records: Tensor, table: np.ndarray, batch: Tensor) -> None:
            pass

    def resizer_of(decode: str, device: torch.device, budget: int, *_: object) -> resizing.Resizer:
        return NullDecoder(budget) if decode == "gpu" else NullResizer(device)

    facts = {"torchvision": "0", "nvjpeg": "0", "decoded_by": "engine", "compute_capability": 90}
    with ExitStack() as stack:
        if "gpu" in (decode, resize):
            stack.enter_context(patch.object(resizing, "INTERPRETED", True))
            stack.enter_context(patch.object(prepare, "environment", lambda device: facts))
            stack.enter_context(patch.object(run, "resizer_of", resizer_of))
        yield
