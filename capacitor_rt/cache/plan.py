"""The immutable plan of a cache: what goes in, and what becomes of it.

Everything that decides a byte of the latents stands in `plan.json`: the list of inputs (as a hash; the list itself is
`source.parquet`), geometry, model and storage. A task is a contiguous slice of the inputs, and the composition of its
batches is a function of the plan and of the inputs' contents, so that a run may end anywhere and another, here or
elsewhere, writes the same files: to the bit where the model computes the same bits, which torch promises for one kind
of device, one number of threads and one version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import CacheError
from ..images.decode import decoder_versions
from ..images.geometry import Size
from ..images.load import PixelPolicy
from ..schema import Invalid
from ..strict_json import StrictJSONError, parse
from ..version import __version__
from .folder import CacheFolder, PendingFile
from .hashing import canonical_json
from .model_source import ModelIdentity
from .parts import Part, parts_of, row_nbytes, value_dtype
from .plan_schema import FORMAT as FORMAT
from .plan_schema import OLD_FORMAT, check_plan_fields
from .request import DTYPES, CacheRequest, geometry, pixels
from .sources import Source

PLAN = "plan.json"
PLAN_BYTES = 16 << 20
PIPELINE = 2
"""Raised whenever the same plan would give other pixels or other files than before."""

MODEL_NAMES = ("id", "revision", "latent_space")
TASK_BYTES = 512 << 20
TASK_INPUTS = 8192
BATCH_PIXELS = {"cuda": 128 * 256 * 256, "cpu": 16 * 256 * 256}


class OtherFormat(CacheError):
    """A cache of another version of the format, which is left as it is."""


@dataclass(frozen=True)
class Task:
    """A contiguous slice of the inputs: what is written and committed as one.

    Attributes:
        number: from 0, in the order of the inputs.
        first, stop: the inputs are `first` to `stop - 1`.
    """

    number: int
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class CachePlan:
    """The contents of `plan.json`. What follows from them is computed once: they are never changed."""

    fields: dict[str, Any]

    @cached_property
    def id(self) -> str:
        """SHA-256 (hex) of what decides the bytes: not of the model's name, nor of library versions."""
        return hashlib.sha256(canonical_json(_identity(self.fields))).hexdigest()

    @property
    def plan8(self) -> str:
        """The digits of the identity that stand in file names."""
        return self.id[:8]

    @property
    def count(self) -> int:
        """Number of inputs."""
        return self.fields["source"]["count"]

    @property
    def task_count(self) -> int:
        return self.fields["source"]["tasks"]

    @cached_property
    def buckets(self) -> tuple[Size, ...]:
        return tuple(Size(*b) for b in self.fields["geometry"]["buckets"])

    @property
    def policy(self) -> PixelPolicy:
        """How bytes become pixels."""
        fields = self.fields["pixels"]
        names = ("decode", "icc", "upscale", "max_pixels")
        chosen = {name: fields[name] for name in names} | {"crop": self.fields["geometry"]["crop"]}
        return PixelPolicy(**chosen, background=tuple(fields["background"]))

    @property
    def columns(self) -> list[dict[str, str]]:
        """Name, type and origin of the columns that were kept from the source."""
        return self.fields["columns"]

    @property
    def dtype(self) -> str:
        """Type that the tensors are stored in."""
        return self.fields["store"]["dtype"]

    @property
    def value_dtype(self) -> str:
        """Type of the values that a reader gets: float32 of integers, otherwise `dtype`."""
        return value_dtype(self.dtype)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Kinds of tensors of a row."""
        return tuple(self.fields["store"]["tensors"])

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What is stored of a row: each kind's parts, in the order of the file and of the row's hash."""
        return tuple(part for kind in self.tensors for part in parts_of(kind, self.dtype))

    @property
    def batch(self) -> int:
        return self.fields["store"]["batch"]

    @property
    def task_inputs(self) -> int:
        return self.fields["store"]["task_inputs"]

    @property
    def number(self) -> int:
        """Of the generation: 0 for a cache that was never updated."""
        return self.fields["generation"]["number"] if self.is_update else 0

    @property
    def is_update(self) -> bool:
        """Whether `cache --update` has made it: its rows may lie in files of earlier generations."""
        return "generation" in self.fields

    @property
    def is_interim(self) -> bool:
        """Whether it has one input for each content alone, and the others are still to be added."""
        return "distinct_of" in self.fields["source"]

    @property
    def log_name(self) -> str:
        """File of the commit lines; one for each generation, so that `plan.json` alone says which counts."""
        return self._own("commits.jsonl")

    @property
    def source_name(self) -> str:
        """File of the list of inputs."""
        return self._own("source.parquet")

    @property
    def carried_name(self) -> str:
        """File of the list of latents that were taken over from earlier generations, where there are any."""
        return self._own("carried.jsonl")

    def _own(self, name: str) -> str:
        stem, _, kind = name.partition(".")
        return f"{stem}-{self.plan8}.{kind}" if self.is_update else name

    def stem(self, task: int) -> str:
        """What the names of a task's files share; the value of `file` in an index."""
        return f"{self.plan8}-{task:06d}"

    def data_name(self, task: int) -> str:
        """File of a task's latents, relative to the cache."""
        return f"tasks/{self.stem(task)}.safetensors"

    def index_name(self, task: int) -> str:
        """File of a task's index, relative to the cache."""
        return f"index/{self.stem(task)}.parquet"

    def row_shape(self, bucket: Size) -> tuple[int, int, int]:
        """Shape of one row of each kind: `[C, H/s, W/s]`."""
        model = self.fields["model"]
        return model["channels"], bucket.height // model["stride"], bucket.width // model["stride"]

    def row_bytes(self, bucket: Size) -> int:
        """Bytes of one row, all its kinds and their parts together."""
        return row_nbytes(self.tensors, self.dtype, self.row_shape(bucket))

    def text(self) -> bytes:
        """The bytes of `plan.json`."""
        return self._text

    @cached_property
    def _text(self) -> bytes:
        # every index holds it and is compared with it
        body = json.dumps({**self.fields, "sha256": _checksum(self.fields)}, indent=1, sort_keys=True)
        return body.encode() + b"\n"

    def save(self, folder: CacheFolder) -> None:
        """Write `plan.json`, durably, unless an identical one is there.

        Raises:
            CacheError: another plan is there, or the file cannot be written.
        """
        PendingFile(folder, PLAN, [self.text()]).publish()


