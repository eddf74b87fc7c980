"""Mutators of a whole cache at once: another plan, or files of another cache, and every file agrees with every other.

No hash can tell of these, so that what they say need not be what was cached. They must be read, or refused in words.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .cache_mutators import NothingToDo, contents

# a row of it is taken, and hashed, within the time of a mutant
_MOST_BYTES = 8 << 20
_TEXTS = ("", "\x1b[2J", "x" * 4096, "\u202e", "../x", "\ud7ff\n", "None")
_NAMES = (
    "id", "row", "latents", "file", "caption", "label", "x\u0085y", "latents_flip", "height", "bucket", "row_hash",
    "number", "__index_level_0__", "input", "\u202e", "n" * 200, "self", "keys", "status",
)  # fmt: skip


def replanned(cache: Path, rng: random.Random) -> str:
    """A plan that says something else, under which every other file is as it says."""
    from capacitor_rt.cache.folder import CacheFolder
    from capacitor_rt.cache.plan import CachePlan, load_plan
    from capacitor_rt.cache.plan_schema import check_plan_fields

    with CacheFolder(cache) as folder:
        old = load_plan(folder)
    if old is None:
        raise NothingToDo("no plan")
    fields = json.loads(json.dumps(old.fields))
    what = rng.choice(sorted(_CHANGES))
    # in an order that no hash of the process decides
    for name in dict.fromkeys([what, *([rng.choice(sorted(_CHANGES))] if rng.random() < 0.2 else [])]):
        _CHANGES[name](fields, rng)
    plan = CachePlan(fields)
    try:
        check_plan_fields(fields)
        sizes = [_lay(cache, old, plan, path) for path in sorted((cache / "index").glob(f"{old.plan8}-*.parquet"))]
    except ValueError:
        # the plan alone is refused
        sizes = []
    for path in [p for p in cache.glob("*") if f"-{old.plan8}." in p.name]:
        path.rename(path.with_name(path.name.replace(old.plan8, plan.plan8)))
    (cache / "plan.json").write_bytes(plan.text())
    return f"another plan, {what}, {len(sizes)} tasks as it says"


def _lay(cache: Path, old: Any, plan: Any, path: Path) -> int:
    """Make an index, its latents and its commit line those of another plan."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from capacitor_rt.cache.commits import Commit
    from capacitor_rt.cache.hashing import xxh3
    from capacitor_rt.cache.index import cached_counts, cached_rows, index_schema
    from capacitor_rt.cache.latent_files import layout
    from capacitor_rt.cache.parquet_files import parquet_bytes
    from capacitor_rt.cache.plan import FORMAT

    number = int(path.stem[9:])
    table = pq.read_table(pa.BufferReader(contents(path)))
    schema = index_schema(plan.columns, plan.is_update)
    arrays = []
    for field in schema:
        values: Any = pa.nulls(len(table), field.type)
        if table.column_names.count(field.name) == 1:
            with suppress(pa.ArrowException):
                values = table[field.name].combine_chunks().cast(field.type)
        arrays.append(values)
    metadata = {"format": FORMAT, "task": str(number), "plan": plan.text().decode()}
    made = pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))
    body = bytes(parquet_bytes(made))
    counts = {n: rows for n, rows in cached_counts(table).items() if n < len(plan.buckets)}
    placed = layout(plan, number, counts, xxh3(body).hexdigest())
    if placed.nbytes > _MOST_BYTES:
        raise ValueError("too large")
    data = (cache / "tasks" / f"{path.stem}.safetensors").read_bytes()
    rest = data[8 + int.from_bytes(data[:8], "little") :]
    latents = (placed.header + rest).ljust(placed.nbytes, b"\0")[: placed.nbytes]
    for sub, suffix, content in (("index", "parquet", body), ("tasks", "safetensors", latents)):
        (cache / sub / f"{path.stem}.{suffix}").unlink()
        (cache / sub / f"{plan.stem(number)}.{suffix}").write_bytes(content)
    log = cache / old.log_name
    hashes = (len(body), xxh3(body).hexdigest(), len(latents), xxh3(latents).hexdigest())
    line = Commit(number, len(table), cached_rows(table), *hashes).line()
    lines = [line if json.loads(one)["task"] == number else one for one in log.read_bytes().splitlines(keepends=True)]
    log.write_bytes(b"".join(lines))
    return len(latents)


def _buckets(fields: dict[str, Any], rng: random.Random) -> None:
    buckets = fields["geometry"]["buckets"]
    at = rng.randrange(len(buckets))
    side = rng.choice((16, 32, 48, 1 << 10, 1 << 24))
    buckets[at] = [side, rng.choice((16, side))]
    if rng.random() < 0.2:
        buckets += [[16 * n, 16] for n in range(100, 1500)]
    elif rng.random() < 0.3:
        buckets.reverse()


def _model(fields: dict[str, Any], rng: random.Random) -> None:
    key, values = rng.choice((
        ("channels", (1, 3, 127, 1 << 16)), ("stride", (1, 8, 16)), ("id", _TEXTS), ("revision", (None, *_TEXTS)),
        ("latent_space", _TEXTS), ("encoding", ("x", "0")), ("config", ({}, {"x": [[]] * 99}, {"patch_size": None})),
        ("sha256", ("0" * 64,)), ("compute_dtype", ("float32", "bfloat16")),
    ))  # fmt: skip
    fields["model"][key] = rng.choice(values)


