"""LightningDiT (hustvl/LightningDiT, datasets/img_latent_dataset.py): safetensors shards with flips and labels.

Its reader takes `DIR/*.safetensors` sorted, in each `latents`, `latents_flip` `[N,C,h,w]` and `labels` int64 `[N]`, and
computes `(latents - mean) / std * multiplier` with `latents_stats.pt`, which it measures itself where it is missing:
written here always, zeros and ones unless asked for, as whitened latents are normalised already.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .base import CODES, Format, Record, torch_bytes
from .files import OutFile
from .pieces import Piece, split

ROWS = 10_000
MAPPED_ROWS = 256
NAMES = ("latents", "latents_flip")
STATS = "latents_stats.pt"


class LightningDiT(Format):
    """Shards of at most `shard_rows` rows."""

    reader = "safetensors"

    def plan(self) -> Iterator[Piece]:
        slices = split(np.arange(len(self.rows)), self.request.shard_rows or ROWS)
        # names sort as their numbers do
        digits = max(3, len(str(len(slices) - 1)))
        for number, rows in enumerate(slices):
            yield Piece(number, rows, f"latents_rank00_shard{number:0{digits}d}.safetensors")

    def record(self, i: int) -> Record:
        assert self.rows.labels is not None, "required"
        tensors = self.rows.tensors(i)
        latents = {name: self.cast(tensors, name, i) for name in NAMES}
        return {**latents, "label": int(self.rows.labels.numbers[i])}

    def files(self, piece: Piece) -> Iterator[OutFile]:
        yield OutFile(piece.name, self._chunks(piece))

    def _chunks(self, piece: Piece) -> Iterator[bytes | memoryview]:
        assert self.rows.labels is not None, "required"
        count = len(piece.rows)
        shape = [count, *self.rows.shape(self.rows.buckets[0])]
        size = int(np.prod(shape)) * self.rows.out_dtype.itemsize
        code = CODES[str(self.rows.out_dtype).removeprefix("torch.")]
        header = {
            "__metadata__": {"latent_space": self.rows.dataset.latent_space, "plan": self.rows.dataset.plan.id},
            **{
                name: {"dtype": code, "shape": shape, "data_offsets": [n * size, (n + 1) * size]}
                for n, name in enumerate(NAMES)
            },
            "labels": {"dtype": "I64", "shape": [count], "data_offsets": [2 * size, 2 * size + 8 * count]},
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for name in NAMES:
            for i in piece.rows.tolist():
                yield self.chunk(self.record(i)[name])
        yield self.rows.labels.numbers[piece.rows].astype("<i8").tobytes()

    def read(self, out: Path, piece: Piece) -> Iterator[Record]:
        from safetensors import safe_open

        with safe_open(out / piece.name, framework="pt") as file:
            labels = file.get_tensor("labels").tolist()
        for start in range(0, len(labels), MAPPED_ROWS):
            # opened anew: what has been read stays in memory for as long as the file is mapped
            with safe_open(out / piece.name, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in NAMES}
                for n in range(start, min(start + MAPPED_ROWS, len(labels))):
                    yield {**{name: s[n : n + 1][0] for name, s in slices.items()}, "label": labels[n]}

    def last_files(self, out: Path) -> Iterator[OutFile]:
        yield OutFile(STATS, self._stats())

    def _stats(self) -> Iterator[bytes]:
        shape = (1, self.rows.channels, 1, 1)
        mean, std = torch.zeros(shape), torch.ones(shape)
        if self.request.stats == "dataset":
            mean, std = (t.float().reshape(shape) for t in channel_statistics(self))
        yield torch_bytes({"mean": mean, "std": std})

    def advice(self, out: Path) -> list[str]:
        rows = self.rows
        patch = 2 if self.request.layout == "unpatchified" else 1
        size = rows.buckets[0].height
        return [
            "LightningDiT's yaml:",
            "data:",
            f"  data_path: {out}",
            f"  image_size: {size}",
            f"  num_classes: {int(rows.labels.numbers.max()) + 1 if rows.labels is not None else 0}",
            "  latent_norm: true",
            "  latent_multiplier: 1.0",
            "vae:",
            f"  downsample_ratio: {rows.stride}",
            "model:",
            f"  model_type: LightningDiT-XL/{patch}",
            f"  in_chans: {rows.channels}",
        ]


def channel_statistics(writer: LightningDiT) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each channel over the rows of `latents`, float64 `[C]`."""
    rows = writer.rows
    count, mean, squares = 0, torch.zeros(rows.channels, dtype=torch.float64), torch.zeros(rows.channels).double()
    for i in range(len(rows)):
        x = rows.tensors(i)["latents"].double().flatten(1)
        # Chan's update, as sums of squares would cancel
        total, delta = count + x.shape[1], x.mean(1) - mean
        squares += x.var(1, correction=0) * x.shape[1] + delta**2 * count * x.shape[1] / total
        mean += delta * x.shape[1] / total
        count = total
    return mean, (squares / (count - 1)).sqrt()
