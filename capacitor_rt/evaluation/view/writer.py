"""`PageWriter`: images, reconstructions and latents come in one by one, and a page goes out whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import InputError
from ...printable import counted
from ...version import __version__
from ..metrics import SSIM_WINDOW, PsnrTable, Similarity, psnr, ssim, summary
from . import pictures
from .folder import FORMAT, Staging
from .latents import COMPONENT_CLIP, MAP_CLIP, MAP_COLUMNS, LatentMoments, LatentSpool, PrincipalBasis, map_levels
from .perceptual import Distance
from .site import check_templates, write_site

SCRIPTS = ("dom.js", "charts.js", "filter.js", "list.js", "panes.js", "overall.js", "main.js")
DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4}
MOST_LEFT_OUT = 500
"""So many inputs that could not be shown are listed; the counts are of all of them."""


@dataclass(frozen=True)
class ShownModel:
    """A model of the page: its name, channels and pixels per latent, and bytes per element of a latent as stored."""

    name: str
    channels: int
    stride: int
    item_size: int = 2


@dataclass(frozen=True)
class Shown:
    """One image of the page.

    Attributes:
        name: what it is called; any text.
        pixels: what was encoded, uint8 `[H,W,3]`; None where there is no original.
        decoded: per model uint8 `[H,W,3]`.
        latents: per model float `[C,h,w]`.
        file_bytes: of the image file.
        note: a few words, shown beside the name.
    """

    name: str
    pixels: np.ndarray | None
    decoded: Mapping[str, np.ndarray]
    latents: Mapping[str, Tensor]
    file_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class LeftOut:
    """An input that has no place on the page: why, and what can be seen of it, uint8 `[H,W,3]`."""

    name: str
    reason: str
    message: str
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class CacheFacts:
    """What a page says of the cache that it is made of.

    Attributes:
        plan: the plan's fields as text.
        buckets: (height, width, rows).
        quarantined: inputs that are not cached, by reason.
    """

    identity: str
    latent_space: str
    rows: int
    inputs: int
    plan: Sequence[tuple[str, str]]
    buckets: Sequence[tuple[int, int, int]]
    quarantined: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PageReport:
    """What was written: the page's first file, its images and those left out, bytes, and the PSNR per model."""

    index: Path
    images: int
    left_out: int
    nbytes: int
    psnr: PsnrTable | None


Scores = dict[str, list[float | None]]
"""Per measure a value per model; None where it is not defined."""


