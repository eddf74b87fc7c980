"""The caches that mutants are made of, and what their rows are: built once, with their sources beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .checkpoints import GOLDEN


class Base(NamedTuple):
    """A cache that mutants are made of.

    Attributes:
        source: its inputs, by the name of a folder or file beside it.
        may_be: the caches whose rows those of a mutant may be.
        is_update: whether a run goes on by an update.
        is_exact: whether a run that ends well leaves the bytes that an undisturbed one leaves.
        columns: labels, captions and other columns that are kept, as `columns` names them.
        other: of two views the second, how it is before a run, and what it is after one.
        of: the folder that is copied; None: that of its own name.
    """

    source: str
    may_be: tuple[str, ...]
    is_update: bool = False
    is_exact: bool = True
    columns: str = ""
    other: tuple[str, str] | None = None
    of: str | None = None


BASES = {
    "whole": Base("src", ("whole",)),
    "updated": Base("src2", ("whole", "updated"), is_update=True),
    # what is damaged of the earlier generation is encoded anew by an update, and lies elsewhere then
    "underway": Base("src2", ("whole", "updated"), is_update=True, is_exact=False),
    "shared": Base("src3", ("shared",)),
    "views": Base("src", ("whole",), other=("other", "other-whole"), of="whole"),
    "views-underway": Base(
        "src2", ("whole", "updated"), True, False, other=("other-whole", "other-updated"), of="underway"
    ),
    "labelled": Base("classes", ("labelled",), columns="table"),
    # an earlier plan in the place of the current one is that generation
    "worn": Base("rows.parquet", ("worn", "compacted", "worn-0", "worn-1"), is_update=True, columns="parquet"),
    "compacting": Base("rows.parquet", ("worn", "compacted", "worn-0", "worn-1"), True, False, columns="parquet"),
}
TRUTHS = ("whole", "updated", "shared", "other-whole", "other-updated", "labelled", "worn", "compacted")
TRUTHS = (*TRUTHS, "worn-0", "worn-1")
WORN = ("worn", "compacting")
# of the rows of a file, those that have to be needed for it to stay: the files of `worn` have 1 of 3, or 2
MIN_LIVE = 0.7
# long ago: how fast a machine is decides not what an update takes for unchanged, nor so which caches there are
LONG_AGO = 1_600_000_000


def settle(path: Path, later: int = 0) -> None:
    """Give a source's file a time that is always the same."""
    os.utime(path, (LONG_AGO + later, LONG_AGO + later))


