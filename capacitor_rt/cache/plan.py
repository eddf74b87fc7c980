"""The immutable plan of a cache: what goes in, what becomes of it, and which shard each input belongs to.

Everything that decides a byte of the shards stands in `plan.json`: the list of inputs (as a hash; the list itself is
`inputs.parquet`), geometry, model and storage. Shard membership, and within a shard the composition of every batch, are
functions of the plan, so that a run may end anywhere and another, here or elsewhere, writes the same files: to the bit
where the model computes the same bits, which torch promises for one kind of device, one number of threads and one
version. Batches matter too: a row's last bits may depend on the batch that it was encoded in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import CacheError, InputError
from ..images.decode import decoder_versions
from ..images.geometry import Size, bucket_table, square_bucket
from ..version import __version__
from .durable import PendingFile, canonical_json, read_commits
from .inputs import Inputs
from .model_source import ModelIdentity

FORMAT = "capacitor-latents/1"
PLAN = "plan.json"
PIPELINE = 1
"""Raised whenever the same plan would give other pixels or other files than before."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ITEM_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
MODEL_NAMES = ("id", "revision", "latent_space")
SHARD_BYTES = 256 << 20
BATCH_PIXELS = {"cuda": 128 * 256 * 256, "cpu": 16 * 256 * 256}


@dataclass(frozen=True)
class CacheRequest:
    """What a caller asks for.

    Attributes:
        side: pixels per side of the square bucket, or with `area` of the square whose area the buckets keep to.
        area: sort the images into buckets of about `side`^2 pixels by their aspect ratio.
        max_aspect: longer side over shorter side of the longest bucket.
        background: colour behind transparent pixels, three numbers of 0 to 255.
        dtype: type of the stored tensors, "bf16", "fp16" or "fp32".
        posterior: store `logsnr` too.
        flip: store the latents of the mirrored images too.
        batch: images per encode call. None takes an existing plan's, or else one that fits the size.
        shard_rows: most inputs per shard. None takes an existing plan's, or else as many as make 256 MiB.

    Raises:
        InputError: a value that is out of range.
    """

    side: int
    area: bool = False
    max_aspect: float = 4.0
    background: tuple[int, int, int] = (255, 255, 255)
    dtype: str = "bf16"
    posterior: bool = False
    flip: bool = False
    batch: int | None = None
    shard_rows: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        for name in ("batch", "shard_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value} is too small: it is at least 1")
        if len(self.background) != 3 or not all(0 <= c <= 255 for c in self.background):
            raise InputError(f"background {self.background} is not a colour: give three numbers of 0 to 255")

    def buckets(self, multiple: int) -> tuple[Size, ...]:
        """Sizes in pixels, legal for a model whose sides are multiples of `multiple`."""
        if self.area:
            return bucket_table(self.side, multiple, self.max_aspect)
        return (square_bucket(self.side, multiple),)


@dataclass(frozen=True)
class Shard:
    """A contiguous slice of the sorted inputs of one bucket.

    Attributes:
        inputs: ordinals of the inputs, int64 `[N]`, ascending.
        name: file of the tensors, relative to the cache.
        index: file of the index, relative to the cache.
    """

    bucket: Size
    inputs: np.ndarray
    name: str
    index: str


@dataclass(frozen=True)
class UnplannedInputs:
    """All inputs without a bucket: their header could not be read, or they are too elongated for any bucket.

    They get an index and no tensors. Attributes as in `Shard`.
    """

    inputs: np.ndarray
    index: str


Part: TypeAlias = Shard | UnplannedInputs
"""What is written and committed as one."""


@dataclass(frozen=True)
class CachePlan:
    """The contents of `plan.json`."""

    fields: dict[str, Any]

    @cached_property
    def id(self) -> str:
        """SHA-256 (hex) of what decides the bits: not of the model's name, nor of library versions."""
        return hashlib.sha256(canonical_json(_identity(self.fields))).hexdigest()

    @property
    def buckets(self) -> tuple[Size, ...]:
        return tuple(Size(*b) for b in self.fields["geometry"]["buckets"])

    @property
    def dtype(self) -> str:
        return self.fields["store"]["dtype"]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(self.fields["store"]["tensors"])

    @property
    def batch(self) -> int:
        return self.fields["store"]["batch"]

    @property
    def shard_rows(self) -> int:
        return self.fields["store"]["shard_rows"]

    def row_shape(self, bucket: Size) -> tuple[int, int, int]:
        """Shape of one row of each tensor: `[C, H/s, W/s]`."""
        model = self.fields["model"]
        return model["channels"], bucket.height // model["stride"], bucket.width // model["stride"]

    def row_bytes(self, bucket: Size) -> int:
        """Bytes of one row, all its tensors together."""
        return int(np.prod(self.row_shape(bucket))) * ITEM_SIZE[self.dtype] * len(self.tensors)

    def parts(self, bucket_of: np.ndarray) -> Iterator[Part]:
        """Every part of the cache in the order of writing: the inputs without a bucket, if there are any, then shards.

        Args:
            bucket_of: position in `buckets` of each input, or -1 without one, int `[N]`.
        """
        name = self.id[:8]
        unplanned = np.flatnonzero(bucket_of < 0)
        if len(unplanned):
            yield UnplannedInputs(unplanned, f"index/unplanned-{name}.parquet")
        for position, bucket in enumerate(self.buckets):
            members = np.flatnonzero(bucket_of == position)
            for number, start in enumerate(range(0, len(members), self.shard_rows)):
                yield Shard(
                    bucket,
                    members[start : start + self.shard_rows],
                    f"shards/{bucket}/{name}-{number:06d}.safetensors",
                    f"index/{bucket}-{name}-{number:06d}.parquet",
                )

    def save(self, out: Path) -> None:
        """Write `plan.json`, durably, unless an identical one is there.

        Raises:
            CacheError: another plan is there, or the file cannot be written.
        """
        body = json.dumps({**self.fields, "sha256": _checksum(self.fields)}, indent=1, sort_keys=True)
        PendingFile(out / PLAN, [body.encode() + b"\n"]).publish()


