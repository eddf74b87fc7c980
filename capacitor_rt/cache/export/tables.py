"""Files of ids and values (JSON, JSON lines, CSV, TSV, Parquet), joined to the rows of a cache."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...extras import require_extra
from ..sources.columns import KEYS

SHOWN = 3


def some(names: Iterable[str], count: int) -> str:
    """The first of `count` names, for a message."""
    shown = ", ".join(repr(name) for name, _ in zip(names, range(SHOWN), strict=False))
    return f"{shown}, ..." if count > SHOWN else shown


def read_pairs(path: Path, value_names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Ids and values in the order of the file.

    JSON is `{id: value}`, `{"labels": [[id, value], ...]}` as ADM's dataset.json, or a list of objects; the other
    formats have named columns: an id (`KEYS`) and one of `value_names`.

    Raises:
        InputError: the file cannot be read, or has no such columns.
    """
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is not of a known kind: use one of {', '.join(readers)}")
    try:
        yield from reader(path, value_names)
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}") from e
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, RecursionError) as e:
        raise InputError(f"{path} cannot be read: {e}") from e


def join(ids: Sequence[str], pairs: Iterable[tuple[str, Any]], path: Path, what: str) -> list[Any]:
    """The value of each of `ids`.

    Raises:
        InputError: ids without a value, or with two.
    """
    values: dict[str, Any] = {}
    for id, value in pairs:
        if values.setdefault(id, value) != value:
            raise InputError(f"{path} has two {what}s of {id!r}, {values[id]!r} and {value!r}: leave one of them")
    missing = [id for id in ids if id not in values]
    if missing:
        known = f"; it names {some(values, len(values))}" if len(missing) == len(ids) else ""
        raise InputError(
            f"{path} has no {what} of {len(missing)} of {len(ids)} rows ({some(missing, len(missing))}){known}: "
            f"add one for each id, which is the path relative to the folder that was cached"
        )
    return [values[id] for id in ids]


def _json(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    document = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(document, list):
        yield from _objects(path, document, names)
        return
    if not isinstance(document, dict):
        raise InputError(f"{path} holds {type(document).__name__}: expected ids and values")
    pairs = document.get("labels") if isinstance(document.get("labels"), list) else list(document.items())
    for pair in pairs or ():
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InputError(f"{path} holds {pair!r}: expected an id and a value")
        yield pair[0], pair[1]


def _jsonl(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig") as f:
        yield from _objects(path, (json.loads(line) for line in f if line.strip()), names)


def _csv(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 24)
    with open(path, encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        yield from _objects(path, rows, names)


def _parquet(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
    try:
        file = pq.ParquetFile(path)
        key, value = _columns(path, file.schema_arrow.names, names)
        for batch in file.iter_batches(columns=[key, value]):
            yield from zip(batch[key].to_pylist(), batch[value].to_pylist(), strict=True)
    except pa.ArrowException as e:
        raise InputError(f"{path} cannot be read: {e}") from e


def _objects(path: Path, rows: Iterable[Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{path} holds {row!r}: expected an object with an id and a {names[0]}")
        key, value = _columns(path, list(row), names)
        yield row[key], row[value]


def _columns(path: Path, there: Sequence[str], names: Sequence[str]) -> tuple[str, str]:
    key = next((name for name in KEYS if name in there), None)
    value = next((name for name in names if name in there), None)
    if key is None or value is None:
        lacking = f"an id ({', '.join(KEYS)})" if key is None else f"one of {', '.join(names)}"
        raise InputError(f"{path} has {', '.join(map(repr, there)) or 'nothing'}: it lacks {lacking}")
    return key, value
