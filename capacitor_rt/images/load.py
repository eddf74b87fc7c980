"""From the bytes of an image file to the pixels that are encoded: the one definition of them.

Decoded as `decode` says, resized and cropped as `geometry` places it, turned upright, and then brought from its colour
profile to sRGB, in this order: resizing does not need the other two, which are done to the few pixels that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ..errors import ImageError, InputError
from . import adm, deferred
from .color import ICC_POLICIES
from .decode import Buffer, OpenedImage, check_background, open_image
from .geometry import TOO_SMALL, UPSCALE_POLICIES, Placement, Size, apply, assign, place, stored_window
from .jpeg import MOST_SHRINK, shrunk
from .opening import ImageHeader
from .reasons import CORRUPT, DEFAULT_MAX_PIXELS, TOO_LARGE
from .resample import MOST_WASTE, Window
from .together import Together

DECODE_POLICIES = ("exact", "fast", "gpu")
CROPS = ("center", "adm")
FILTER, RESAMPLE = "lanczos", "int16"


@dataclass(frozen=True)
class PixelPolicy:
    """What of the pixels is a matter of choice. It is part of a cache's plan.

    Attributes:
        decode: "exact", or "fast": the DCT of a large JPEG shrinks it by 2, 4 or 8, never to less than twice the size
            that it is resized to; or "gpu": what `gpu_jpeg` lets through is decoded by a GPU where there is one, and
            exactly everywhere else.
        icc: "srgb" brings pixels with a colour profile to sRGB, "ignore" passes profiles over.
        background: RGB, 0-255, behind transparent pixels.
        upscale: "allow", or "refuse" for images smaller than their bucket.
        max_pixels: largest width x height that is decoded.
        crop: "center": resized until the bucket is just covered, then cropped at the centre; "adm": as ADM, DiT and
            those after them did it, see `images.adm`, which is a matter of squares and of `exact` decoding.

    Raises:
        InputError: a value that is none of these.
    """

    decode: str = "exact"
    icc: str = "srgb"
    background: tuple[int, int, int] = (255, 255, 255)
    upscale: str = "allow"
    max_pixels: int = DEFAULT_MAX_PIXELS
    crop: str = "center"

    def __post_init__(self) -> None:
        choices = {"decode": DECODE_POLICIES, "icc": ICC_POLICIES, "upscale": UPSCALE_POLICIES, "crop": CROPS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is unknown: use one of {', '.join(known)}")
        check_background(self.background)
        if self.crop == "adm" and self.decode != "exact":
            raise InputError(f"crop adm halves the whole picture, which decode {self.decode} does not have: use exact")
        if self.max_pixels < 1:
            raise InputError(f"max_pixels {self.max_pixels} allows no image: use 1 or more")

    def fields(self) -> dict[str, Any]:
        """Everything that the pixels depend on beside the file and its placement, as JSON has it."""
        fields = asdict(self) | {"background": list(self.background)}
        # it is a matter of the placement
        del fields["crop"]
        names = (adm.FILTER, adm.RESAMPLE) if self.crop == "adm" else (FILTER, RESAMPLE)
        return fields | dict(zip(("filter", "resample"), names, strict=True))

    def place(self, size: Size, bucket: Size) -> Placement:
        """How an upright image of `size` comes into `bucket`.

        Raises:
            ImageError: "too_small" by the policy, or "too_large" where the resize alone would be.
        """
        if self.crop == "center":
            return place(size, bucket, upscale=self.upscale)
        placement = adm.place_adm(size, bucket)
        if placement.upscaled and self.upscale == "refuse":
            raise ImageError(TOO_SMALL, f"image of {size} (height x width) is smaller than its bucket {bucket}")
        return placement


@dataclass(frozen=True)
class LoadedImage:
    """One image as it is encoded.

    Attributes:
        header: of the file.
        bucket: its number among the buckets that were to choose from.
        placement: how the upright image came into it.
        pixels: uint8 `[H,W,3]`, or `[N]` that are the record of an image to be resized elsewhere.
        offset: where that begins among the records of all views, in bytes.
    """

    header: ImageHeader
    bucket: int
    placement: Placement
    pixels: np.ndarray
    offset: int = 0


Admit = Callable[[int], AbstractContextManager[object]]
"""Entered while an image of so many bytes is decoded: may wait until there is memory."""


def load_image(
    data: bytes,
    policy: PixelPolicy,
    buckets: Sequence[Size],
    out: np.ndarray | None = None,
    *,
    name: str = "image",
    admit: Admit = nullcontext,
    buffer: Buffer | None = None,
    record_bytes: int | None = None,
) -> LoadedImage:
    """Decode an image file and bring it into the bucket nearest in aspect.

    Args:
        data: the file's bytes.
        buckets: to choose from.
        out: uint8 `[N]`, contiguous, with room for the pixels of any of them; `pixels` is then a view of its beginning.
        name: what messages call the image.
        buffer: gives memory of so many bytes that the decoded picture may lie in, to be used again.
        record_bytes: leave the resizing to others: `out` takes a record (see `deferred`) of so many bytes at most. An
            image that needs more, or a colour profile, is resized here, and its record says so: `ready_bytes` suffice.

    Raises:
        ImageError: with one of `REASONS`, or "too_small" by the policy.
    """
    view = View(policy, tuple(buckets))
    record = out[:record_bytes] if record_bytes is not None and out is not None else None
    outs = [out] if out is not None and record is None else None
    (loaded,) = load_views(data, [view], outs, name=name, admit=admit, buffer=buffer, records=record)
    if isinstance(loaded, ImageError):
        raise loaded
    return loaded


class View(NamedTuple):
    """What is made of an image: pixels by a policy, in the nearest of these buckets."""

    policy: PixelPolicy
    buckets: tuple[Size, ...]

    @property
    def slot(self) -> int:
        """Bytes of the pixels of the largest bucket."""
        return 3 * max(bucket.area for bucket in self.buckets)

    def place(self, size: Size, name: str) -> tuple[int, Placement]:
        """The number of the bucket that an image of `size` is brought to, and how it lies there.

        Raises:
            ImageError: it is too large or too small for the policy; `name` is what the message calls it.
        """
        if size.area > self.policy.max_pixels:
            raise ImageError(TOO_LARGE, f"{name}: {size} is more than {self.policy.max_pixels} pixels")
        bucket = assign(size, self.buckets)
        return self.buckets.index(bucket), self.policy.place(size, bucket)


class _Plan(NamedTuple):
    shrink: int
    number: int
    bucket: int
    placement: Placement


def load_views(
    data: bytes,
    views: Sequence[View],
    outs: Sequence[np.ndarray] | None = None,
    *,
    name: str = "image",
    admit: Admit = nullcontext,
    buffer: Buffer | None = None,
    records: np.ndarray | None = None,
    together: Together | None = None,
    token: Any = None,
) -> list[LoadedImage | ImageError]:
    """Decode an image file and make every view of it, or say why it cannot be made. Pixels are those of `load_image`.

    The file is decoded once, or with `fast` once for each factor by which views shrink it.

    Args:
        outs: for each view uint8 `[N]`, contiguous, with room for the pixels of any of its buckets; they lie there.
        name, admit, buffer: as those of `load_image`.
        records: leave the resizing to others: this, uint8 `[N]` with room for the `ready_bytes` of every view, takes
            the records of all of them, in any order, and the pixels that they are made from but once. What finds no
            room, and what `load_image` says, is resized here. `pixels` of each lie from its `offset` on.
        together, token: with `outs`, pixels of a single view may wait there to be resized with those of the next
            images; they are not in `out` before `together.finish()`, which calls them `token` if that fails.

    Raises:
        ImageError: no view can be made, as the file is no image.
    """
    image = open_image(data, name=name, max_pixels=max(view.policy.max_pixels for view in views))
    size = Size(image.header.height, image.header.width)
    found: list[LoadedImage | ImageError] = []
    plans: list[_Plan] = []
    needed = 0
    for number, view in enumerate(views):
        policy = view.policy
        try:
            bucket, placement = view.place(size, name)
        except ImageError as e:
            found.append(e)
            continue
        shrink = _shrink(image.header, placement) if policy.decode == "fast" and image.shrinks else 0
        found.append(LoadedImage(image.header, bucket, placement, _NO_PIXELS))
        plans.append(_Plan(shrink, number, bucket, placement))
        resizing = adm.memory(size, placement) if policy.crop == "adm" else _resizing_memory(size, placement)
        needed = max(needed, resizing)
    if plans:
        with admit(image.memory + needed):
            # by a function: what it has decoded is gone before others are admitted
            for number, made in (
                _make(image, views, plans, outs, buffer, together, token)
                if records is None
                else _recorded(image, views, plans, records, buffer)
            ):
                found[number] = made
    return found


def _make(
    image: OpenedImage,
    views: Sequence[View],
    plans: Sequence[_Plan],
    outs: Sequence[np.ndarray] | None,
    buffer: Buffer | None,
    together: Together | None,
    token: Any,
) -> list[tuple[int, LoadedImage | ImageError]]:
    """The views that were planned, by their numbers."""
    made = list[tuple[int, LoadedImage | ImageError]]()
    alone = _room(image, views[plans[0].number].policy, plans[0], outs, together) if len(plans) == 1 else None
    decoded = _Decoded(image, buffer if alone is None else lambda _: alone)
    for shrink, number, bucket, placement in sorted(plans, key=lambda plan: plan.shrink):
        policy, out = views[number].policy, None
        if outs is not None:
            crop = placement.crop
            out = outs[number][: 3 * crop.area].reshape(crop.height, crop.width, 3)
        try:
            pixels = decoded.pixels(policy, shrink)
            if out is None:
                pixels = _placed(image, pixels, policy, placement)
            elif alone is None or not np.may_share_memory(pixels, np.frombuffer(alone, np.uint8)):
                pixels = _laid(_placed(image, pixels, policy, placement, out), out)
            elif together is not None and not np.may_share_memory(pixels, out):
                together.add(pixels, out, token)
                pixels = out
            made.append((number, LoadedImage(image.header, bucket, placement, pixels)))
        except ImageError as e:
            # its traceback would hold what was decoded
            made.append((number, e.with_traceback(None)))
    return made


def _room(
    image: OpenedImage,
    policy: PixelPolicy,
    plan: _Plan,
    outs: Sequence[np.ndarray] | None,
    together: Together | None,
) -> memoryview | None:
    """Memory that the one view of an image is decoded into: where its pixels are wanted, or where others wait."""
    header, crop = image.header, plan.placement.crop
    if outs is None or policy.crop != "center" or header.orientation != 1 or image.color_map(policy.icc) is not None:
        return None
    size = Size(shrunk(header.height, plan.shrink), shrunk(header.width, plan.shrink))
    if size == plan.placement.resize == crop:
        return outs[plan.number][: 3 * crop.area].data
    if size == plan.placement.resize or together is None:
        return None
    return together.room(size, stored_window(plan.placement, 1), FILTER)


_NO_PIXELS = np.empty((0, 0, 3), np.uint8)


class _Decoded:
    """The pixels of an opened image as they were asked for last."""

    def __init__(self, image: OpenedImage, buffer: Buffer | None):
        self.image, self.buffer = image, buffer
        self._as: tuple[Any, ...] | None = None
        self._pixels: np.ndarray | ImageError = _NO_PIXELS

    def pixels(self, policy: PixelPolicy, shrink: int) -> np.ndarray:
        """uint8 `[H,W,3]` as stored, at 1/2^shrink of the size; of the memory of the last ones."""
        wanted = (policy.background, policy.icc, shrink)
        if wanted != self._as:
            # what was there goes first
            self._as, self._pixels = wanted, _NO_PIXELS
            try:
                self._pixels = _stored(self.image, policy, shrink, self.buffer)
            except ImageError as e:
                self._pixels = e
        if isinstance(self._pixels, ImageError):
            raise self._pixels
        return self._pixels


def _laid(pixels: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The same pixels in `out`."""
    if pixels is not out:
        np.copyto(out, pixels)
    return out


