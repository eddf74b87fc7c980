"""Reading a latent cache: `LatentDataset`, map-style, and `BucketBatchSampler`, which never mixes sizes in a batch."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..errors import CacheError, InputError
from ..images.geometry import Size
from ..images.scan import id_to_path
from .durable import read_commits, require_extra
from .plan import CachePlan, load_plan
from .shards import OK, IndexEntry, ShardFile, index_schema, read_index, read_rows, read_shard_header, row_hashes

if TYPE_CHECKING:
    import pyarrow

OPEN_FILES = 128
"""Shards that one process keeps open at a time."""


class _Row(TypedDict):
    latents: Tensor
    id: str
    height: int
    width: int


class LatentRow(_Row, total=False):
    """A row of a latent cache, which `torch.utils.data.default_collate` takes as it is.

    `latents` is `[C,h,w]` in the stored dtype; `logsnr`, `latents_flip` and `logsnr_flip` have the same shape and are
    there where the cache has them. `id` is the input's relative path as text, `height` and `width` are the bucket's in
    pixels.
    """

    logsnr: Tensor
    latents_flip: Tensor
    logsnr_flip: Tensor


class Ids(Sequence[str]):
    """Ids of rows, kept as one Arrow array: a name becomes a `str` when it is asked for."""

    def __init__(self, names: pyarrow.Array):
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        return self._names[i].to_pylist() if isinstance(i, slice) else self._names[i].as_py()


class LatentDataset(Dataset[LatentRow]):
    """Rows of a latent cache by number, in the order of the inputs' paths.

    `ds[i]` is a `LatentRow`, whose tensors are fresh memory; `path(i)` is the raw path. `draw(row, generator)` draws a
    sample of the posterior.

    The index is held in columns (about 40 bytes per row, and the ids), and files are opened on first use in each
    process, so that instances go through fork, spawn and pickle. Several threads may use one instance.

    Args:
        root: folder of the cache.
        verify: compare each row with its hash when it is read.
        allow_partial: open a cache that is not finished, as far as it is.

    Raises:
        CacheError: there is no cache, it is not finished, or its plan or index is damaged.
    """

    def __init__(self, root: str | os.PathLike[str], *, verify: bool = False, allow_partial: bool = False):
        self.root = Path(root)
        self.verify = verify
        plan = load_plan(self.root)
        if plan is None:
            raise CacheError(f"{self.root} is no latent cache: it has no plan.json")
        self.plan: CachePlan = plan
        self._load_index(allow_partial)
        self._open_files()

    def _load_index(self, allow_partial: bool) -> None:
        pa, pc = require_extra("pyarrow"), require_extra("pyarrow.compute")
        commits = list(read_commits(self.root).values())
        seen, total = sum(c["inputs"] for c in commits), self.plan.fields["inputs"]["count"]
        if seen != total and not allow_partial:
            raise CacheError(
                f"{self.root} is not finished: {seen} of {total} inputs are done: run the cache command again, "
                "or pass allow_partial=True"
            )
        names = ["input", "id", "bucket_height", "bucket_width", "row", "row_hash"]
        tables = []
        self._shards: list[str] = []
        self._index_files: list[tuple[str, str]] = []
        for commit in commits:
            if commit["shard"] is None:
                continue
            table = read_index(self.root / commit["index"], commit["index_xxh3"])
            table = table.filter(pc.equal(table["status"], OK)).select(names)
            # 32-bit offsets would end at 2 GiB of names
            table = table.set_column(1, "id", table["id"].cast(pa.large_string()))
            number = pa.array(np.full(len(table), len(self._shards), np.int32))
            tables.append(table.append_column("shard", number))
            self._shards.append(commit["shard"])
            self._index_files.append((commit["index"], commit["index_xxh3"]))
        if not tables:
            raise CacheError(f"{self.root} holds no rows: none of its {total} inputs could be cached")
        table = pa.concat_tables(tables).sort_by("input").combine_chunks()
        self._ids = table["id"].combine_chunks()
        self._shard = table["shard"].to_numpy()
        self._row = table["row"].to_numpy()
        self._hash = np.frombuffer(b"".join(table["row_hash"].to_pylist()), np.dtype("V16"))
        sizes = np.stack([table["bucket_height"].to_numpy(), table["bucket_width"].to_numpy()], 1)
        unique, self._bucket = np.unique(sizes, axis=0, return_inverse=True)
        self._bucket = self._bucket.reshape(-1).astype(np.int32)
        self.buckets: tuple[Size, ...] = tuple(Size(int(h), int(w)) for h, w in unique)

    def _open_files(self) -> None:
        self._files: OrderedDict[int, tuple[FileIO, ShardFile]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_files()

    def __len__(self) -> int:
        return len(self._row)

    def __repr__(self) -> str:
        return f"LatentDataset({str(self.root)!r}, {len(self)} rows, {len(self.buckets)} buckets, {self.latent_space})"

    def __getitem__(self, i: int) -> LatentRow:
        i = self._position(i)
        bucket = self.bucket(i)
        named = {"id": self._ids[i].as_py(), "height": bucket.height, "width": bucket.width}
        return cast("LatentRow", {**self.tensors(i), **named})

    @property
    def latent_space(self) -> str:
        """Name of the space the latents are in, e.g. `full_capacitor/whitened@<revision>`."""
        return self.plan.fields["model"]["latent_space"]

    @property
    def ids(self) -> Ids:
        """Id of every row, in order."""
        return Ids(self._ids)

    def column(self, name: str) -> pyarrow.Array:
        """A column of the index (`IndexEntry`), one value per row, in order; read from disk at each call.

        Raises:
            InputError: the index has no such column. CacheError: an index file is damaged.
        """
        pa = require_extra("pyarrow")
        pieces = [self._index(number).select(["input", *self._known(name)]) for number in range(len(self._shards))]
        column = pa.concat_tables(pieces).sort_by("input")[name]
        return (column.cast(pa.large_string()) if column.type == pa.string() else column).combine_chunks()

    def entries(self, i: int) -> IndexEntry:
        """What the index says of row `i`; columns that do not apply are None."""
        i = self._position(i)
        table = self._index(int(self._shard[i]))
        (entry,) = table.slice(int(self._row[i]), 1).to_pylist()
        return cast("IndexEntry", entry)

    def _index(self, number: int) -> pyarrow.Table:
        """The index of a shard, its rows alone, in their order in the shard."""
        name, digest = self._index_files[number]
        table = read_index(self.root / name, digest)
        return table.filter(require_extra("pyarrow.compute").equal(table["status"], OK))

    @staticmethod
    def _known(name: str) -> list[str]:
        names = index_schema().names
        if name not in names:
            raise InputError(f"the index has no column {name!r}: it has {', '.join(names)}")
        return [] if name == "input" else [name]

    @property
    def bucket_numbers(self) -> np.ndarray:
        """Position in `buckets` of each row, int32 `[N]`."""
        return self._bucket

    def bucket(self, i: int) -> Size:
        """Image size in pixels that row `i` was encoded at."""
        return self.buckets[self._bucket[self._position(i)]]

    def path(self, i: int) -> str:
        """Relative path of the input, for `os` functions: bytes that are not UTF-8 are surrogate escapes."""
        return os.fsdecode(id_to_path(self._ids[self._position(i)].as_py()))

    def tensors(self, i: int) -> dict[str, Tensor]:
        """The tensors of row `i` alone, each `[C,h,w]` in the stored dtype.

        Raises:
            CacheError: the shard is missing or cut short; with `verify`, also if the row does not match its hash.
        """
        i = self._position(i)
        number, row = int(self._shard[i]), int(self._row[i])
        file, shard = self._file(number)
        tensors = {name: read_rows(file.fileno(), shard, name, row, 1) for name in self.plan.tensors}
        if self.verify and row_hashes(list(tensors.values()))[0] != self._hash[i].tobytes():
            raise CacheError(
                f"row {row} of {shard.path} ({self._ids[i].as_py()!r}) is damaged: it does not match its hash; "
                "run `capacitor-rt verify` for the whole cache"
            )
        return {name: t[0] for name, t in tensors.items()}

    def draw(
        self, row: LatentRow | Mapping[str, Any], generator: torch.Generator | None = None, *, flip: bool = False
    ) -> Tensor:
        """A sample of the posterior in the space of the latents, float32, from a row of a cache with `logsnr`.

        The posterior of raw latents is `alpha mean + sigma n`, `sigma^2 = sigmoid(-logsnr)`, n unit normal, and
        `latents` holds the whitened `alpha mean`; whitening divides by `std`, so a sample is `latents + sigma / std
        * n`, `std` per channel from `plan.json` ("whitening").

        Args:
            row: a row, or a collated batch of rows.
            flip: sample the posterior of the mirrored image.

        Raises:
            InputError: the row has no `logsnr`, or with `flip` none of the mirrored image.
        """
        tensors = cast("Mapping[str, Tensor]", row)
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
        return i % len(self)

    def _file(self, number: int) -> tuple[FileIO, ShardFile]:
        with self._lock:
            if number in self._files:
                self._files.move_to_end(number)
                return self._files[number]
        shard = self._checked_header(self.root / self._shards[number])
        # closed when the last reader lets go of it
        entry = open(shard.path, "rb", buffering=0), shard  # noqa: SIM115
        with self._lock:
            entry = self._files.setdefault(number, entry)
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return entry

    def _checked_header(self, path: Path) -> ShardFile:
        shard = read_shard_header(path)
        if tuple(shard.offsets) != self.plan.tensors or str(shard.dtype) != f"torch.{self.plan.dtype}":
            raise CacheError(f"shard {path} is damaged: its header does not fit plan.json")
        return shard


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of row numbers of one bucket each, for `DataLoader(batch_sampler=...)`.

    A step takes `batch_size * world_size` rows of one bucket and gives each rank an equal share, so that ranks see
    the same size in the same step and no row twice. The last, smaller step of a bucket is shared out as evenly as it
    goes, and a rank that would get nothing skips it; with `drop_last` it is left out, and every rank has the same
    number of batches.

    The order is a function of (seed, epoch); call `set_epoch` before each epoch. `len` is the number of this rank's
    batches.

    To resume in the middle of an epoch, save `state_dict(done)` and give it to `load_state_dict` of a new sampler;
    iteration goes on after `done` batches. Data loader workers ask for batches ahead of time: pass the number that
    your loop has finished.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size} is too small: it is at least 1")
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} is not among 0 to {world_size - 1}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._start = 0
        self._given = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, from its beginning; the epoch of a loaded state keeps its place."""
        if epoch != self.epoch:
            self.epoch, self._start = epoch, 0
        self._given = self._start

    def __len__(self) -> int:
        return sum(self._share(stop - start) > 0 for _, start, stop in self._steps())

    def __iter__(self) -> Iterator[list[int]]:
        start, self._start = self._start, 0
        self._given = start
        orders = [self._shuffled(rows, n) for n, rows in enumerate(self._members())]
        mine = (s for s in self._shuffled(self._steps(), len(orders)) if self._share(s[2] - s[1]))
        for number, (bucket, begin, end) in enumerate(mine):
            if number < start:
                continue
            self._given = number + 1
            yield orders[bucket][begin + self.rank : end : self.world_size].tolist()

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Where this epoch is. `done`: batches of this epoch that are finished; default all that were given out."""
        return self._settings() | {"epoch": self.epoch, "done": self._given if done is None else done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a saved state was.

        Raises:
            InputError: the state is of another cache or of other settings, under which the order is another.
        """
        differing = {k: (state.get(k), v) for k, v in self._settings().items() if state.get(k) != v}
        if differing:
            changes = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in differing.items())
            raise InputError(f"the sampler's state does not fit ({changes}): resume with the same cache and settings")
        self.epoch, self._start = state["epoch"], state["done"]
        self._given = self._start

    def _settings(self) -> dict[str, Any]:
        names = ("batch_size", "shuffle", "seed", "drop_last", "world_size")
        own = {name: getattr(self, name) for name in names}
        return own | {"plan": self.dataset.plan.id, "rows": len(self.dataset)}

    def _members(self) -> list[np.ndarray]:
        """Rows of each bucket, ascending."""
        numbers = self.dataset.bucket_numbers
        by_bucket = np.argsort(numbers, kind="stable")
        return np.split(by_bucket, np.cumsum(np.bincount(numbers, minlength=len(self.dataset.buckets)))[:-1])

    def _steps(self) -> np.ndarray:
        """(bucket, begin, end) of every step of all ranks in the buckets' shuffled rows, int64 `[S,3]`."""
        step = self.batch_size * self.world_size
        steps = []
        for bucket, count in enumerate(np.bincount(self.dataset.bucket_numbers).tolist()):
            begins = np.arange(0, count - step + 1 if self.drop_last else count, step)
            steps.append(np.stack([np.full_like(begins, bucket), begins, np.minimum(begins + step, count)], 1))
        return np.concatenate(steps)

    def _share(self, rows: int) -> int:
        """Rows of a step of `rows` rows that are this rank's."""
        return len(range(self.rank, rows, self.world_size))

    def _shuffled(self, values: np.ndarray, stream: int) -> np.ndarray:
        if not self.shuffle:
            return values
        seed = np.random.SeedSequence([self.seed, self.epoch, stream])
        return np.random.Generator(np.random.PCG64(seed)).permutation(values, axis=0)
