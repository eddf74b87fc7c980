"""Reading a latent cache: `LatentDataset`, map-style."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
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
from ..printable import counted
from .carried import CarriedFile, load_carried
from .commits import Commit, read_log
from .folder import CacheFolder
from .index import is_ok
from .latent_files import Layout, layout, row_hashes
from .latent_reader import Batch, BatchRow, LatentReader
from .plan import CachePlan, load_plan
from .quantization import bad_numbers, values_of
from .rows import Rows, load_rows
from .shared_batches import shared_batches
from .store import read_index
from .views import no_cache


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
    missing caption is "", any other missing value becomes -1, NaN, "" or False, so that rows collate.
    """

    logsnr: Tensor
    latents_flip: Tensor
    logsnr_flip: Tensor
    label: int
    caption: str


class Ids(Sequence[str]):
    """The ids of all rows, as texts that are made when they are asked for. `column`: chunked."""

    def __init__(self, column: Any):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return self._column.take(list(range(*i.indices(len(self))))).to_pylist()
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of a cache of {len(self)} rows")
        return self._column[i % len(self)].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):
            yield from self._column.slice(start, 4096).to_pylist()


class LatentDataset(Dataset[LatentRow]):
    """Rows of a latent cache by number, in the order of the inputs.

    `ds[i]` is a `LatentRow`, whose tensors are fresh memory; `path(i)` is the raw path. `draw(row, generator)` draws a
    sample of the posterior. `ds.ids` are the ids of all rows, `column(name)` is a column of the index over all rows,
    `entries(i)` all that the index says of one.

    Every index is compared with its hash and checked when a cache is opened for the first time, and a file of latents
    must begin as its index says: what is returned is what the index vouches for. What they say of the rows, 36 bytes
    each, the ids, and the columns that were kept from the source, is then kept in a file that all processes map
    (`rows`). Files are opened on first use in each process, so that instances go through fork, spawn and pickle.
    Several threads may use one instance.

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
        # whose memory is made when a data loader's workers are, which share it
        self._shared = shared_batches()
        with CacheFolder(self.root) as folder:
            plan = load_plan(folder)
            if plan is None:
                raise CacheError(no_cache(self.root))
            self.plan: CachePlan = plan
            self._load_index(folder, allow_partial)

    def _load_index(self, folder: CacheFolder, allow_partial: bool) -> None:
        log = read_log(folder, self.plan)
        commits = [commit for _, commit in sorted(log.commits.items())]
        seen, total = sum(c.inputs for c in commits), self.plan.count
        if self.plan.is_interim and not allow_partial:
            raise CacheError(
                f"{self.root} is not finished: inputs of the same bytes are still to be added: run the cache command "
                "again, or pass allow_partial=True"
            )
        if not allow_partial and (seen != total or len(commits) != self.plan.task_count or log.bad):
            damage = f"; {len(log.bad)} lines of commits.jsonl are damaged" if log.bad else ""
            raise CacheError(
                f"{self.root} is not finished: {seen} of {counted(total, 'input')} done{damage}: run the cache command "
                "again, or pass allow_partial=True"
            )
        self._commits: list[Commit] = commits
        self._is_partial = allow_partial
        self._carried: list[CarriedFile] = list(load_carried(folder, self.plan).values())
        # rows up to and with each task
        self._stops: np.ndarray = np.cumsum([commit.rows for commit in commits])
        self._own_rows: Rows | None = load_rows(folder, self.plan, commits, allow_partial)
        if not len(self._own_rows):
            raise CacheError(f"{self.root} holds no rows: none of its {total} inputs could be cached")
        # the buckets in use, ordered by height, then width
        used = np.flatnonzero(self._own_rows.bucket_counts(len(self.plan.buckets))).tolist()
        used.sort(key=self.plan.buckets.__getitem__)
        self.buckets: tuple[Size, ...] = tuple(self.plan.buckets[n] for n in used)
        self._rank = np.zeros(len(self.plan.buckets), np.int32)
        self._rank[used] = np.arange(len(used), dtype=np.int32)

    @property
    def _rows(self) -> Rows:
        """The table of rows, which a copy in another process maps on first use."""
        if self._own_rows is None:
            self._own_rows = load_rows(self._opened(), self.plan, self._commits, self._is_partial)
        return self._own_rows

    def _read_index(self, commit: Commit, folder: CacheFolder | None = None) -> Any:
        return read_index(folder or self._opened(), self.plan, commit)

    def _open_files(self) -> None:
        self._folder: CacheFolder | None = None
        self._lock = threading.Lock()
        self._reader: LatentReader | None = None

    def _opened(self) -> CacheFolder:
        """The folder, which is opened on first use in each process."""
        with self._lock:
            if self._folder is None:
                self._folder = CacheFolder(self.root)
            return self._folder

    def __getstate__(self) -> dict[str, Any]:
        own = ("_reader", "_lock", "_folder", "_own_rows")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own_rows = None
        self._open_files()

    def close(self) -> None:
        """Close descriptors and free the memory shared with workers, which must have ended. Both come back when they
        are needed; what was read stays.
        """
        self._open_files()
        self._shared = shared_batches()

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __repr__(self) -> str:
        held = f"{counted(len(self), 'row')}, {counted(len(self.buckets), 'bucket')}"
        return f"LatentDataset({str(self.root)!r}, {held}, {self.latent_space})"

    def __getitem__(self, i: int) -> LatentRow:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[LatentRow]:
        """Several rows: neighbours in a file are read at once. `DataLoader` asks for batches so.

        Rows of one bucket lie in one tensor of each kind, which collating them does not copy.
        """
        places = [self._position(i) for i in indices]
        rows: list[LatentRow | None] = [None] * len(places)
        for batch in self._batches(places):
            bucket = self.plan.buckets[batch.number]
            for at, position in enumerate(batch.positions):
                i = places[position]
                row = BatchRow({kind: t[at] for kind, t in batch.tensors.items()})
                row.batch, row.at = batch.tensors, at
                row |= {"id": self._rows.value("id", i), "height": bucket.height, "width": bucket.width}
                row |= self._extras(i)
                rows[position] = cast("LatentRow", row)
        return cast("list[LatentRow]", rows)

    @property
    def ids(self) -> Ids:
        """The ids of all rows."""
        return Ids(self._rows.table["id"])

    @property
    def latent_space(self) -> str:
        """Name of the space the latents are in, e.g. `full_capacitor/whitened@<revision>`."""
        return self.plan.fields["model"]["latent_space"]

    @property
    def bucket_numbers(self) -> np.ndarray:
        """Position in `buckets` of each row, int32 `[N]`, made at each call."""
        return self._rank[self._rows.numbers()]

    @property
    def label_names(self) -> list[str] | None:
        """Names of the labels 0, 1, ...; None where labels are numbers in the source, or there are none."""
        return self.plan.fields["label_names"]

    def bucket(self, i: int) -> Size:
        """Image size in pixels that row `i` was encoded at."""
        return self.plan.buckets[self._rows.place(self._position(i))[1]]

    def path(self, i: int) -> str:
        """Relative path of the input, for `os` functions: bytes that are not UTF-8 are surrogate escapes."""
        return os.fsdecode(id_to_path(self._rows.value("id", self._position(i))))

    def tensors(self, i: int) -> dict[str, Tensor]:
        """The tensors of row `i` alone, each `[C,h,w]`, as `raw` has them.

        Raises:
            CacheError: the file is missing, damaged or cut short; with `verify`, also if the row does not match its
                hash.
        """
        (batch,) = self._batches([self._position(i)])
        return {kind: t[0] for kind, t in batch.tensors.items()}

    def column(self, name: str) -> Any:
        """A column of the index, or one that was kept from the source, over all rows, in order: a `pyarrow.Array`.

        Those of the index are read from disk at each call, texts are of type `large_string`.

        Raises:
            InputError: the index has no such column.
        """
        pa = require_extra("pyarrow")
        if name == "id" or name in [column["name"] for column in self.plan.columns]:
            return _whole(self._rows.table[name])
        chunks = []
        for commit in self._commits:
            table = self._read_index(commit)
            if name not in table.column_names:
                raise InputError(f"the index has no column {name!r}: it has {', '.join(table.column_names)}")
            chunks += table.filter(is_ok(table))[name].chunks
        return _whole(pa.chunked_array(chunks))

    @property
    def task_stops(self) -> np.ndarray:
        """Number of rows up to and with each committed task, int64 `[T]`."""
        return self._stops

    def entries(self, i: int) -> dict[str, Any]:
        """All that the index says of row `i`, by the names of its columns."""
        i = self._position(i)
        task = int(np.searchsorted(self._stops, i, "right"))
        table = self._read_index(self._commits[task])
        at = np.flatnonzero(is_ok(table))[i - int(self._stops[task]) + self._commits[task].rows]
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
            value = self._rows.value(column["name"], i)
            values[column["name"]] = missing[column["type"]] if value is None else value
        return values

    def _batches(self, places: list[int]) -> list[Batch]:
        """The tensors of rows, bucket by bucket, compared with their hashes where that was asked for."""
        with self._lock:
            if self._reader is None:
                parts = [part.name for part in self.plan.parts]
                self._reader = LatentReader(self._opened, parts, self._name, self._layout, self._shared)
            reader = self._reader
        found = reader.batches([self._rows.place(i) for i in places])
        if self.verify:
            for batch in found:
                for position, digest in zip(batch.positions, row_hashes(list(batch.tensors.values())), strict=True):
                    if digest != self._rows.hash(places[position]):
                        raise self._damaged(places[position], "it does not match its hash")
        for batch in found:
            if bad_numbers(batch.tensors):
                for at, position in enumerate(batch.positions):
                    if why := bad_numbers({name: t[at] for name, t in batch.tensors.items()}):
                        raise self._damaged(places[position], why)
        if self.raw:
            return found
        return [batch._replace(tensors=reader.placed(values_of(batch.tensors, self.plan.tensors))) for batch in found]

    def _damaged(self, i: int, why: str) -> CacheError:
        file, number, row = self._rows.place(i)
        return CacheError(
            f"row {row} of {self.plan.buckets[number]} in {self.root / self._name(file)} "
            f"({self._rows.value('id', i)!r}) is damaged: {why}; run `capacitor-rt verify` for the whole cache"
        )

    def _name(self, file: int) -> str:
        own = len(self._commits)
        return self.plan.data_name(self._commits[file].task) if file < own else self._carried[file - own].name

    def _layout(self, file: int) -> Layout:
        if file >= len(self._commits):
            return self._carried[file - len(self._commits)].layout(self.plan)
        commit, stop = self._commits[file], int(self._stops[file])
        counts = self._rows.file_counts(file, stop - commit.rows, stop)
        return layout(self.plan, commit.task, counts, commit.index_xxh3)


def _whole(column: Any) -> Any:
    """A chunked column as one array; texts with 64-bit offsets, as those of many rows exceed 2 GiB."""
    pa = require_extra("pyarrow")
    if column.type == pa.string():
        column = column.cast(pa.large_string())
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
