"""What `capacitor-rt view` does with a latent cache: its rows, decoded, beside the images that it was made of."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.commits import read_log
from ..cache.dataset import LatentDataset
from ..cache.folder import CacheFolder
from ..cache.hashing import xxh3
from ..cache.parts import ITEM_SIZE
from ..cache.quarantine import quarantine_bytes
from ..errors import CacheError, ImageError, InputError
from ..evaluation.evaluate import ImageCodec
from ..evaluation.metrics import CosineSimilarity
from ..evaluation.view.perceptual import lpips_distance
from ..evaluation.view.pictures import glimpse
from ..evaluation.view.writer import CacheFacts, LeftOut, PageWriter, Shown
from ..images.frames import to_uint8
from ..images.load import load_image
from ..images.reading import read_bytes
from ..images.scan import id_to_path
from .codecs import cosine_observer
from .terminal import note
from .view_run import STORED_ITEM_SIZE, Done, Settings, fill, id_of, pairs, remarks, shown_model, spread


def view_cache(
    root: Path,
    models: Mapping[str, ImageCodec],
    settings: Settings,
    images: Path | None,
    notes: Mapping[str, str] | None = None,
) -> Done:
    """A page of the rows of a latent cache, as the first model decodes them; the others encode the originals.

    Args:
        images: the folder that was cached; None shows no originals.
        notes: a few words by the name of a row.

    Raises:
        CapacitorError: no cache, one of other shapes than the first model's, or no page can be written there.
    """
    dataset = LatentDataset(root, verify=True, allow_partial=True)
    first = next(iter(models))
    _check_shapes(dataset, models)
    item_size = ITEM_SIZE[dataset.plan.dtype]
    shown = [
        shown_model(name, codec, item_size if name == first else STORED_ITEM_SIZE) for name, codec in models.items()
    ]
    chosen = spread(range(len(dataset)), settings.limit)
    cosines: dict[str, CosineSimilarity] = {}
    rows = _Rows(dataset, models, settings, images, cosine_observer(list(models), cosines), notes or {})
    distance, reason = lpips_distance() if images is not None else (None, "")
    with PageWriter(settings.out, shown, id_of(root), distance=distance) as page:
        page.remarks += remarks(len(chosen), len(dataset), "rows", reason)
        page.notes += _other_model(dataset, models[first])
        for warning in page.notes:
            note(f"warning: {warning}")
        done = fill(page, rows.of(chosen), len(chosen), settings)
        reasons = _quarantine(dataset, page, images)
        return page.finish(cosines=pairs(list(models), cosines), cache=_facts(dataset, reasons)), done


class _Rows:
    """Rows of a cache as items of a page, neighbours of one size decoded together."""

    def __init__(
        self,
        dataset: LatentDataset,
        models: Mapping[str, ImageCodec],
        settings: Settings,
        images: Path | None,
        observe: Any,
        notes: Mapping[str, str],
    ):
        self.dataset, self.settings, self.images, self.observe, self.notes = dataset, settings, images, observe, notes
        (self.first, self.codec), *self.others = models.items()
        self.policy = dataset.plan.policy
        # of what was cached; a file that has other bytes now is another picture
        self.hashes = dataset.column("bytes_hash") if images is not None else None

    def of(self, chosen: Sequence[int]) -> Iterator[Shown | LeftOut]:
        at = iter(chosen)
        waiting = list(islice(at, 1))
        for row in at:
            if len(waiting) == self.settings.batch or self.dataset.bucket(row) != self.dataset.bucket(waiting[0]):
                yield from self._together(waiting)
                waiting = []
            waiting.append(row)
        yield from self._together(waiting)

    def _together(self, rows: Sequence[int]) -> Iterator[Shown | LeftOut]:
        import torch

        names = [id_of(Path(self.dataset.path(row))) for row in rows]
        originals: list[tuple[np.ndarray | None, int | None]] = []
        kept = []
        stored = []
        for row, name in zip(rows, names, strict=True):
            try:
                latents_of = self.dataset.tensors(row)["latents"]
                originals.append(self._original(row))
            except (ImageError, CacheError) as error:
                reason = error.reason if isinstance(error, ImageError) else "damaged"
                note(f"{reason}: {error}")
                yield LeftOut(name, reason, str(error))
                continue
            stored.append(latents_of)
            kept.append((row, name))
        if not kept:
            return
        device = self.codec.device
        latents = {self.first: torch.stack(stored).float().to(device)}
        if self.others:
            pixels = torch.from_numpy(np.stack([p for p, _ in originals if p is not None]))
            latents |= {name: codec.encode(pixels.to(codec.device)) for name, codec in self.others}
        decoded = {}
        for name, codec in ((self.first, self.codec), *self.others):
            out = codec.decode(latents[name], inference_config=self.settings.inference)
            decoded[name] = [to_uint8(image) for image in out]
        self.observe(latents)
        for i, (_, name) in enumerate(kept):
            made = {model: images[i] for model, images in decoded.items()}
            z = {model: batch[i] for model, batch in latents.items()}
            pixels_of, nbytes = originals[i]
            yield Shown(name, pixels_of, made, z, nbytes, self.notes.get(name, ""))

    def _original(self, row: int) -> tuple[np.ndarray | None, int | None]:
        """What was encoded, anew from the file, and the file's bytes."""
        if self.images is None:
            return None, None
        path = self.images / self.dataset.path(row)
        data = read_bytes(path)
        if self.hashes is not None and xxh3(data).digest() != self.hashes[row].as_py():
            raise ImageError("changed", f"{path} has other bytes than when it was cached")
        return load_image(data, self.policy, [self.dataset.bucket(row)], name=str(path)).pixels, len(data)


