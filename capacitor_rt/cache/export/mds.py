"""MDS shards of MosaicML streaming, as PRX and micro_diffusion read them.

PRX (prx/dataset/dataset.py) samples `mean + std * n` of the halves of `img_latent`, and takes 8 pixels per latent.
micro_diffusion (datasets/latents_loader.py) reshapes the bytes of `latents_256` to `[-1,32,32]`, whatever they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import InputError
from ...extras import is_installed
from ...images.geometry import Size
from .base import Format, Record, from_numpy
from .files import OutFile
from .mds_format import encode_sample, fixed_size, index_bytes, read_shard, shard_config, shard_head, shard_info
from .pieces import Piece, cut
from .rows import Rows

SHARD_BYTES = 64 << 20
MOST_SHARD_BYTES = (1 << 32) - 1
"""Offsets are 32 bits."""
KEPT: dict[str, tuple[str, Any]] = {
    "int64": ("int", -1),
    "float64": ("float64", float("nan")),
    "string": ("str", ""),
    "bool": ("int", 0),
}
"""Encodings of kept columns by their type, and what a missing value is, as in `LatentDataset`."""
MICRO_SIDES = {256: 32, 512: 64}


class Mds(Format):
    """Shards of at most `shard_bytes`; of several image sizes each has its folder with an index of its own."""

    def __init__(self, rows: Rows):
        self._folders = [f"{b}/" if len(rows.buckets) > 1 else "" for b in rows.buckets]
        super().__init__(rows)
        self._installed = _reader()
        if self._installed is not None:
            self.reader = f"mosaicml-streaming {version('mosaicml-streaming')}"

    def check(self) -> None:
        if (self.request.shard_bytes or 0) > MOST_SHARD_BYTES:
            raise InputError(f"--shard-bytes is at most {MOST_SHARD_BYTES}: offsets in MDS have 32 bits")
        for bucket in self.rows.buckets:
            self.columns(bucket)
        if self.request.preset != "micro":
            return
        for bucket in self.rows.buckets:
            side = MICRO_SIDES.get(bucket.height)
            if side is None or bucket.height != bucket.width or self.rows.shape(bucket)[1:] != (side, side):
                raise InputError(
                    f"images of {bucket} have latents of {'x'.join(map(str, self.rows.shape(bucket)))}, and "
                    "micro_diffusion takes those of 256x256 for 32x32, of 512x512 for 64x64 and scrambles any other: "
                    "cache with --size 256 or 512"
                )
        assert self.rows.text_latents is not None, "required"
        if len(self.rows.text_latents.shapes) > 1:
            raise InputError("micro_diffusion reads caption_latents of one shape: pad the tensors of --text-latents")

    def columns(self, bucket: Size) -> dict[str, str]:
        """Encodings of the columns by name, in the order of the names."""
        found = {"caption": "str", "id": "str", "original_height": "int", "original_width": "int"}
        if self.request.preset == "micro":
            found |= {f"latents_{bucket.height}": "bytes", "caption_latents": "bytes"}
        else:
            channels, *sides = self.rows.shape(bucket)
            shape = ",".join(map(str, (2 * channels, *sides)))
            found["img_latent"] = f"ndarray:{_name(self.rows.out_dtype)}:{shape}"
        for name, (kind, _) in self.rows.kept.items():
            if name in found:
                raise InputError(f"the cache keeps a column {name!r}, which MDS rows have already: rename it")
            found[name] = KEPT[kind][0]
        return dict(sorted(found.items()))

    def plan(self) -> Iterator[Piece]:
        number = 0
        for position, bucket in enumerate(self.rows.buckets):
            rows = np.flatnonzero(self.rows.bucket_numbers == position)
            for n, piece in enumerate(cut(rows, self._sizes(rows, bucket), self.request.shard_bytes or SHARD_BYTES)):
                yield Piece(number, piece, f"{self._folders[position]}shard.{n:05d}.mds")
                number += 1

    def _sizes(self, rows: np.ndarray, bucket: Size) -> np.ndarray:
        """Bytes of each row, at most: text is counted, sizes and offsets are allowed for."""
        channels, height, width = self.rows.shape(bucket)
        latents = channels * height * width * self.rows.out_dtype.itemsize
        per_row = latents * (1 if self.request.preset == "micro" else 2) + 64
        if self.request.preset == "micro" and self.rows.text_latents is not None:
            per_row += int(np.prod(next(iter(self.rows.text_latents.shapes)))) * 2
        texts = [self.rows.ids, *([self.rows.captions] if self.rows.captions is not None else [])]
        strings = [values for kind, values in self.rows.kept.values() if kind == "string"]
        per_row += 8 * len(self.rows.kept)
        sizes = np.array([per_row + sum(len(t[i].encode()) for t in texts) for i in rows.tolist()], np.int64)
        for values in strings:
            sizes += [len((values[i].as_py() or "").encode()) for i in rows.tolist()]
        return sizes

    def record(self, i: int) -> Record:
        geometry, tensors = self.rows.geometry, self.rows.tensors(i)
        found: Record = {
            "caption": self.rows.captions[i] if self.rows.captions is not None else "",
            "id": self.rows.ids[i],
            "original_height": int(geometry["height"][i]),
            "original_width": int(geometry["width"][i]),
        }
        for name, (kind, values) in self.rows.kept.items():
            value = values[i].as_py()
            missing = KEPT[kind][1]
            found[name] = missing if value is None else type(missing)(value)
        latents = self.cast(tensors, "latents", i)
        if self.request.preset == "micro":
            assert self.rows.text_latents is not None, "required"
            found[f"latents_{self.rows.bucket(i).height}"] = bytes(self.chunk(latents))
            found["caption_latents"] = self.rows.text_latents[self.rows.ids[i]].half().numpy().tobytes()
            return found
        std = self.cast(tensors, "std", i) if "std" in tensors else torch.zeros_like(latents)
        return found | {"img_latent": torch.cat([latents, std])}

    def files(self, piece: Piece) -> Iterator[OutFile]:
        yield OutFile(piece.name, self._chunks(piece))

    def _config(self, bucket: Size) -> dict[str, Any]:
        return shard_config(self.columns(bucket), self.request.shard_bytes or SHARD_BYTES)

    def _chunks(self, piece: Piece) -> Iterator[bytes]:
        bucket = self.rows.bucket(int(piece.rows[0]))
        columns = self.columns(bucket)
        yield shard_head(self._config(bucket), [self._sample_bytes(i, columns) for i in piece.rows.tolist()])
        for i in piece.rows.tolist():
            yield encode_sample(self.record(i), columns)

    def _sample_bytes(self, i: int, columns: dict[str, str]) -> int:
        """Of a row, without reading its latents: they have a size of their own."""
        total = 0
        for name, encoding in columns.items():
            size = fixed_size(encoding)
            total += self._text_bytes(i, name) + 4 if size is None else size
        return total

    def _text_bytes(self, i: int, name: str) -> int:
        if name == "id":
            return len(self.rows.ids[i].encode())
        if name == "caption":
            return len(self.rows.captions[i].encode()) if self.rows.captions is not None else 0
        if name in self.rows.kept:
            return len((self.rows.kept[name][1][i].as_py() or "").encode())
        if name == "caption_latents":
            assert self.rows.text_latents is not None, "required"
            return int(np.prod(next(iter(self.rows.text_latents.shapes)))) * 2
        return int(np.prod(self.rows.shape(self.rows.bucket(i)))) * self.rows.out_dtype.itemsize

    def read(self, out: Path, piece: Piece) -> Iterator[Record]:
        bucket = self.rows.bucket(int(piece.rows[0]))
        if self._installed is None:
            samples = read_shard(out / piece.name, self.columns(bucket))
        else:
            info = self._shard_info(bucket, piece, (out / piece.name).stat().st_size)
            folder = (out / piece.name).parent
            reader = self._installed.MDSReader.from_json(str(folder), "", info)
            samples = (reader[n] for n in range(len(piece.rows)))
        for sample in samples:
            yield {k: _plain(v) for k, v in sample.items()}

    def _shard_info(self, bucket: Size, piece: Piece, nbytes: int) -> dict[str, Any]:
        return shard_info(self._config(bucket), Path(piece.name).name, nbytes, len(piece.rows))

    def last_files(self, out: Path) -> Iterator[OutFile]:
        for position, folder in enumerate(self._folders):
            bucket = self.rows.buckets[position]
            pieces = [piece for piece in self.pieces if self.rows.bucket_numbers[piece.rows[0]] == position]
            shards = [self._shard_info(bucket, piece, (out / piece.name).stat().st_size) for piece in pieces]
            yield OutFile(f"{folder}index.json", [index_bytes(shards)])

    def advice(self, out: Path) -> list[str]:
        if self.request.preset == "micro":
            side, text = self.rows.buckets[0].height, self.rows.text_latents
            assert text is not None, "required"
            tokens, width = next(iter(text.shapes))
            return [
                f"build_streaming_latents_dataloader('{out}', image_size={side}, cap_seq_size={tokens}, "
                f"cap_emb_dim={width}, ...), and a model of {self.rows.channels} input channels"
            ]
        if self.request.preset == "plain":
            return [f"streaming.StreamingDataset(local='{out}', batch_size=...)"]
        silent = [] if self.rows.captions is not None else ["every caption is empty: export with --captions"]
        return [
            *silent,
            "PRX's yaml (a model with in_channels 32, patch size 2, and a VAE of scaling_factor 1.0):",
            f"  dataset: {{local: [{out}], has_text_latents: false, caption_keys: caption}}",
        ]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return from_numpy(value)
    return value.item() if isinstance(value, np.generic) else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=1)
def _reader() -> Any:
    """The module with streaming's `MDSReader`, None where it cannot be imported."""
    # asked once: a failed import leaves modules behind, and the next one would succeed
    if not is_installed("streaming"):
        return None
    try:
        return import_module("streaming.base.format.mds.reader")
    except (ImportError, AttributeError, RuntimeError):
        return None
