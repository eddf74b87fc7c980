"""Reading a latent cache: `LatentDataset`, map-style."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, TypedDict, cast, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import CacheError, InputError
from ..extras import require_extra
from ..images.geometry import Size
from ..images.scan import id_to_path
from .commits import Commit, read_log
from .folder import CacheFolder
from .index import cached_counts, is_ok
from .latent_files import Layout, has_header, layout, read_rows, row_hashes
from .plan import CachePlan, load_plan
from .quantization import bad_numbers, values_of
from .store import read_index

OPEN_FILES = 128
"""Files of latents that one process keeps open at a time."""


class _Row(TypedDict):
    latents: Tensor
    id: str
    height: int
    width: int


class LatentRow(_Row, total=False):
    """A row of a latent cache, which `torch.utils.data.default_collate` takes as it is.

    `latents` is `[C,h,w]` in the stored dtype, float32 where that is int8; `logsnr`, `latents_flip` and `logsnr_flip`
    have the same shape and are there where the cache has them. `id` is the input's locator as text, `height` and
    `width` are the bucket's in pixels. A cache with labels, captions or other columns gives them under their names; a
    missing caption is "", any other missing value is left out of no row: it is -1, NaN, "" or False.
    """

    logsnr: Tensor
    latents_flip: Tensor
    logsnr_flip: Tensor
    label: int
    caption: str


class Ids(Sequence[str]):
    """The ids of all rows, as texts that are made when they are asked for."""

    def __init__(self, array: Any):
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return self._array.take(list(range(*i.indices(len(self))))).to_pylist()
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of a cache of {len(self)} rows")
        return self._array[i % len(self)].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):
            yield from self._array.slice(start, 4096).to_pylist()


class LatentDataset(Dataset[LatentRow]):
    """Rows of a latent cache by number, in the order of the inputs.

    `ds[i]` is a `LatentRow`, whose tensors are fresh memory; `path(i)` is the raw path. `draw(row, generator)` draws a
    sample of the posterior. `ds.ids` are the ids of all rows, `column(name)` is a column of the index over all rows,
    `entries(i)` all that the index says of one.

    Every index is compared with its hash and checked when the cache is opened, and a file of latents must begin as its
    index says: what is returned is what the index vouches for. Held are 32 bytes per row, the ids, and the columns that
    were kept from the source. Files are opened on first use in each process, so that instances go through fork, spawn
    and pickle. Several threads may use one instance.

    Args:
        root: folder of the cache.
        verify: compare each row with its hash when it is read.
        raw: tensors as they are stored: of a cache in int8 integers, with `latents_scale` and `latents_offset`, float32
            `[C]`, beside `latents`, and so of every kind; `quantization.dequantize` makes values of them, on any
            device.
        allow_partial: open a cache that is not finished, as far as it is.

    Raises:
        CacheError: there is no cache, it is not finished, or its plan or index is damaged.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, verify: bool = False, allow_partial: bool = False, raw: bool = False
    ):
        for extra in ("pyarrow", "xxhash"):
            require_extra(extra)
        self.root = Path(root)
        self.verify = verify
        self.raw = raw
        self._open_files()
        with CacheFolder(self.root) as folder:
            plan = load_plan(folder)
            if plan is None:
                raise CacheError(f"{self.root} is no latent cache: it has no plan.json")
            self.plan: CachePlan = plan
            self._load_index(folder, allow_partial)

    def _load_index(self, folder: CacheFolder, allow_partial: bool) -> None:
        pa = require_extra("pyarrow")
        log = read_log(folder)
        commits = [commit for _, commit in sorted(log.commits.items())]
        seen, total = sum(c.inputs for c in commits), self.plan.count
        if not allow_partial and (seen != total or len(commits) != self.plan.task_count or log.bad):
            damage = f"; {len(log.bad)} lines of commits.jsonl are damaged" if log.bad else ""
            raise CacheError(
                f"{self.root} is not finished: {seen} of {total} inputs are done{damage}: run the cache command again, "
                "or pass allow_partial=True"
            )
        kept = [column["name"] for column in self.plan.columns]
        names = ["id", "bucket", "row", "row_hash", *kept]
        tables = []
        reached = 0
        self._commits: list[Commit] = commits
        self._counts: list[dict[int, int]] = []
        for number, commit in enumerate(commits):
            table = self._read_index(commit, folder)
            first = table["input"][0].as_py()
            if first < reached or table.num_rows != commit.inputs or (not allow_partial and first != reached):
                raise CacheError(f"{self.root} is damaged: task {commit.task} does not follow the one before it")
            reached = first + table.num_rows
            self._counts.append(cached_counts(table))
            if sum(self._counts[-1].values()) != commit.rows:
                raise CacheError(f"{self.root} is damaged: the commit line of task {commit.task} is not of its index")
            table = table.filter(is_ok(table)).select(names)
            # 32-bit offsets would end at 2 GiB of names
            table = table.set_column(0, "id", table["id"].cast(pa.large_string()))
            tables.append(table.append_column("task", pa.array(np.full(len(table), number, np.int32))))
        if not any(map(len, tables)):
            raise CacheError(f"{self.root} holds no rows: none of its {total} inputs could be cached")
        table = pa.concat_tables(tables)
        self._ids = _whole(table["id"])
        self.ids: Ids = Ids(self._ids)
        self._task = table["task"].to_numpy()
        self._row = table["row"].to_numpy()
        self._hash = np.frombuffer(b"".join(table["row_hash"].to_pylist()), np.dtype("V16"))
        self._kept = table.select(kept)
        self._number = table["bucket"].to_numpy().astype(np.int32)
        unique, bucket = np.unique(self._number, return_inverse=True)
        # the buckets in use, ordered by height, then width
        sizes = [self.plan.buckets[n] for n in unique]
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        self._bucket: np.ndarray = rank[bucket.reshape(-1)]
        self.buckets: tuple[Size, ...] = tuple(sizes[n] for n in order)

    def _read_index(self, commit: Commit, folder: CacheFolder | None = None) -> Any:
        return read_index(folder or self._opened(), self.plan, commit)

    def _open_files(self) -> None:
        self._folder: CacheFolder | None = None
        self._files: OrderedDict[int, tuple[FileIO, Layout]] = OrderedDict()
        self._lock = threading.Lock()

    def _opened(self) -> CacheFolder:
        """The folder, which is opened on first use in each process."""
        with self._lock:
            if self._folder is None:
                self._folder = CacheFolder(self.root)
            return self._folder

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_lock", "_folder")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_files()

    def __len__(self) -> int:
        return len(self._row)

    def __repr__(self) -> str:
        return f"LatentDataset({str(self.root)!r}, {len(self)} rows, {len(self.buckets)} buckets, {self.latent_space})"

    def __getitem__(self, i: int) -> LatentRow:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[LatentRow]:
        """Several rows: neighbours in a file are read at once. `DataLoader` asks for batches so."""
        places = [self._position(i) for i in indices]
        found = self._tensors(places)
        rows = []
        for i, tensors in zip(places, found, strict=True):
            bucket = self.buckets[self._bucket[i]]
            named = {"id": self._ids[i].as_py(), "height": bucket.height, "width": bucket.width}
            rows.append(cast("LatentRow", {**tensors, **named, **self._extras(i)}))
        return rows

    @property
    def latent_space(self) -> str:
        """Name of the space the latents are in, e.g. `full_capacitor/whitened@<revision>`."""
        return self.plan.fields["model"]["latent_space"]

    @property
    def bucket_numbers(self) -> np.ndarray:
        """Position in `buckets` of each row, int32 `[N]`."""
        return self._bucket

    @property
    def label_names(self) -> list[str] | None:
        """Names of the labels 0, 1, ...; None where labels are numbers in the source, or there are none."""
        return self.plan.fields["label_names"]

    def bucket(self, i: int) -> Size:
        """Image size in pixels that row `i` was encoded at."""
        return self.buckets[self._bucket[self._position(i)]]

    def path(self, i: int) -> str:
        """Relative path of the input, for `os` functions: bytes that are not UTF-8 are surrogate escapes."""
        return os.fsdecode(id_to_path(self._ids[self._position(i)].as_py()))

    def tensors(self, i: int) -> dict[str, Tensor]:
        """The tensors of row `i` alone, each `[C,h,w]`, as `raw` has them.

        Raises:
            CacheError: the file is missing, damaged or cut short; with `verify`, also if the row does not match its
                hash.
        """
        return self._tensors([self._position(i)])[0]

    def column(self, name: str) -> Any:
        """A column of the index, or one that was kept from the source, over all rows, in order: a `pyarrow.Array`.

        Those of the index are read from disk at each call, texts are of type `large_string`.

        Raises:
            InputError: the index has no such column.
        """
        pa = require_extra("pyarrow")
        if name in self._kept.column_names:
            return _whole(self._kept[name])
        if name == "id":
            return self._ids
        chunks = []
        for commit in self._commits:
            table = self._read_index(commit)
            if name not in table.column_names:
                raise InputError(f"the index has no column {name!r}: it has {', '.join(table.column_names)}")
            chunks += table.filter(is_ok(table))[name].chunks
        return _whole(pa.chunked_array(chunks))

    def entries(self, i: int) -> dict[str, Any]:
        """All that the index says of row `i`, by the names of its columns."""
        i = self._position(i)
        table = self._read_index(self._commits[int(self._task[i])])
        at = np.flatnonzero(is_ok(table))[i - int(np.searchsorted(self._task, self._task[i]))]
        return table.slice(int(at), 1).to_pylist()[0]

    def draw(self, row: LatentRow, generator: torch.Generator | None = None, *, flip: bool = False) -> Tensor:
        """A sample of the posterior of `row`, which has `logsnr`: float32 `[C,h,w]`, whitened like `latents`.

        Args:
            flip: sample the posterior of the mirrored image.

        Raises:
            InputError: the row has no `logsnr`, or with `flip` none of the mirrored image, or it is `raw` integers.
        """
        tensors = cast("Mapping[str, Tensor]", row)
        if tensors["latents"].dtype == torch.int8:
            raise InputError("the row holds raw int8: open the cache without raw=True to draw from it")
        suffix = "_flip" if flip else ""
        try:
            latents, logsnr = tensors[f"latents{suffix}"].float(), tensors[f"logsnr{suffix}"].float()
        except KeyError as e:
            raise InputError(f"the row has no {e.args[0]}: cache with posterior (and flip) to draw from it") from None
        sigma = (0.5 * torch.nn.functional.logsigmoid(-logsnr)).exp()
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        whitening = self.plan.fields["whitening"]
        std = torch.tensor(whitening["std"], device=latents.device)[:, None, None] if whitening else 1.0
        return latents + sigma / std * noise

    def _position(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of a cache of {len(self)} rows")
        return int(i) % len(self)

    def _extras(self, i: int) -> dict[str, Any]:
        """The kept columns of a row. What is missing gets a value that can be collated."""
        missing = {"int64": -1, "float64": float("nan"), "string": "", "bool": False}
        values = {}
        for column in self.plan.columns:
            value = self._kept[column["name"]][i].as_py()
            values[column["name"]] = missing[column["type"]] if value is None else value
        return values

    def _tensors(self, places: list[int]) -> list[dict[str, Tensor]]:
        """The tensors of rows, each run of neighbours of one file read at once."""
        found: list[dict[str, Tensor]] = [{} for _ in places]
        order = sorted(range(len(places)), key=lambda at: self._key(places[at]))
        start = 0
        while start < len(order):
            task, number, row = self._key(places[order[start]])
            stop = start + 1
            while stop < len(order) and self._key(places[order[stop]]) == (task, number, row + stop - start):
                stop += 1
            self._read_run(task, number, row, [order[k] for k in range(start, stop)], places, found)
            start = stop
        return found

    def _key(self, i: int) -> tuple[int, int, int]:
        return int(self._task[i]), int(self._number[i]), int(self._row[i])

    def _read_run(
        self, task: int, number: int, row: int, run: list[int], places: list[int], found: list[dict[str, Tensor]]
    ) -> None:
        file, placed = self._file(task)
        what = self.root / self.plan.data_name(self._commits[task].task)
        tensors = {
            part.name: read_rows(file.fileno(), placed.tensors[number, part.name], row, len(run), what)
            for part in self.plan.parts
        }
        if self.verify:
            for k, digest in enumerate(row_hashes(list(tensors.values()))):
                i = places[run[k]]
                if digest != self._hash[i].tobytes():
                    raise CacheError(
                        f"row {row + k} of {self.plan.buckets[number]} in {what} ({self._ids[i].as_py()!r}) is "
                        "damaged: it does not match its hash; run `capacitor-rt verify` for the whole cache"
                    )
        if why := bad_numbers(tensors):
            raise CacheError(f"{what} is damaged: of row {row} to {row + len(run) - 1}, {why}")
        if not self.raw:
            tensors = values_of(tensors, self.plan.tensors)
        for k, at in enumerate(run):
            # a row alone is its own memory already
            found[at] = {kind: t[k] for kind, t in tensors.items()}

    def _file(self, number: int) -> tuple[FileIO, Layout]:
        with self._lock:
            if number in self._files:
                self._files.move_to_end(number)
                return self._files[number]
        commit = self._commits[number]
        name = self.plan.data_name(commit.task)
        try:
            # closed when the last reader lets go of it
            file = self._opened().open(name)
        except FileNotFoundError:
            raise CacheError(f"{self.root / name} cannot be read: No such file or directory") from None
        placed = layout(self.plan, commit.task, self._counts[number], commit.index_xxh3)
        if not has_header(file.fileno(), placed):
            file.close()
            raise CacheError(f"{self.root / name} is damaged: its header or its size is not that of its index")
        entry = file, placed
        with self._lock:
            entry = self._files.setdefault(number, entry)
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return entry


def _whole(column: Any) -> Any:
    """A chunked column as one array; texts with 64-bit offsets, as those of many rows exceed 2 GiB."""
    pa = require_extra("pyarrow")
    if column.type == pa.string():
        column = column.cast(pa.large_string())
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