def _recorded(
    image: OpenedImage, views: Sequence[View], plans: Sequence[_Plan], out: np.ndarray, buffer: Buffer | None
) -> list[tuple[int, LoadedImage | ImageError]]:
    """The records of the views that were planned, by their numbers: those made of the same pixels share them."""

    def source(plan: _Plan) -> tuple[Any, ...]:
        policy = views[plan.number].policy
        return plan.shrink, policy.background, policy.icc

    decoded, made = _Decoded(image, buffer), list[tuple[int, LoadedImage | ImageError]]()
    sizes = [views[plan.number].buckets[plan.bucket] for plan in plans]
    least = {p.number: deferred.ready_bytes(size.height, size.width) for p, size in zip(plans, sizes, strict=True)}
    end, spare, header = 0, len(out) - sum(least.values()), image.header
    for _, group in groupby(sorted(plans, key=source), source):
        of_source = list(group)
        try:
            pixels = decoded.pixels(views[of_source[0].number].policy, of_source[0].shrink)
        except ImageError as e:
            made += [(plan.number, e.with_traceback(None)) for plan in of_source]
            continue
        begin, sharing = end, _sharing(image, views, of_source, pixels, least, spare)
        if sharing:
            windows = [stored_window(plan.placement, header.orientation) for plan in sharing]
            begins, nbytes = deferred.write_records(pixels, windows, header.orientation, FILTER, out[begin:])
            end += nbytes
            for plan, at in zip(sharing, begins, strict=True):
                record = out[begin + at : end]
                made.append((plan.number, LoadedImage(header, plan.bucket, plan.placement, record, begin + at)))
        for plan in of_source:
            if plan in sharing:
                continue
            try:
                ready = _placed(image, pixels, views[plan.number].policy, plan.placement)
            except ImageError as e:
                made.append((plan.number, e.with_traceback(None)))
                continue
            record = out[end : end + deferred.write_ready(ready, out[end:])]
            made.append((plan.number, LoadedImage(header, plan.bucket, plan.placement, record, end)))
            end += len(record)
        spare -= end - begin - sum(least[plan.number] for plan in of_source)
    return made


