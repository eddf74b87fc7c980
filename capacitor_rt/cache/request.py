"""What a caller asks of a cache: sizes, geometry, colours, storage; checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass
from typing import Any

from ..errors import InputError
from ..images.geometry import Size, bucket_table, square_bucket
from ..images.load import PixelPolicy
from ..images.reasons import DEFAULT_MAX_PIXELS
from .parts import INT8

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int8": INT8}


@dataclass(frozen=True)
class CacheRequest:
    """What a caller asks for.

    Attributes:
        side: pixels per side of the square bucket, or with `area` of the square whose area the buckets keep to.
        area: sort the images into buckets of about `side`^2 pixels by their aspect ratio.
        max_aspect: longer side over shorter side of the longest bucket.
        background: colour behind transparent pixels, three numbers of 0 to 255.
        dtype: type of the stored tensors, "bf16", "fp16", "fp32", or "int8" with a scale per row and channel, see
            `quantization`.
        decode: "exact"; "fast": large JPEGs are shrunk while they are decoded; or "gpu": the GPU decodes the usual
            ones, as `PixelPolicy` says.
        icc: "srgb" brings images with a colour profile to sRGB, "ignore" passes profiles over.
        crop: "center", or "adm": the square crop of ADM and DiT, see `images.adm`.
        posterior: store `logsnr` too.
        flip: store the latents of the mirrored images too.
        dedupe: inputs of the same bytes share a row.
        batch: images per encode call. None takes an existing plan's, or else one that fits the size.
        task_inputs: most inputs per task, that is per file of latents. None takes an existing plan's, or else 8192, or
            fewer where their latents would exceed 512 MiB. `shard_rows` is the name of version 0.2.

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
    task_inputs: int | None = None
    decode: str = "exact"
    icc: str = "srgb"
    crop: str = "center"
    dedupe: bool = False
    shard_rows: InitVar[int | None] = None

    def __post_init__(self, shard_rows: int | None) -> None:
        if shard_rows is not None:
            object.__setattr__(self, "task_inputs", shard_rows)
        if self.side**2 > DEFAULT_MAX_PIXELS:
            most = math.isqrt(DEFAULT_MAX_PIXELS)
            raise InputError(f"side {self.side} is too large: no image is brought to more than {most} x {most} pixels")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        for name in ("batch", "task_inputs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value} is too small: it is at least 1")
        if self.area and self.crop == "adm":
            raise InputError("crop adm is square, and an area has buckets of many shapes: use --size, or crop center")
        self.policy()

    def policy(self) -> PixelPolicy:
        """How bytes become pixels."""
        return PixelPolicy(decode=self.decode, icc=self.icc, background=self.background, crop=self.crop)

    def buckets(self, multiple: int) -> tuple[Size, ...]:
        """Sizes in pixels, legal for a model whose sides are multiples of `multiple`."""
        if self.area:
            return bucket_table(self.side, multiple, self.max_aspect)
        return (square_bucket(self.side, multiple),)


def geometry(request: CacheRequest) -> dict[str, Any]:
    """What `geometry` says of a request; the buckets, which need the model, are added."""
    return {
        "mode": "area" if request.area else "size",
        "side": request.side,
        "max_aspect": float(request.max_aspect) if request.area else 1.0,
        "resize": "cover",
        "crop": request.crop,
    }


def pixels(request: CacheRequest) -> dict[str, Any]:
    """How bytes become pixels."""
    return {**request.policy().fields(), "exif_orientation": "applied"}