def load_plan(folder: CacheFolder) -> CachePlan | None:
    """The plan of an existing cache, None where there is none.

    Raises:
        CacheError: the file is damaged, or of another format.
    """
    try:
        data = folder.read(PLAN, PLAN_BYTES)
    except FileNotFoundError:
        return None
    return parse_plan(data, folder)


def parse_plan(data: bytes, folder: CacheFolder) -> CachePlan:
    """The plan that the bytes of a `plan.json` are. Errors as in `load_plan`."""
    path = folder.path / PLAN
    try:
        fields = parse(data)
    except StrictJSONError as e:
        raise _damaged(folder, f"it is not valid JSON: {e}") from e
    if not isinstance(fields, dict) or type(fields.get("format")) is not str:
        raise _damaged(folder, "it names no format")
    if fields["format"] == OLD_FORMAT:
        raise OtherFormat(
            f"{folder.path} is a cache of format {OLD_FORMAT}, which version 0.2 wrote and reads; it is left as it is: "
            "cache into a new OUT, or go on with capacitor-rt 0.2"
        )
    if fields["format"] != FORMAT:
        raise OtherFormat(f"{path} has format {fields['format'][:80]!r}: this version reads {FORMAT!r}")
    checksum = fields.pop("sha256", None)
    try:
        known = _checksum(fields)
    except ValueError as e:
        raise _damaged(folder, str(e)) from e
    if checksum != known:
        raise _damaged(folder, "its contents do not match its sha256")
    try:
        check_plan_fields(fields)
    except Invalid as e:
        raise _damaged(folder, str(e)) from e
    return CachePlan(fields)


