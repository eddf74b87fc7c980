"""`capacitor-rt`: images to latents and back from a shell.

Exit codes: 0 done; 3 finished, but some inputs failed; 2 usage; 1 failed; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings

import typer

from ..errors import CapacitorError, CheckpointError, InputError
from .cache import cache, verify
from .doctor import doctor
from .inspect_checkpoint import inspect
from .latent_files import decode, encode
from .options import note
from .plan import plan
from .psnr import psnr

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fast runtime for the full_capacitor image autoencoder.",
)

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
