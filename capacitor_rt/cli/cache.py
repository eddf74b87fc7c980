"""`capacitor-rt cache`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..sizes import SIZE_MULTIPLE
from .cache_report import print_dry_run, print_report, print_views, remark
from .interrupts import interruptible
from .options import (
    AreaSide,
    Backend,
    Background,
    ComputeDtype,
    Device,
    Gpus,
    Model,
    Revision,
    SquareSide,
    StoredDtype,
    image_option,
    model_option,
    parse_background,
    resolve_device,
    visible_gpus,
)
from .terminal import echo

if TYPE_CHECKING:
    from ..cache.decoding import Helper

_stored = partial(typer.Option, rich_help_panel="What is stored")
_work = partial(typer.Option, rich_help_panel="Processes")
_source = partial(typer.Option, rich_help_panel="Source, labels, captions")
_again = partial(typer.Option, rich_help_panel="An existing cache")


def cache(
    src: Annotated[
        str,
        typer.Argument(
            help="What to encode: a folder of images, an image, a list of paths (.txt), or tar or Parquet files: one, "
            "a folder of them, a pattern, or a URL (s3://, hf://)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the cache: a new one, an empty one, or one to go on with.")],
    model: Model,
    size: SquareSide = None,
    area: AreaSide = None,
    view: Annotated[
        list[str] | None,
        image_option(
            "--view",
            help="Several sizes from one decode, each a cache in a folder under OUT: SIDE\\[@OPTION+...], with commas "
            "between; options are area, adm, posterior, flip, and a --dtype. As 256,512@flip.",
            metavar="VIEWS",
        ),
    ] = None,
    max_aspect: Annotated[
        float, image_option(min=1, help="Largest ratio of a bucket's longer side to its shorter side.")
    ] = 4.0,
    background: Background = "ffffff",
    decode: Annotated[
        str,
        image_option(
            help="How JPEGs are decoded: exact; fast, which shrinks large ones on the way; or gpu, by nvJPEG, which "
            "needs the extra \\[gpu-decode].",
            metavar="HOW",
        ),
    ] = "exact",
    icc: Annotated[
        str, image_option(help="Colour profiles: srgb applies them, ignore passes them over.", metavar="HOW")
    ] = "srgb",
    crop: Annotated[
        str,
        image_option(
            help="What of an image fills a square: center, or adm (center_crop_arr of ADM, DiT, REPA, LightningDiT).",
            metavar="HOW",
        ),
    ] = "center",
    dtype: Annotated[
        StoredDtype, _stored(help="Type that the latents are stored in; int8 has a scale per image and channel.")
    ] = StoredDtype.bf16,
    posterior: Annotated[bool, _stored("--posterior", help="Store logsnr too, so that samples can be drawn.")] = False,
    flip: Annotated[bool, _stored("--flip", help="Store the latents of the mirrored images too.")] = False,
    batch: Annotated[int | None, _work(min=1, help="Images per encode call (default: by size).")] = None,
    task_inputs: Annotated[
        int | None,
        _stored(
            "--task-inputs", "--shard-rows", min=1, help="Most images per file of latents (default: 8192, or 512 MiB)."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        _work(min=0, help="Processes that read and decode (default: one per core, fewer for few images; 0: none)."),
    ] = None,
    resize: Annotated[
        str,
        image_option(help="Where images are resized: cpu, gpu, or auto (cpu). The bits are the same.", metavar="WHERE"),
    ] = "auto",
    image_timeout: Annotated[
        float, _work(min=0.1, help="Seconds that reading and decoding one image may take.")
    ] = 60.0,
    pixel_budget: Annotated[
        float,
        _work(min=0.01, help="GiB that all workers together may take for files and images that they decode."),
    ] = 2.0,
    metrics: Annotated[
        Path | None,
        _work(help="Keep what the stages do in this file: JSON, or Prometheus text if it ends in .prom."),
    ] = None,
    device: Device = "auto",
    gpus: Gpus = None,
    coordinators: Annotated[
        int | None, _work(min=1, help="Processes that encode on the device, or on each of --gpus.")
    ] = None,
    ray: Annotated[
        str | None,
        _work(
            help="Work by actors on a Ray cluster, a GPU each: its address, auto or local. --coordinators: how many.",
            metavar="ADDRESS",
        ),
    ] = None,
    compute_dtype: ComputeDtype = None,
    backend: Backend = "auto",
    encode_precision: Annotated[
        str | None,
        model_option("--encode-precision", help="Encode in fp8 (e4m3) by the scales of calibrate-fp8.", metavar="NAME"),
    ] = None,
    revision: Revision = None,
    source: Annotated[
        str, _source("--source", help="Kind of SRC: folder, list, tar or parquet (default: by its name).")
    ] = "auto",
    image_column: Annotated[
        str | None, _source(help="Column of the images in Parquet files (default: by name and type).")
    ] = None,
    labels: Annotated[
        str | None,
        _source(
            help="Labels: folder (the first folder of the path), a table (.csv, .jsonl, .json, .parquet), an extension "
            "beside the images in tar files, or a column of Parquet files."
        ),
    ] = None,
    captions: Annotated[
        str | None,
        _source(help="Captions: txt or json (files beside the images), a table, or a column of Parquet files."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        _source(help="Column to keep in the index, of a table, of the .json in tar files, or of Parquet files."),
    ] = None,
    update: Annotated[
        bool,
        _again(
            "--update",
            help="If SRC has changed, make a new generation of the cache: rows of unchanged bytes are kept, "
            "and the old one stays whole until then.",
        ),
    ] = False,
    rehash: Annotated[
        bool, _again("--rehash", help="With --update: read every file, also one of unchanged size and time.")
    ] = False,
    dedupe: Annotated[
        bool,
        _stored("--dedupe", help="Encode inputs of the same bytes once: the source is searched for them first."),
    ] = False,
    retry_quarantined: Annotated[
        bool, _again("--retry-quarantined", help="Try quarantined inputs again, and cache those that can be now.")
    ] = False,
    give_up: Annotated[
        bool,
        _again(
            "--give-up",
            help="Quarantine also what failed for now (I/O errors, timeouts), so that its task is finished.",
        ),
    ] = False,
    measure: Annotated[
        int | None,
        _stored(
            min=0,
            help="Images on which a new cache measures what each --dtype costs (default: 4 with int8, else none).",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")] = False,
) -> None:
    """Encode a folder of images into latents on disk, or go on with an unfinished cache.

    Ends with 0 if every input is cached, 3 if some are quarantined (OUT/quarantine.jsonl says why), 1 on failure and
    130 when interrupted; the same command then goes on from the last finished task.
    """
    sides = [side for side in (size, area) if side is not None]
    if len(sides) + bool(view) != 1:
        raise InputError("give one of --size N (squares), --area N (aspect-ratio buckets) and --view (several sizes)")
    if "://" not in src and not Path(src).exists() and not any(c in src for c in "*?["):
        raise InputError(f"{src!r} does not exist: give a folder of images, one image, or files that hold images")
    if gpus is not None and device not in ("auto", "cuda"):
        raise InputError(f"--gpus {gpus} and --device {device} exclude each other: give one of them")
    if rehash and not update:
        raise InputError("--rehash is for --update: add it")
    if ray is not None and gpus is not None:
        raise InputError("--ray and --gpus exclude each other: on a cluster --coordinators says how many GPUs")
    # which of them decode, and whether, is not known before it is planned
    is_alone = ray is None and gpus is None and coordinators is None and not dry_run
    with interruptible(), _helper(out) if is_alone and workers != 0 else nullcontext() as helper:
        from ..cache.model_source import Checkpoint
        from ..cache.options import RunOptions
        from ..cache.outlook import dry_run as describe_run
        from ..cache.request import CacheRequest
        from ..cache.run import cache_images
        from ..cache.sources import ColumnsRequest
        from ..cache.views import parse_views
        from ..cache.views_run import cache_views, dry_run_views

        compute = compute_dtype.full_name if compute_dtype else None
        devices = _devices(gpus, device, coordinators) if ray is None else ["cpu" if device == "cpu" else "cuda"]
        checkpoint = Checkpoint(model, devices[0], compute, revision, backend, encode_precision)
        request = CacheRequest(
            side=sides[0] if sides else SIZE_MULTIPLE,
            area=area is not None,
            max_aspect=max_aspect,
            background=parse_background(background),
            decode=decode,
            icc=icc,
            crop=crop,
            dtype=dtype.value,
            posterior=posterior,
            flip=flip,
            batch=batch,
            task_inputs=task_inputs,
            dedupe=dedupe,
        )
        options = RunOptions(
            workers=workers,
            progress=not quiet,
            give_up=give_up,
            retry_quarantined=retry_quarantined,
            update=update,
            rehash=rehash,
            image_timeout=image_timeout,
            pixel_budget=int(pixel_budget * (1 << 30)),
            resize=resize,
            metrics=metrics,
            source=source,
            image_column=image_column,
            measure=measure,
            columns=ColumnsRequest(labels, captions, tuple(keep or ())),
        )
        views = parse_views(view, request) if view else None
        if dry_run and views is not None:
            for name, found in dry_run_views(src, out, checkpoint, views, options=options).items():
                echo(f"{name}:")
                print_dry_run(found)
            return
        if dry_run:
            print_dry_run(describe_run(src, out, checkpoint, request, options=options))
            return
        asked = views or request
        if ray is not None:
            from ..cache.ray_actors import cache_on_ray

            report = cache_on_ray(ray, src, out, checkpoint, asked, actors=coordinators, note=remark, options=options)
        elif gpus is not None or coordinators is not None:
            from ..cache.coordinators import cache_on

            report = cache_on(devices, src, out, checkpoint, asked, note=remark, options=options)
        elif views is not None:
            report = cache_views(src, out, checkpoint, views, note=remark, options=options, helper=helper)
        else:
            report = cache_images(src, out, checkpoint, request, note=remark, options=options, helper=helper)
    if report.views:
        print_views(report, out)
    else:
        print_report(report, out)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _helper(out: Path) -> AbstractContextManager[Helper | None]:
    """What decoding workers are forked from, for a new cache: it imports torch while this process does."""
    if (out / "plan.json").exists() or any(out.glob("*/plan.json")):
        return nullcontext()
    from ..cache.decoding.helper import Helper

    return Helper()


def _devices(gpus: str | None, device: str, coordinators: int | None) -> list[str]:
    """The device of each process that encodes."""
    each = visible_gpus(gpus) if gpus is not None else [resolve_device(device)]
    return [name for name in each for _ in range(coordinators or 1)]
