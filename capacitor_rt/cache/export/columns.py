"""Labels, captions and text latents of the rows of a cache, checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import CacheError, InputError
from ...images.scan import id_to_path
from ...strict_json import open_regular
from ..sources.columns import caption_text
from ..sources.tables import CAPTIONS, LABELS, MAX_CAPTION, Table, some

MOST_CAPTION_BYTES = 64 * 1024
"""Of one caption in UTF-8; text encoders take a few thousand tokens at most."""


@dataclass(frozen=True)
class Labels:
    """Class numbers of the rows, int64 `[N]`, and the names of the classes where they have any."""

    numbers: np.ndarray
    classes: tuple[str, ...] | None = None


def read_labels(source: str, ids: Sequence[str], others: Sequence[str] = ()) -> Labels:
    """Labels of the rows `ids`.

    Args:
        source: "folder": the number of the row's top folder among all top folders, sorted, which is the rule of
            torchvision's ImageFolder. Else a file of ids and labels; names of classes are numbered as they sort.
        others: ids of inputs that are not cached, whose folders count too.

    Raises:
        InputError: rows without a label, a label that is neither a number from 0 nor a name, or both kinds.
    """
    if source == "folder":
        folders = [id.partition("/")[0] if "/" in id else None for id in ids]
        bare = [id for id, folder in zip(ids, folders, strict=True) if folder is None]
        if bare:
            raise InputError(
                f"{len(bare)} of {len(ids)} rows lie in no folder ({some(bare, len(bare))}), so they have no label: "
                "give --labels FILE"
            )
        return _numbered([str(folder) for folder in folders], [id.partition("/")[0] for id in others if "/" in id])
    path = _file(source, "labels", "folder")
    values = [_label(value, path) for value in _joined(path, ids, LABELS)]
    if all(isinstance(value, int) for value in values):
        return Labels(np.array(values, np.int64))
    if any(isinstance(value, int) for value in values):
        raise InputError(f"{path} holds numbers and names of classes: use one or the other")
    return _numbered([str(value) for value in values])


def _joined(path: Path, ids: Sequence[str], names: Sequence[str]) -> list[Any]:
    """The values of the rows in a table. Raises InputError."""
    try:
        return Table(path).joined(ids, names)
    except CacheError as e:
        raise InputError(str(e)) from e


def _numbered(names: Sequence[str], others: Sequence[str] = ()) -> Labels:
    classes = sorted({*names, *others})
    number = {name: n for n, name in enumerate(classes)}
    return Labels(np.array([number[name] for name in names], np.int64), tuple(classes))


def _label(value: Any, path: Path) -> int | str:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return value
    raise InputError(f"{path} holds the label {value!r}: labels are numbers from 0, or names")


def read_captions(source: str, ids: Sequence[str], images: Path | None) -> list[str]:
    """Captions of the rows `ids`.

    Args:
        source: "txt" (a.txt beside a.png), "json" (a.json with a caption), or a file of ids and captions.
        images: the folder that was cached.

    Raises:
        InputError: rows without a caption; a caption that is no text, holds NUL, or is above `MOST_CAPTION_BYTES`.
    """
    if source in ("txt", "json"):
        assert images is not None, "the request was checked"
        missing = [id for id in ids if not _beside(images, id, source).is_file()]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(ids)} rows have no .{source} file beside them under {images} "
                f"({some(missing, len(missing))}): add them, empty ones where there is nothing to say"
            )
        found = [_caption_file(_beside(images, id, source)) for id in ids]
    else:
        path = _file(source, "captions", "txt or json")
        found = _joined(path, ids, CAPTIONS)
    for id, caption in zip(ids, found, strict=True):
        check_caption(caption, id)
    return found


def check_caption(caption: Any, id: str) -> None:
    """Raise InputError for what no reader takes as a caption."""
    if not isinstance(caption, str):
        raise InputError(f"the caption of {id!r} is {type(caption).__name__}, not text: mend it")
    if "\0" in caption:
        raise InputError(f"the caption of {id!r} holds a NUL character: remove it, text files and tokenizers end there")
    try:
        size = len(caption.encode())
    except UnicodeEncodeError as e:
        raise InputError(f"the caption of {id!r} is no valid Unicode ({e.reason}): mend it") from e
    if size > MOST_CAPTION_BYTES:
        raise InputError(f"the caption of {id!r} has {size} bytes, above {MOST_CAPTION_BYTES}: shorten it")


def source_path(images: Path, id: str) -> Path:
    """Where the input of an id lies."""
    return images / os.fsdecode(id_to_path(id))


def _beside(images: Path, id: str, extension: str) -> Path:
    return source_path(images, id).with_suffix(f".{extension}")


def _caption_file(path: Path) -> str:
    """The caption in a file beside an image, read as `cache --captions` reads it."""
    try:
        with open_regular(path) as file:
            caption = caption_text(file.read(MAX_CAPTION + 1), path.suffix[1:], str(path))
    except OSError as e:
        raise InputError(f"caption {path} cannot be read: {e.strerror or 'no regular file'}") from e
    except CacheError as e:
        raise InputError(str(e)) from e
    if caption is None:
        raise InputError(f"{path} has no caption: it is an object with one of {', '.join(CAPTIONS)}")
    return caption


def _file(source: str, option: str, else_use: str) -> Path:
    path = Path(source)
    if not path.is_file():
        raise InputError(f"--{option} {source!r} is not a file: give one, or use {else_use}")
    return path


class TextLatents:
    """Tensors of a text encoder by id, `[tokens, channels]` each, from a safetensors file that is read as needed.

    Raises:
        InputError: the file cannot be read, or lacks rows.
    """

    def __init__(self, path: Path, ids: Sequence[str]):
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="pt")
            names = set(self._file.keys())
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path} cannot be read as safetensors: {e}") from e
        missing = [id for id in ids if id not in names]
        if missing:
            raise InputError(
                f"{path} has no tensor of {len(missing)} of {len(ids)} rows ({some(missing, len(missing))}): "
                "name each tensor as the row's id"
            )
        shapes = {tuple(self._file.get_slice(id).get_shape()) for id in ids}
        bad = next((shape for shape in shapes if len(shape) != 2), None)
        if bad is not None:
            raise InputError(f"{path} holds a tensor of shape {list(bad)}: text latents are [tokens, channels]")
        self.shapes = shapes

    def __getitem__(self, id: str) -> Tensor:
        return self._file.get_tensor(id)