def _damaged(folder: CacheFolder, why: str) -> CacheError:
    return CacheError(
        f"{folder.path / PLAN} is damaged ({why}): `capacitor-rt verify --repair {folder.path}` restores it from the "
        "index; or cache into a new OUT"
    )


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def make_plan(
    request: CacheRequest,
    model: ModelIdentity,
    source: Source,
    buckets: tuple[Size, ...],
    configs: dict[str, Any] | None = None,
    distinct_of: dict[str, Any] | None = None,
    gpu_decode: dict[str, Any] | None = None,
) -> CachePlan:
    """The plan of a new cache.

    Args:
        configs, gpu_decode: as `kept_configs.configs_of` and `nvjpeg.environment` give them.
        distinct_of: of an interim plan, what the field of this name says.
    """
    tensors = ["latents", "logsnr"] if request.posterior else ["latents"]
    if request.flip:
        tensors += [f"{name}_flip" for name in tensors]
    fields: dict[str, Any] = {
        "format": FORMAT,
        "pipeline": PIPELINE,
        "source": source.fields(),
        "columns": source.columns.fields(),
        "label_names": source.columns.label_names,
        "geometry": {
            **geometry(request),
            "multiple": model.multiple,
            "buckets": [[b.height, b.width] for b in buckets],
        },
        "pixels": pixels(request),
        "model": model.fields(),
        "whitening": model.whitening,
        "store": {"dtype": DTYPES[request.dtype], "tensors": tensors},
        "code": code_versions(),
    }
    if configs:
        fields["configs"] = configs
    if gpu_decode:
        fields["gpu_decode"] = gpu_decode
    if request.dedupe:
        fields["store"]["dedupe"] = True
    fields["store"] |= {
        "batch": request.batch or _default_batch(model.device, buckets),
        "task_inputs": request.task_inputs or _default_task_inputs(CachePlan(fields), buckets),
    }
    fields["source"]["tasks"] = len(source.listing.tasks(fields["store"]["task_inputs"]))
    if distinct_of:
        fields["source"]["distinct_of"] = distinct_of
    return new_plan(fields)


def new_plan(fields: dict[str, Any]) -> CachePlan:
    """A plan that is to be written.

    Raises:
        CacheError: it could not be read again, which would be the end of the cache.
    """
    plan = CachePlan(fields)
    try:
        check_plan_fields(fields)
        parse(text := plan.text())
    except (Invalid, StrictJSONError) as e:
        raise CacheError(f"these inputs and settings make no plan ({e}): rename or leave out what is named") from e
    if len(text) > PLAN_BYTES:
        raise CacheError(f"the names of the labels take {len(text)} bytes, and {PLAN_BYTES} are the most: use numbers")
    return plan


def plan_tasks(plan: CachePlan, bounds: Sequence[tuple[int, int]]) -> list[Task]:
    """The tasks whose inputs the source bounds so."""
    return [Task(number, first, stop) for number, (first, stop) in enumerate(bounds)]


def code_versions() -> dict[str, str]:
    """Versions of what makes the pixels, for the record; they are not part of a plan's identity."""
    return {"capacitor_rt": __version__, **decoder_versions()}


def _default_batch(device: str, buckets: tuple[Size, ...]) -> int:
    largest = max(b.area for b in buckets)
    return max(1, BATCH_PIXELS.get(device, BATCH_PIXELS["cpu"]) // largest)


def _default_task_inputs(plan: CachePlan, buckets: tuple[Size, ...]) -> int:
    most = max(1, min(TASK_INPUTS, TASK_BYTES // max(plan.row_bytes(b) for b in buckets)))
    # a power of two, so that the tasks of several views lie in each other
    return 1 << (most.bit_length() - 1)


def _identity(fields: dict[str, Any]) -> dict[str, Any]:
    """The part of a plan that two runs must share to write the same bytes."""
    same = {k: fields[k] for k in ("format", "pipeline", "source", "columns", "geometry", "pixels", "store")}
    same |= {k: fields[k] for k in ("configs", "gpu_decode", "generation") if k in fields}
    return {**same, "model": {k: v for k, v in fields["model"].items() if k not in MODEL_NAMES}}
