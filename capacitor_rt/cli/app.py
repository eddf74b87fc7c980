"""`capacitor-rt`: images to latents and back from a shell.

Exit codes: 0 done; 3 finished, but some inputs failed; 2 usage; 1 failed; 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, cast

import typer

from ..errors import CapacitorError, CheckpointError, HungError, InputError
from ..extras import what_is_missing
from ..version import __version__
from .cache import cache
from .cache_status import diff, gc, status
from .calibrate import calibrate
from .calibrate_fp8 import calibrate_fp8
from .doctor import doctor
from .export import export
from .inspect_checkpoint import inspect
from .interrupts import INTERRUPTED
from .latent_files import decode, encode
from .plan import plan
from .probe import probe
from .psnr import psnr
from .push import push
from .terminal import echo, note, note_error, route_messages
from .tune import tune
from .verify import verify
from .view import view

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fast runtime for the full_capacitor image autoencoder.",
)


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose interruption is a line on standard error, which typer ends without a word."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return run


for command in (
    encode, decode, inspect, cache, verify, status, diff, gc, export, push, psnr, view, probe, plan, doctor, tune,
    calibrate,
):  # fmt: skip
    app.command()(_told(command))
app.command("calibrate-fp8")(_told(calibrate_fp8))


# the parser's own errors: bad options, bad values, missing arguments
_UsageError = cast(type[Exception], next(t for t in typer.BadParameter.__mro__ if t.__name__ == "UsageError"))


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"capacitor-rt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Fast runtime for the full_capacitor image autoencoder."""


def main() -> None:
    """Entry point: expected failures end in one line and an exit code, never in a traceback."""
    route_messages()
    sys.exit(_run())


def _run() -> int:
    """Run the command that the arguments name; its exit code."""
    try:
        return app(prog_name="capacitor-rt", standalone_mode=False) or 0
    except HungError as error:
        note_error(error)
        sys.stdout.flush()
        sys.stderr.flush()
        # an orderly end would wait for what hangs
        os._exit(1)
    except CapacitorError as error:
        note_error(error)
        return 2 if isinstance(error, InputError) and not isinstance(error, CheckpointError) else 1
    except _UsageError as error:
        return _print_usage_error(error)
    except typer.Abort:
        note("aborted")
        return 1
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # the reader went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # without its number
        named = isinstance(error.filename, str | bytes) and error.strerror
        note(f"error: {os.fsdecode(error.filename)}: {error.strerror}" if named else f"error: {error}")
        return 1
    except ModuleNotFoundError as error:
        if (missing := what_is_missing(error)) is None:
            raise
        note(f"error: {missing}")
        return 1


def _print_usage_error(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return error.exit_code
    if error.ctx is not None:
        note(error.ctx.get_usage())
        note(f"'{error.ctx.command_path} --help' explains the options")
    note(f"error: {error.format_message().replace('Value error, ', '')}")
    return error.exit_code


if __name__ == "__main__":
    main()
