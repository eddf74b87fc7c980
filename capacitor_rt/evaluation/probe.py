"""Which reading of a sibling's architecture its weights were made under: the PSNR of every one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..config import FullCapacitorInferenceConfig
from ..errors import InputError
from ..images.frames import Framing
from ..model import FullCapacitor
from .evaluate import evaluate

MARGIN_DB = 1.0
"""What a reading must be ahead of the others to count as the right one."""


@dataclass(frozen=True)
class ReadingScore:
    """A reading and the PSNR in dB of each image under it."""

    reading: dict[str, str]
    psnr: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.psnr)


def probe(model: FullCapacitor, paths: Sequence[Path], framing: Framing, seed: int = 0) -> Iterator[ReadingScore]:
    """Reconstruct images under every reading that the files of `model` leave open, in one step of the torch backend.

    The readings share the model's tensors.

    Raises:
        InputError: a model that leaves nothing open. ImageError: an image that cannot be decoded.
    """
    inference = FullCapacitorInferenceConfig(seed=seed)
    for reading in readings(model):
        twin = with_reading(model, reading)
        values = []
        for score in evaluate(paths, {"": twin}, framing, inference=inference):
            if score.error is not None:
                raise score.error
            values.append(score.psnr[""])
        yield ReadingScore(reading, tuple(values))


def readings(model: FullCapacitor) -> list[dict[str, str]]:
    """Every combination of what the files of `model` leave open, our own reading first.

    Raises:
        InputError: a model that leaves nothing open.
    """
    dico = model.config.dico
    if dico is None:
        raise InputError("every part of this architecture is known: only irdiffae and mdiffae have readings to probe")
    names = dico.open_readings
    return [dict(zip(names, choice, strict=True)) for choice in itertools.product(*names.values())]


def with_reading(model: FullCapacitor, reading: dict[str, str], settled: bool = False) -> FullCapacitor:
    """The same tensors, not copied, under another reading; served by the torch backend."""
    dico = model.config.dico
    if dico is None:
        raise InputError("only irdiffae and mdiffae have readings")
    changes: dict[str, Any] = reading | {"settled": settled}
    config = dataclasses.replace(model.config, dico=dataclasses.replace(dico, **changes))
    with torch.device("meta"):
        twin = FullCapacitor(config, backend="torch")
    twin.hold(model.state_dict())
    return twin


def leaders(scores: Sequence[ReadingScore]) -> list[ReadingScore]:
    """The best reading, and every one within `MARGIN_DB` of it; best first."""
    ranked = sorted(scores, key=lambda score: -score.mean)
    return [score for score in ranked if not score.mean < ranked[0].mean - MARGIN_DB]
