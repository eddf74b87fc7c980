"""What `capacitor-rt view` does: images or the rows of a cache by every model, one by one, into a page."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import FullCapacitorInferenceConfig
from ..evaluation.evaluate import ImageCodec, reconstruct
from ..evaluation.metrics import CosineSimilarity, Similarity
from ..evaluation.view.folder import read_manifest
from ..evaluation.view.perceptual import lpips_distance
from ..evaluation.view.pictures import glimpse
from ..evaluation.view.writer import LeftOut, PageReport, PageWriter, Shown, ShownModel
from ..images.frames import RGB, Framing
from ..images.scan import path_to_id
from ..printable import counted
from .codecs import cosine_observer
from .options import list_images
from .terminal import bar, note

STORED_ITEM_SIZE = 2
"""Bytes per element of latents that no cache holds yet: caches store bfloat16 unless told otherwise."""


@dataclass(frozen=True)
class Settings:
    """What images and caches have in common; names as of the command's options."""

    out: Path
    limit: int
    batch: int = 8
    steps: int = 1
    seed: int = 0
    progress: bool = True

    @property
    def inference(self) -> FullCapacitorInferenceConfig:
        return FullCapacitorInferenceConfig(num_steps=self.steps, seed=self.seed)


Done = tuple[PageReport, bool]
"""The report, and whether all was done: an interruption ends the page early."""


def view_images(
    sources: Sequence[Path],
    models: Mapping[str, ImageCodec],
    settings: Settings,
    size: int | None,
    area: int | None,
    background: RGB,
) -> Done:
    """A page of image files.

    Raises:
        CapacitorError: no image, or no page can be written there.
    """
    found = _without_page(list_images(list(sources)), settings.out)
    chosen = spread(found, settings.limit)
    # of one folder the names below it say enough
    names = {path: id_of(below if len(sources) == 1 else path) for path, below in chosen}
    shown = [shown_model(name, codec, STORED_ITEM_SIZE) for name, codec in models.items()]
    cosines: dict[str, CosineSimilarity] = {}
    source = ", ".join(id_of(path) for path in sources[:3]) + (" and more" if len(sources) > 3 else "")

    def rows() -> Iterator[Shown | LeftOut]:
        for made in reconstruct(
            list(names),
            models,
            Framing(size, area),
            inference=settings.inference,
            background=background,
            batch=settings.batch,
            observe=cosine_observer(list(models), cosines),
        ):
            name = names[made.path]
            if made.frame is None:
                assert made.error is not None
                note(f"{made.error.reason}: {made.error}")
                yield LeftOut(name, made.error.reason, str(made.error), glimpse(made.path))
            else:
                nbytes = made.path.stat().st_size
                yield Shown(name, made.frame.pixels, made.decoded, made.latents, nbytes)

    distance, reason = lpips_distance()
    with PageWriter(settings.out, shown, source, distance=distance) as page:
        page.remarks += remarks(len(names), len(found), "images", reason)
        done = fill(page, rows(), len(names), settings)
        return page.finish(cosines=pairs(list(models), cosines)), done


def fill(page: PageWriter, rows: Iterator[Shown | LeftOut], total: int, settings: Settings) -> bool:
    """Add rows until they end or the run is interrupted; whether they ended."""
    try:
        for row in bar(rows, total, "image") if settings.progress else rows:
            if isinstance(row, LeftOut):
                page.leave_out(row)
            else:
                page.add(row)
    except KeyboardInterrupt:
        if not len(page):
            raise
        note(f"interrupted: the page is made of {counted(len(page), 'image')}, which were done")
        page.notes.append(f"Interrupted: {len(page)} of {total} images were done.")
        return False
    return True


def spread(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` items, in their order, spread evenly from the first to the last."""
    if len(items) <= limit:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def shown_model(name: str, codec: ImageCodec, item_size: int) -> ShownModel:
    """What the page says of a model; `item_size` is of an element of its latents as stored, in bytes."""
    import torch

    from ..model import FullCapacitor

    if isinstance(codec, FullCapacitor):
        return ShownModel(name, codec.latent_channels, codec.latent_stride, item_size)

    # of whatever else encodes images only an encoding tells
    side = math.lcm(codec.size_multiple, 32)
    latents = codec.encode(torch.zeros((1, side, side, 3), dtype=torch.uint8, device=codec.device))
    return ShownModel(name, latents.shape[1], side // latents.shape[2], item_size)


def pairs(names: Sequence[str], cosines: Mapping[str, CosineSimilarity]) -> dict[tuple[str, str], Similarity]:
    """Cosines of the first model's latents with another's, by both names."""
    return {(names[0], other): cosine.result() for other, cosine in cosines.items()}


def remarks(shown: int, found: int, what: str, reason: str) -> list[str]:
    """What stands beside the figures: how many images of how many, and why there is no LPIPS."""
    lines = [f"{shown} of {found} {what}, spread evenly over all."] if shown < found else []
    return lines + ([f"{reason}."] if reason else [])


def _without_page(found: list[tuple[Path, Path]], out: Path) -> list[tuple[Path, Path]]:
    """The files that are no part of a page that is there already, which may lie among the images."""
    if read_manifest(out) is None:
        return found
    page = out.resolve()
    return [pair for pair in found if not pair[0].resolve().is_relative_to(page)]


def id_of(path: Path) -> str:
    """A path as text."""
    return path_to_id(os.fsencode(path))
