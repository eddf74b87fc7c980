"""REPA (sihyun-yu/REPA, dataset.py; SRA too): moments in .npy beside the pictures that they are of.

`vae-sd/00000/img-mean-std-00000000.npy` float32 `[2C,h,w]`, mean then deviation; `vae-sd/dataset.json` with the labels;
`images/00000/img00000000.png`, which its DINO encoder sees. Files and labels are paired by their sorted names. Its code
holds 4 channels and a stride of 8: only the unpatchified layout keeps the stride.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import CacheError, ImageError, InputError
from ...extras import require_extra
from ...images.decode import open_image
from ...images.geometry import Placement, Size
from ...images.load import PixelPolicy, frame
from ...images.reading import read_bytes
from ..sources.tables import some
from .base import Format, Record, from_numpy
from .columns import source_path
from .files import OutFile
from .pieces import Piece, split

ROWS = 1000
"""Rows of a folder, as ADM's tools write them."""
_PLACEMENT = ("resize_height", "resize_width", "crop_top", "crop_left", "bytes_hash")


class Repa(Format):
    """Pieces of a folder each."""

    reader = "numpy and Pillow"

    def check(self) -> None:
        assert self.request.images is not None, "the request was checked"
        images, kind = self.request.images, self.rows.dataset.plan.fields["source"]["kind"]
        if kind in ("tar", "parquet"):
            raise InputError(
                f"the cache was made from {kind} files, and REPA's pictures are cut from files in a folder: cache those"
            )
        missing = [id for id in self.rows.ids if not source_path(images, id).is_file()]
        if missing:
            raise InputError(
                f"{images} lacks {len(missing)} of {len(self.rows)} cached images ({some(missing, len(missing))}): "
                "give the folder that was cached"
            )
        self._policy = _policy(self.rows.dataset.plan.fields)
        self._columns = {name: self.rows.column(name) for name in _PLACEMENT}

    def plan(self) -> Iterator[Piece]:
        for number, rows in enumerate(split(np.arange(len(self.rows)), ROWS)):
            yield Piece(number, rows, f"{number:05d}")

    def names(self, piece: Piece) -> list[str]:
        return [name for i in piece.rows.tolist() for name in self._names(i)]

    def _names(self, i: int) -> tuple[str, str]:
        folder = f"{i // ROWS:05d}"
        return f"vae-sd/{folder}/img-mean-std-{i:08d}.npy", f"images/{folder}/img{i:08d}.png"

    def record(self, i: int) -> Record:
        tensors = self.rows.tensors(i)
        mean = self.cast(tensors, "latents", i)
        std = self.cast(tensors, "std", i) if "std" in tensors else torch.zeros_like(mean)
        return {"moments": torch.cat([mean, std]), "image": self._pixels(i)}

    def _pixels(self, i: int) -> Tensor:
        """The crop that was encoded, uint8 `[H,W,3]`."""
        assert self.request.images is not None, "the request was checked"
        id = self.rows.ids[i]
        path = source_path(self.request.images, id)
        height, width, top, left, digest = (self._columns[name][i].as_py() for name in _PLACEMENT)
        try:
            data = read_bytes(path)
            if require_extra("xxhash").xxh3_128(data).digest() != digest:
                raise CacheError(f"{path} is not the file that was cached: restore it, or cache again")
            placement = Placement(Size(height, width), top, left, self.rows.bucket(i))
            return from_numpy(frame(open_image(data, name=str(path)), self._policy, placement))
        except ImageError as e:
            raise CacheError(f"{path} could be decoded when it was cached, and no more: {e}") from e

    def files(self, piece: Piece) -> Iterator[OutFile]:
        for i in piece.rows.tolist():
            record, (latents, picture) = self.record(i), self._names(i)
            npy = io.BytesIO()
            np.lib.format.write_array(npy, record["moments"].numpy(), allow_pickle=False)
            yield OutFile(latents, [npy.getvalue()])
            yield OutFile(picture, [png(record["image"])])

    def read(self, out: Path, piece: Piece) -> Iterator[Record]:
        image_module: Any = require_extra("PIL.Image")
        for i in piece.rows.tolist():
            latents, picture = (out / name for name in self._names(i))
            with image_module.open(picture) as image:
                pixels = from_numpy(np.array(image))
            yield {"moments": from_numpy(np.load(latents, allow_pickle=False)), "image": pixels}

    def last_files(self, out: Path) -> Iterator[OutFile]:
        assert self.rows.labels is not None, "required"
        numbers = self.rows.labels.numbers.tolist()
        pairs = [[self._names(i)[0].removeprefix("vae-sd/"), label] for i, label in enumerate(numbers)]
        yield OutFile("vae-sd/dataset.json", [json.dumps({"labels": pairs}).encode()])

    def advice(self, out: Path) -> list[str]:
        return [
            f"REPA: --data-dir {out} --resolution {self.rows.buckets[0].height}; in train.py set in_channels to "
            f"{self.rows.channels}, latents_scale to ones and latents_bias to zeros of as many channels"
        ]


def png(pixels: Tensor) -> bytes:
    """A picture, uint8 `[H,W,3]`, as a PNG file."""
    image_module: Any = require_extra("PIL.Image")
    buffer = io.BytesIO()
    image_module.fromarray(pixels.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def _policy(plan: dict[str, Any]) -> PixelPolicy:
    """How the pixels of a cache were made."""
    fields = {**plan["geometry"], **plan.get("pixels", {})}
    icc = fields.get("icc", fields.get("icc_profile"))
    return PixelPolicy(
        decode=fields.get("decode", "exact"),
        icc="ignore" if icc in ("ignore", "ignored") else "srgb",
        background=tuple(fields["background"]),
        crop=fields["crop"],
    )
