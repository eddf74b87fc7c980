"""`capacitor-rt cache` and `capacitor-rt verify`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ..errors import InputError

INTERRUPTED = 130
TERMINATED = 143


class StoredDtype(str, Enum):
    """Floating point formats by their short names."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


_COMPUTE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def cache(
    src: Annotated[Path, typer.Argument(help="Folder of images (with its subfolders), or one image.")],
    out: Annotated[Path, typer.Argument(help="Folder of the cache: new, empty, or one to go on with.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, .safetensors file, or 'sample'.")],
    size: Annotated[int | None, typer.Option(min=1, help="Cut every image to N x N pixels.")] = None,
    area: Annotated[int | None, typer.Option(min=1, help="N^2 pixels in aspect-ratio buckets.")] = None,
    max_aspect: Annotated[float, typer.Option(min=1, help="Longest bucket, as longer side : shorter side.")] = 4.0,
    background: Annotated[str, typer.Option(help="Colour behind transparent pixels, RRGGBB.")] = "ffffff",
    dtype: Annotated[StoredDtype, typer.Option(help="Stored type of the latents.")] = StoredDtype.bf16,
    posterior: Annotated[bool, typer.Option("--posterior", help="Also store logsnr, to draw from.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Also store the latents of the mirrored image.")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per encode call (default: by size).")] = None,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Most images per shard (default: as many as make 256 MiB).")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads (default: every core).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto is a GPU where there is one.")] = "auto",
    compute_dtype: Annotated[
        StoredDtype | None, typer.Option(help="Of the convolutions (default: bf16 on a GPU, fp32 on a CPU).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Encode a folder of images into latents on disk, or go on with an unfinished cache.

    Ends with 0 if every input is cached, 3 if some are quarantined (OUT/quarantine.jsonl says why), 1 on failure and
    130 when interrupted; the same command then goes on from the last finished shard.
    """
    if (size is None) == (area is None):
        raise InputError("give one of --size N (squares) and --area N (aspect-ratio buckets)")
    with _interruptible():
        from .encode import Checkpoint
        from .job import Request
        from .run import cache_images, forecast

        compute = _COMPUTE[compute_dtype.value] if compute_dtype else None
        source = Checkpoint(model, _device(device), compute, revision)
        request = Request(
            side=size or area,
            area=area is not None,
            max_aspect=max_aspect,
            background=_colour(background),
            dtype=dtype.value,
            posterior=posterior,
            flip=flip,
            batch=batch,
            shard_rows=shard_rows,
        )
        if dry_run:
            _print_forecast(forecast(src, out, source, request, workers=workers, progress=not quiet))
            return
        report = cache_images(src, out, source, request, workers=workers, progress=not quiet, note=_note)
    _print_report(report, out)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def verify(
    root: Annotated[Path, typer.Argument(help="Folder of the cache.")],
    workers: Annotated[int, typer.Option(min=1, help="Threads that read.")] = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Compare every byte of a cache with its hashes and name what is damaged.

    Ends with 1 if something is damaged or still to be written.
    """
    with _interruptible():
        from .verify import verify as check

        with tqdm(desc="verify", unit="shard", disable=quiet, leave=False) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(1)

            found = check(root, workers=workers, advance=advance)
    for line in found.notes:
        _note(line)
    for line in found.problems:
        _say(f"damaged: {line}", err=True)
    if found.unfinished:
        _say(f"unfinished: {found.unfinished} shards are still to be written: run the cache command again", err=True)
    state = f"{len(found.problems)} problems" if found.problems else "no damage"
    typer.echo(f"{found.rows} rows of {found.inputs} inputs, {found.shards} shards, {_bytes(found.nbytes)}: {state}")
    if found.problems or found.unfinished:
        raise typer.Exit(1)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Interruptions to a line on stderr and an exit code; other expected failures are the entry point's to print."""
    try:
        with _sigterm():
            yield
    except _Terminated as e:
        _say("terminated: finished shards are safe, and the same command goes on from there", err=True)
        raise typer.Exit(TERMINATED) from e
    except KeyboardInterrupt as e:
        _say("interrupted: finished shards are safe, and the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from e


class _Terminated(KeyboardInterrupt):
    pass


@contextmanager
def _sigterm() -> Iterator[None]:
    """Make SIGTERM, which schedulers send before they kill, as clean a stop as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _colour(text: str) -> tuple[int, int, int]:
    try:
        red, green, blue = bytes.fromhex(text.removeprefix("#"))
    except ValueError:
        raise InputError(f"background {text!r} is not a colour: write it as RRGGBB, for instance ffffff") from None
    return red, green, blue


def _print_forecast(plan) -> None:
    for line in plan.notes:
        _note(line)
    typer.echo("bucket (height x width)    images")
    for bucket, count in plan.buckets.items():
        typer.echo(f"{bucket!s:>23}  {count:>8}")
    for reason, count in sorted(plan.quarantined.items()):
        typer.echo(f"{'quarantined: ' + reason:>23}  {count:>8}")
    typer.echo(f"{plan.shards} shards of at most {plan.rows} images, {_bytes(plan.nbytes)} of latents in all")
    typer.echo(f"to be written: {plan.todo} shards, {_bytes(plan.todo_nbytes)}")


def _print_report(report, out: Path) -> None:
    new = f", {report.new_images} of them now" if 0 < report.new_images < report.inputs else ""
    done = f"{report.cached} of {report.inputs} images in {report.shards} shards, {_bytes(report.nbytes)}"
    if not report.new_images:
        typer.echo(f"nothing to do: {out} holds {done}")
    else:
        rate = report.new_images / max(report.meters.wall, 1e-9)
        typer.echo(f"cached {done}{new}: {rate:.1f} images/s; {report.meters}")
    if report.quarantined:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(report.quarantined.items()))
        _say(f"{report.quarantined.total()} quarantined ({reasons}): see {out / 'quarantine.jsonl'}", err=True)


def _bytes(n: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:.4g} TB"


def _note(line: str) -> None:
    _say(f"note: {line}", err=True)


def _say(line: str, err: bool = False) -> None:
    """Print a line that may hold file names of any bytes, clear of a progress bar."""
    stream = sys.stderr if err else sys.stdout
    tqdm.write(line.encode("utf-8", "backslashreplace").decode(), file=stream)
