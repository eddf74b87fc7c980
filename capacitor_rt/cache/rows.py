"""`.rows`: the rows of a finished cache as one table in a memory map, which all processes of a machine share.

It is derived from the indexes, once, and holds 36 bytes per row, the ids, and the columns that were kept from the
source: an Arrow IPC file behind a page that names its own hash and what it was derived from, which is the plan, every
commit line, so the hash of every index, and the times of the indexes. All of this is compared before anything is taken
from it, and whatever is wrong with the file only means that it is made anew. Where OUT cannot be written to it lies in
the user's cache folder, and of an unfinished cache nowhere.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheError
from ..extras import require_extra
from .carried import load_carried
from .commits import Commit
from .folder import TMP, CacheFolder, make_dir, write_all
from .hashing import canonical_json, xxh3
from .index import cached_counts, cached_rows, index_schema, is_ok, is_own
from .latent_files import has_header, layout
from .plan import CachePlan
from .store import read_index, repair_hint

ROWS = ".rows"
MAGIC = b"capacitor-rows/1\n"
HEAD = 4096
CHUNK_ROWS = 1 << 18
"""Rows of a chunk of the table; the last has the rest."""
_BLOCK = 4 << 20


class Rows:
    """The rows of a cache, in the order of the inputs.

    Attributes:
        table: their columns in chunks of `CHUNK_ROWS`: `file` (position of the task among the committed ones; the
            files of earlier generations are numbered behind them, in the order of the list of them),
            `bucket` (its number in the plan), `row` (in the file's tensors of that bucket), `row_hash`, `id`, and
            the kept columns.
        is_named: whether it can be opened again by its name.
    """

    def __init__(self, table: Any, is_named: bool):
        self.table = table
        self.is_named = is_named
        self._places = [_numpy(table[name]) for name in ("file", "bucket", "row")]
        self._hashes = [np.frombuffer(c.buffers()[1], "V16") for c in table["row_hash"].chunks]

    def __len__(self) -> int:
        return self.table.num_rows

    def place(self, i: int) -> tuple[int, int, int]:
        """File, number of the bucket, and row of `i`."""
        chunk, at = divmod(i, CHUNK_ROWS)
        file, number, row = (column[chunk][at] for column in self._places)
        return int(file), int(number), int(row)

    def hash(self, i: int) -> bytes:
        """XXH3-128 of row `i`."""
        chunk, at = divmod(i, CHUNK_ROWS)
        return self._hashes[chunk][at].tobytes()

    def value(self, name: str, i: int) -> Any:
        """What column `name` has for row `i`, None where it has nothing."""
        chunk, at = divmod(i, CHUNK_ROWS)
        return self.table[name].chunk(chunk)[at].as_py()

    def numbers(self) -> np.ndarray:
        """Number of the bucket of each row, int32 `[N]`."""
        chunks = self._places[1]
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def bucket_counts(self, buckets: int) -> np.ndarray:
        """Rows of each bucket of the plan, int64 `[buckets]`."""
        return sum((np.bincount(c, minlength=buckets) for c in self._places[1]), np.zeros(buckets, np.int64))

    def file_counts(self, file: int, first: int, stop: int) -> dict[int, int]:
        """Rows of each bucket that a file has any of, all of which are among the rows `first` to `stop` - 1."""
        found: dict[int, int] = {}
        while first < stop:
            chunk, at = divmod(first, CHUNK_ROWS)
            end = min(at + stop - first, CHUNK_ROWS)
            files, numbers = (column[chunk][at:end] for column in self._places[:2])
            for number, count in enumerate(np.bincount(numbers[files == file]).tolist()):
                if count:
                    found[number] = found.get(number, 0) + count
            first += end - at
        return dict(sorted(found.items()))


def load_rows(folder: CacheFolder, plan: CachePlan, commits: Sequence[Commit], is_partial: bool) -> Rows:
    """The rows of a cache, from a table that is there, or from the indexes.

    Args:
        commits: of its tasks, in order.
        is_partial: a table is neither looked for nor left behind.

    Raises:
        CacheError: an index is missing, damaged, or not that of its commit line.
    """
    key = _key(folder, plan, commits)
    schema = rows_schema(plan)
    counts = [commit.rows for commit in commits]
    for where, name in () if is_partial else _places(folder, key, make=False):
        # whatever is wrong with it, it is made anew
        with suppress(CacheError, OSError), where.open(name) as file:
            table = _checked(file, key, schema, counts, len(plan.buckets))
            if table is not None:
                return Rows(table, True)
    tables = _tables(folder, plan, commits, is_partial)
    for where, name in () if is_partial else _places(folder, key, make=True):
        temporary = f"{name}{TMP}{uuid.uuid4().hex}"
        try:
            file = where.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except (CacheError, OSError):
            continue
        with closing(file):
            try:
                _write(file, tables, key, schema)
                table = _mapped(file, schema)
                where.rename(temporary, name)
                return Rows(table, True)
            except OSError:
                # no room there: elsewhere from the beginning
                tables = _tables(folder, plan, commits, is_partial)
            finally:
                with suppress(OSError):
                    where.unlink(temporary)
    with tempfile.TemporaryFile(buffering=0) as file:
        _write(file, tables, key, schema)
        return Rows(_mapped(file, schema), False)


def rows_schema(plan: CachePlan) -> Any:
    """Columns of the table."""
    pa = require_extra("pyarrow")
    index = index_schema(plan.columns)
    kept = [index.field(column["name"]) for column in plan.columns]
    fields = [pa.field(name, pa.int32(), nullable=False) for name in ("file", "bucket", "row")]
    fields += [pa.field("row_hash", pa.binary(16), nullable=False), pa.field("id", pa.large_string(), nullable=False)]
    # 32-bit offsets would do for a chunk, and end at 2 GiB of texts in all
    return pa.schema([*fields, *(f.with_type(pa.large_string()) if f.type == pa.string() else f for f in kept)])


def _key(folder: CacheFolder, plan: CachePlan, commits: Sequence[Commit]) -> str:
    """Hash of all that the table follows from: also of sizes and times of the indexes, which tell of a change."""
    digest = xxh3(MAGIC + plan.text())
    for commit in commits:
        info = folder.stat(plan.index_name(commit.task))
        found = (info.st_size, info.st_mtime_ns) if info is not None else None
        digest.update(commit.line() + repr(found).encode())
    return digest.hexdigest()


def _places(folder: CacheFolder, key: str, make: bool) -> Iterator[tuple[CacheFolder, str]]:
    """Where the table may lie: in the cache, and in the user's own folder."""
    yield folder, ROWS
    base = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError, CacheError, OSError):
        path = (Path(base) if base else Path.home() / ".cache") / "capacitor_rt" / "rows"
        if make:
            make_dir(path)
        with CacheFolder(path) as own:
            yield own, key


