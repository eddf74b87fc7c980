"""`capacitor-rt`: images to latents and back from a shell.

Exit codes: 0 done; 3 finished, but some inputs failed; 2 usage; 1 failed; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Annotated

import typer

from ..errors import CapacitorError, CheckpointError, InputError
from .cache import cache, verify
from .doctor import doctor
from .latent_files import decode, encode
from .options import Revision, note
from .plan import plan
from .psnr import psnr

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fast runtime for the full_capacitor image autoencoder.",
)


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, folder, .safetensors file, or 'sample'.")] = "sample",
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a checkpoint's tensors, what each was read as, the counts, and every problem. Exit 1 if there is one."""
    from ..checkpoint import problems_of, resolve

    source = resolve(checkpoint, revision=revision)
    reading, problems = problems_of(source)
    if as_json:
        document = {
            "source": {"id": source.id, "revision": source.revision, "sha256": source.sha256},
            "config": reading.config.to_dict(),
            "tensors": [vars(entry) for entry in reading.entries],
            "counts": reading.counts(),
            "notes": reading.notes,
            "problems": problems,
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        _print_reading(source, reading, problems)
    if problems:
        raise typer.Exit(1)


def _print_reading(source, reading, problems: list[str]) -> None:
    width = max((len(e.name) for e in reading.entries), default=0)
    for entry in reading.entries:
        if entry.read_as is None:
            meaning = "left over"
        elif (entry.read_as, entry.read_shape) == (entry.name, entry.shape):
            meaning = ""
        else:
            meaning = f"read as {entry.read_as} {list(entry.read_shape)}"
        typer.echo(f"{entry.name:<{width}}  {entry.dtype:<4}  {entry.shape!s:<20}  {meaning}".rstrip())
    config, counts = reading.config, reading.counts()
    typer.echo(
        f"\n{source.weights}\n  sha256 {source.sha256}\n"
        f"  {counts['total']:,} parameters in {len(reading.entries)} tensors: "
        f"encoder {counts['encoder']:,}, decoder {counts['decoder']:,}\n"
        f"  patch {config.patch_size}, width {config.model_dim}, hidden {config.hidden_dim}, "
        f"blocks {config.encoder_depth} + {config.decoder_depth} "
        f"({config.decoder_start_blocks}+{config.decoder_middle_blocks}+{config.decoder_end_blocks}), "
        f"latents {config.latent_channels} channels at stride {config.latent_stride}\n"
        f"  latent space {source.latent_space}"
    )
    for line in reading.notes:
        typer.echo(f"note: {line}")
    for line in problems:
        typer.echo(f"problem: {line}")
    typer.echo(f"{len(problems)} problems" if problems else "no problems")


for command in (encode, decode, inspect, cache, verify, psnr, plan, doctor):
    app.command()(command)


def main() -> None:
    """Entry point: expected failures end in one line and an exit code, never in a traceback."""
    warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
    try:
        app()
    except CapacitorError as error:
        note(f"error: {error}")
        sys.exit(2 if isinstance(error, InputError) and not isinstance(error, CheckpointError) else 1)
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        note(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
