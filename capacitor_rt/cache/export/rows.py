"""The rows of a cache as exporters see them: ordered by id, in one layout, space and scale, with their columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import CacheError, CapacitorError, InputError
from ...extras import require_extra
from ...images.geometry import Size
from ...printable import counted
from ..dataset import Ids, LatentDataset
from ..status import status
from .columns import Labels, TextLatents, check_caption, read_captions, read_labels
from .files import file_digest
from .request import DTYPES, FLUX2, REQUIRED, STORED, UNPATCHIFIED, UNUSED, ExportRequest

# a wider type that holds every value of the narrower one
_EXACT = {(torch.bfloat16, torch.float32), (torch.float16, torch.float32)}


def open_cache(root: Path) -> LatentDataset:
    """A finished cache, each row of which is compared with its hash as it is read.

    Raises:
        CacheError: it is no cache, of another tool, damaged, unfinished, or being written.
    """
    if not root.is_dir():
        raise CacheError(f"{str(root)!r} is not a folder: give the folder of a cache")
    try:
        return LatentDataset(root, verify=True)
    except CacheError as e:
        _say_unfinished(root, e)
        raise


def _say_unfinished(root: Path, error: CacheError) -> None:
    """Raise CacheError for a cache that is not finished; the message says whether a process is at work on it."""
    try:
        found = status(root)
    except CapacitorError:
        return
    if found.done_inputs == found.inputs and not found.is_interim:
        return
    done = f"{found.done_inputs} of {counted(found.inputs, 'input')} done"
    who = next(iter(found.workers.values()), None)
    if who is not None:
        raise CacheError(f"{root} is being written, {done} ({who}): wait for it to end, and export then") from error
    raise CacheError(f"{root} is not finished: {done}: run the cache command again, and export then") from error


class Rows:
    """Rows by number, in the order of their ids. `request` is resolved.

    Tensors are `[C,h,w]` in the layout of the request, in the cache's dtype unless a scale or another space makes
    float32 of them. Columns (ids, labels, captions) are held in memory, latents are read as they are asked for.
    """

    def __init__(self, dataset: LatentDataset, request: ExportRequest):
        self.dataset = dataset
        self.request = request
        self.dtype: torch.dtype = getattr(torch, dataset.plan.value_dtype)
        self.out_dtype = self.dtype if request.dtype in (None, STORED) else getattr(torch, DTYPES[str(request.dtype)])
        self._check_tensors()
        pc = require_extra("pyarrow.compute")
        names = dataset.column("id")
        self.order: np.ndarray = pc.sort_indices(names).to_numpy()
        names = names.take(self.order)
        self.ids: Sequence[str] = Ids(names)
        doubled = pc.equal(names[:-1], names[1:]).to_numpy(zero_copy_only=False).nonzero()[0]
        if len(doubled):
            raise InputError(f"two rows have the id {self.ids[int(doubled[0])]!r}: an export names rows by their ids")
        self._calibration = self._read_calibration()
        self._check_range()
        self.empty_captions = 0
        self.labels = self._find_labels()
        self.captions = self._find_captions()
        text = request.text_latents
        self.text_latents = TextLatents(text, self.ids) if text is not None else None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_flips(self) -> bool:
        return "latents_flip" in self.dataset.plan.tensors

    @property
    def channels(self) -> int:
        """Channels in the layout of the request."""
        return self.dataset.plan.fields["model"]["channels"] // (4 if self._shuffled else 1)

    @property
    def stride(self) -> int:
        """Pixels per latent in each direction, in the layout of the request."""
        return self.dataset.plan.fields["model"]["stride"] // (2 if self._shuffled else 1)

    @property
    def _shuffled(self) -> bool:
        return self.request.layout == UNPATCHIFIED

    @cached_property
    def bucket_numbers(self) -> np.ndarray:
        """Position in `buckets` of each row."""
        return self.dataset.bucket_numbers[self.order]

    @property
    def buckets(self) -> tuple[Size, ...]:
        return self.dataset.buckets

    def bucket(self, i: int) -> Size:
        return self.buckets[self.bucket_numbers[i]]

    def shape(self, bucket: Size) -> tuple[int, int, int]:
        """Of the latents of a bucket, in the layout of the request."""
        return self.channels, bucket.height // self.stride, bucket.width // self.stride

    def column(self, name: str) -> Any:
        """A column of the index, in the order of the rows."""
        return self.dataset.column(name).take(self.order)

    @cached_property
    def geometry(self) -> dict[str, np.ndarray]:
        """Original height and width, and the corner of the crop in the resized image, int `[N]` each."""
        names = ("height", "width", "crop_top", "crop_left")
        return {name: np.asarray(self.column(name)) for name in names}

    def tensors(self, i: int) -> dict[str, Tensor]:
        """`latents` of a row, with `latents_flip` where the cache has it, and with `--posterior` `std`, `std_flip`."""
        stored = self.dataset.tensors(int(self.order[i]))
        found = {}
        for suffix in ("", "_flip") if self.has_flips else ("",):
            found[f"latents{suffix}"] = self._in_layout(self._scaled(self._in_space(stored, suffix)))
            if self.request.posterior:
                found[f"std{suffix}"] = self._in_layout(self._scaled(self._deviation(stored[f"logsnr{suffix}"])))
        return found

    def cast(self, tensor: Tensor, i: int) -> tuple[Tensor, float]:
        """A tensor of row `i` in the dtype of the export, and the largest difference that the dtype makes.

        Raises:
            InputError: a value is out of the dtype's range.
        """
        dtype = self.out_dtype
        out = tensor.to(dtype).contiguous()
        if tensor.dtype == dtype or (tensor.dtype, dtype) in _EXACT:
            return out, 0.0
        if not torch.isfinite(out).all():
            self._refuse_value(i, float(tensor.float().abs().max()))
        return out, float((out.double() - tensor.double()).abs().max())

    def _in_space(self, stored: dict[str, Tensor], suffix: str) -> Tensor:
        latents = stored[f"latents{suffix}"]
        if self._calibration is None:
            return latents
        from ...flux2_space import to_flux2

        # 32 channels are FLUX.2's latents as its encoder gives them, 128 those after its batch norm
        logsnr = stored.get(f"logsnr{suffix}")
        return to_flux2(latents, self._calibration, logsnr=logsnr, normalised=not self._shuffled)

    def _scaled(self, tensor: Tensor) -> Tensor:
        return tensor if self.request.scale == 1.0 else tensor.float() * self.request.scale

    def _in_layout(self, tensor: Tensor) -> Tensor:
        return F.pixel_shuffle(tensor, 2) if self._shuffled else tensor

    def _deviation(self, logsnr: Tensor) -> Tensor:
        """Of the posterior in whitened units: sigma / std, sigma^2 = sigmoid(-logsnr)."""
        sigma = (0.5 * F.logsigmoid(-logsnr.float())).exp()
        whitening = self.dataset.plan.fields["whitening"]
        return sigma / torch.tensor(whitening["std"])[:, None, None] if whitening else sigma

    def _check_tensors(self) -> None:
        rules, there = self.request.rules, self.dataset.plan.tensors
        if rules.flips == REQUIRED and not self.has_flips:
            raise InputError(
                f"{self.dataset.root} holds no latents of mirrored images, and {rules.reader} reads them half of the "
                "time: cache with --flip (latents cannot be mirrored themselves)"
            )
        if self.request.posterior and "logsnr" not in there:
            raise InputError(f"{self.dataset.root} holds no logsnr: cache with --posterior, or leave --posterior away")
        if rules.one_size and len(self.dataset.buckets) > 1:
            sizes = ", ".join(map(str, self.dataset.buckets[:4]))
            raise InputError(
                f"{self.dataset.root} holds {len(self.dataset.buckets)} image sizes ({sizes}, ...), and {rules.reader} "
                "stacks rows of one: cache with --size N, or export to mds or wds"
            )
        channels = self.dataset.plan.fields["model"]["channels"]
        if self._shuffled and channels % 4:
            raise InputError(f"{channels} channels are no multiple of 4: --layout unpatchified cannot be made of them")

    def _check_range(self) -> None:
        """Refuse what the index says a narrower dtype cannot hold; `cast` finds the rest when it comes to it."""
        if self._calibration is not None or self.out_dtype != torch.float16 or self.dtype == torch.float16:
            return
        largest = np.maximum(np.abs(np.asarray(self.column("min"))), np.abs(np.asarray(self.column("max"))))
        worst = int(np.argmax(largest))
        if largest[worst] * self.request.scale > torch.finfo(torch.float16).max:
            self._refuse_value(worst, float(largest[worst]) * self.request.scale)

    def _refuse_value(self, i: int, value: float) -> None:
        raise InputError(f"row {self.ids[i]!r} holds {value:.6g}, which {self.out_dtype} cannot: use --dtype fp32")

    def _read_calibration(self) -> Any:
        if self.request.space != FLUX2:
            return None
        from ...flux2_space import Flux2Calibration

        calibration = Flux2Calibration.read(str(self.request.calibration))
        calibration.check_space(self.dataset.latent_space)
        return calibration

    def _find_labels(self) -> Labels | None:
        if self.request.labels is not None:
            return read_labels(self.request.labels, self.ids, _uncached(self.dataset.root))
        if self.request.rules.labels == UNUSED:
            return None
        stored = self._stored("label")
        if stored is not None and stored.null_count == 0:
            names = self.dataset.label_names
            return Labels(stored.to_numpy().astype(np.int64), tuple(names) if names else None)
        if self.request.rules.labels == REQUIRED:
            raise InputError(
                f"{self.request.rules.reader} reads a label per row, and the cache has none: give --labels folder "
                "(sorted top folders) or --labels FILE"
            )
        return None

    @property
    def labels_are_folders(self) -> bool:
        """Whether a row's label is the number of its top folder."""
        origins = {column["name"]: column["from"] for column in self.dataset.plan.columns}
        return (self.request.labels or origins.get("label")) == "folder"

    def _find_captions(self) -> Sequence[str] | None:
        if self.request.captions is not None:
            found = read_captions(self.request.captions, self.ids, self.request.images)
        elif self.request.rules.captions == UNUSED or (stored := self._stored("caption")) is None:
            return None
        else:
            # what has none is "" in the rows of a cache too
            self.empty_captions = stored.null_count
            found = ["" if caption is None else caption for caption in stored.to_pylist()]
            for id, caption in zip(self.ids, found, strict=True):
                check_caption(caption, id)
        pa = require_extra("pyarrow")
        return Ids(pa.array(found, pa.large_string()))

    def _stored(self, name: str) -> Any:
        """A column that the cache was given, in the order of the rows; None where it has none."""
        return self.column(name) if name in {column["name"] for column in self.dataset.plan.columns} else None

    @cached_property
    def kept(self) -> dict[str, tuple[str, Any]]:
        """Type and values of the other columns that the cache was given, by name, in the order of the rows."""
        columns = [c for c in self.dataset.plan.columns if c["name"] not in ("label", "caption")]
        return {c["name"]: (c["type"], self.column(c["name"])) for c in columns}

    def digest(self) -> dict[str, str | None]:
        """Hashes of what decides the bytes of an export beside plan and request; None for what it does not use."""
        found: dict[str, str | None] = {"ids": _digest(self.ids), "labels": None, "captions": None}
        for name in ("calibration", "text_latents"):
            path = getattr(self.request, name)
            found[name] = file_digest(path) if path is not None else None
        if self.labels is not None:
            found["labels"] = hashlib.sha256(self.labels.numbers.astype("<i8").tobytes()).hexdigest()
        if self.captions is not None:
            found["captions"] = _digest(self.captions)
        return found


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _uncached(root: Path) -> list[str]:
    """Ids in the quarantine, where there is one."""
    try:
        lines = (root / "quarantine.jsonl").read_bytes().splitlines()
        entries = [json.loads(line) for line in lines]
        return [str(entry.get("id") or entry.get("path") or entry.get("locator")) for entry in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError) as e:
        raise CacheError(f"{root / 'quarantine.jsonl'} cannot be read ({e}): run `capacitor-rt verify`") from e
