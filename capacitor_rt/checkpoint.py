"""Checkpoints: a hub id, a folder or a file -> architecture, validated tensors, source; and back to a folder.

One error lists everything that is wrong with a checkpoint; files are only read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import strict_json
from .checkpoint_schema import DERIVED, Entry, Reading, read_layout
from .conditioning import default_freqs
from .config import MOST_CONFIG_BYTES, ModelConfig
from .errors import CheckpointError, ConfigError
from .hub_access import explained, unreachable
from .printable import counted
from .safetensors_header import read_safetensors_header, unreadable

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
ADAPTER_NAME = "adapter.json"
"""Arguments of an adapter, beside the model that it was saved with."""
SAMPLE = "sample"
_log = logging.getLogger("capacitor_rt")


@dataclass
class CheckpointSource:
    """Where a model's weights came from.

    Attributes:
        id: hub id, absolute path, or "sample".
        revision: commit hash on the hub; None for local files.
        weights: the weights file.
        config: `config.json` beside it, None where there is none.
        encoding: what latents differ by from those of the same weights in 16 or 32 bits, such as "fp8-12345678".
    """

    id: str
    revision: str | None
    weights: Path
    config: Path | None = field(default=None)
    encoding: str | None = None

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights file, hex."""
        with open(self.weights, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    @property
    def latent_space(self) -> str:
        """Name of the space that `encode` returns, e.g. `full_capacitor/whitened@<revision>`."""
        name = Path(self.id).stem if os.path.isabs(self.id) else self.id.rsplit("/", 1)[-1]
        kind = f"whitened-{self.encoding}" if self.encoding else "whitened"
        return f"{name}/{kind}@{self.revision or 'sha256:' + self.sha256[:16]}"


def resolve(
    id_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
) -> CheckpointSource:
    """Find a checkpoint's files, downloading them through `huggingface_hub` where `id_or_path` is a hub id.

    "sample" is the checkpoint bundled with this package (write "./sample" for a folder of that name).

    Raises:
        CheckpointError: nothing there, no access, or offline and not in the cache.
    """
    name = os.fspath(id_or_path)
    if name == SAMPLE:
        if subfolder:
            raise CheckpointError(
                f"subfolder {subfolder!r} does not go with {SAMPLE!r}: leave it out, or write './{SAMPLE}' for "
                "a folder of that name"
            )
        return _in_folder(Path(__file__).parent / "sample", SAMPLE, None)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            folder = path / subfolder if subfolder else path
            return _in_folder(folder, str(folder.resolve()), None)
        if path.is_file():
            return CheckpointSource(str(path.resolve()), None, path, _config_in(path.parent))
    # a name that is too long, a folder that may not be entered, the home of an unknown user, a circle of links
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name[:200]!r} cannot be looked up: {error}") from error
    if path.suffix == ".safetensors" or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise CheckpointError(
            f"{name!r} is neither a folder, nor a .safetensors file, nor a hub id like 'data-archetype/full_capacitor'"
        )
    options = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    return _from_hub(name, revision, subfolder, force_download, options)


def _in_folder(folder: Path, id: str, revision: str | None) -> CheckpointSource:
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        candidates = sorted(folder.glob("*.safetensors"))
        if len(candidates) != 1:
            found = ", ".join(c.name for c in candidates) or "no .safetensors file"
            raise CheckpointError(f"{folder} holds {found}: expected {WEIGHTS_NAME}, or give the file itself")
        weights = candidates[0]
    return CheckpointSource(id, revision, weights, _config_in(folder))


def _config_in(folder: Path) -> Path | None:
    """The folder's `config.json`; also one that cannot be read, because that is not as if there were none."""
    config = folder / CONFIG_NAME
    return config if os.path.lexists(config) else None


def _from_hub(
    id: str, revision: str | None, subfolder: str | None, force_download: bool, options: dict[str, Any]
) -> CheckpointSource:
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import hf_hub_download

    why = None if options["local_files_only"] else unreachable()
    if why:
        if force_download:
            raise CheckpointError(f"{id} cannot be downloaded again: {why}")
        # else each file would be asked for again and again, for half a minute
        options = options | {"local_files_only": True}

    def fetch(filename: str, at: str | None) -> Path:
        return Path(
            hf_hub_download(id, filename, revision=at, subfolder=subfolder, force_download=force_download, **options)
        )

    with explained(id, revision, why):
        try:
            config = fetch(CONFIG_NAME, revision)
        except hub_errors.LocalEntryNotFoundError:
            raise
        except hub_errors.EntryNotFoundError:
            config = None
        # both files of one commit, also while the repository is being changed
        commit = _commit_of(config) if config else None
        try:
            weights = fetch(WEIGHTS_NAME, commit or revision)
        except hub_errors.LocalEntryNotFoundError:
            raise
        except hub_errors.EntryNotFoundError:
            where = f"{id}/{subfolder}" if subfolder else id
            raise CheckpointError(f"{where} holds no {WEIGHTS_NAME} at revision {revision or 'main'}") from None
    if why:
        _log.warning("%s: %s comes from the local cache, as it was last seen", why, id)
    return CheckpointSource(id, _commit_of(weights), weights, config)


