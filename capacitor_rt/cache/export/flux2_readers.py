"""Trainers and tools of FLUX.2 that read a file per row: musubi-tuner, NeMo Automodel, ComfyUI.

All three take `[128, h/16, w/16]` after FLUX.2's batch norm, which `--space flux2` approximates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from .base import Record, RowFiles, relative_path, safetensors_bytes, torch_bytes
from .files import OutFile
from .pieces import split
from .request import ARCHITECTURES

ITEMS = 10_000
"""Entries of one of Automodel's metadata files."""
MUSUBI_VERSION = "1.0.1"


class Musubi(RowFiles):
    """musubi-tuner (dataset/image_video_dataset.py): `STEM_WWWWxHHHH_ARCH.safetensors`, all in one folder.

    It sorts rows into its own buckets by the size in the name and stacks them. The size here is that of the latents'
    image rather than the original's, so that with `bucket_no_upscale` its buckets are those of the cache.
    """

    reader = "safetensors"

    def check(self) -> None:
        self.check_names("musubi-tuner keeps all latents in one folder by the stem alone; rename one and cache again")

    def row_name(self, i: int) -> str:
        stem, bucket = relative_path(self.rows.ids[i]).stem, self.rows.bucket(i)
        return f"{stem}_{bucket.width:04d}x{bucket.height:04d}_{self.request.architecture}.safetensors"

    def record(self, i: int) -> Record:
        latents, bucket = self.cast(self.rows.tensors(i), "latents", i), self.rows.bucket(i)
        _, height, width = latents.shape
        # the dtype's name in full: what follows the last underscore is cut off, whatever it is
        key = f"latents_{height}x{width}_{str(latents.dtype).removeprefix('torch.')}"
        metadata = {
            "architecture": ARCHITECTURES[self.request.architecture],
            "width": str(bucket.width),
            "height": str(bucket.height),
            "format_version": MUSUBI_VERSION,
        }
        return {key: latents, "metadata": metadata}

    def encode(self, record: Record) -> bytes:
        return safetensors_bytes({k: v for k, v in record.items() if k != "metadata"}, record["metadata"])

    def decode(self, path: Path) -> Record:
        return _read_safetensors(path)

    def advice(self, out: Path) -> list[str]:
        side = max(max(b.height, b.width) for b in self.rows.buckets)
        return [
            "musubi-tuner's dataset.toml (cache the text encoder's outputs as usual, and leave its cache_latents out):",
            f"  cache_directory = '{out}'",
            "  enable_bucket = true",
            "  bucket_no_upscale = true",
            f"  resolution = [{side}, {side}]",
        ]


class Comfy(RowFiles):
    """ComfyUI's LoadLatent (nodes.py): `NAME.latent` in its input folder, which it does not search deeper."""

    reader = "safetensors"

    def check(self) -> None:
        self.check_names("rename one and cache again")

    def row_name(self, i: int) -> str:
        return f"{str(relative_path(self.rows.ids[i])).replace('/', '_')}.latent"

    def record(self, i: int) -> Record:
        latents = self.cast(self.rows.tensors(i), "latents", i)[None]
        # without this tensor LoadLatent divides by 0.18215
        return {"latent_tensor": latents, "latent_format_version_0": torch.empty(0)}

    def encode(self, record: Record) -> bytes:
        return safetensors_bytes(record)

    def decode(self, path: Path) -> Record:
        found = _read_safetensors(path)
        found.pop("metadata")
        return found

    def advice(self, out: Path) -> list[str]:
        return [f"ComfyUI: copy {out}/*.latent to its input folder, and load them by LoadLatent"]


class Automodel(RowFiles):
    """NeMo Automodel (components/datasets/diffusion): metadata.json, its shards of items, and a .pt per row.

    It refuses a `cache_file` outside its folder, and resolves relative ones against the working directory: they are
    written in full, so that the folder must be exported to the place where it is read.
    """

    reader = "torch"

    def row_name(self, i: int) -> str:
        bucket = self.rows.bucket(i)
        return f"{bucket.width}x{bucket.height}/{i:08d}.pt"

    def record(self, i: int) -> Record:
        geometry, rows = self.rows.geometry, self.rows
        found: Record = {
            "latent": self.cast(rows.tensors(i), "latents", i),
            "crop_offset": [int(geometry["crop_left"][i]), int(geometry["crop_top"][i])],
            "prompt": rows.captions[i] if rows.captions is not None else "",
            "image_path": rows.ids[i],
        }
        if rows.text_latents is not None:
            found["prompt_embeds"] = rows.text_latents[rows.ids[i]][None].clone()
        return found

    def encode(self, record: Record) -> bytes:
        return torch_bytes(record)

    def decode(self, path: Path) -> Record:
        return torch.load(path, weights_only=True)

    def last_files(self, out: Path) -> Iterator[OutFile]:
        names = []
        for number, rows in enumerate(split(torch.arange(len(self.rows)).numpy(), ITEMS)):
            items = [self._item(out.resolve(), i) for i in rows.tolist()]
            names.append(f"metadata_shard_{number:04d}.json")
            yield OutFile(names[-1], [json.dumps(items).encode()])
        yield OutFile("metadata.json", [json.dumps({"shards": names}).encode()])

    def _item(self, out: Path, i: int) -> dict[str, Any]:
        bucket, geometry = self.rows.bucket(i), self.rows.geometry
        return {
            "cache_file": str(out / PurePosixPath(self.row_name(i))),
            "bucket_resolution": [bucket.width, bucket.height],
            "original_resolution": [int(geometry["width"][i]), int(geometry["height"][i])],
            "bucket_id": int(self.rows.bucket_numbers[i]),
            "aspect_ratio": bucket.width / bucket.height,
        }

    def advice(self, out: Path) -> list[str]:
        lines = [f"NeMo Automodel: cache_dir: {out.resolve()} (do not move the folder: its index names it in full)"]
        if self.rows.text_latents is None:
            lines.append("its collate function stacks prompt_embeds: export with --text-latents FILE.safetensors")
        return lines


def _read_safetensors(path: Path) -> Record:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        # a SafeOpen is no mapping
        names = list(file.keys())
        return {**{name: file.get_tensor(name) for name in names}, "metadata": file.metadata()}
