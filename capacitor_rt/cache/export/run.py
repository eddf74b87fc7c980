"""`export_cache`: check everything, then write what is missing, read every row back, and finish."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ...errors import CacheError
from ...version import __version__
from .base import Format, same
from .files import locked, publish, remove_stale
from .pieces import FORMAT, LOG, Piece, PieceLog, PieceRecord, check_out, write_manifest
from .request import ExportRequest
from .rows import Rows, open_cache

_WRITERS = {
    "lightningdit": ("lightningdit", "LightningDiT"),
    "mds": ("mds", "Mds"),
    "wds": ("wds", "Wds"),
    "repa": ("repa", "Repa"),
    "repae": ("repae", "RepaE"),
    "mar": ("moments", "Mar"),
    "ddt": ("moments", "Ddt"),
    "musubi": ("flux2_readers", "Musubi"),
    "automodel": ("flux2_readers", "Automodel"),
    "comfy": ("flux2_readers", "Comfy"),
}
_SIZED = (Tensor, bytes)
# what decides no byte of the files, or is in the manifest by its contents
_NOT_IN_MANIFEST = ("images", "labels", "captions", "text_latents", "calibration")


@dataclass(frozen=True)
class ExportReport:
    """What an export holds.

    Attributes:
        rows, files, nbytes: of the whole export.
        new_rows: rows written by this run.
        read_back: what read the pieces back, e.g. "webdataset 1.0.2".
        conversion: what becomes of the cached values beside a change of dtype, in words; None where nothing does.
        rounding: largest difference that the dtype makes to a cached value; 0 where it holds every one.
        advice: what to tell the trainer, line by line.
    """

    rows: int
    files: int
    nbytes: int
    new_rows: int
    read_back: tuple[str, ...]
    conversion: str | None
    rounding: float
    advice: tuple[str, ...]


def export_cache(
    root: str | Path,
    out: str | Path,
    request: ExportRequest,
    *,
    progress: bool = True,
    note: Callable[[str], None] = lambda line: None,
) -> ExportReport:
    """Write a finished cache in the format of a trainer, or go on with an unfinished export.

    Nothing is written before everything has been checked. A piece (a shard, or a block of rows where each is a file)
    appears whole, is read back through the reader's library where that is installed, compared with the cache bit by
    bit, and then logged in capacitor.jsonl; another run with the same request does not write it again.

    Args:
        root: folder of the cache.
        out: folder of the export: a new one, an empty one, or one to go on with.
        progress: show a bar.
        note: is told what a user should know and no error is.

    Raises:
        InputError: the request does not go with the format, its reader, the cache, or what is in `out`.
        CacheError: the cache is damaged or unfinished, or `out` cannot be written.
    """
    root, out = Path(root), Path(out)
    writer, manifest = _prepare(root, out, request)
    for line in _notes(writer, out):
        note(line)
    with locked(out):
        remove_stale(out)
        write_manifest(out, manifest)
        log = PieceLog(out)
        try:
            new = _write(writer, out, log, progress)
        finally:
            log.close()
        # each is whole if it is there, and some take long to compute
        publish(out, (file for file in writer.last_files(out) if not (out / file.name).exists()))
        writer.finish(out)
    records = [log.records[piece.number] for piece in writer.pieces]
    return ExportReport(
        rows=len(writer.rows),
        files=sum(r["files"] for r in records),
        nbytes=sum(r["bytes"] for r in records),
        new_rows=new,
        read_back=tuple(sorted({r["read_back"] for r in records})),
        conversion=writer.conversion,
        rounding=max((r["rounding"] for r in records), default=0.0),
        advice=tuple(writer.advice(out.absolute())),
    )


@dataclass(frozen=True)
class ExportOutlook:
    """What an export would write.

    Attributes:
        rows, files: of the whole export.
        nbytes: of its tensors, without what is around them.
        done: files that are there already.
        notes: what a user should know, line by line.
    """

    rows: int
    files: int
    nbytes: int
    done: int
    notes: tuple[str, ...]


def describe_export(root: str | Path, out: str | Path, request: ExportRequest) -> ExportOutlook:
    """Check everything that `export_cache` checks, and write nothing. Errors as there."""
    root, out = Path(root), Path(out)
    writer, _ = _prepare(root, out, request)
    names = [name for piece in writer.pieces for name in writer.names(piece)]
    done = sum((out / name).exists() for name in names)
    return ExportOutlook(len(writer.rows), len(names), _tensor_bytes(writer), done, tuple(_notes(writer, out)))


def _prepare(root: Path, out: Path, request: ExportRequest) -> tuple[Format, dict[str, Any]]:
    """The writer of a request, and the manifest of its export, after everything has been checked."""
    request = request.resolved()
    rows = Rows(open_cache(root), request)
    module, name = _WRITERS[request.format]
    writer: Format = getattr(import_module(f".{module}", __package__), name)(rows)
    manifest = _manifest(rows)
    check_out(out, root, manifest)
    return writer, manifest


def _tensor_bytes(writer: Format) -> int:
    """Bytes of the tensors of all records: those of a row of each size, times their number."""
    total = 0
    for position, count in enumerate(np.bincount(writer.rows.bucket_numbers).tolist()):
        values = writer.record(int(np.argmax(writer.rows.bucket_numbers == position))).values()
        total += count * sum(v.nbytes if isinstance(v, Tensor) else len(v) for v in values if isinstance(v, _SIZED))
    return total


def _write(writer: Format, out: Path, log: PieceLog, progress: bool) -> int:
    """Write the pieces that are missing; the number of their rows."""
    new = 0
    with tqdm(
        total=len(writer.rows), desc="export", unit="row", disable=None if progress else True, leave=False
    ) as bar:
        for piece in writer.pieces:
            if not log.is_done(piece, out, writer.names(piece)):
                log.append(_write_piece(writer, out, piece), out, writer.names(piece))
                new += len(piece.rows)
            bar.update(len(piece.rows))
    return new


def _write_piece(writer: Format, out: Path, piece: Piece) -> PieceRecord:
    writer.rounding = 0.0
    names, published = writer.names(piece), publish(out, writer.files(piece))
    _compare(writer, out, piece, names)
    return {
        "piece": piece.number,
        "files": len(names),
        "bytes": published.nbytes,
        "xxh3": published.xxh3,
        "read_back": writer.reader,
        "rounding": writer.rounding,
    }


def _compare(writer: Format, out: Path, piece: Piece, names: list[str]) -> None:
    """Read a piece back and compare every row with the cache."""
    count = 0
    for i, got in zip(piece.rows.tolist(), writer.read(out, piece), strict=False):
        want = writer.record(i)
        wrong = sorted(key for key in want.keys() | got.keys() if not same(want.get(key), got.get(key)))
        if wrong:
            raise CacheError(
                f"{out / names[0]} does not read back as it was written: {', '.join(wrong)} of {writer.rows.ids[i]!r} "
                f"differs ({writer.reader}): move the file away, and export again"
            )
        count += 1
    if count != len(piece.rows):
        raise CacheError(f"{out / names[0]} reads back as {count} rows instead of {len(piece.rows)}: move it away")


def _manifest(rows: Rows) -> dict[str, Any]:
    plan, request = rows.dataset.plan, rows.request
    options = {k: v for k, v in asdict(request).items() if k not in (*_NOT_IN_MANIFEST, "format")}
    return {
        "format": FORMAT,
        "export": request.format,
        "cache": {"plan": plan.id, "latent_space": rows.dataset.latent_space, "rows": len(rows)},
        "pixels": {"crop": plan.fields["geometry"]["crop"], "filter": plan.fields["pixels"]["filter"]},
        "latents": {
            "layout": request.layout,
            "space": request.space,
            "approximate": request.space != "whitened",
            "divided_by_alpha": request.space != "whitened" and "logsnr" in plan.tensors,
            "scale": request.scale,
            "dtype": str(rows.out_dtype).removeprefix("torch."),
            "channels": rows.channels,
            "stride": rows.stride,
        },
        "options": options,
        "contents": rows.digest(),
        "classes": list(rows.labels.classes) if rows.labels is not None and rows.labels.classes else None,
        "code": {"capacitor_rt": __version__},
    }


def _notes(writer: Format, out: Path) -> list[str]:
    rows, lines = writer.rows, []
    space = shutil.disk_usage(next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())).free
    if not (out / LOG).exists() and (needed := _tensor_bytes(writer)) > space:
        lines.append(f"{needed / 1e9:.4g} GB of tensors are to be written, and {space / 1e9:.4g} GB are free")
    if rows.request.space != "whitened":
        alpha = (
            "divided by alpha" if "logsnr" in rows.dataset.plan.tensors else "not divided by alpha (no logsnr cached)"
        )
        lines.append(f"latents are converted to FLUX.2's space approximately, {alpha}")
        lines.append("no trainer of FLUX.2 has been tried on such latents yet")
    if rows.empty_captions:
        lines.append(f"{rows.empty_captions} rows have no caption in the cache, and an empty one in the export")
    if rows.labels is not None and rows.labels.classes:
        empty = len(rows.labels.classes) - len(set(rows.labels.numbers.tolist()))
        if empty:
            lines.append(f"{empty} classes have no cached row; they keep their numbers")
    return lines
