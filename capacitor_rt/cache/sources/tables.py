"""Tables of a user: files of ids and values (CSV, TSV, JSON lines, JSON, Parquet), joined to inputs and to rows."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...errors import CacheError
from ...extras import require_extra
from ...strict_json import open_regular

LABEL, CAPTION = "label", "caption"
KEYS = ("file_name", "id", "path", "key", "image", "filename")
"""Names of the column of a table that says which input a row is about."""
LABELS = ("label", "class", "cls", "class_id", "category")
CAPTIONS = ("caption", "text", "prompt")
KINDS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet")
MAX_CAPTION = 1 << 20
MAX_TABLE = 4 << 30
SHOWN = 3
ABSENT = object()
"""In place of a value: the table has no row of that id."""
_VALUE = ""


class Table:
    """A table of a file, found by its extension.

    JSON is `{id: value}`, `{id: {name: value, ...}}`, `{"labels": [[id, value], ...]}` as ADM's dataset.json, or a list
    of objects. In the others, and in objects, a column of `KEYS` names the input.

    Attributes:
        names: of its columns; none where ids are mapped to values.
        origin: the kind of file and the hash of its bytes.

    Raises:
        CacheError: it cannot be read, or names no inputs.
    """

    def __init__(self, path: Path):
        self.path = path
        hint = "give a .csv, .jsonl, .json or .parquet file"
        try:
            with open_regular(path) as file:
                if os.fstat(file.fileno()).st_size > MAX_TABLE:
                    raise CacheError(f"{path} has more than {MAX_TABLE} bytes: keep columns of the source itself")
                data = file.read()
        except OSError as e:
            raise CacheError(f"cannot read {path}: {e.strerror or 'it is no regular file'}: {hint}") from e
        kind = path.suffix.lower().lstrip(".")
        self.origin = f"{kind}:{hashlib.sha256(data).hexdigest()}"
        self.is_mapping = False
        try:
            rows = list(self._rows(data, kind))
        except (ValueError, csv.Error) as e:
            raise CacheError(f"{path} cannot be read as a table: {str(e)[:200]}") from e
        self.names = [] if self.is_mapping else list(dict.fromkeys(name for _, row in rows[:1000] for name in row))
        self._by_key: dict[str, dict[str, Any]] = {}
        self._more: dict[str, list[dict[str, Any]]] = {}
        for key, row in rows:
            if key in self._by_key:
                self._more.setdefault(key, []).append(row)
            else:
                self._by_key[key] = row

    def column(self, ids: Iterable[str], name: str) -> list[Any]:
        """Values of a column for inputs; None where there is none. Errors as of `values`."""
        return [None if v is ABSENT else v for v in self.values(ids, (name,))]

    def value(self, ids: Iterable[str], name: str) -> list[Any]:
        """The labels or captions of inputs, captions as texts; None where there is none. Errors as of `values`."""
        values = [None if v is ABSENT else v for v in self.values(ids, LABELS if name == LABEL else CAPTIONS)]
        return values if name == LABEL else [None if v is None else text_of(v) for v in values]

    def values(self, ids: Iterable[str], names: Sequence[str]) -> list[Any]:
        """What the table has of inputs in the first of some columns, or maps their ids to; `ABSENT` where it has none.

        An input is found by its id, or by that without its extension or the name of its tar file.

        Raises:
            CacheError: none of the columns is there; two values of one input.
        """
        if not self.is_mapping and not any(name in self.names for name in names):
            there = ", ".join(map(repr, self.names)) or "nothing"
            wanted = " or ".join(map(repr, names[:2]))
            raise CacheError(f"{self.path} has no column {wanted}, it lacks one of {', '.join(names)}: it has {there}")
        return [self._value(id, names) for id in ids]

    def joined(self, ids: Sequence[str], names: Sequence[str]) -> list[Any]:
        """`values` of rows that all need one.

        Raises:
            CacheError: as there, or rows without one.
        """
        found = self.values(ids, names)
        missing = [id for id, value in zip(ids, found, strict=True) if value is ABSENT]
        if missing:
            lacking = f"{len(missing)} of {len(ids)} rows ({some(missing, len(missing))})"
            known = f"; it names {some(self._by_key, len(self._by_key))}" if len(missing) == len(ids) else ""
            raise CacheError(
                f"{self.path} has no {names[0]} of {lacking}{known}: add one for each id, which is the path relative "
                "to the folder that was cached"
            )
        return found

    def _value(self, id: str, names: Sequence[str]) -> Any:
        bare = re.sub(r"\.[^./]*$", "", id)
        # a key of WebDataset stands without the name of its tar file
        key = next((key for key in (id, bare, bare.rpartition(".tar/")[2]) if key in self._by_key), None)
        if key is None:
            return ABSENT
        value = self._cell(self._by_key[key], names)
        for row in self._more.get(key, ()):
            other = self._cell(row, names)
            if other != value:
                raise CacheError(
                    f"{self.path} has two {names[0]}s of {key!r}, {value!r} and {other!r}: leave one of them"
                )
        return value

    def _cell(self, row: dict[str, Any], names: Sequence[str]) -> Any:
        if self.is_mapping:
            return row[_VALUE]
        return next((row[name] for name in names if name in row), ABSENT)

    def _rows(self, data: bytes, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keys and rows; sets `is_mapping`."""
        if kind not in KINDS:
            raise ValueError(f"its extension {kind!r} is not of a known kind: use one of {', '.join(KINDS)}")
        if kind == "parquet":
            pa, pq = require_extra("pyarrow"), require_extra("pyarrow.parquet")
            try:
                return self._objects(
                    pq.read_table(pa.BufferReader(data), use_threads=False, pre_buffer=False).to_pylist()
                )
            except (OSError, pa.ArrowException) as e:
                raise ValueError(e) from e
        text = data.decode("utf-8-sig")
        if kind in ("csv", "tsv"):
            return self._objects(csv.DictReader(io.StringIO(text), delimiter="\t" if kind == "tsv" else ","))
        if kind in ("jsonl", "ndjson"):
            return self._objects(parse_json(line) for line in text.split("\n") if line.strip())
        document = parse_json(text)
        if not isinstance(document, dict):
            return self._objects(document if isinstance(document, list) else [document])
        if isinstance(document.get("labels"), list):
            return self._pairs(document["labels"])
        if any(isinstance(value, dict) for value in document.values()):
            return ((key, row) for key, row in document.items() if isinstance(row, dict))
        return self._pairs(document.items())

    def _pairs(self, pairs: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        self.is_mapping = True
        for pair in pairs:
            if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)):
                raise ValueError(f"it holds {pair!r}: expected an id and a value")
            yield pair[0], {_VALUE: pair[1]}

    def _objects(self, rows: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        first = True
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"its rows are no JSON objects: it holds {repr(row)[:40]}, expected an object")
            key = next((name for name in KEYS if name in row), None)
            if key is not None:
                yield str(row[key]), row
            elif first:
                self._no_key(row)
            first = False

    def _no_key(self, row: dict[str, Any]) -> NoReturn:
        there = ", ".join(map(repr, row)) or "nothing"
        raise CacheError(f"{self.path} has no column that names the images: call it 'file_name' (it has {there})")


def some(names: Iterable[str], count: int) -> str:
    """The first of `count` names, for a message."""
    shown = ", ".join(repr(name) for name, _ in zip(names, range(SHOWN), strict=False))
    return f"{shown}, ..." if count > SHOWN else shown


def parse_json(text: str | bytes) -> Any:
    """What a JSON text of a user says, NaN included, which tools write for what is missing.

    Raises:
        ValueError: it is no JSON, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def text_of(value: Any, most: int = MAX_CAPTION) -> str:
    """A value as a text that UTF-8 can say; what is no text in JSON.

    Raises:
        CacheError: it is longer than `most` characters.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > most:
        raise CacheError(f"{text[:40]!r}... has {len(text)} characters, and {most} are the most: shorten it")
    return text.encode("utf-8", "backslashreplace").decode()
