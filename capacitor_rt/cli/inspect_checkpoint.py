"""`capacitor-rt inspect`: what a checkpoint holds, how it is read, and everything that is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..printable import counted
from .options import CHECKPOINTS, AsJson, Revision, check_model
from .terminal import echo, echo_json

if TYPE_CHECKING:
    from ..checkpoint import CheckpointSource
    from ..checkpoint_schema import Entry, Reading
    from ..config import ModelConfig


def inspect(
    checkpoint: Annotated[
        str, typer.Argument(help=f"Checkpoint to read: {CHECKPOINTS}.", callback=check_model)
    ] = "sample",
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Print a checkpoint's tensors, what each was read as, the counts of parameters, and every problem.

    Ends with 1 if there is a problem.
    """
    from ..checkpoint import problems_of, resolve

    source = resolve(checkpoint, revision=revision)
    reading, problems = problems_of(source)
    if as_json:
        echo_json(_document(source, reading, problems))
    else:
        for line in _lines(source, reading, problems):
            echo(line)
    if problems:
        raise typer.Exit(1)


def _document(source: CheckpointSource, reading: Reading, problems: list[str]) -> dict[str, Any]:
    return {
        "source": {"id": source.id, "revision": source.revision, "sha256": source.sha256},
        "config": reading.config.to_dict(),
        "tensors": [vars(entry) for entry in reading.entries],
        "counts": reading.counts(),
        "notes": reading.notes,
        "problems": problems,
    }


def _lines(source: CheckpointSource, reading: Reading, problems: list[str]) -> list[str]:
    """One line per tensor, the architecture, and one line per note and problem."""
    width = max((len(entry.name) for entry in reading.entries), default=0)
    config, counts = reading.config, reading.counts()
    return [
        *(
            f"{entry.name:<{width}}  {entry.dtype:<4}  {entry.shape!s:<20}  {_meaning(entry)}".rstrip()
            for entry in reading.entries
        ),
        "",
        f"{source.weights}",
        f"  sha256 {source.sha256}",
        f"  {counts['total']:,} parameters in {counted(len(reading.entries), 'tensor')}: "
        f"encoder {counts['encoder']:,}, decoder {counts['decoder']:,}",
        f"  patch {config.patch_size}, width {config.model_dim}, hidden {config.hidden_dim}, "
        f"blocks {config.encoder_depth} + {config.decoder_depth} "
        f"({config.decoder_start_blocks}+{config.decoder_middle_blocks}+{config.decoder_end_blocks}), "
        f"latents {config.latent_channels} channels at stride {config.latent_stride}",
        *_reading(config),
        f"  latent space {source.latent_space}",
        *(f"note: {line}" for line in reading.notes),
        *(f"problem: {line}" for line in problems),
        counted(len(problems), "problem") if problems else "no problems",
    ]


def _reading(config: ModelConfig) -> list[str]:
    """What is inferred of a sibling's architecture."""
    if config.dico is None:
        return []
    choices = ", ".join(f"{name} {config.dico.reading[name]}" for name in config.dico.open_readings)
    return [f"  {config.dico.sibling}, {'settled' if config.dico.settled else 'unverified'}: {choices}"]


def _meaning(entry: Entry) -> str:
    """What a tensor of the file was read as, where that is not what the file says."""
    if entry.read_as is None or entry.read_shape is None:
        return "left over"
    if (entry.read_as, entry.read_shape) == (entry.name, entry.shape):
        return ""
    return f"read as {entry.read_as} {list(entry.read_shape)}"