def load_plan(out: Path) -> CachePlan | None:
    """The plan of an existing cache, None where there is none.

    Raises:
        CacheError: the file is damaged, or of another format.
    """
    path = out / PLAN
    try:
        fields = json.loads(path.read_bytes())
        checksum = fields.pop("sha256")
    except FileNotFoundError:
        return None
    except OSError as e:
        raise CacheError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CacheError(_damaged(path, "it is no complete JSON object")) from None
    if fields.get("format") != FORMAT:
        raise CacheError(f"{path} has format {fields.get('format')!r}: this version reads {FORMAT!r}")
    if checksum != _checksum(fields):
        raise CacheError(_damaged(path, "its contents do not match its sha256"))
    return CachePlan(fields)


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}): restore it from a copy, or cache into a new OUT"


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def make_plan(request: CacheRequest, model: ModelIdentity, inputs: Inputs, buckets: tuple[Size, ...]) -> CachePlan:
    """The plan of a new cache. `inputs` have been assigned to `buckets`."""
    tensors = ["latents", "logsnr"] if request.posterior else ["latents"]
    if request.flip:
        tensors += [f"{name}_flip" for name in tensors]
    fields: dict[str, Any] = {
        "format": FORMAT,
        "pipeline": PIPELINE,
        "inputs": {"count": len(inputs), "sha256": inputs.digest()},
        "geometry": {
            **_geometry(request),
            "multiple": model.multiple,
            "buckets": [[b.height, b.width] for b in buckets],
        },
        "model": model.fields(),
        "whitening": model.whitening,
        "store": {"dtype": DTYPES[request.dtype], "tensors": tensors},
        "code": code_versions(),
    }
    fields["store"] |= {
        "batch": request.batch or _default_batch(model.device, buckets),
        "shard_rows": request.shard_rows or _default_shard_rows(CachePlan(fields), buckets),
    }
    return CachePlan(fields)


def _geometry(request: CacheRequest) -> dict[str, Any]:
    return {
        "mode": "area" if request.area else "size",
        "side": request.side,
        "max_aspect": float(request.max_aspect) if request.area else 1.0,
        "background": list(request.background),
        "exif_orientation": "applied",
        "icc_profile": "srgb",
        "resize": "cover",
        "filter": "lanczos",
        "upscale": "allow",
        "crop": "center",
    }


def code_versions() -> dict[str, str]:
    """Versions of what makes the pixels, for the record; they are not part of a plan's identity."""
    return {"capacitor_rt": __version__, **decoder_versions()}


def _default_batch(device: str, buckets: tuple[Size, ...]) -> int:
    largest = max(b.area for b in buckets)
    return max(1, BATCH_PIXELS.get(device, BATCH_PIXELS["cpu"]) // largest)


def _default_shard_rows(plan: CachePlan, buckets: tuple[Size, ...]) -> int:
    return max(1, SHARD_BYTES // max(plan.row_bytes(b) for b in buckets))


def _identity(fields: dict[str, Any]) -> dict[str, Any]:
    """The part of a plan that two runs must share to write the same bytes."""
    same = {k: fields[k] for k in ("format", "pipeline", "inputs", "geometry", "store")}
    return {**same, "model": {k: v for k, v in fields["model"].items() if k not in MODEL_NAMES}}


def check_plan(old: CachePlan, request: CacheRequest, model: ModelIdentity, out: Path) -> None:
    """Refuse to continue a cache under other settings or with another model.

    Raises:
        CacheError: names every field with its old and its new value.
    """
    fields = old.fields
    store = {
        "dtype": DTYPES[request.dtype],
        "posterior": request.posterior,
        "flip": request.flip,
        "batch": request.batch or old.batch,
        "shard_rows": request.shard_rows or old.shard_rows,
    }
    stored = {
        "dtype": old.dtype,
        "posterior": "logsnr" in old.tensors,
        "flip": "latents_flip" in old.tensors,
        "batch": old.batch,
        "shard_rows": old.shard_rows,
    }
    geometry = {k: v for k, v in fields["geometry"].items() if k not in ("buckets", "multiple")}
    model_new, model_old = model.fields(), dict(fields["model"])
    if model_new["sha256"] == model_old["sha256"]:
        # the same weights under another name are the same model
        for key in MODEL_NAMES:
            model_old.pop(key), model_new.pop(key)
    changes = [
        *_diff("", {"pipeline": fields["pipeline"]}, {"pipeline": PIPELINE}),
        *_diff("geometry.", geometry, _geometry(request)),
        *_diff("model.", model_old, model_new),
        *_diff("store.", stored, store),
    ]
    if changes:
        started = any(commit["rows"] for commit in read_commits(out).values())
        raise CacheError(
            f"{out} was planned otherwise, and a cache is never mixed:\n  "
            + "\n  ".join(changes)
            + "\nuse the old settings, or "
            + ("cache into a new OUT" if started else f"delete {out}, which holds no latents yet")
        )


def _diff(prefix: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _diff(f"{prefix}{key}.", a, b)
        elif a != b:
            lines.append(f"{prefix}{key} {a} -> {b}")
    return lines