def _tables(folder: CacheFolder, plan: CachePlan, commits: Sequence[Commit], is_partial: bool) -> Iterator[Any]:
    """The rows of each task, as the schema has them, whose index is checked."""
    pa = require_extra("pyarrow")
    schema = rows_schema(plan)
    stems = pa.array(list(load_carried(folder, plan)), pa.string())
    reached = 0
    for number, commit in enumerate(commits):
        table = read_index(folder, plan, commit)
        first = table["input"][0].as_py()
        if first < reached or table.num_rows != commit.inputs or (not is_partial and first != reached):
            raise CacheError(f"{folder.path} is damaged: task {commit.task} does not follow the one before it")
        reached = first + table.num_rows
        if cached_rows(table) != commit.rows:
            raise CacheError(f"{folder.path} is damaged: the commit line of task {commit.task} is not of its index")
        if (is_ok(table) & ~is_own(table)).any():
            _check_own_file(folder, plan, commit, table)
        table = table.filter(is_ok(table))
        columns = {
            "file": pa.array(_files(table, number, stems, len(commits))),
            **{name: table[name] for name in schema.names[1:]},
        }
        yield pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)


def _check_own_file(folder: CacheFolder, plan: CachePlan, commit: Commit, table: Any) -> None:
    """A task's own file vouches for its index by its header, also where rows are read from other files alone."""
    name = plan.data_name(commit.task)
    placed = layout(plan, commit.task, cached_counts(table), commit.index_xxh3)
    try:
        with folder.open(name) as file:
            if has_header(file.fileno(), placed):
                return
    except FileNotFoundError as e:
        raise CacheError(f"{folder.path / name} cannot be read ({e.strerror}): {repair_hint(folder)}") from None
    raise CacheError(f"{folder.path / name} is damaged: its header is not that of its index: {repair_hint(folder)}")