def companion(
    source: CheckpointSource,
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str | None = None,
) -> Path | None:
    """A small file beside a checkpoint's weights, of the same commit; None where there is none.

    One of a checkpoint of the hub is downloaded. Where the hub is not asked and was not asked for the file before, the
    file is taken for absent, and a warning logged.

    Raises:
        CheckpointError: no access, or the download failed.
    """
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    path = source.weights.parent / name
    if path.is_file() or source.revision is None:
        return path if path.is_file() else None
    why = None if local_files_only else unreachable()
    folder = None if cache_dir is None else Path(cache_dir)
    options: dict[str, Any] = {"revision": source.revision, "subfolder": subfolder, "cache_dir": folder, "token": token}
    with explained(source.id, source.revision, why):
        try:
            return Path(hf_hub_download(source.id, name, **options, local_files_only=local_files_only or bool(why)))
        except hub_errors.LocalEntryNotFoundError:
            inside = f"{subfolder}/{name}" if subfolder else name
            if try_to_load_from_cache(source.id, inside, cache_dir=folder, revision=source.revision) is None:
                _log.warning("%s: %s is not in the local cache: taken for absent", source.id, name)
            return None
        except hub_errors.EntryNotFoundError:
            return None


def _commit_of(path: Path) -> str | None:
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def read_header(source: CheckpointSource) -> Reading:
    """Match the header of a checkpoint with the architecture, without reading the weights.

    Raises:
        CheckpointError: the weights file or `config.json` cannot be read at all.
    """
    settings = _read_settings(source.config)
    stored = read_safetensors_header(source.weights)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    try:
        return read_layout(shapes, dtypes, settings, str(source.config or source.weights))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _read_settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        settings = strict_json.read(path, MOST_CONFIG_BYTES)
    except strict_json.StrictJSONError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds a JSON {type(settings).__name__}: expected an object of settings")
    return settings


def read_tensors(source: CheckpointSource, reading: Reading) -> tuple[dict[str, Tensor], list[str]]:
    """The model's tensors by their names there, memory-mapped where possible, and the problems of their values."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    try:
        with safe_open(source.weights, framework="pt") as file:
            for entry in reading.entries:
                # what is misshaped or of another type is a problem of its own, and may be of any size
                if entry.read_as is not None and entry.fits:
                    t = tensors[entry.read_as] = _tensor(source, file, entry)
                    problems += _value_problems(entry, t)
    except (SafetensorError, OSError) as error:
        raise unreadable(source.weights, error) from error
    return tensors, problems


def _tensor(source: CheckpointSource, file: Any, entry: Entry) -> Tensor:
    """A tensor of an open file, memory-mapped where possible."""
    from safetensors import SafetensorError

    try:
        return file.get_tensor(entry.name)
    # torch says RuntimeError, or NotImplementedError, which is one, for what it cannot map or view
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise unreadable(source.weights, f"tensor {entry.name}: {error}") from error


def _value_problems(entry: Entry, t: Tensor) -> list[str]:
    # the model holds float32, which has no place for the largest of float64
    bad = t.numel() - int(torch.isfinite(t.float() if t.dtype == torch.float64 else t).sum())
    if bad:
        return [f"not finite: {entry.name} has {bad} NaN or Inf among {t.numel()} values"]
    if entry.read_as is not None and entry.read_as.endswith("running_var") and bool((t < 0).any()):
        return [f"negative variance: {entry.name} has {int((t < 0).sum())} values below 0"]
    return []


def problems_of(source: CheckpointSource) -> tuple[Reading, list[str]]:
    """Everything that is wrong with a checkpoint, its values included; for `capacitor-rt inspect`."""
    reading = read_header(source)
    _, value_problems = read_tensors(source, reading)
    return reading, [*reading.problems, *reading.leftovers, *value_problems]


@dataclass(frozen=True)
class CheckpointContents:
    """A checkpoint that fits: its architecture, and its tensors by the model's names, in the model's shapes.

    The tensors keep the file's dtypes and are memory-mapped where possible; what follows from the architecture is
    computed where the file lacks it.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]


def read(source: CheckpointSource, *, strict: bool = True) -> CheckpointContents:
    """Read a checkpoint whole; notes on it, and with `strict` False left-over tensors, are warned of.

    Raises:
        CheckpointError: not readable, or its tensors do not fit; all of them are listed.
    """
    reading = read_header(source)
    tensors, value_problems = read_tensors(source, reading)
    problems = [*reading.problems, *(reading.leftovers if strict else []), *value_problems]
    if problems:
        raise CheckpointError(f"{source.weights} does not fit ({counted(len(problems), 'problem')}):", problems)
    for note in reading.notes:
        if note.startswith(str(source.config)):
            warnings.warn(note, stacklevel=3)
    for note in reading.leftovers:
        warnings.warn(note, stacklevel=3)
    shapes = {entry.read_as: entry.read_shape or () for entry in reading.entries}
    fitting = {name: t.reshape(shapes[name]) for name, t in tensors.items()}
    for name in DERIVED:
        fitting.setdefault(name, default_freqs())
    return CheckpointContents(reading.config, fitting)


def save(folder: str | os.PathLike[str], config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, each whole or not at all. Tensors keep their dtype."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    # safetensors refuses tensors that share memory
    tensors = {name: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for name, t in tensors.items()}
    with replacing(folder / WEIGHTS_NAME) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with replacing(folder / CONFIG_NAME) as path:
        path.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of tensors with their names, types and shapes, hex: what identifies a model that was built in memory."""
    digest = hashlib.sha256()
    for name, t in sorted(state.items()):
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class replacing:
    """A temporary path beside `path` that takes its place when the block ends well."""

    def __init__(self, path: Path):
        self.path = path
        # a name may have 255 bytes
        name = os.fsdecode(os.fsencode(path.name)[:200])
        self.temporary = path.with_name(f"{name}.tmp-{uuid.uuid4().hex}")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            # safetensors makes its files private; ours are like any other file
            mask = os.umask(0)
            os.umask(mask)
            self.temporary.chmod(0o666 & ~mask)
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
