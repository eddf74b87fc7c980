"""`capacitor-rt view`: images, reconstructions and latents as a page that a browser opens from disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..printable import counted
from .codecs import check_against
from .options import (
    AreaSide,
    Backend,
    Background,
    ComputeDtype,
    Device,
    Model,
    Revision,
    Seed,
    SquareSide,
    Steps,
    check_one_of,
    parse_background,
)
from .terminal import echo, echo_table, note

if TYPE_CHECKING:
    from ..evaluation.view.writer import PageReport

LIMIT = 2000


def view(
    source: Annotated[
        list[Path],
        typer.Argument(
            help="Images, folders of them, or one latent cache; or with --serve a page to show.", show_default=False
        ),
    ],
    model: Model = "sample",
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Another model to compare with, flux2, or flux2:FOLDER; may be given several times.",
            callback=check_against,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the page: new, empty, or an older page.")] = Path(
        "page"
    ),
    images: Annotated[
        Path | None, typer.Option(help="Folder that a cache was made of; without it a cache has no originals to show.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show so many images at most, spread evenly over all.")] = LIMIT,
    serve: Annotated[bool, typer.Option("--serve", help="Show the page at an address on this machine alone.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 takes a free one.")] = 0,
    size: SquareSide = None,
    area: AreaSide = None,
    steps: Steps = 1,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Largest number of images of one size that run together.")] = 8,
    background: Background = "ffffff",
    revision: Revision = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = None,
    backend: Backend = "auto",
) -> None:
    """Make a page of results: images beside their reconstructions, differences, latents, scores and statistics.

    Ends with 3 if some images could not be decoded, and with 130 when interrupted, having made the page of what was
    done.
    """
    check_one_of(size, area)
    if len(source) == 1 and (source[0] / "page.json").is_file() and not (source[0] / "plan.json").exists():
        if not serve:
            raise InputError(f"{str(source[0])!r} is a page already: open its index.html, or give --serve")
        _serve(source[0], port)
        return
    for path in source:
        if not path.exists():
            raise InputError(f"{str(path)!r} does not exist: give images, a folder of them, or a cache")
    is_cache = any((path / "plan.json").is_file() for path in source)
    if is_cache and len(source) > 1:
        raise InputError("a page is of one cache, or of images: give one of them")
    if is_cache and (size or area):
        raise InputError("--size and --area are for images: the sizes of a cache are those it was made with")
    if is_cache and against and images is None:
        raise InputError("--against needs the images that the cache was made of: give --images FOLDER")
    if images is not None and not is_cache:
        raise InputError("--images is for a cache, and no SOURCE is one: give images as SOURCE alone")
    if images is not None and not images.is_dir():
        raise InputError(f"{str(images)!r} for --images is not a folder: give the folder that was cached")
    from ..evaluation.view.folder import check_out
    from ..evaluation.view.site import check_templates

    check_templates()
    check_out(out)
    from .codecs import load_codecs
    from .view_run import Settings, view_images

    models = load_codecs(model, against or [], None, None, revision, device, compute_dtype, backend)
    settings = Settings(out, limit, batch, steps, seed)
    if is_cache:
        from .view_cache import view_cache

        report, done = view_cache(source[0], models, settings, images)
    else:
        report, done = view_images(source, models, settings, size, area, parse_background(background))
    _print(report)
    if serve and done:
        _serve(report.index.parent, port)
    if not done:
        raise typer.Exit(130)
    if report.left_out:
        raise typer.Exit(3)


def _print(report: PageReport) -> None:
    if report.psnr is not None:
        echo_table(report.psnr.render())
        echo()
    if report.left_out:
        note(f"{counted(report.left_out, 'input')} could not be shown: the page says why")
    echo(f"{report.index}  {counted(report.images, 'image')}, {report.nbytes / 1e6:.1f} MB: open it in a browser")


def _serve(folder: Path, port: int) -> None:
    from ..evaluation.view.serve import PageServer

    with PageServer(folder, port) as server:
        note(f"{server.url} shows {folder}; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            note("ended")