def _files(table: Any, number: int, stems: Any, tasks: int) -> np.ndarray:
    """In which file each row of the index of the `number`th of `tasks` tasks lies, int32 `[N]`."""
    files = np.full(len(table), number, np.int32)
    if "file" in table.column_names:
        pc = require_extra("pyarrow.compute")
        elsewhere = table["file"].is_valid().to_numpy()
        places = pc.index_in(table["file"], value_set=stems).fill_null(-1).to_numpy()[elsewhere]
        if (places < 0).any():
            raise CacheError("the cache is damaged: an index names a file that the list of carried files has not")
        files[elsewhere] = tasks + places
    return files


class _Sink:
    """A file that is written from front to back and hashed."""

    def __init__(self, fd: int):
        self.fd = fd
        self.digest = xxh3()
        self.size = 0
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        write_all(self.fd, view)
        self.digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def _write(file: Any, tables: Iterator[Any], key: str, schema: Any) -> None:
    pa = require_extra("pyarrow")
    fd = file.fileno()
    os.ftruncate(fd, 0)
    write_all(fd, bytes(HEAD))
    sink = _Sink(fd)
    waiting: list[Any] = []
    held = 0
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
        for table in tables:
            waiting.append(table)
            held += table.num_rows
            while held >= CHUNK_ROWS:
                whole = pa.concat_tables(waiting)
                _write_chunk(writer, whole.slice(0, CHUNK_ROWS), schema)
                waiting, held = [whole.slice(CHUNK_ROWS)], held - CHUNK_ROWS
        if held:
            _write_chunk(writer, pa.concat_tables(waiting), schema)
    fields = {"key": key, "nbytes": sink.size, "xxh3": sink.digest.hexdigest()}
    os.pwrite(fd, _head(fields), 0)


def _head(fields: dict[str, Any]) -> bytes:
    return (MAGIC + canonical_json(fields) + b"\n").ljust(HEAD, b"\0")


def _write_chunk(writer: Any, table: Any, schema: Any) -> None:
    pa = require_extra("pyarrow")
    # of one chunk each: `combine_chunks` of a table may leave more
    arrays = [pa.concat_arrays(column.chunks) for column in table.columns]
    writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _checked(file: FileIO, key: str, schema: Any, counts: Sequence[int], buckets: int) -> Any:
    """The table of a file that was derived from `key` and is as it was written; else None."""
    pa = require_extra("pyarrow")
    fd = file.fileno()
    head = os.pread(fd, HEAD, 0)
    try:
        fields = json.loads(head.removeprefix(MAGIC).partition(b"\n")[0]) if head.startswith(MAGIC) else {}
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or fields.get("key") != key or head != _head(fields):
        return None
    at, stop = HEAD, os.fstat(fd).st_size
    if fields.get("nbytes") != stop - HEAD:
        return None
    digest = xxh3()
    while block := os.pread(fd, _BLOCK, at):
        digest.update(block)
        at += len(block)
    if (fields.get("xxh3"), at) != (digest.hexdigest(), stop):
        return None
    try:
        table = _mapped(file, schema)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError):
        return None
    lengths = [batch.num_rows for batch in table.to_batches()]
    if table.num_rows != sum(counts) or any(n != CHUNK_ROWS for n in lengths[:-1]):
        return None
    if any(table[name].null_count for name in ("file", "bucket", "row", "row_hash", "id")):
        return None
    return table if _are_places(table, len(counts), buckets) else None


def _are_places(table: Any, files: int, buckets: int) -> bool:
    """Whether every row has a file, a bucket and a row that there may be; the file of latents says whether it is so."""
    most = {"file": files, "bucket": buckets, "row": 1 << 31}
    return all(
        not len(chunk) or (chunk.min() >= 0 and chunk.max() < stop)
        for name, stop in most.items()
        for chunk in _numpy(table[name])
    )


def _mapped(file: Any, schema: Any) -> Any:
    """The table of a file, none of which is read yet.

    Raises:
        pyarrow's errors; ValueError: it is another table.
    """
    pa = require_extra("pyarrow")
    # kept by the table's buffers, also once the file is closed
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    options = pa.ipc.IpcReadOptions(use_threads=False)
    table = pa.ipc.open_file(pa.py_buffer(view).slice(HEAD), options=options).read_all()
    if table.schema != schema:
        raise ValueError("other columns")
    return table


def _numpy(column: Any) -> list[np.ndarray]:
    return [chunk.to_numpy() for chunk in column.chunks]
