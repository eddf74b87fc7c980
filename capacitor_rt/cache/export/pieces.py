"""Writing an export: pieces appear whole, are logged when they have been read back, and are never written twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ...errors import CacheError, InputError
from ...schema import HEX32, Invalid, Number, Record, Text
from ...strict_json import StrictJSONError, parse
from ..hashing import xxh3
from .files import LOCK, TMP, OutFile, append_line, files_hash, open_own, publish, read_own

MANIFEST = "capacitor.json"
LOG = "capacitor.jsonl"
STAMPS = ".stamps"
FORMAT = "capacitor-export/1"
MOST_BYTES = 1 << 30
# what a run notes and another may differ in
_FOR_THE_RECORD = ("code", "pixels")


@dataclass(frozen=True)
class Piece:
    """Rows that are written, read back and logged as one.

    Attributes:
        number: position among the pieces.
        rows: numbers of the rows, int64 `[N]`, ascending.
        name: file, or folder of the files, relative to the export; what the format makes of it.
    """

    number: int
    rows: np.ndarray
    name: str = ""


class PieceRecord(TypedDict):
    """A line of capacitor.jsonl: number of the piece, of its files and bytes, the hash of these in the order of the
    files, what read it back, largest rounding."""

    piece: int
    files: int
    bytes: int
    xxh3: str
    read_back: str
    rounding: float


def cut(rows: np.ndarray, nbytes: np.ndarray | int, limit: int) -> Iterator[np.ndarray]:
    """Consecutive slices of `rows` of at most `limit` bytes each, and at least one row. `nbytes`: of each row."""
    total = np.cumsum(np.broadcast_to(np.asarray(nbytes, np.int64), rows.shape))
    start, before = 0, 0
    while start < len(rows):
        stop = max(int(np.searchsorted(total, before + limit, side="right")), start + 1)
        yield rows[start:stop]
        start, before = stop, int(total[stop - 1])


def check_out(out: Path, cache: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but this export, before anything is written.

    Raises:
        InputError: files of others, or an export with other settings; names each that differs.
    """
    inside = out.resolve()
    if inside == cache.resolve() or cache.resolve() in inside.parents:
        raise InputError(f"{out} lies in the cache {cache}: give an OUT of its own")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder")
    path = out / MANIFEST
    if not path.exists():
        there = sorted(p.name for p in out.iterdir() if p.name != LOCK and TMP not in p.name) if out.exists() else []
        if there:
            raise InputError(f"{out} holds {there[0]!r} and is no export: give a new or an empty folder")
        return
    try:
        old = parse(read_own(path, MOST_BYTES))
        if not isinstance(old, dict):
            raise StrictJSONError("it is no object")
        changes = list(_changes("", _identity(old), _identity(json.loads(json.dumps(manifest)))))
    except (OSError, StrictJSONError) as e:
        raise CacheError(f"{path} cannot be read ({e}): give a new OUT") from e
    if changes:
        raise InputError(f"{out} was exported otherwise: use the old settings, or give a new OUT", changes)


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in manifest.items() if k not in _FOR_THE_RECORD}


def _changes(prefix: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(f"{prefix}.{key}" if prefix else key, old.get(key), new.get(key))
    elif old != new:
        yield f"{prefix} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    """Write capacitor.json, unless it is there; `check_out` has compared it."""
    if not (out / MANIFEST).exists():
        publish(out, [OutFile(MANIFEST, [json.dumps(manifest, indent=1).encode() + b"\n"])])


_COUNT = Number(0, 2**62)
_RECORD = Record(
    {
        "piece": _COUNT,
        "files": _COUNT,
        "bytes": _COUNT,
        "xxh3": HEX32,
        "read_back": Text(longest=200),
        "rounding": Number(0, 1e300, whole=False),
    }
)


class PieceLog:
    """capacitor.jsonl: the pieces that are written and have been read back. A torn last line does not count.

    A piece whose files are, by inode, size and times, those that this machine has written or hashed before is not read
    again; `.stamps` keeps that, and whatever is wrong with it means that files are read once more.

    Only the holder of the export's lock may open it.
    """

    def __init__(self, out: Path):
        self.path = out / LOG
        try:
            data = read_own(self.path, MOST_BYTES)
        except FileNotFoundError:
            data = b""
        self._size = data.rfind(b"\n") + 1
        self.records: dict[int, PieceRecord] = {}
        for number, line in enumerate(data[: self._size].splitlines(), 1):
            try:
                record = parse(line)
                _RECORD.check("", record)
                self.records[record["piece"]] = record
            except (StrictJSONError, Invalid):
                raise CacheError(f"{self.path} line {number} is damaged: delete that line, and export again") from None
        self._fd = open_own(self.path, os.O_WRONLY | os.O_CREAT)
        if len(data) != self._size:
            os.ftruncate(self._fd, self._size)
        os.lseek(self._fd, self._size, os.SEEK_SET)
        self._stamps: set[bytes] = set()
        with suppress(OSError, CacheError):
            self._stamps = set(read_own(out / STAMPS, MOST_BYTES).split(b"\n"))

    def is_done(self, piece: Piece, out: Path, names: Sequence[str]) -> bool:
        """Whether a piece is logged and its files `names` are there.

        Raises:
            CacheError: they are not what was written, or cannot be read.
        """
        record = self.records.get(piece.number)
        if record is None:
            return False
        which = names[0] if len(names) == 1 else f"one of {names[0]} to {names[-1]}"
        try:
            found = [(out / name).stat() for name in names]
            stamp = _stamp(record, found)
            if sum(info.st_size for info in found) != record["bytes"]:
                raise CacheError(f"{out / which} is damaged: its size has changed; move it away, and export again")
            if stamp not in self._stamps:
                if files_hash(out / name for name in names) != record["xxh3"]:
                    raise CacheError(
                        f"{out / which} is damaged: its bytes have changed; move it away, and export again"
                    )
                self._keep(stamp, out)
        except FileNotFoundError:
            return False
        except OSError as e:
            raise CacheError(f"{out / which} cannot be read ({e.strerror or e}): move it away, and export again") from e
        return True

    def _keep(self, stamp: bytes, out: Path) -> None:
        self._stamps.add(stamp)
        with suppress(OSError, CacheError):
            fd = open_own(out / STAMPS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                os.write(fd, stamp + b"\n")
            finally:
                os.close(fd)

    def append(self, record: PieceRecord, out: Path, names: Sequence[str]) -> None:
        """Log a piece whose files were read back just now."""
        line = json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        append_line(self._fd, self._size, line, self.path)
        self._size += len(line)
        self.records[record["piece"]] = record
        with suppress(OSError):
            self._keep(_stamp(record, [(out / name).stat() for name in names]), out)

    def close(self) -> None:
        os.close(self._fd)


def _stamp(record: PieceRecord, found: Sequence[os.stat_result]) -> bytes:
    """By what the files of a piece are known again."""
    places = [(i.st_dev, i.st_ino, i.st_size, i.st_mtime_ns, i.st_ctime_ns) for i in found]
    return f"{record['piece']} {record['xxh3']} {xxh3(repr(places).encode()).hexdigest()}".encode()


def split(rows: np.ndarray, count: int) -> Sequence[np.ndarray]:
    """Consecutive slices of at most `count` rows."""
    return [rows[start : start + count] for start in range(0, len(rows), count)]
