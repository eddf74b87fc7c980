"""`capacitor-rt probe`: which reading of irdiffae's or mdiffae's architecture a checkpoint was made under."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .options import (
    CHECKPOINTS,
    AsJson,
    ComputeDtype,
    Device,
    ImagePaths,
    Revision,
    Seed,
    check_model,
    check_square,
    list_images,
    load_model,
)
from .terminal import bar, echo, echo_json, note

if TYPE_CHECKING:
    from ..evaluation.probe import ReadingScore
    from ..model import FullCapacitor


def probe(
    model: Annotated[
        str, typer.Argument(help=f"Checkpoint of irdiffae or mdiffae: {CHECKPOINTS}.", callback=check_model)
    ],
    images: ImagePaths,
    size: Annotated[
        int, typer.Option(min=1, help="Resize and centre-crop images to N x N pixels.", callback=check_square)
    ] = 256,
    save: Annotated[
        Path | None, typer.Option(help="Folder to write the checkpoint to, with the reading that won.")
    ] = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = None,
    as_json: AsJson = False,
) -> None:
    """Print the PSNR of reconstructions under every reading of what a sibling's files leave open, best first.

    The right reading stands out: the model cards say 34 to 36 dB in the mean. Readings within 1 dB are not told apart.
    """
    import warnings

    from ..errors import UnverifiedModelWarning
    from ..evaluation.probe import leaders, readings, with_reading
    from ..evaluation.probe import probe as run
    from ..images.frames import Framing

    found = [path for path, _ in list_images(images)]
    if save is not None and save.exists() and any(save.iterdir()):
        raise InputError(f"{save} for --save is not empty: give a folder that does not exist yet")
    with warnings.catch_warnings():
        # settling that is what this command is for
        warnings.simplefilter("ignore", UnverifiedModelWarning)
        loaded = load_model(model, revision, device, compute_dtype, "torch")
    total = len(readings(loaded))
    scores = sorted(bar(run(loaded, found, Framing(size, None), seed), total, "reading"), key=lambda s: -s.mean)
    best = leaders(scores)
    if as_json:
        echo_json(_document(loaded, scores, best))
    else:
        for line in _lines(loaded, scores, best):
            echo(line)
    if save is None:
        return
    if len(best) > 1:
        raise InputError(f"{len(best)} readings are not told apart, so none is saved: give more images")
    with_reading(loaded, best[0].reading, settled=True).save_pretrained(save)
    note(f"wrote {save}, which loads with this reading and without a warning")


def _lines(model: FullCapacitor, scores: list[ReadingScore], best: list[ReadingScore]) -> list[str]:
    names = list(scores[0].reading)
    widths = [max(len(name), *(len(score.reading[name]) for score in scores)) for name in names]
    lines = ["  ".join(["PSNR dB", *(name.ljust(w) for name, w in zip(names, widths, strict=True))]).rstrip()]
    for score in scores:
        cells = [score.reading[name].ljust(w) for name, w in zip(names, widths, strict=True)]
        lines.append("  ".join([f"{score.mean:7.2f}", *cells]).rstrip())
    lines.append("")
    if len(best) > 1:
        return [*lines, f"the first {len(best)} are within 1 dB: these images do not tell them apart"]
    ahead = f", {best[0].mean - scores[1].mean:.2f} dB ahead of the next" if len(scores) > 1 else ""
    loaded_as = {name: getattr(model.config.dico, name) for name in names}
    same = "the one it loads with" if loaded_as == best[0].reading else "NOT the one it loads with: see --save"
    return [*lines, f"the first is right{ahead}; it is {same}"]


def _document(model: FullCapacitor, scores: list[ReadingScore], best: list[ReadingScore]) -> dict[str, Any]:
    return {
        "sibling": model.config.dico.sibling if model.config.dico else None,
        "scores": [{"reading": score.reading, "mean": score.mean, "psnr": list(score.psnr)} for score in scores],
        "told_apart": len(best) == 1,
    }