def _check_shapes(dataset: LatentDataset, models: Mapping[str, ImageCodec]) -> None:
    (name, codec), *others = models.items()
    shown = shown_model(name, codec, STORED_ITEM_SIZE)
    of_model = dataset.plan.fields["model"]
    channels, stride = of_model["channels"], of_model["stride"]
    if (channels, stride) != (shown.channels, shown.stride):
        raise InputError(
            f"the cache holds latents of {channels} channels and stride {stride}, and the model {name} has "
            f"{shown.channels} and {shown.stride}: give the model that made it as --model"
        )
    for other, its in others:
        bad = next((b for b in dataset.buckets if b.height % its.size_multiple or b.width % its.size_multiple), None)
        if bad:
            raise InputError(f"{other} needs sides that are multiples of {its.size_multiple}, and the cache has {bad}")


def _other_model(dataset: LatentDataset, codec: ImageCodec) -> list[str]:
    """A remark where the cache was made by other weights than those that decode it."""
    from ..cache.model_source import Loaded
    from ..model import FullCapacitor

    wanted = dataset.plan.fields.get("model", {}).get("sha256")
    if not isinstance(codec, FullCapacitor) or wanted is None:
        return []
    identity = Loaded(codec).identity()
    if identity.sha256 == wanted:
        return []
    return [
        f"These latents were made by other weights ({dataset.latent_space}) than those that decode them here "
        f"({identity.latent_space}): what is shown says nothing of either."
    ]


def _quarantine(dataset: LatentDataset, page: PageWriter, images: Path | None) -> Counter[str]:
    """Add what the cache could not hold, by its index, to the page; numbers by reason."""
    reasons: Counter[str] = Counter()
    with CacheFolder(dataset.root) as folder:
        commits = read_log(folder, dataset.plan).commits
        lines = quarantine_bytes(folder, dataset.plan, commits).splitlines()
    for entry in map(json.loads, lines):
        reasons[entry["reason"]] += 1
        name = entry["path"]
        page.leave_out(LeftOut(name, entry["reason"], entry["message"] or "", _glimpse(images, name)))
    return reasons


def _glimpse(images: Path | None, name: str) -> np.ndarray | None:
    if images is None:
        return None
    path = Path(os.fsdecode(os.path.join(os.fsencode(images), id_to_path(name))))
    return glimpse(path) if path.resolve().is_relative_to(images.resolve()) else None


def _facts(dataset: LatentDataset, reasons: Counter[str]) -> CacheFacts:
    counts = np.bincount(dataset.bucket_numbers, minlength=len(dataset.buckets)).tolist()
    plan = dataset.plan
    return CacheFacts(
        plan.id,
        dataset.latent_space,
        len(dataset),
        plan.count,
        list(_flat("", plan.fields)),
        [(bucket.height, bucket.width, count) for bucket, count in zip(dataset.buckets, counts, strict=True)],
        reasons,
    )


LONGEST_FIELD = 200


def _flat(prefix: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields and their fields as text, lists of many numbers cut short."""
    for key, value in sorted(fields.items()):
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        yield f"{prefix}{key}", text if len(text) <= LONGEST_FIELD else f"{text[:LONGEST_FIELD]} ..."
