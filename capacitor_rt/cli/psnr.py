"""`capacitor-rt psnr`: reconstruction over any number of images, in bounded memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .codecs import check_against, cosine_observer, load_codecs
from .options import (
    AreaSide,
    Backend,
    Background,
    ComputeDtype,
    Device,
    Dtype,
    ImagePaths,
    Model,
    Revision,
    Seed,
    SquareSide,
    Steps,
    check_backend,
    check_one_of,
    list_images,
    parse_background,
)
from .terminal import bar, echo, echo_json, echo_table, note, printable

if TYPE_CHECKING:
    from ..evaluation.evaluate import Score
    from ..evaluation.metrics import CosineSimilarity, PsnrTable, Similarity


def psnr(
    images: ImagePaths,
    model: Model = "sample",
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Another model to compare with, flux2, or flux2:FOLDER; may be given several times.",
            callback=check_against,
        ),
    ] = None,
    against_backend: Annotated[
        str | None,
        typer.Option(
            help="Backend of what is compared with: the models of --against, or else the same model.",
            callback=check_backend,
        ),
    ] = None,
    against_dtype: Annotated[
        Dtype | None,
        typer.Option(help="Compute type of what is compared with: the models of --against, or else the same model."),
    ] = None,
    size: SquareSide = None,
    area: AreaSide = None,
    steps: Steps = 1,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Largest number of images of one size that run together.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON; '-' prints it.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write one row per image, as it is done.")] = None,
    background: Background = "ffffff",
    revision: Revision = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = None,
    backend: Backend = "auto",
) -> None:
    """Reconstruct every image; print the PSNRs (mean, std, median, P5, P95) and the cosine of the latents.

    Ends with 3 if some images could not be decoded.
    """
    check_one_of(size, area)
    if json_file and str(json_file) != "-" and not json_file.parent.is_dir():
        raise InputError(f"{json_file.parent} for --json does not exist: create it first")
    found = [path for path, _ in list_images(images)]
    from ..config import FullCapacitorInferenceConfig
    from ..evaluation.evaluate import evaluate
    from ..images.frames import Framing

    framing, colour = Framing(size, area), parse_background(background)
    models = load_codecs(model, against or [], against_backend, against_dtype, revision, device, compute_dtype, backend)
    cosines: dict[str, CosineSimilarity] = {}
    inference = FullCapacitorInferenceConfig(num_steps=steps, seed=seed)
    observe = cosine_observer(list(models), cosines)
    scored = evaluate(found, models, framing, inference=inference, background=colour, batch=batch, observe=observe)
    values: dict[str, list[float]] = {name: [] for name in models}
    names, failed = [], 0
    with ExitStack() as stack:
        write_row = _csv_rows(stack, csv_file, list(models)) if csv_file else None
        for score in bar(scored, len(found), "image"):
            if score.error is not None:
                note(f"{score.error.reason}: {score.error}")
                failed += 1
                continue
            names.append(printable(str(score.path)))
            for name, column in values.items():
                column.append(score.psnr[name])
            if write_row:
                write_row(score)
    if not names:
        raise InputError(f"none of the {len(found)} images could be decoded")
    _print(values, names, {name: cosine.result() for name, cosine in cosines.items()}, json_file)
    if failed:
        note(f"{failed} of {len(found)} images could not be decoded")
        raise typer.Exit(3)


def _csv_rows(stack: ExitStack, path: Path, models: list[str]) -> Callable[[Score], None]:
    """Writes one row per score as it comes, so that an interrupted run keeps what was done."""
    file = stack.enter_context(path.open("w", newline="", encoding="utf-8", errors="surrogateescape"))
    rows = csv.writer(file)
    rows.writerow(["path", "height", "width", *models])

    def write(score: Score) -> None:
        rows.writerow([score.path, score.height, score.width, *(f"{score.psnr[m]:.4f}" for m in models)])
        file.flush()

    return write


def _print(
    values: dict[str, list[float]], names: list[str], cosines: dict[str, Similarity], json_file: Path | None
) -> None:
    from ..evaluation import metrics

    table = metrics.PsnrTable.of(values, names)
    first, *others = values
    pairs = {other: metrics.PsnrTable.of({first: values[first], other: values[other]}, names) for other in others}
    document = _document(table, pairs, cosines)
    if json_file and str(json_file) == "-":
        echo_json(document)
        return
    echo_table("\n\n".join(pair.render() for pair in pairs.values()) if len(pairs) > 1 else table.render())
    for name, similarity in cosines.items():
        echo()
        echo(f"latents of {first} and {name}: cosine {similarity.overall:.4f}{_spread(similarity)}")
    if json_file:
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _spread(similarity: Similarity) -> str:
    channels = similarity.per_channel
    channels = channels[~channels.isnan()]
    if not len(channels):
        return ""
    low, middle, high = channels.min().item(), channels.median().item(), channels.max().item()
    return f"; by channel {low:.4f} to {high:.4f}, median {middle:.4f}"


def _document(table: PsnrTable, pairs: dict[str, PsnrTable], cosines: dict[str, Similarity]) -> dict[str, Any]:
    document = table.to_dict()
    if len(pairs) > 1:
        document["deltas"] = {name: pair.to_dict()["delta"] for name, pair in pairs.items()}
    document["latent_cosine"] = {name: similarity.to_dict() for name, similarity in cosines.items()}
    return document
