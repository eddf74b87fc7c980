"""The file that encoding in fp8 needs: ranges of one model's activations on some images, with a hash of both.

Written by `capacitor-rt calibrate-fp8`, beside the weights, as strict JSON. It belongs to the weights whose hash it
names and to no others.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import strict_json
from .errors import InputError

FORMAT = "capacitor-fp8-calibration/1"
SUFFIX = ".fp8-calibration.json"
MOST_BYTES = 32 << 20
_PARTS = ("y", "hidden", "gain")


@dataclass(frozen=True)
class Fp8Calibration:
    """Contents of a calibration file.

    Attributes:
        model: `id`, `revision` and `sha256` of the weights file.
        images: `count` of those that were seen, how many `failed` to be decoded, `framing`, and `sha256` of the pixels.
        ranges: of each block the largest magnitudes: `y`, and of each hidden channel `hidden` and `gain` (see
            `runtime.fold_fp8.BlockRange`).
        report: what encoding in fp8 costs on these images, as `calibrate-fp8` prints it.
        code: versions of this package and of torch.
    """

    model: dict[str, Any]
    images: dict[str, Any]
    ranges: tuple[dict[str, Any], ...]
    report: dict[str, Any]
    code: dict[str, str]

    @property
    def sha256(self) -> str:
        """Hash of the ranges, hex: of all that decides a bit of the latents beside the weights."""
        text = json.dumps(self.ranges, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The contents of the file."""
        return {"format": FORMAT, **asdict(self), "sha256": self.sha256}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Fp8Calibration:
        """A parsed file.

        Raises:
            InputError: another format, a missing field, a value that is not a number, or values that do not match their
                hash.
        """
        again = "make it anew by `capacitor-rt calibrate-fp8`"
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise InputError(f"{where} is no {FORMAT} file: {again}")
        try:
            read = cls(
                dict(values["model"]),
                dict(values["images"]),
                tuple(_range(block) for block in values["ranges"]),
                dict(values["report"]),
                dict(values["code"]),
            )
            known = values["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where} is damaged ({error!r}): {again}") from None
        if read.sha256 != known:
            raise InputError(f"{where} is damaged (its ranges do not match its sha256): {again}")
        return read


def _range(block: Any) -> dict[str, Any]:
    if set(block) != set(_PARTS):
        raise ValueError(f"a block has {sorted(block)[:4]}")
    for value in (block["y"], *block["hidden"], *block["gain"]):
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{value!r} is no magnitude")
    return {"y": block["y"], "hidden": list(block["hidden"]), "gain": list(block["gain"])}


def places(weights: Path, sha256: str, is_sample: bool) -> tuple[Path, ...]:
    """Where the calibration of a weights file may lie: beside it, else in the user's cache folder, by hash.

    The bundled sample, which is part of the package, has its calibration in the cache folder alone.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    inside = (Path(base) if base else Path.home() / ".cache") / "capacitor_rt" / "fp8"
    beside = weights.with_name(f"{weights.stem}{SUFFIX}")
    return (*(() if is_sample else (beside,)), inside / f"{sha256[:32]}{SUFFIX}")


def load(path: Path, sha256: str) -> Fp8Calibration:
    """The calibration at `path`, of the weights with this hash.

    Raises:
        InputError: it is damaged, or of other weights.
    """
    try:
        values = strict_json.read(path, MOST_BYTES)
    except (OSError, strict_json.StrictJSONError) as error:
        raise InputError(f"{path} cannot be read ({error}): make it anew by `capacitor-rt calibrate-fp8`") from error
    calibration = Fp8Calibration.from_dict(values, str(path))
    if calibration.model.get("sha256") != sha256:
        raise InputError(
            f"{path} is of other weights ({str(calibration.model.get('sha256'))[:16]}) than these ({sha256[:16]}): "
            "calibrate these by `capacitor-rt calibrate-fp8`"
        )
    return calibration


def save(calibration: Fp8Calibration, path: Path) -> None:
    """Write a calibration, whole or not at all; one that is there is never replaced.

    Raises:
        InputError: the file exists. OSError: it cannot be written.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        strict_json.write_new(path, calibration.to_dict())
    except FileExistsError:
        refuse_existing(path)
        raise


def refuse_existing(path: Path) -> None:
    """Raise InputError where `path` exists."""
    if os.path.lexists(path):
        raise InputError(f"{path} exists: caches may have been made by it, so move it away, or give another --out")