class PageWriter:
    """Grows a page beside `out`, and puts it there in `finish`. Leaving the context without it leaves nothing behind.

    Args:
        out: folder of the page: absent, empty, or an older page.
        models: in the order shown; the first is the one that the others are compared with.
        source: what the images are of, any text.
        distance: LPIPS, or None.
        workers: threads that measure and compress.

    Raises:
        InputError: `out` holds something else.
    """

    def __init__(
        self,
        out: Path,
        models: Sequence[ShownModel],
        source: str,
        *,
        distance: Distance | None = None,
        workers: int | None = None,
    ):
        check_templates()
        self.models, self.source = tuple(models), source
        # what every reader must know, and what stands beside the figures
        self.notes: list[str] = []
        self.remarks: list[str] = []
        self._distance = distance
        self._staging = Staging(out)
        self._folder = self._staging.folder
        for name in ("images", "thumbs", "left-out"):
            (self._folder / name).mkdir()
        self._moments = {model.name: LatentMoments() for model in models}
        self._spools = {model.name: LatentSpool(self._folder) for model in models}
        self._items: list[dict[str, Any]] = []
        self._scores: list[Future[Scores]] = []
        self._left_out: list[LeftOut] = []
        self._reasons: Counter[str] = Counter()
        self._workers = workers or min(8, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._workers)

    def __enter__(self) -> PageWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for spool in self._spools.values():
            spool.close()
        self._staging.discard()

    def __len__(self) -> int:
        """Images so far."""
        return len(self._items)

    def add(self, item: Shown) -> None:
        """Add an image. Its pictures are compressed in the background, a few at a time."""
        height, width = item.decoded[self.models[0].name].shape[:2]
        if max(height, width) > pictures.LARGEST_SIDE:
            self.leave_out(LeftOut(item.name, "too_large", f"{width}x{height} pixels: bring it down with --area"))
            return
        number = len(self._items)
        latents = {name: z.detach().float().cpu() for name, z in item.latents.items()}
        for name, z in latents.items():
            self._moments[name].update(z)
            self._spools[name].append(z)
        self._items.append(
            {
                "name": item.name,
                "note": item.note,
                "width": width,
                "height": height,
                "fileBytes": item.file_bytes,
                "latentBytes": [latents[m.name].numel() * m.item_size for m in self.models],
            }
        )
        # what waits holds pixels
        if number >= 4 * self._workers:
            self._scores[number - 4 * self._workers].result()
        self._scores.append(self._pool.submit(self._make, number, item, latents))

    def leave_out(self, item: LeftOut) -> None:
        """Add an input that cannot be shown."""
        self._reasons[item.reason] += 1
        if len(self._left_out) >= MOST_LEFT_OUT:
            return
        if item.pixels is not None:
            pictures.save_thumb(self._folder / "left-out" / f"{len(self._left_out):06d}.webp", item.pixels)
        self._left_out.append(item)

    def _make(self, number: int, item: Shown, latents: Mapping[str, Tensor]) -> Scores:
        stem = self._folder / "images" / f"{number:06d}"
        first = item.decoded[self.models[0].name]
        pictures.save_thumb(
            self._folder / "thumbs" / f"{number:06d}.webp", first if item.pixels is None else item.pixels
        )
        if item.pixels is not None:
            pictures.save_exact(Path(f"{stem}-original.webp"), item.pixels)
        for i, model in enumerate(self.models):
            pictures.save_exact(Path(f"{stem}-{i}.webp"), item.decoded[model.name])
            pictures.save_maps(Path(f"{stem}-{i}-maps.webp"), map_levels(latents[model.name]))
        if item.pixels is None:
            return {}
        return measure(item.pixels, [item.decoded[model.name] for model in self.models], self._distance)

    def finish(
        self, *, cosines: Mapping[tuple[str, str], Similarity] | None = None, cache: CacheFacts | None = None
    ) -> PageReport:
        """Write what needs all images, and publish.

        Args:
            cosines: of the latents of pairs of models.

        Raises:
            InputError: no image was added. OSError: a file cannot be written.
        """
        if not self._items:
            reasons = ", ".join(f"{reason} {n}" for reason, n in self._reasons.most_common())
            raise InputError(f"no image can be shown ({reasons or 'there is none'}): a page needs at least one")
        scores = [future.result() for future in self._scores]
        shares = self._colours()
        measures = {key: {m.name: [s[key][i] for s in scores] for i, m in enumerate(self.models)} for key in scores[0]}
        table = _psnr_table(measures, [item["name"] for item in self._items])
        found = cosines or {}
        data = self._data(measures, found, shares)
        write_site(
            self._folder,
            "results.html",
            SCRIPTS,
            data,
            title=self._title(),
            source=self.source,
            made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            version=__version__,
            notes=self.notes,
            remarks=self.remarks,
            models=self.models,
            images=len(self._items),
            tables=summary_tables(measures),
            cosines=[(a, b, similarity.overall) for (a, b), similarity in found.items()],
            cache=cache,
            left_out=self._left_out,
            reasons=self._reasons,
            quarantined=cache.quarantined if cache else {},
        )
        nbytes = sum(p.stat().st_size for p in self._folder.rglob("*") if p.is_file())
        self._staging.publish()
        index = self._staging.out / "index.html"
        return PageReport(index, len(self._items), self._reasons.total(), nbytes, table)

    def _title(self) -> str:
        names = " and ".join(model.name for model in self.models)
        return f"{names}: {counted(len(self._items), 'image')}"

    def _colours(self) -> list[float]:
        """Pictures of the components, one basis for all models of as many channels; the shares of the variance."""
        bases: dict[int, PrincipalBasis] = {}
        for channels in {model.channels for model in self.models}:
            moments = LatentMoments()
            for model in self.models:
                if model.channels == channels:
                    moments.merge(self._moments[model.name])
            bases[channels] = PrincipalBasis(moments)
        for i, model in enumerate(self.models):
            jobs: list[Future[None]] = []
            for number, latents in enumerate(self._spools[model.name]):
                path = self._folder / "images" / f"{number:06d}-{i}-pca.webp"
                jobs.append(self._pool.submit(pictures.save_exact, path, bases[model.channels].colours(latents)))
            for job in jobs:
                job.result()
        return [bases[model.channels].share for model in self.models]

    def _data(
        self,
        measures: Mapping[str, Mapping[str, Sequence[float | None]]],
        cosines: Mapping[tuple[str, str], Similarity],
        shares: Sequence[float],
    ) -> dict[str, Any]:
        columns = {key: [item[key] for item in self._items] for key in self._items[0]}
        models = [
            {
                "name": model.name,
                "channels": model.channels,
                "stride": model.stride,
                "share": share,
                "mean": self._moments[model.name].mean.tolist(),
                "std": self._moments[model.name].std.tolist(),
            }
            for model, share in zip(self.models, shares, strict=True)
        ]
        return {
            "format": FORMAT,
            "models": models,
            "images": columns,
            "hasOriginals": bool(measures),
            "measures": {key: list(values.values()) for key, values in measures.items()},
            "cosines": [
                {"a": a, "b": b, "overall": s.overall, "channels": s.per_channel.tolist()}
                for (a, b), s in cosines.items()
            ],
            "maps": {"columns": MAP_COLUMNS, "clip": MAP_CLIP},
            "componentClip": COMPONENT_CLIP,
        }


