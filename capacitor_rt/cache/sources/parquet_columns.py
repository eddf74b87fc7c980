"""Labels, captions and other columns that are kept of Parquet files."""

from __future__ import annotations

from typing import Any

from ...errors import CacheError, InputError
from ...extras import require_extra
from .columns import CAPTION, LABEL, MAX_LABEL_NAME, Column, Columns, ColumnsRequest, parse_json, text_of
from .listing import Listing
from .parquet_opening import open_parquet, reading
from .remote import Files


def wanted_columns(request: ColumnsRequest) -> list[tuple[str, str]]:
    """Names of the columns that are kept, each with the column of the files that it is made of."""
    pairs = [(LABEL, request.labels), (CAPTION, request.captions), *((name, name) for name in request.keep)]
    return [(name, column) for name, column in pairs if column is not None]


class ParquetColumns:
    def __init__(
        self,
        files: Files,
        groups: list[tuple[bytes, int, int, int]],
        listing: Listing,
        schema: Any,
        request: ColumnsRequest,
    ):
        self.files, self.groups, self.listing, self.schema, self.request = files, groups, listing, schema, request
        self.sources: dict[str, str] = {}
        self.found: list[Column] = []
        self.names: list[str] | None = None
        self.numbers: dict[str, int] = {}

    def columns(self) -> Columns:
        for name, column in wanted_columns(self.request):
            self.sources[name] = column
            kind = "string" if name == CAPTION else self._kind(column)
            if name == LABEL:
                self.names = self._label_names(column)
                if kind == "string":
                    self.names = self._all_names(column)
                    self.numbers = {text: i for i, text in enumerate(self.names)}
                elif kind != "int64":
                    raise InputError(
                        f"column {column!r} holds no labels: it is of type {self.schema.field(column).type}"
                    )
                kind = "int64"
            self.found.append(Column(name, kind, f"parquet:{column}"))
        return Columns(tuple(self.found), self.names, self.read)

    def read(self, first: int, stop: int) -> dict[str, list[Any]]:
        number = int(self.listing.containers[first])
        name, group, start, _ = self.groups[number]
        at = int(self.listing.offsets[first]) - start
        with reading(self.files.shown(name)):
            with open_parquet(self.files, name) as file:
                # in this thread, as of a table of the cache
                columns = sorted({*self.sources.values()})
                table = file.read_row_group(group, columns=columns, use_threads=False).slice(at, stop - first)
            if len(table) != stop - first:
                raise ValueError(f"row group {group} has not as many rows as it says")
            lists = {name: table[name].to_pylist() for name in self.sources.values()}
        values: dict[str, list[Any]] = {}
        for column in self.found:
            found = lists[self.sources[column.name]]
            if column.name == LABEL:
                if self.numbers:
                    found = [None if v is None else self.numbers.get(text_of(v)) for v in found]
                if any(v is None for v in found):
                    raise CacheError(f"{self.listing.id(first + found.index(None))!r} has no label: label every image")
            elif column.kind == "string":
                found = [None if v is None else text_of(v) for v in found]
            elif column.kind == "float64":
                found = [None if v is None else float(v) for v in found]
            values[column.name] = found
        return values

    def _kind(self, column: str) -> str:
        types, kind = require_extra("pyarrow").types, self.schema.field(column).type
        if types.is_boolean(kind):
            return "bool"
        if types.is_integer(kind) and not types.is_uint64(kind):
            return "int64"
        return "float64" if types.is_floating(kind) else "string"

    def _label_names(self, column: str) -> list[str] | None:
        """Names of the classes, where the file's metadata of the hub has them."""
        try:
            info = parse_json((self.schema.metadata or {})[b"huggingface"])
            names = info["info"]["features"][column]["names"]
        except (KeyError, ValueError, TypeError):
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return None
        return [text_of(name, MAX_LABEL_NAME) for name in names]

    def _all_names(self, column: str) -> list[str]:
        found: set[str] = set()
        for name in dict.fromkeys(g[0] for g in self.groups):
            with reading(self.files.shown(name)), open_parquet(self.files, name) as file:
                values = file.read(columns=[column], use_threads=False)[column].unique().to_pylist()
            found.update(text_of(v, MAX_LABEL_NAME) for v in values if v is not None)
        return sorted(found)
