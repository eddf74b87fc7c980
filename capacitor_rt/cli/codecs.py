"""The models that a command compares: checkpoints and FLUX.2, by the names that its tables show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..printable import printable
from .options import Dtype, check_model, load_model

if TYPE_CHECKING:
    from ..evaluation.evaluate import ImageCodec, Latents
    from ..evaluation.metrics import CosineSimilarity

FLUX2 = "flux2"


def check_against(names: list[str] | None) -> list[str] | None:
    """Names of models as they are, `flux2` and `flux2:FOLDER` among them; CheckpointError for one that cannot be."""
    for name in names or ():
        if not _is_flux2(name):
            check_model(name)
    return names


def load_codecs(
    model: str,
    against: list[str],
    against_backend: str | None,
    against_dtype: Dtype | None,
    revision: str | None,
    device: str,
    dtype: Dtype | None,
    backend: str,
) -> dict[str, ImageCodec]:
    """The models by the names that the table shows, the one that the others are compared with first."""
    from ..evaluation.flux2 import require as require_flux2

    if (against_backend or against_dtype) and all(_is_flux2(other) for other in against):
        against = [model, *against]
    if any(map(_is_flux2, against)):
        require_flux2()
    label = printable(Path(model).name)
    models: dict[str, ImageCodec] = {label: load_model(model, revision, device, dtype, backend)}
    for other in against:
        if _is_flux2(other):
            name = FLUX2
            made = _load_flux2(other, models[label])
        else:
            name = " ".join(
                filter(None, (printable(Path(other).name), against_backend, against_dtype and against_dtype.value))
            )
            its = revision if other == model else None
            made = load_model(other, its, device, against_dtype or dtype, against_backend or backend)
        while name in models:
            name += " (2)"
        models[name] = made
    return models


def _is_flux2(name: str) -> bool:
    return name == FLUX2 or name.startswith(f"{FLUX2}:")


def _load_flux2(name: str, like: ImageCodec) -> ImageCodec:
    from ..evaluation.flux2 import HUB_ID, Flux2

    where = name.removeprefix(FLUX2).removeprefix(":") or HUB_ID
    return Flux2.from_pretrained(where, device=like.device, dtype=like.dtype)


def cosine_observer(models: list[str], cosines: dict[str, CosineSimilarity]) -> Callable[[Latents], None]:
    """Adds each batch to `cosines`: the first model's latents with each other model's, where they have one shape."""
    from ..evaluation.metrics import CosineSimilarity

    first, *others = models

    def observe(latents: Latents) -> None:
        for name in others:
            if latents[name].shape == latents[first].shape:
                cosines.setdefault(name, CosineSimilarity()).update(latents[first], latents[name])

    return observe
