"""WebDataset tars: TREAD's `KEY.latent.npy` and `KEY.cls`, or megatron-energon's `KEY.pth`.

Members of a key lie together, a key is the row's number in eight digits (a name with dots would be split in the wrong
place), and everything about a tar's bytes follows from the rows: no times, no owners.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import CacheError, InputError
from ...extras import is_installed
from .base import Format, Record, from_numpy, torch_bytes
from .files import OutFile
from .pieces import Piece, cut
from .rows import Rows

SHARD_BYTES = 1_000_000_000
NV_META = ".nv-meta"
"""Where `energon prepare` puts its index."""
BLOCK = tarfile.BLOCKSIZE
# of a member beside its data: its header, and the padding of both
_OVERHEAD = 2 * BLOCK


class Wds(Format):
    """Tars of at most `shard_bytes`; of several image sizes each has its folder."""

    def __init__(self, rows: Rows):
        self._energon = rows.request.preset == "energon"
        super().__init__(rows)
        self._installed = is_installed("webdataset")
        if self._installed:
            self.reader = f"webdataset {version('webdataset')}"

    def check(self) -> None:
        if not self._energon:
            return
        if self.request.posterior:
            raise InputError("--preset energon holds latents as they are used: leave --posterior away")
        for bucket in self.rows.buckets:
            if any(side % 2 for side in self.rows.shape(bucket)[1:]):
                raise InputError(
                    f"images of {bucket} have latents of {'x'.join(map(str, self.rows.shape(bucket)))}, and NeMo cuts "
                    "them into 2x2 patches: use --layout unpatchified"
                )

    def plan(self) -> Iterator[Piece]:
        number, limit = 0, self.request.shard_bytes or SHARD_BYTES
        for position, bucket in enumerate(self.rows.buckets):
            folder = f"{bucket}/" if len(self.rows.buckets) > 1 else ""
            rows = np.flatnonzero(self.rows.bucket_numbers == position)
            # the two blocks at the end of a tar, which is padded to a record
            for n, piece in enumerate(cut(rows, self._sizes(rows), max(1, limit - tarfile.RECORDSIZE))):
                yield Piece(number, piece, f"{folder}{self.request.prefix}-train-{n:06d}.tar")
                number += 1

    def _sizes(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of each row in a tar, at most."""
        shape = self.rows.shape(self.rows.bucket(int(rows[0])))
        latents = int(np.prod(shape)) * self.rows.out_dtype.itemsize
        copies = (2 if self.request.posterior else 1) * (1 if self._energon or not self.rows.has_flips else 2)
        # the headers of npy and pth, cls, and json without its id
        per_row = copies * (latents + 4096 + _OVERHEAD) + 4 * _OVERHEAD
        if self.rows.text_latents is not None:
            per_row += max(int(np.prod(s)) for s in self.rows.text_latents.shapes) * 4 + 4096 + _OVERHEAD
        texts = [self.rows.ids, *([self.rows.captions] if self.rows.captions is not None else [])]
        sizes = np.array([per_row + sum(6 * len(t[i]) for t in texts) for i in rows.tolist()], np.int64)
        for name, (_, values) in self.rows.kept.items():
            sizes += [8 + 6 * (len(name) + len(str(values[i].as_py()))) for i in rows.tolist()]
        return sizes

    def record(self, i: int) -> Record:
        rows, tensors = self.rows, self.rows.tensors(i)
        found: Record = {}
        if self._energon:
            # a tensor of its own: of a view, torch.save writes all that it is a view of
            found["pth"] = self.cast(tensors, "latents", i)[:, None].clone()
            if rows.text_latents is not None:
                found["pickle"] = rows.text_latents[rows.ids[i]].float()
        else:
            for name in tensors:
                member = f"{'latent' + name[7:] if name.startswith('latents') else name}.npy"
                found[member] = self.cast(tensors, name, i)
        if rows.labels is not None:
            found["cls"] = int(rows.labels.numbers[i])
        if rows.captions is not None:
            found["txt"] = rows.captions[i]
        found["json"] = self._description(i)
        return dict(sorted(found.items()))

    def _description(self, i: int) -> dict[str, Any]:
        bucket, geometry = self.rows.bucket(i), self.rows.geometry
        height, width, top, left = (int(geometry[k][i]) for k in ("height", "width", "crop_top", "crop_left"))
        found = {"id": self.rows.ids[i], "original_height": height, "original_width": width}
        kept = {name: values[i].as_py() for name, (_, values) in self.rows.kept.items()}
        # no NaN in JSON
        found |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in kept.items()}
        if self._energon:
            # nobody scored them: NeMo's encoder skips what is below its threshold, 0.0 by default
            return found | {"image_height": bucket.height, "image_width": bucket.width, "aesthetic_score": 0.0}
        return found | {"height": bucket.height, "width": bucket.width, "crop_top": top, "crop_left": left}

    def files(self, piece: Piece) -> Iterator[OutFile]:
        yield OutFile(piece.name, self._chunks(piece))

    def _chunks(self, piece: Piece) -> Iterator[bytes]:
        total = 0
        for i in piece.rows.tolist():
            for name, value in self.record(i).items():
                data = encode_member(name, value)
                info = tarfile.TarInfo(f"{i:08d}.{name}")
                info.size, info.mode = len(data), 0o644
                block = info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
                total += len(block)
                yield block
        total += 2 * BLOCK
        yield bytes(2 * BLOCK + -total % tarfile.RECORDSIZE)

    def read(self, out: Path, piece: Piece) -> Iterator[Record]:
        read = _webdataset_samples if self._installed else _tar_samples
        for sample in read(out / piece.name):
            yield {k: from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in sorted(sample.items())}

    def _prepare(self) -> list[str]:
        """Options of `energon prepare`."""
        pattern = f"{'.*/' if len(self.rows.buckets) > 1 else ''}.*\\.tar"
        return ["--non-interactive", "--split-parts", f"train:{pattern}", "--sample-type", "CrudeWebdataset"]

    def finish(self, out: Path) -> None:
        if not self._energon or (out / NV_META).exists() or not is_installed("megatron.energon"):
            return
        command = [
            sys.executable,
            "-m",
            "megatron.energon.cli.main",
            "prepare",
            "--no-progress",
            *self._prepare(),
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            raise CacheError(f"every tar is written and checked, but `energon prepare` failed: {lines[-1]}")

    def advice(self, out: Path) -> list[str]:
        deep = "/*" if len(self.rows.buckets) > 1 else ""
        if self._energon:
            lines = [f"prepared for energon: its path is {out}"]
            if not (out / NV_META).exists():
                lines = [f"energon prepare {shlex.join(self._prepare())} {out}"]
            if self.rows.text_latents is None:
                lines.append("NeMo's BasicDiffusionTaskEncoder reads KEY.pickle too: export with --text-latents")
            return lines
        lines = [f"webdataset.WebDataset(sorted(glob.glob('{out}{deep}/*.tar'))).decode()"]
        if self.rows.labels is None:
            lines.append("TREAD reads KEY.cls too: export with --labels folder or FILE")
        return lines


def encode_member(name: str, value: Any) -> bytes:
    """A value as the bytes of a member with that extension."""
    kind = name.rpartition(".")[2]
    if kind == "npy":
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, value.numpy(), allow_pickle=False)
        return buffer.getvalue()
    if kind == "pth":
        return torch_bytes(value)
    if kind == "pickle":
        return pickle.dumps(value.numpy(), protocol=4)
    if kind == "json":
        return json.dumps(value).encode()
    return str(value).encode()


def _tar_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Samples of a tar by the standard library alone."""
    sample: dict[str, Any] = {}
    last = None
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            key, _, name = info.name.partition(".")
            if key != last and last is not None:
                yield sample
                sample = {}
            last = key
            file = tar.extractfile(info)
            assert file is not None, "every member is a file"
            sample[name] = _decode_member(name, file.read())
    if last is not None:
        yield sample


def _decode_member(name: str, data: bytes) -> Any:
    kind = name.rpartition(".")[2]
    if kind == "npy":
        return np.load(io.BytesIO(data), allow_pickle=False)
    if kind == "pth":
        return torch.load(io.BytesIO(data), weights_only=True)
    if kind == "pickle":
        # of our own making: the member was written a moment ago
        return pickle.loads(data)
    if kind == "json":
        return json.loads(data)
    return int(data) if kind == "cls" else data.decode()


def _webdataset_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Samples of a tar as webdataset decodes them."""
    webdataset = import_module("webdataset")
    for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
        yield {name: value for name, value in sample.items() if not name.startswith("__")}