def _sharing(
    image: OpenedImage,
    views: Sequence[View],
    plans: Sequence[_Plan],
    pixels: np.ndarray,
    least: Mapping[int, int],
    spare: int,
) -> list[_Plan]:
    """Those of the views that are resized elsewhere: as many as find room in what is there beside the least of all."""
    sharing: list[_Plan] = []
    windows: list[Window] = []
    for plan in plans:
        policy, window = views[plan.number].policy, stored_window(plan.placement, image.header.orientation)
        if policy.crop == "adm" or image.color_map(policy.icc) is not None:
            continue
        if pixels.shape[:2] == (window.height, window.width):
            # nothing is resized
            continue
        more = deferred.record_bytes(pixels.shape, [*windows, window], FILTER)
        if more - sum(least[p.number] for p in (*sharing, plan)) <= spare:
            sharing, windows = [*sharing, plan], [*windows, window]
    return sharing


def frame(image: OpenedImage, policy: PixelPolicy, placement: Placement, buffer: Buffer | None = None) -> np.ndarray:
    """The pixels of an opened image as placed: uint8 `[H,W,3]`, contiguous and writable.

    Raises:
        ImageError: with one of `REASONS`.
    """
    shrink = _shrink(image.header, placement) if policy.decode == "fast" and image.shrinks else 0
    return _placed(image, _stored(image, policy, shrink, buffer), policy, placement)


