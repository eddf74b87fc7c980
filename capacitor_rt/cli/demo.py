"""The whole road on the bundled photographs: images to latents on disk and back, shown and measured.

`python -m capacitor_rt.cli.demo --out demo-out` caches the photographs, reads the latents back from the disk, decodes
them, and writes two pictures, a contact sheet and the latents as colours, and a page to look at.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CapacitorError, InputError
from ..extras import require_extra
from .options import CHECKPOINTS
from .terminal import echo_table, note_error, route_messages

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the cache and the pictures.")] = Path("demo-out"),
    model: Annotated[str, typer.Option(help=f"Model to load: {CHECKPOINTS}.")] = "sample",
    photos: Annotated[Path | None, typer.Option(help="Folder of the images to show; the bundled ones if none.")] = None,
    area: Annotated[int, typer.Option(min=1, help="Bring photographs to about N^2 pixels.")] = 320,
    device: Annotated[str, typer.Option(help="Device to run on, as torch names it.")] = "cpu",
) -> None:
    """Cache photographs as latents, decode them, draw them and their latents, make a page, print the table of PSNRs."""
    try:
        # first, so that a missing extra ends in one line too
        require_extra("PIL.Image")
        require_extra("jinja2", "view")
        from .demo_run import PHOTOS, run_demo

        echo_table(run_demo(out, model, device=device, photos=photos or PHOTOS, area=area).render())
    except CapacitorError as error:
        note_error(error)
        sys.exit(2 if isinstance(error, InputError) else 1)


if __name__ == "__main__":
    route_messages()
    app()