def _store(fields: dict[str, Any], rng: random.Random) -> None:
    key, values = rng.choice((
        ("dtype", ("bfloat16", "float16", "float32", "int8")), ("task_inputs", (1, 2, 3, 5, 1 << 31)),
        ("tensors", (["latents"], ["latents", "logsnr"], ["latents", "latents_flip"])), ("batch", (1, 1 << 24)),
        ("dedupe", (True,)),
    ))  # fmt: skip
    fields["store"][key] = rng.choice(values)


def _source(fields: dict[str, Any], rng: random.Random) -> None:
    source = fields["source"]
    key = rng.choice(("count", "tasks", "sha256", "kind", "distinct_of"))
    if key == "distinct_of":
        source[key] = {
            "count": rng.choice((1, source["count"], 2**48)),
            "sha256": rng.choice(("0" * 64, source["sha256"])),
        }
    else:
        numbers = (1, source["count"] - 1, source["count"] + 1, 2**31, 2**48)
        source[key] = {"sha256": "0" * 64, "kind": rng.choice(("tar", "parquet", "files", "x"))}.get(key) or rng.choice(
            numbers
        )


def _columns(fields: dict[str, Any], rng: random.Random) -> None:
    columns = fields["columns"]
    one = {"name": rng.choice(_NAMES), "type": rng.choice(("int64", "float64", "string", "bool")), "from": "x"}
    if columns and rng.random() < 0.5:
        columns[rng.randrange(len(columns))].update(rng.choice(([("name", one["name"])], [("type", one["type"])])))
    else:
        columns.insert(rng.randint(0, len(columns)), one)


def _label_names(fields: dict[str, Any], rng: random.Random) -> None:
    fields["label_names"] = rng.choice((None, [], list(_TEXTS), ["x"] * 9, ["x" * 4096] * 99))


def _whitening(fields: dict[str, Any], rng: random.Random) -> None:
    channels = fields["model"]["channels"]
    number = rng.choice((0, -1, 1e30, -1e30, 1e-300, 1))
    fields["whitening"] = rng.choice((None, {"mean": [number] * channels, "std": [number] * channels}))


def _pixels(fields: dict[str, Any], rng: random.Random) -> None:
    key, values = rng.choice((
        ("max_pixels", (1, 2**48)), ("background", ([0, 0, 0],)), ("decode", ("fast", "exact")), ("icc", ("ignore",)),
        ("filter", _TEXTS), ("resample", _TEXTS), ("exif_orientation", _TEXTS),
    ))  # fmt: skip
    fields["pixels"][key] = rng.choice(values)


def _generation(fields: dict[str, Any], rng: random.Random) -> None:
    if "generation" not in fields:
        fields["generation"] = {"number": 1, "of": "0" * 64, "carried": "0" * 64}
    key, value = rng.choice((("number", 1 << 30), ("number", 1), ("of", "0" * 64), ("carried", "0" * 64)))
    fields["generation"][key] = value


def _code(fields: dict[str, Any], rng: random.Random) -> None:
    fields["code"] = rng.choice(({}, dict.fromkeys(_TEXTS, "x" * 200), {"torch": "\x1b[2J"}))
    if rng.random() < 0.5:
        family = [{"x": rng.choice((None, [], 1e30, {}, "x"))}]
        fields["configs"] = {"compute_capability": 90, "families": {rng.choice(("dwconv", "grn", "x")): family}}


_CHANGES: dict[str, Callable[[dict[str, Any], random.Random], None]] = {
    f.__name__[1:]: f
    for f in (
        _buckets, _model, _store, _source, _columns, _label_names, _whitening, _pixels, _generation, _code,
    )
}  # fmt: skip


def twice(cache: Path, rng: random.Random) -> str:
    """A task's files under the name of another task, and the log says so: the same rows, twice or in its place."""
    from capacitor_rt.cache.commits import Commit

    logs = sorted(cache.glob("commits*.jsonl"))
    log = rng.choice(logs)
    lines = [json.loads(line) for line in contents(log).splitlines()]
    if len(lines) < 2:
        raise NothingToDo("one task")
    a, b = rng.sample(range(len(lines)), 2)
    plan8 = log.stem[8:] or next(p.name[:8] for p in (cache / "index").iterdir())
    for sub, suffix in (("index", "parquet"), ("tasks", "safetensors")):
        with suppress(OSError):
            shutil.copy(*(cache / sub / f"{plan8}-{lines[n]['task']:06d}.{suffix}" for n in (a, b)))
    lines[b] = {**lines[a], "task": lines[b]["task"]}
    made = [Commit(**{k: v for k, v in line.items() if k != "sum"}).line() for line in lines]
    log.write_bytes(b"".join(made))
    return f"{log.name}: task {lines[a]['task']} in the place of {lines[b]['task']}"


PLANS: dict[str, Callable[[Path, random.Random], str]] = {f.__name__: f for f in (replanned, twice)}
WEIGHTS = (8, 3)
# what they make is as sound as what a run makes
AGREEING = ("replanned",)
