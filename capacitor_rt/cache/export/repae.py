"""REPA-E (REPA-E/REPA-E, dataset.py): what REPA reads, as entries of HDF5 files.

Its reader opens `images.h5` and `NAME.h5`, takes the names of their entries from `images_h5.json` and `NAME_h5.json`,
and pairs them in sorted order; labels are the bytes of an entry `dataset.json`. Moments are mean, then deviation, and
its loop normalises by `NAME-latents-stats.pt`. An HDF5 file cannot be gone on with where it was cut off, so the entries
lie in shards that appear whole, and the two files link to them: a folder of the names is a shard.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...extras import MissingExtraError, is_installed, require_extra
from .base import Record, from_numpy, torch_bytes
from .files import OutFile
from .pieces import Piece, cut, split
from .repa import ROWS, Repa, png
from .rows import Rows

NAME = "capacitor"
"""The `vae_latents_name` of its dataset."""
SHARD_BYTES = 256 << 20
"""A shard is put together in memory."""
SHARDS = "shards"


class RepaE(Repa):
    """Pieces of two shards each, latents and pictures."""

    def __init__(self, rows: Rows):
        if not is_installed("h5py"):
            # not the extra: that brings an older numpy
            raise MissingExtraError("REPA-E reads HDF5, and h5py is not installed: pip install h5py")
        self._h5py: Any = import_module("h5py")
        super().__init__(rows)
        self.reader = f"h5py {self._h5py.__version__}"

    def plan(self) -> Iterator[Piece]:
        bucket = self.rows.buckets[0]
        per_row = 8 * int(np.prod(self.rows.shape(bucket))) + 3 * bucket.height * bucket.width
        number = 0
        for folder in split(np.arange(len(self.rows)), ROWS):
            for rows in cut(folder, per_row, self.request.shard_bytes or SHARD_BYTES):
                yield Piece(number, rows, f"{number:05d}")
                number += 1

    def names(self, piece: Piece) -> list[str]:
        return [f"{SHARDS}/{NAME}-{piece.name}.h5", f"{SHARDS}/images-{piece.name}.h5"]

    def files(self, piece: Piece) -> Iterator[OutFile]:
        moments, pictures = {}, {}
        for i in piece.rows.tolist():
            record = self.record(i)
            moments[_latents(i)] = record["moments"].numpy()
            pictures[_picture(i)] = np.frombuffer(png(record["image"]), np.uint8)
        for name, entries in zip(self.names(piece), (moments, pictures), strict=True):
            yield OutFile(name, [self._file(entries)])

    def read(self, out: Path, piece: Piece) -> Iterator[Record]:
        image_module: Any = require_extra("PIL.Image")
        latents, pictures = (self._h5py.File(out / name, "r") for name in self.names(piece))
        with latents, pictures:
            for i in piece.rows.tolist():
                with image_module.open(io.BytesIO(pictures[_picture(i)][()].tobytes())) as image:
                    yield {"moments": from_numpy(latents[_latents(i)][()]), "image": from_numpy(np.array(image))}

    def last_files(self, out: Path) -> Iterator[OutFile]:
        assert self.rows.labels is not None, "required"
        numbers = self.rows.labels.numbers.tolist()
        for n, (file, name) in enumerate(((NAME, _latents), ("images", _picture))):
            links = {piece.name: self._h5py.ExternalLink(self.names(piece)[n], "/") for piece in self.pieces}
            names = [f"{piece.name}/{name(i)}" for piece in self.pieces for i in piece.rows.tolist()]
            labels = json.dumps({"labels": list(map(list, zip(names, numbers, strict=True)))}).encode()
            yield OutFile(f"{file}.h5", [self._file(links | {"dataset.json": np.frombuffer(labels, np.uint8)})])
            yield OutFile(f"{file}_h5.json", [json.dumps(names).encode()])
        shape = (1, self.rows.channels, 1, 1)
        stats = {"latents_scale": torch.ones(shape), "latents_bias": torch.zeros(shape)}
        yield OutFile(f"{NAME}-latents-stats.pt", [torch_bytes(stats)])

    def _file(self, entries: dict[str, Any]) -> bytes:
        """An HDF5 file of arrays and links, whose bytes depend on nothing else."""
        with self._h5py.File("shard.h5", "w", driver="core", backing_store=False) as file:
            for name, value in entries.items():
                file[name] = value
            file.flush()
            return file.id.get_file_image()

    def advice(self, out: Path) -> list[str]:
        stride, channels = self.rows.stride, self.rows.channels
        patch = 2 if self.request.layout == "unpatchified" else 1
        size = self.rows.buckets[0].height
        return [
            f"REPA-E: train_ldm_only.py --data-dir {out} --resolution {size} with a SiT /{patch}; there, in_channels "
            f"{channels}, latent_size resolution // {stride}, "
            f"CustomH5Dataset(..., vae_latents_name='{NAME}'), and the statistics of {NAME}-latents-stats.pt"
        ]


def _latents(i: int) -> str:
    return f"img-mean-std-{i:08d}.npy"


def _picture(i: int) -> str:
    return f"img{i:08d}.png"