def _stored(image: OpenedImage, policy: PixelPolicy, shrink: int, buffer: Buffer | None) -> np.ndarray:
    pixels = image.stored_pixels(policy.background, icc=policy.icc, shrink=shrink, buffer=buffer)
    height, width = pixels.shape[:2] if image.header.orientation < 5 else pixels.shape[1::-1]
    if (height, width) != (shrunk(image.header.height, shrink), shrunk(image.header.width, shrink)):
        raise ImageError(CORRUPT, f"pixels of {height}x{width}, where the header says {image.header}")
    return pixels


def _placed(
    image: OpenedImage, pixels: np.ndarray, policy: PixelPolicy, placement: Placement, out: np.ndarray | None = None
) -> np.ndarray:
    """The pixels as placed; in `out` if they are that at once."""
    orientation = image.header.orientation
    color = image.color_map(policy.icc)
    if policy.crop == "adm":
        pixels = adm.apply_adm(pixels, placement, orientation)
    else:
        pixels = apply(pixels, placement, FILTER, orientation, None if color else out)
    return color(pixels) if color else pixels


def _resizing_memory(size: Size, placement: Placement) -> int:
    """Bytes of the picture resized along one axis and along both, at most."""
    area = min(placement.resize.area, MOST_WASTE * placement.crop.area)
    return 3 * (area + max(size.height * placement.resize.width, size.width * placement.resize.height))


def _shrink(header: ImageHeader, placement: Placement) -> int:
    """The power of two by which the DCT may shrink an image that is at least twice too large afterwards."""
    for shrink in range(MOST_SHRINK, 0, -1):
        height, width = shrunk(header.height, shrink), shrunk(header.width, shrink)
        if height >= 2 * placement.resize.height and width >= 2 * placement.resize.width:
            return shrink
    return 0
