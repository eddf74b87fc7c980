"""What reaches the terminal: every line that a command prints goes through `printable`."""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import typer
from tqdm import tqdm

from ..printable import printable as printable


def echo(line: str = "") -> None:
    """A line on standard output."""
    typer.echo(_encodable(printable(line), sys.stdout))


def echo_table(text: str) -> None:
    """Lines of our own making on standard output; names in them must be `printable` already, newlines included."""
    for line in text.split("\n"):
        echo(line)


def echo_json(document: Any) -> None:
    """A document on standard output: JSON in ASCII, in which every control character is an escape."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=True))


def note(line: str) -> None:
    """A line on standard error, clear of a progress bar."""
    tqdm.write(_encodable(printable(line), sys.stderr), file=sys.stderr)


# how an error joins its problems to its message
_NEXT = "\n  "


def note_error(error: BaseException) -> None:
    """An expected failure on standard error: a line, and one more per problem that it lists."""
    problems = [str(problem) for problem in getattr(error, "problems", ())]
    note(f"error: {str(error).removesuffix(''.join(f'{_NEXT}{problem}' for problem in problems))}")
    for problem in problems:
        note(f"  {problem}")


def bar(items: Iterable[Any], total: int, unit: str) -> Iterable[Any]:
    """Progress with rate and ETA on standard error, where that is a terminal."""
    return tqdm(items, total=total, unit=unit, disable=None, dynamic_ncols=True, leave=False)


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[], object]]:
    """The same for work that is not one iterable: a function to call when one more is done."""
    with tqdm(total=total, unit=unit, disable=None, dynamic_ncols=True, leave=False) as shown:
        yield shown.update


class NoteHandler(logging.Handler):
    """Log records of the library as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"{'note' if record.levelno <= logging.INFO else record.levelname.lower()}: {record.getMessage()}")


def route_messages() -> None:
    """Let warnings, log records of the library and tracebacks, which may quote what a file says, be notes too."""
    warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
    # of damaged metadata, which is passed over
    warnings.filterwarnings("ignore", module=r"PIL\b")
    sys.excepthook = _print_crash
    log = logging.getLogger("capacitor_rt")
    if not any(isinstance(handler, NoteHandler) for handler in log.handlers):
        log.addHandler(NoteHandler())
    log.setLevel(logging.INFO)


def _print_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    for line in "".join(traceback.format_exception(kind, error, trace)).rstrip("\n").split("\n"):
        note(line)


def _encodable(line: str, stream: Any) -> str:
    """The line with escapes for what the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)
