"""Columns beside the images: labels, captions, and whatever else of the source is to be kept."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CacheError, InputError
from ...images.scan import path_to_id
from ...strict_json import open_regular
from ..parts import OFFSET, SCALE
from ..plan_schema import KINDS, RESERVED
from .listing import Listing, examples
from .tables import CAPTION, CAPTIONS, LABEL, MAX_CAPTION, Table, parse_json, text_of

MAX_LABEL_NAME = 4096
# by their own options, and of what `raw` rows of int8 hold
_TAKEN = {*RESERVED, LABEL, CAPTION, *(f"{kind}{suffix}" for kind in KINDS for suffix in (SCALE, OFFSET))}


@dataclass(frozen=True)
class ColumnsRequest:
    """What is to be kept beside the images.

    Attributes:
        labels: "folder" (the first folder of the path), a table by its path, or in tar and Parquet sources the name of
            a member's extension or of a column; None for none.
        captions: "txt" or "json" (a file of the same stem), a table by its path, or a column; None for none.
        keep: more columns, of the tables or of the source itself.
    """

    labels: str | None = None
    captions: str | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.keep:
            if name in _TAKEN or "/" in name or not name.isprintable() or not 0 < len(name) <= 200:
                raise InputError(f"column {name!r} cannot be kept under that name: rename it in the source")
        if len(set(self.keep)) < len(self.keep):
            raise InputError(f"keep names a column twice: {', '.join(self.keep)}")

    def __bool__(self) -> bool:
        return bool(self.labels or self.captions or self.keep)


@dataclass(frozen=True)
class Column:
    """A column of the index: `kind` is one of `plan.COLUMN_TYPES`, `origin` where it comes from."""

    name: str
    kind: str
    origin: str


def _nothing(first: int, stop: int) -> dict[str, list[Any]]:
    return {}


@dataclass(frozen=True)
class Columns:
    """The columns that are kept, and how to read them.

    Attributes:
        label_names: names of the labels 0, 1, ...; None where labels are numbers in the source already.
        read: values of the inputs `first` to `stop - 1`, a list for each column's name.
    """

    columns: tuple[Column, ...] = ()
    label_names: list[str] | None = None
    read: Callable[[int, int], dict[str, list[Any]]] = field(default=_nothing, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # the values stay in the process that listed the inputs: workers that decode need none
        return Columns, (self.columns, self.label_names)

    def fields(self) -> list[dict[str, str]]:
        """Its entry in `plan.json`."""
        return [{"name": c.name, "type": c.kind, "from": c.origin} for c in self.columns]


def file_columns(root: bytes, listing: Listing, request: ColumnsRequest) -> Columns:
    """The columns of a source of files.

    Raises:
        CacheError, InputError: a table cannot be read, lacks a column, or labels no row of it.
    """
    if not request:
        return Columns()
    return _FileColumns(root, listing, request).columns()


class _FileColumns:
    def __init__(self, root: bytes, listing: Listing, request: ColumnsRequest):
        self.root, self.listing, self.request = root, listing, request
        self.ids = [listing.id(i) for i in range(len(listing))]
        self.fixed: dict[str, list[Any]] = {}
        self.found: list[Column] = []
        self.names: list[str] | None = None
        self.lazy: str | None = None

    def columns(self) -> Columns:
        labels, captions = self.request.labels, self.request.captions
        tables = {name: Table(Path(name)) for name in (labels, captions) if name and name not in _WORDS}
        if labels == "folder":
            self._label(self._folders(), "folder")
        elif labels in ("txt", "json"):
            raise InputError(f"labels {labels!r} is for captions: give 'folder', or a table with a column 'label'")
        elif labels:
            self._label(tables[labels].value(self.ids, LABEL), tables[labels].origin)
        if captions == "folder":
            raise InputError("captions 'folder' is for labels: give 'txt', 'json', or a table with a column 'caption'")
        if captions in ("txt", "json"):
            self.lazy = captions
            self.found.append(Column(CAPTION, "string", captions))
        elif captions:
            self._add(CAPTION, "string", tables[captions].origin, tables[captions].value(self.ids, CAPTION))
        for name in self.request.keep:
            self._keep(name, list(tables.values()))
        return Columns(tuple(self.found), self.names, self.read)

    def read(self, first: int, stop: int) -> dict[str, list[Any]]:
        values = {name: column[first:stop] for name, column in self.fixed.items()}
        if self.lazy:
            values[CAPTION] = [self._beside(i) for i in range(first, stop)]
        return {column.name: values[column.name] for column in self.found}

    def _add(self, name: str, kind: str, origin: str, values: list[Any]) -> None:
        self.fixed[name] = values
        self.found.append(Column(name, kind, origin))

    def _folders(self) -> list[str | None]:
        return [id.partition("/")[0] if "/" in id else None for id in self.ids]

    def _label(self, values: list[Any], origin: str) -> None:
        kept, self.names = numbered(values)
        missing = [id for id, value in zip(self.ids, kept, strict=True) if value is None]
        if missing:
            raise CacheError("; ".join(examples("inputs have no label", missing)) + ": label every image")
        self._add(LABEL, "int64", origin, kept)

    def _keep(self, name: str, tables: list[Table]) -> None:
        table = next((t for t in tables if name in t.names), None)
        if table is None:
            where = " or ".join(str(t.path) for t in tables) or "a table of --labels or --captions"
            raise InputError(f"column {name!r} cannot be kept: it is not in {where}")
        kind, values = typed(table.column(self.ids, name))
        self._add(name, kind, table.origin, values)

    def _beside(self, i: int) -> str | None:
        """The caption in the file beside an input; None where there is none."""
        path = (
            os.path.splitext(os.path.join(self.root, self.listing.locators[i]))[0] + b"." + os.fsencode(self.lazy or "")
        )
        try:
            with open_regular(path) as file:
                data = file.read(MAX_CAPTION + 1)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise CacheError(f"caption {path_to_id(path)} cannot be read: {e.strerror or 'no regular file'}") from e
        return caption_text(data, self.lazy or "", path_to_id(path))


def caption_text(data: bytes, kind: str, where: str) -> str | None:
    """The caption in the bytes of a `txt` or `json` file, where it may be the whole or an entry `caption` or `text`.

    Raises:
        CacheError: it is not UTF-8, too long, or JSON without a caption.
    """
    if len(data) > MAX_CAPTION:
        raise CacheError(f"caption {where} has more than {MAX_CAPTION} bytes: shorten it")
    try:
        text = data.decode("utf-8-sig")
        value = parse_json(text) if kind == "json" else text.strip()
    except ValueError as e:
        raise CacheError(f"caption {where} is not {'JSON' if kind == 'json' else 'UTF-8'}: {e}") from e
    if isinstance(value, dict):
        value = next((value[name] for name in CAPTIONS if isinstance(value.get(name), str)), None)
    return text_of(value) if isinstance(value, str) else None


_WORDS = ("folder", "txt", "json")


def numbered(values: list[Any]) -> tuple[list[int | None], list[str] | None]:
    """Labels as numbers: as they are where all are whole numbers of 64 bits, else by the sorted order of their names.

    Raises:
        CacheError: a name is too long.
    """
    present = [v for v in values if v is not None and v != ""]
    numbers = [whole_number(v) for v in present]
    if None not in numbers:
        at = iter(numbers)
        return [None if v is None or v == "" else next(at) for v in values], None
    names = sorted({text_of(v, MAX_LABEL_NAME) for v in present})
    number = {name: i for i, name in enumerate(names)}
    return [None if v is None or v == "" else number[text_of(v)] for v in values], names


def whole_number(value: Any) -> int | None:
    """A whole number of 64 bits, or the digits of one; None for whatever else."""
    if isinstance(value, str):
        # int() takes underscores, and the digits of any script
        value = int(value) if re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", value) else None
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def typed(values: list[Any]) -> tuple[str, list[Any]]:
    """The narrowest of the column types that takes all values, and the values so."""
    present = [v for v in values if v is not None]
    if present and all(isinstance(v, bool) for v in present):
        return "bool", values
    if present and all(isinstance(v, int) and not isinstance(v, bool) and -(2**63) <= v < 2**63 for v in present):
        return "int64", values
    if present and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in present):
        # a whole number beyond the floats is a text
        with suppress(OverflowError):
            return "float64", [None if v is None else float(v) for v in values]
    return "string", [None if v is None else text_of(v) for v in values]
