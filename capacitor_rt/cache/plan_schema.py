"""What `plan.json` may hold."""

from __future__ import annotations

from typing import Any

from ..images.color import ICC_POLICIES
from ..images.geometry import UPSCALE_POLICIES
from ..images.load import CROPS, DECODE_POLICIES
from ..images.reasons import DEFAULT_MAX_PIXELS
from ..schema import HEX64, Anything, Choice, Invalid, ListOf, MapOf, Number, Optional, Record, Text
from .parts import FLOATS, ITEM_SIZE

FORMAT = "capacitor-latents/2"
OLD_FORMAT = "capacitor-latents/1"
KINDS = ("latents", "logsnr", "latents_flip", "logsnr_flip")
RESERVED = frozenset(
    (
        *("input", "id", "status", "reason", "message", "bytes_hash", "width", "height", "orientation", "bucket"),
        *("resize_height", "resize_width", "crop_top", "crop_left", "row", "row_hash", "min", "max", "mean", "std"),
        *("file", *KINDS),
    )
)
"""Names that an index has columns of, or a row tensors: nothing is kept under them."""

_SIDE = Number(1, 1 << 24)
_COUNT = Number(0, 2**48)
_NUMBERS = ListOf(Number(-1e30, 1e30, whole=False), 1, 4096)
COLUMN_TYPES = ("int64", "float64", "string", "bool")
# of columns that have a meaning
_COLUMNS = {"label": "int64", "caption": "string"}
COLUMN_NAME = Text(r"[^\x00-\x1f/]{1,200}")
PLAN_SCHEMA = Record(
    {
        "format": Choice((FORMAT,)),
        "pipeline": Number(1, 1 << 20),
        "source": Record(
            {
                "kind": Text("[a-z]{1,20}"),
                "count": Number(1, 2**48),
                "sha256": HEX64,
                "tasks": _COUNT,
                "distinct_of": Record({"count": Number(1, 2**48), "sha256": HEX64}),
            },
            optional=("distinct_of",),
        ),
        "columns": ListOf(
            Record({"name": COLUMN_NAME, "type": Choice(COLUMN_TYPES), "from": Text(longest=400)}), most=200
        ),
        "label_names": Optional(ListOf(Text(longest=4096), most=1 << 20)),
        "geometry": Record(
            {
                "mode": Choice(("size", "area")),
                "side": _SIDE,
                "max_aspect": Number(1, 1e9, whole=False),
                "multiple": _SIDE,
                "buckets": ListOf(ListOf(_SIDE, 2, 2), 1, 1 << 16),
                "resize": Text(longest=40),
                "crop": Choice(CROPS),
            }
        ),
        "pixels": Record(
            {
                "decode": Choice(DECODE_POLICIES),
                "icc": Choice(ICC_POLICIES),
                "background": ListOf(Number(0, 255), 3, 3),
                "upscale": Choice(UPSCALE_POLICIES),
                "max_pixels": Number(1, 2**48),
                "filter": Text(longest=40),
                "resample": Text(longest=40),
                "exif_orientation": Text(longest=40),
            }
        ),
        "model": Record(
            {
                "id": Text(),
                "revision": Optional(Text()),
                "sha256": HEX64,
                "latent_space": Text(),
                "config": MapOf(Anything()),
                "channels": Number(1, 1 << 16),
                "stride": Number(1, 1 << 12),
                "compute_dtype": Choice(FLOATS),
                "encoding": Text("[a-z0-9-]{1,40}"),
            },
            optional=("encoding",),
        ),
        "whitening": Optional(Record({"mean": _NUMBERS, "std": _NUMBERS})),
        "store": Record(
            {
                "dtype": Choice(tuple(ITEM_SIZE)),
                "tensors": ListOf(Choice(KINDS), 1, 4),
                "batch": Number(1, 1 << 24),
                "task_inputs": Number(1, 1 << 31),
                "dedupe": Choice((True,)),
            },
            optional=("dedupe",),
        ),
        "code": MapOf(Text(longest=200)),
        # what a config may be is checked by the launches, which know theirs
        "configs": Record(
            {"compute_capability": Number(80, 999), "families": MapOf(ListOf(MapOf(Anything()), most=4096), most=100)}
        ),
        "gpu_decode": Record(
            {
                "torchvision": Text(r"[0-9a-z.]{1,40}"),
                "nvjpeg": Text(r"[0-9.]{1,40}"),
                "decoded_by": Choice(("engine", "cuda")),
                "compute_capability": Number(50, 999),
            }
        ),
        "generation": Record({"number": Number(1, 1 << 30), "of": HEX64, "carried": HEX64}),
    },
    optional=("configs", "gpu_decode", "generation"),
)


def check_plan_fields(fields: Any) -> None:
    """Raises Invalid for what no plan of this format can be."""
    PLAN_SCHEMA.check("", fields)
    _check_values(fields)


def _check_values(fields: dict[str, Any]) -> None:
    """What the schema cannot say: which values go together."""
    model, store, geometry = fields["model"], fields["store"], fields["geometry"]
    if any(side % model["stride"] for bucket in geometry["buckets"] for side in bucket):
        raise Invalid("a bucket's side is no multiple of the model's stride")
    if len({tuple(b) for b in geometry["buckets"]}) < len(geometry["buckets"]):
        raise Invalid("a bucket is there twice")
    if geometry["side"] ** 2 > DEFAULT_MAX_PIXELS:
        raise Invalid(f"no image is brought to {geometry['side']}^2 pixels")
    for height, width in geometry["buckets"]:
        if height % geometry["multiple"] or width % geometry["multiple"] or height * width > geometry["side"] ** 2:
            raise Invalid(f"a bucket of {height}x{width} is not one of side {geometry['side']}")
    square = all(height == width for height, width in geometry["buckets"])
    if geometry["crop"] == "adm" and not (square and fields["pixels"]["decode"] == "exact"):
        raise Invalid("crop adm is square, of images that are decoded exactly")
    if ("gpu_decode" in fields) != (fields["pixels"]["decode"] == "gpu"):
        raise Invalid("gpu_decode goes with decode gpu")
    if store["tensors"] != [kind for kind in KINDS if kind in store["tensors"]] or "latents" not in store["tensors"]:
        raise Invalid("store.tensors are not latents and what belongs to them")
    largest = max(h * w for h, w in geometry["buckets"]) // model["stride"] ** 2
    if largest * model["channels"] * 4 * store["task_inputs"] >= 2**62:
        raise Invalid("a task's latents overflow 64 bits")
    if fields["whitening"] is not None and any(len(v) != model["channels"] for v in fields["whitening"].values()):
        raise Invalid("whitening has not one number per channel")
    names = [column["name"] for column in fields["columns"]]
    if len(set(names)) < len(names):
        raise Invalid("a column is there twice")
    for column in fields["columns"]:
        name, kind = column["name"], column["type"]
        if name in RESERVED or _COLUMNS.get(name, kind) != kind:
            raise Invalid(f"a column {name!r} of type {kind} cannot be kept")
    if not fields["source"]["count"] >= fields["source"]["tasks"] >= 1:
        raise Invalid("source.tasks does not fit source.count")