class CacheBases:
    """Small caches under `home`, and their rows.

    `whole` has two sizes, mirrored and with logsnr, and two quarantined inputs. `updated` is the same after an update,
    `underway` in the midst of one; `shared` is in int8, and inputs of the same bytes share a row. `other` is a second
    view. `labelled` has labels by folders, and captions and columns of a table; `worn` such of Parquet files, and files
    of latents that are needed in part alone, `compacted` is the same after a compaction, and `compacting` in the midst
    of one.
    """

    def __init__(self, home: Path):
        from capacitor_rt import FullCapacitor
        from capacitor_rt.cache import CacheRequest

        self.home = home
        self.rng = np.random.default_rng(0)
        self.model = FullCapacitor.from_pretrained(GOLDEN / "p16", strict_size=False)
        self.request = CacheRequest(48, area=True, posterior=True, task_inputs=4, batch=2)
        self.second = replace(self.request, side=32, area=False, posterior=False, task_inputs=2)
        source = home / "src"
        source.mkdir()
        for i in range(9):
            self.image(source / f"{i}.png", ((32, 32), (24, 64))[i % 2])
        (source / "4b.png").write_bytes(b"no image")
        (source / "7b.png").write_bytes(b"")
        for path in source.iterdir():
            settle(path)
        self.go_on("whole", home / "whole")
        self.update()
        self.share()
        self.add_views()
        self.label()
        self.wear()
        self.compact()
        self.truths = {name: truth(home / name) for name in TRUTHS}

    def image(self, path: Path, size: tuple[int, int] = (32, 32)) -> None:
        from PIL import Image

        Image.fromarray(self.rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)

    def update(self) -> None:
        """Make `updated` of `whole`, and `underway`, the same before its last task was committed."""
        whole, updated, underway = (self.home / base for base in ("whole", "updated", "underway"))
        source = self.home / "src2"
        shutil.copytree(self.home / "src", source)
        for name in ("1", "9"):
            self.image(source / f"{name}.png")
            settle(source / f"{name}.png", 100)
        (source / "3.png").unlink()
        shutil.copytree(whole, updated)
        self.go_on("updated", updated)
        self.undo(updated, underway)
        (underway / "quarantine.jsonl").write_bytes((whole / "quarantine.jsonl").read_bytes())

    def undo(self, after: Path, out: Path) -> None:
        """Make `out`, which is `after` before the last task of its generation was committed."""
        from capacitor_rt.cache.folder import CacheFolder
        from capacitor_rt.cache.plan import load_plan

        shutil.copytree(after, out)
        with CacheFolder(out) as folder:
            plan = load_plan(folder)
        assert plan is not None
        plan8, record = plan.plan8, out / "generations" / f"{plan.fields['generation']['of'][:8]}.json"
        (out / "plan.json").rename(out / "generations" / f"{plan8}.json")
        record.rename(out / "plan.json")
        log = out / f"commits-{plan8}.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(lines[:-1]))
        for part in out.glob(f"*/{plan8}-{json.loads(lines[-1])['task']:06d}.*"):
            part.unlink()

    def share(self) -> None:
        """Make `shared`, two of whose inputs are there twice."""
        source = self.home / "src3"
        shutil.copytree(self.home / "src", source)
        for name in ("0", "5"):
            shutil.copy(source / f"{name}.png", source / f"{name}-again.png")
        self.go_on("shared", self.home / "shared")

    def add_views(self) -> None:
        """Make `other`, an unfinished view, and what it is when it is finished and when it is updated."""
        from capacitor_rt.cache import RunOptions, cache_images

        other, whole, updated = (self.home / name for name in ("other", "other-whole", "other-updated"))
        options = RunOptions(workers=0, progress=False)
        cache_images(self.home / "src", whole, self.model, self.second, options=options)
        shutil.copytree(whole, other)
        log = other / "commits.jsonl"
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-2]))
        for sub in ("tasks", "index"):
            for path in sorted((other / sub).iterdir())[-2:]:
                path.unlink()
        shutil.copytree(whole, updated)
        options = replace(options, update=True)
        cache_images(self.home / "src2", updated, self.model, self.second, options=options)

    def label(self) -> None:
        """Make `labelled`."""
        source, rows = self.home / "classes", []
        for i in range(7):
            folder = source / ("ant", "bee\u0301", "c d")[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            self.image(folder / f"{i}.png", ((32, 32), (24, 64))[i % 2])
            values = {"text": f"a {i}\n\u00e9", "n": i - 2**60, "score": i / 3, "good": i % 2 == 0, "who": "\u202e" * i}
            kept = {key: value for at, (key, value) in enumerate(values.items()) if at != i}
            rows.append({"file_name": f"{folder.name}/{i}.png", **kept})
        (source / "ant" / "4b.png").write_bytes(b"no image")
        (self.home / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.go_on("labelled", self.home / "labelled")

    def wear(self) -> None:
        """Make `worn`: of two files of three rows one is still needed, or two, and another is of the last update."""
        for number, rows in enumerate(((*range(9),), (0, 1, 3, 4, 6, 7, 8, 9), (0, 3, 4, 6, 7, 8, 9, 10))):
            self.table(self.home / "rows.parquet", rows)
            settle(self.home / "rows.parquet", 100 * number)
            self.go_on("worn", self.home / "worn")
            shutil.copytree(self.home / "worn", self.home / f"worn-{number}")

    def table(self, path: Path, rows: tuple[int, ...]) -> None:
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image

        data = []
        for i in rows:
            sink = io.BytesIO()
            pixels = np.random.default_rng(i).integers(0, 256, (*((32, 32), (24, 64))[i % 2], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(sink, "PNG")
            data.append(b"no image" if i == 7 else sink.getvalue())
        columns = {
            "image": pa.array(data),
            "kind": pa.array([f"kind {i % 4}" for i in rows]),
            "text": pa.array([None if i == 3 else f"{i} \u00e9\n" for i in rows]),
            "n": pa.array([None if i == 4 else i - 2**60 for i in rows], pa.int64()),
            "score": pa.array([None if i == 6 else i / 3 for i in rows], pa.float64()),
            "good": pa.array([None if i == 0 else i % 3 == 0 for i in rows], pa.bool_()),
        }
        pq.write_table(pa.table(columns), path, row_group_size=3)

    def compact(self) -> None:
        """Make `compacted` and `compacting`."""
        from capacitor_rt.cache.compaction import compact

        shutil.copytree(self.home / "worn", self.home / "compacted")
        if not compact(self.home / "compacted", MIN_LIVE):
            raise AssertionError("nothing is to be compacted")
        self.undo(self.home / "compacted", self.home / "compacting")

    def go_on(self, base: str, out: Path, retry: bool = False) -> Any:
        """The run, or the update, that a user starts again."""
        from capacitor_rt.cache import RunOptions, cache_images, cache_views
        from capacitor_rt.cache.sources import ColumnsRequest

        table = str(self.home / "table.jsonl")
        columns = {
            "": ColumnsRequest(),
            "table": ColumnsRequest("folder", table, ("n", "score", "good", "who")),
            "parquet": ColumnsRequest("kind", "text", ("n", "score", "good")),
        }
        it = BASES[base]
        options = RunOptions(
            workers=0,
            progress=False,
            backoff=(0.0,),
            update=it.is_update,
            retry_quarantined=retry and not it.is_update,
            columns=columns[it.columns],
        )
        if it.other:
            views = {"cache": self.request, "other": self.second}
            return cache_views(self.home / it.source, out.parent, self.model, views, note=str, options=options)
        request = self.request
        if base == "shared":
            request = replace(request, dtype="int8", dedupe=True)
        elif it.columns:
            request = replace(request, posterior=False, task_inputs=3)
        return cache_images(self.home / it.source, out, self.model, request, options=options)

    def lay(self, base: str, folder: Path) -> None:
        """A copy of a base as `folder/cache`, with the second view as `folder/other`."""
        it = BASES[base]
        shutil.copytree(self.home / (it.of or base), folder / "cache")
        if it.other:
            shutil.copytree(self.home / it.other[0], folder / "other")


class Truth(NamedTuple):
    """What a cache holds: its rows by id, each with all that a dataset gives of it, and the names of its labels."""

    rows: dict[str, dict[str, Any]]
    label_names: list[str] | None


def truth(folder: Path) -> Truth:
    """What an undamaged cache holds; its table of rows is left, too."""
    from capacitor_rt import LatentDataset

    rows = LatentDataset(folder, verify=True)
    return Truth({row["id"]: dict(row) for row in (rows[i] for i in range(len(rows)))}, rows.label_names)


def wrong(rows: Any, wanted: Truth, partial: bool) -> str:
    """What an opened cache gives that was not cached so, rows and columns; empty for nothing.

    Raises:
        CacheError: it refuses to.
    """
    found = rows.__getitems__(range(len(rows)))
    ids = sorted(row["id"] for row in found)
    if not partial and ids != sorted(wanted.rows):
        return f"{len(found)} rows of {len(wanted.rows)}"
    for row in found:
        cached = wanted.rows.get(row["id"], {})
        if differing := [name for name in {*cached, *row} if not _same(row.get(name), cached.get(name))]:
            return f"row {row['id']} is not the one that was cached: {min(differing)}"
    if rows.label_names != wanted.label_names:
        return f"labels are called {rows.label_names}"
    return next(_wrong_columns(rows, found), "")


def _wrong_columns(rows: Any, found: list[Any]) -> Iterator[str]:
    """Columns that say something else than the rows, and what the index says of the last one."""
    last = rows.entries(-1) if len(rows) else {}
    for name in ("id", *(column["name"] for column in rows.plan.columns)):
        values = rows.column(name).to_pylist()
        if any(value is not None and not _same(value, row[name]) for value, row in zip(values, found, strict=True)):
            yield f"column {name} is not that of the rows"
        if last and last[name] != values[-1]:
            yield f"the entry of the last row says another {name}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    # 1 is no True, and what is no number is itself
    return type(one) is type(other) and (one == other or (one != one and other != other))


def wrong_samples(path: Path, wanted: dict[str, dict[str, Any]]) -> str:
    """What samples of an exported tar hold that was not cached so; empty for nothing."""
    import io
    import tarfile

    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    for key in {name.partition(".")[0] for name in members}:
        told = json.loads(members[f"{key}.json"])
        if (row := wanted.get(told["id"])) is None:
            return f"{told['id']} was not cached"
        values = {"label": int(members[f"{key}.cls"]), "caption": members[f"{key}.txt"].decode()}
        values |= {name: told.get(name) for name in ("n", "score", "good", "who") if name in row}
        missing = {"n": -1, "good": False, "who": ""}
        for name, value in values.items():
            if value is None and name == "score":
                value = float("nan")
            if not _same(missing.get(name) if value is None else value, row[name]):
                return f"{name} of {told['id']} is {value!r}"
        if not np.array_equal(np.load(io.BytesIO(members[f"{key}.latent.npy"])), row["latents"].float().numpy()):
            return f"{told['id']} has other latents"
    return ""


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a cache without what a machine notes for itself."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".stamps", ".rows")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def snapshot(folder: Path) -> dict[str, tuple[bytes | None, int, int]]:
    """All that a folder holds: contents, inodes and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        data = path.read_bytes() if path.is_file() else None
        found[os.fspath(path.relative_to(folder))] = (data, info.st_ino, info.st_mtime_ns)
    return found
