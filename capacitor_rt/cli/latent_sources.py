"""What `decode` is given: files of latents, folders of them, caches; and the picture that each row becomes."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .terminal import note

if TYPE_CHECKING:
    from torch import Tensor

    from ..cache import LatentDataset

    Picture = tuple[Path, Callable[[], Tensor]]
    """The path of a picture, and what gives its latents `[1,C,h,w]`."""

SUFFIX = ".safetensors"
PLAN = "plan.json"
_FLOATS = ("F32", "F16", "BF16", "F64")


def picture_name(name: str) -> str:
    """Name of the picture that latents become: a.png.safetensors to a.png, a.jpg.safetensors to a.jpg.png.

    Two inputs that differ in the extension alone thus stay two pictures.
    """
    name = name.removesuffix(SUFFIX)
    return name if name.lower().endswith(".png") else f"{name}.png"


@dataclass(frozen=True)
class LatentFile:
    """A file of `encode`, or another with a tensor `latents` `[N,C,h,w]`; `target` is the picture of its only row."""

    path: Path
    target: Path

    @property
    def targets(self) -> dict[Path, Path]:
        """Source and picture, as far as they are known before the file is read."""
        return {self.path: self.target}

    @property
    def refused(self) -> list[str]:
        """Rows that are left out: none."""
        return []

    def __len__(self) -> int:
        return 1

    def read(self) -> tuple[str | None, Iterator[Picture]]:
        """The space of the latents, if the file names it, and every picture.

        Raises:
            InputError: the file cannot be read as latents.
        """
        latents, space = read_latents(self.path)
        return space, self._rows(latents)

    def _rows(self, latents: Tensor) -> Iterator[Picture]:
        for i in range(len(latents)):
            name = self.target if len(latents) == 1 else self.target.with_stem(f"{self.target.stem}-{i:06d}")
            yield name, partial(latents.__getitem__, slice(i, i + 1))


class CacheRows:
    """Rows of a cache, whose pictures are named by the ids of the inputs.

    Args:
        ids: patterns, of which an id must match one; none takes every row.
        limit: most rows.

    Raises:
        CacheError: the cache cannot be read. InputError: no id matches.

    Attributes:
        refused: why rows are left out whose ids cannot be names of files.
    """

    def __init__(self, root: Path, out: Path, ids: list[str], limit: int | None):
        from ..cache import LatentDataset
        from ..images.names import id_to_relative

        self.path = root
        self.dataset: LatentDataset = LatentDataset(root, verify=True, allow_partial=True)
        rows = self._matching(ids)
        self.rows: list[int] = []
        self.refused: list[str] = []
        self.targets: dict[Path, Path] = {}
        for i in rows[:limit]:
            try:
                relative = id_to_relative(self.dataset.ids[i])
            except InputError as error:
                self.refused.append(f"{root}: {error}")
                continue
            self.rows.append(i)
            self.targets[root / relative] = out / relative.with_name(picture_name(relative.name))

    def _matching(self, ids: list[str]) -> list[int]:
        names = self.dataset.ids
        if not ids:
            return list(range(len(names)))
        rows = [i for i, name in enumerate(names) if any(fnmatch.fnmatchcase(name, pattern) for pattern in ids)]
        if not rows:
            raise InputError(f"no id of {self.path} matches {' or '.join(ids)}: its first is {names[0]!r}")
        return rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self) -> tuple[str | None, Iterator[Picture]]:
        """As that of `LatentFile`; the latents of a damaged row raise CacheError."""
        pairs = zip(self.rows, self.targets.values(), strict=True)
        return self.dataset.latent_space, ((target, partial(self._latents, i)) for i, target in pairs)

    def _latents(self, i: int) -> Tensor:
        return self.dataset.tensors(i)["latents"][None]


Source = LatentFile | CacheRows


def find_latents(inputs: list[Path], out: Path, ids: list[str], limit: int | None) -> list[Source]:
    """What lies behind the arguments of `decode`, at most `limit` files and rows of caches.

    Raises:
        InputError: an input does not exist, or holds no latents; patterns of ids without a cache.
    """
    sources: list[Source] = []
    left = limit
    for item in inputs:
        found: list[Source] = []
        if (item / PLAN).is_file():
            found.append(CacheRows(item, out, ids, left))
        elif item.is_dir():
            caches = sorted(path.name for path in item.iterdir() if (path / PLAN).is_file())
            if caches:
                raise InputError(f"{item} holds the caches {', '.join(caches)}: give one of them, {item / caches[0]}")
            files = sorted(path for path in item.rglob(f"*{SUFFIX}") if path.is_file())
            if not files:
                raise InputError(f"{item} holds neither a cache nor files of latents ({SUFFIX})")
            relative = [path.relative_to(item) for path in files[:left]]
            found += [LatentFile(item / r, out / r.with_name(picture_name(r.name))) for r in relative]
        elif item.is_file():
            found += [LatentFile(item, out / picture_name(item.name))][:left]
        else:
            raise InputError(f"{str(item)!r} does not exist: give files of latents, folders of them, or caches")
        sources += found
        if left is not None:
            left -= sum(map(len, found))
    if ids and not any(isinstance(source, CacheRows) for source in sources):
        raise InputError("--id chooses rows of a cache by their ids: give a cache, or leave it away")
    return [source for source in sources if len(source) or source.refused]


def note_space(source: Source, space: str | None, model_space: str, any_space: bool) -> None:
    """Refuse latents of another space, by InputError; say so where none is named."""
    if space is None:
        note(f"note: {source.path} does not name the space of its latents: they are taken for {model_space}")
    elif space != model_space and not any_space:
        raise InputError(
            f"{source.path} holds latents of {space}, and the model decodes {model_space}: "
            "give --model the model that made them, or pass --any-space"
        )


def read_latents(path: Path) -> tuple[Tensor, str | None]:
    """`latents [N,C,h,w]` of a file written by `encode`, and the name of their space.

    Raises:
        InputError: not a safetensors file, or without `latents` of rank 4.
    """
    from safetensors import SafetensorError, safe_open

    from ..errors import CheckpointError
    from ..safetensors_header import read_safetensors_header

    try:
        # the library would believe whatever the header says of lengths
        stored = read_safetensors_header(path).get("latents")
    except CheckpointError as error:
        raise InputError(str(error)) from error
    if stored is not None and stored.dtype not in _FLOATS:
        raise InputError(f"{path}: latents are of type {stored.dtype}, expected one of {', '.join(_FLOATS)}")
    try:
        # by descriptor: safetensors refuses names that are not UTF-8
        with open(path, "rb") as opened, safe_open(f"/proc/self/fd/{opened.fileno()}", framework="pt") as file:
            if "latents" not in file.keys():  # noqa: SIM118
                names = ", ".join(file.keys()) or "no tensors"
                raise InputError(
                    f"{path} holds {names}: expected a tensor named 'latents' (of a cache give its folder)"
                )
            latents, metadata = file.get_tensor("latents"), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    if latents.dim() != 4:
        raise InputError(f"{path}: latents have shape {list(latents.shape)}, expected [N,C,h,w]")
    return latents, metadata.get("latent_space")
