"""`capacitor-rt verify --decode N`: rows of a cache, decoded by the model that made them, against their images.

Hashes say that a cache holds what was written. This says that what was written is what the images look like.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..cache.dataset import LatentDataset
from ..cache.hashing import xxh3
from ..cache.model_source import Checkpoint
from ..cache.sources import Reader, Source
from ..cache.sources.open import open_source
from ..config import FullCapacitorInferenceConfig
from ..errors import CacheError, ImageError, InputError
from ..evaluation.metrics import psnr, summary
from ..images.frames import to_uint8
from ..images.load import load_image
from ..images.scan import id_to_path
from ..model import FullCapacitor
from ..printable import counted
from .demo_run import DIFFERENCE_GAIN, sheet

TOLERANCE = 1.0
"""Decibels that a row may decode worse than its image encoded anew. Storage in int8 costs hundredths of one."""
CLEAR = 60.0
"""Decibels above which two decoded images are not told apart any more."""
WORST = 12
"""Rows of the contact sheet."""


@dataclass(frozen=True)
class Compared:
    """A row: PSNR in dB of its decoded image, and of the image encoded anew and decoded, both against the image."""

    id: str
    cached: float
    anew: float
    original: np.ndarray
    decoded: np.ndarray

    def is_poor(self, tolerance: float) -> bool:
        return self.cached < min(self.anew, CLEAR) - tolerance


@dataclass
class DecodedSample:
    """What came of a sample of rows.

    Attributes:
        rows, buckets, tasks: of the sample: its size, and how many of each it touches.
        compared: the rows whose images are there, the worst first.
        missing: id of each of the others, and why it was not compared.
    """

    rows: int
    buckets: int
    tasks: int
    compared: list[Compared] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        cached, anew = (summary([getattr(row, name) for row in self.compared]) for name in ("cached", "anew"))
        figures = f"median {cached['median']:.2f} dB, P5 {cached['p5']:.2f}, P95 {cached['p95']:.2f}"
        of = f"{counted(self.buckets, 'bucket')} and {counted(self.tasks, 'task')}"
        rows = f"{counted(len(self.compared), 'row')} of {of} decoded"
        return f"{rows}: PSNR {figures}; encoded anew: median {anew['median']:.2f} dB"


def decode_sample(
    root: Path, count: int, images: str, model: Checkpoint, *, tolerance: float = TOLERANCE, seed: int = 0
) -> DecodedSample:
    """Decode `count` rows, spread over the buckets and the tasks, and compare them with their images.

    Args:
        images: what was cached: a folder, list, tar or Parquet files.
        model: the one that the cache was made with.

    Raises:
        CacheError: the cache was made by another model, or none of the images is there as it was.
    """
    dataset = LatentDataset(root, verify=True, allow_partial=True)
    identity = model.identity(dataset.plan.fields["model"]["compute_dtype"])
    planned = dataset.plan.fields["model"]
    if identity.sha256 != planned["sha256"]:
        raise CacheError(
            f"{root} was made by {planned['id']} (weights {planned['sha256'][:16]}), "
            f"and {model.name} has other weights ({identity.sha256[:16]}): name the one that made it by --model"
        )
    chosen = stratified(dataset.bucket_numbers, count, seed)
    entries = {i: dataset.entries(i) for i in chosen}
    tasks = {int(np.searchsorted(dataset.task_stops, i, "right")) for i in chosen}
    found = DecodedSample(len(chosen), len({dataset.bucket(i) for i in chosen}), len(tasks))
    source = open_source(images, root, dataset.plan.fields["source"]["kind"])
    codec = model.load(identity)
    originals = _Originals(source, [entry["id"] for entry in entries.values()])
    for i, entry in entries.items():
        try:
            data = originals.read(entry["id"])
            if xxh3(data).digest() != entry["bytes_hash"]:
                raise ImageError("changed", "it has other bytes than when it was cached")
            pixels = load_image(data, dataset.plan.policy, [dataset.bucket(i)], name=entry["id"]).pixels
        except ImageError as error:
            found.missing[entry["id"]] = f"{error.reason}: {error}"
            continue
        found.compared.append(_compared(dataset, i, entry["id"], pixels, codec))
    if not found.compared:
        (first, why), *_ = found.missing.items()
        raise CacheError(
            f"none of the images of the {len(chosen)} rows is there as it was cached: give the source by --images",
            [f"{first}: {why}"],
        )
    found.compared.sort(key=lambda row: (not row.is_poor(tolerance), row.cached - min(row.anew, CLEAR), row.cached))
    return found


def stratified(buckets: np.ndarray, count: int, seed: int) -> list[int]:
    """Rows of every bucket, in proportion to its size but one at least, spread evenly over the bucket and so its tasks.

    Args:
        buckets: number of each row's bucket, int `[N]`.
        count: of the rows; if there are more buckets, the largest of these have one each.
    """
    numbers, sizes = np.unique(buckets, return_counts=True)
    count = min(count, len(buckets))
    largest = np.argsort(-sizes, kind="stable")[:count]
    shares = np.zeros(len(numbers), np.int64)
    shares[largest] = 1
    # what is left goes where it is missing most
    for _ in range(count - len(largest)):
        open_ = shares < sizes
        want = np.where(open_, sizes * count / sizes.sum() - shares, -np.inf)
        shares[int(np.argmax(want))] += 1
    rng = np.random.default_rng(seed)
    found: list[int] = []
    for number, share in zip(numbers, shares.tolist(), strict=True):
        rows = np.flatnonzero(buckets == number)
        edges = np.linspace(0, len(rows), share + 1).astype(np.int64)
        found += [int(rows[rng.integers(a, b)]) for a, b in itertools.pairwise(edges)]
    return sorted(found)


class _Originals:
    """The images of a few rows, by their ids."""

    def __init__(self, source: Source, ids: Sequence[str]):
        self.reader: Reader = source.open()
        wanted = {id_to_path(id): id for id in ids}
        self.places = {wanted[name]: i for i, name in enumerate(source.listing.locators) if name in wanted}

    def read(self, id: str) -> bytes:
        if id not in self.places:
            raise ImageError("changed", "it is not there any more")
        return self.reader.read(self.places[id])


@torch.no_grad()
def _compared(dataset: LatentDataset, i: int, id: str, pixels: np.ndarray, model: FullCapacitor) -> Compared:
    bucket = dataset.bucket(i)
    image = torch.from_numpy(np.ascontiguousarray(pixels))[None].to(model.device)
    stored = dataset.tensors(i)["latents"][None].float().to(model.device)
    inference = FullCapacitorInferenceConfig(seed=0)
    # one at a time: both start from the same noise
    pictures = [
        to_uint8(model.decode(z, bucket.height, bucket.width, inference)[0]) for z in (stored, model.encode(image))
    ]
    return Compared(id, psnr(pixels, pictures[0]), psnr(pixels, pictures[1]), pixels, pictures[0])


def save_sheet(found: DecodedSample, path: Path, title: str) -> int:
    """The worst rows as a picture: original, decoded, and their difference; how many there are of them."""
    worst = found.compared[:WORST]
    try:
        sheet(title, f"the worst of {len(found.compared)} rows", _HEADS, list(_entries(worst)), across=1).save(path)
    except (OSError, ValueError) as e:
        raise InputError(f"cannot write {path}: {e}: give a file name that ends in .png or .jpg") from e
    return len(worst)


_HEADS = ("original", "decoded from the cache", f"absolute difference x {DIFFERENCE_GAIN}")


def _entries(rows: Sequence[Compared]) -> Iterator[tuple[str, str, tuple[np.ndarray, ...]]]:
    for row in rows:
        difference = (np.abs(row.original.astype(np.int16) - row.decoded) * DIFFERENCE_GAIN).clip(0, 255)
        tiles = (row.original, row.decoded, difference.astype(np.uint8))
        yield f"{row.id[-60:]}   {row.cached:.2f} dB", f"{row.anew:.2f} dB encoded anew", tiles