def measure(pixels: np.ndarray, decoded: Sequence[np.ndarray], distance: Distance | None) -> Scores:
    """PSNR in dB (infinite for identical pixels), SSIM and LPIPS of the images that models made of `pixels`."""
    found: Scores = {"psnr": [psnr(pixels, image) for image in decoded]}
    fits = min(pixels.shape[:2]) >= SSIM_WINDOW
    found["ssim"] = [ssim(pixels, image) if fits else None for image in decoded]
    if distance is not None:
        found["lpips"] = [_or_none(distance, pixels, image) for image in decoded]
    return found


def _or_none(distance: Distance, a: np.ndarray, b: np.ndarray) -> float | None:
    try:
        return distance(a, b)
    except RuntimeError:
        # too small for the network's poolings
        return None


def _psnr_table(measures: Mapping[str, Mapping[str, Sequence[Any]]], names: Sequence[str]) -> PsnrTable | None:
    return PsnrTable.of(measures["psnr"], names) if measures else None


@dataclass(frozen=True)
class SummaryTable:
    """A table of the page: rows of a name and mean, std, median, P5 and P95 as text."""

    caption: str
    rows: list[tuple[str, list[str]]]
    remarks: list[str]


def summary_tables(measures: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[SummaryTable]:
    """The card's table for every measure, with rows of differences image by image to the first model."""
    names = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
    tables = []
    for key, values in measures.items():
        digits = DIGITS[key]
        rows: list[tuple[str, list[str]]] = []
        remarks: list[str] = []
        for name, column in values.items():
            present = [v for v in column if v is not None]
            if not present:
                continue
            row = summary(present)
            rows.append((name, _cells(row, digits, "")))
            if row["identical"]:
                remarks.append(f"{name}: {row['identical']} reproduced exactly, left out of the figures")
        first, *others = values
        for other in others:
            pairs = [
                (a, b) for a, b in zip(values[first], values[other], strict=True) if a is not None and b is not None
            ]
            finite = [a - b if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs]
            with contextlib.suppress(InputError):
                rows.append((f"{first} - {other}", _cells(summary(finite), digits, "+")))
        if rows:
            tables.append(SummaryTable(names[key], rows, remarks))
    return tables


def _cells(row: Mapping[str, float | int], digits: int, sign: str) -> list[str]:
    # a deviation is no difference, and carries no sign
    return [f"{row[name]:{sign if name != 'std' else ''}.{digits}f}" for name in ("mean", "std", "median", "p5", "p95")]
