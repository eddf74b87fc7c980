"""`capacitor-rt push`: a cache or a model to the Hugging Face hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..printable import counted
from .terminal import echo, note


def _check_repo(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise InputError(f"{name!r} is no name of a repository: write OWNER/NAME")
    return name


def _check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder: give a cache, or a folder of save_pretrained")
    return folder


def push(
    folder: Annotated[
        Path, typer.Argument(help="A finished cache, or a folder of `save_pretrained`.", callback=_check_folder)
    ],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if needed.", callback=_check_repo)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, where it is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if needed.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there with others.")] = False,
) -> None:
    """Upload a cache (as a dataset) or a saved model, with a card that says what it is and how to load it.

    A cache is verified first; one that is unfinished or damaged is refused. The same command goes on where one was cut
    short.
    """
    from huggingface_hub.utils import disable_progress_bars
    from tqdm import tqdm

    from ..hub import push_to_hub

    if not sys.stderr.isatty():
        disable_progress_bars()
    bars: dict[str, tqdm] = {}

    def advance(what: str, done: int, total: int) -> None:
        bar = bars.get(what)
        if bar is None:
            bar = bars[what] = tqdm(total=total, desc=what, unit="file", disable=None, leave=False)
        bar.update(done - bar.n)

    try:
        pushed = push_to_hub(folder, repo_id, private=private, revision=revision, overwrite=overwrite, advance=advance)
    finally:
        for bar in bars.values():
            bar.close()
    if pushed.unchanged:
        note(f"there already: {counted(len(pushed.unchanged), 'file')}")
    echo(f"{counted(len(pushed.uploaded), 'file')} pushed to {pushed.url}" + (f" ({revision})" if revision else ""))
