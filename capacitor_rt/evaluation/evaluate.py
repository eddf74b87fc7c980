"""Reconstruction quality over a folder of images: every model sees the same frames, memory stays bounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import FullCapacitorInferenceConfig
from ..errors import ImageError
from ..images.frames import RGB, Frame, Framing, group_frames, load_frames, to_batch, to_uint8
from .metrics import psnr

Latents = dict[str, Tensor]
"""Latents `[B,C,h,w]` of one batch by the name of the model that made them."""


class ImageCodec(Protocol):
    """What is evaluated: `FullCapacitor`, `Flux2`, or anything else that encodes images and decodes its latents.

    `size_multiple` divides the height and width of every image that is encoded.
    """

    @property
    def size_multiple(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, image: Tensor) -> Tensor:
        """uint8 `[B,H,W,3]` to latents `[B,C,h,w]`."""
        ...

    def decode(self, latents: Tensor, *, inference_config: FullCapacitorInferenceConfig | None = None) -> Tensor:
        """Latents `[B,C,h,w]` to images `[B,3,H,W]` in about [-1,1]."""
        ...


@dataclass(frozen=True)
class Score:
    """One image: the size that was encoded and the PSNR in dB of each model, or why there is none."""

    path: Path
    height: int = 0
    width: int = 0
    psnr: dict[str, float] = field(default_factory=dict)
    error: ImageError | None = None


@dataclass(frozen=True)
class Reconstruction:
    """One image by every model, or why there is none.

    Attributes:
        frame: what was encoded.
        latents: per model `[C,h,w]`, on the model's device.
        decoded: per model uint8 `[H,W,3]`.
    """

    path: Path
    frame: Frame | None = None
    latents: Latents = field(default_factory=dict)
    decoded: dict[str, np.ndarray] = field(default_factory=dict)
    error: ImageError | None = None


def reconstruct(
    paths: Iterable[Path],
    models: Mapping[str, ImageCodec],
    framing: Framing,
    *,
    inference: FullCapacitorInferenceConfig | None = None,
    background: RGB = (255, 255, 255),
    batch: int = 8,
    workers: int = 4,
    observe: Callable[[Latents], None] | None = None,
) -> Iterator[Reconstruction]:
    """Encode and decode every image with every model.

    Args:
        paths: image files.
        models: by the name that the table shows. The frames satisfy the size rules of all of them.
        inference: sampler settings; by default one step, seed 0.
        batch: neighbouring images of one size that are encoded together, at most.
        observe: told the latents of every batch.

    Yields:
        One reconstruction per image, in order; an undecodable file yields its error.
    """
    inference = inference or FullCapacitorInferenceConfig(seed=0)
    multiple = math.lcm(*(model.size_multiple for model in models.values()))
    for group in group_frames(load_frames(paths, framing, multiple, background, workers), batch):
        if isinstance(group, tuple):
            path, error = group
            yield Reconstruction(path, error=error)
        else:
            yield from _reconstructions(group, models, inference, observe)


def evaluate(
    paths: Iterable[Path],
    models: Mapping[str, ImageCodec],
    framing: Framing,
    *,
    inference: FullCapacitorInferenceConfig | None = None,
    background: RGB = (255, 255, 255),
    batch: int = 8,
    workers: int = 4,
    observe: Callable[[Latents], None] | None = None,
) -> Iterator[Score]:
    """`reconstruct` every image and compare the 8-bit pixels; arguments as there.

    Yields:
        One score per image, in order; an undecodable file yields its error.
    """
    for made in reconstruct(
        paths,
        models,
        framing,
        inference=inference,
        background=background,
        batch=batch,
        workers=workers,
        observe=observe,
    ):
        if made.frame is None:
            yield Score(made.path, error=made.error)
            continue
        pixels = made.frame.pixels
        decibels = {name: psnr(pixels, image) for name, image in made.decoded.items()}
        height, width = pixels.shape[:2]
        yield Score(made.path, height, width, decibels)


def _reconstructions(
    frames: list[Frame],
    models: Mapping[str, ImageCodec],
    inference: FullCapacitorInferenceConfig,
    observe: Callable[[Latents], None] | None,
) -> Iterator[Reconstruction]:
    decoded: list[dict[str, np.ndarray]] = [{} for _ in frames]
    latents: Latents = {}
    for name, model in models.items():
        latents[name] = model.encode(to_batch(frames, model.device))
        out = model.decode(latents[name], inference_config=inference)
        for images, image in zip(decoded, out, strict=True):
            images[name] = to_uint8(image)
    if observe:
        observe(latents)
    for i, (frame, images) in enumerate(zip(frames, decoded, strict=True)):
        yield Reconstruction(frame.path, frame, {name: z[i] for name, z in latents.items()}, images)
