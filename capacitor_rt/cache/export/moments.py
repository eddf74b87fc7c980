"""Moments of the posterior, a file per row: MAR's npz, DDT's pt. Mean (the cached mode) and deviation are whitened.

Of a cache without `--posterior`, or an export without it, the deviation is zero: as a logarithm -30, at which their
samplers clamp.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .base import Record, RowFiles, from_numpy, relative_path, torch_bytes

MAR_SCALE = 0.2325
"""MAR's loop multiplies its samples by this (LTH14/mar, engine_mar.py)."""
LEAST_LOGVAR = -30.0


class _ClassFolders(RowFiles):
    """A file per row, under the folder of its class, which is what torchvision's DatasetFolder numbers."""

    def _name(self, i: int) -> str:
        """Of the input; under the number of its class unless its top folder is the class."""
        assert self.rows.labels is not None, "required"
        path = str(relative_path(self.rows.ids[i]))
        if self.rows.labels_are_folders:
            return path
        digits = max(4, len(str(int(self.rows.labels.numbers.max()))))
        return f"{int(self.rows.labels.numbers[i]):0{digits}d}/{path}"

    def moments(self, i: int, suffix: str = "") -> tuple[Tensor, Tensor]:
        """Mean and deviation of a row, `[C,h,w]` each."""
        tensors = self.rows.tensors(i)
        mean = self.cast(tensors, f"latents{suffix}", i)
        name = f"std{suffix}"
        return mean, self.cast(tensors, name, i) if name in tensors else torch.zeros_like(mean)


def log_variance(std: Tensor) -> Tensor:
    """`2 ln std`, at least `LEAST_LOGVAR`."""
    return (2 * std.log()).clamp_min(LEAST_LOGVAR)


class Mar(_ClassFolders):
    """MAR (util/loader.py): `class/name.ext.npz` with `moments` and `moments_flip`, `[2C,h,w]`, mean then log-variance.

    Its loop multiplies samples by 0.2325: means are divided by it, and `2 ln 0.2325` is subtracted from log-variances.
    """

    reader = "numpy"

    def check(self) -> None:
        factor = self.request.scale / MAR_SCALE
        self.conversion = f"multiplied by {factor:g} (1 / {MAR_SCALE} for MAR's loop)"
        assert self.rows.labels is not None, "required"
        present = np.unique(self.rows.labels.numbers)
        if len(present) != int(present[-1]) + 1:
            absent = next(n for n, label in enumerate([*present.tolist(), -1]) if label != n)
            raise InputError(
                f"no row has the label {absent}, and MAR numbers the folders that are there: classes above it would "
                "shift; number the classes without gaps by --labels FILE"
            )
        self.check_names("rename one and cache again")

    def row_name(self, i: int) -> str:
        return f"{self._name(i)}.npz"

    def record(self, i: int) -> Record:
        found = {}
        for suffix in ("", "_flip"):
            mean, std = self.moments(i, suffix)
            parts = [mean / MAR_SCALE, log_variance(std) - 2 * math.log(MAR_SCALE)]
            found[f"moments{suffix}"] = torch.cat(parts)
        return found

    def encode(self, record: Record) -> bytes:
        return npz(record)

    def decode(self, path: Path) -> Record:
        with np.load(path, allow_pickle=False) as file:
            return {name: from_numpy(file[name]) for name in file.files}

    def advice(self, out: Path) -> list[str]:
        size, patch = self.rows.buckets[0].height, 2 if self.request.layout == "unpatchified" else 1
        return [
            f"MAR: main_mar.py --use_cached --cached_path {out} --img_size {size} --vae_embed_dim {self.rows.channels} "
            f"--vae_stride {self.rows.stride} --patch_size {patch}"
        ]


class Ddt(_ClassFolders):
    """DDT (src/data/dataset/imagenet.py): `class/name.ext.pt` with `mean` and `logvar`, `[C,h,w]` each.

    It lists the images of ROOT, whose folders are its classes, and looks the latents up in `ROOT_256_latent`.
    """

    reader = "torch"

    def check(self) -> None:
        if not self.rows.labels_are_folders:
            raise InputError("DDT takes labels from the folders of its images: use --labels folder")
        self.check_names("rename one and cache again")

    def row_name(self, i: int) -> str:
        return f"{self._name(i)}.pt"

    def record(self, i: int) -> Record:
        mean, std = self.moments(i)
        return {"mean": mean, "logvar": log_variance(std)}

    def encode(self, record: Record) -> bytes:
        return torch_bytes(record)

    def decode(self, path: Path) -> Record:
        return torch.load(path, weights_only=True)

    def advice(self, out: Path) -> list[str]:
        patch = 1 if self.request.layout == "patchified" else 2
        size = self.rows.buckets[0].height
        return [
            f"DDT: name {out} as its images with _{size}_latent behind; in_channels {self.rows.channels}, "
            f"patch_size {patch}, and no scaling of latents"
        ]


def npz(record: Record) -> bytes:
    """An uncompressed .npz whose bytes depend on nothing but its arrays: numpy's own have the time in them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in record.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, tensor.numpy(), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return buffer.getvalue()
