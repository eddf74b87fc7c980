"""Mutators of a finished cache: bytes, lines of the log, fields of the plan, cells of an index, files themselves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .checkpoints import VALUES, damage, special

MOST_BYTES = 1 << 20


class NothingToDo(Exception):
    """What a mutator changes is not there, or no longer what it was: an earlier one was at it."""


def files(cache: Path) -> list[Path]:
    """Every file of a cache, the ones of tasks twice: they are most of it."""
    parts = sorted(p for sub in ("tasks", "index") for p in (cache / sub).iterdir())
    found = [*sorted(cache.iterdir()), *sorted((cache / "generations").glob("*")), *parts, *parts]
    # what an earlier edit has made a pipe, a device or a terabyte is not read
    return [p for p in found if is_plain(p)]


def is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size < MOST_BYTES


def contents(path: Path) -> bytes:
    """Bytes of a file that earlier mutators have left one."""
    if not is_plain(path):
        raise NothingToDo(path.name)
    return path.read_bytes()


def log_of(cache: Path, rng: random.Random) -> Path:
    """The log of the current generation, or of another."""
    return rng.choice(sorted(cache.glob("commits*.jsonl")))


def some_bytes(cache: Path, rng: random.Random) -> str:
    path = rng.choice(files(cache))
    data, what = damage(path.read_bytes() or b"\n", rng)
    path.write_bytes(data)
    return f"{path.name}: {what}"


def one_bit(cache: Path, rng: random.Random) -> str:
    path = rng.choice(files(cache))
    data = bytearray(path.read_bytes() or b"\n")
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))
    return f"{path.name}: a bit of byte {at}"


def draft_bit(cache: Path, rng: random.Random) -> str:
    """A bit of a file of the generation under way, which has fewer than the others; whatever their names are."""
    names = [p.name for p in sorted((cache / "index").iterdir())]
    counts = Counter(name[:8] for name in names)
    draft, count = min(counts.items(), key=lambda item: item[1])
    if count == max(counts.values()):
        raise NothingToDo("no draft")
    path = rng.choice(sorted(cache.glob(f"*/{draft}-*")))
    data = bytearray(contents(path))
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))
    return f"{path.parent.name}/{path.name}, a draft: a bit of byte {at}"


def another_kind(cache: Path, rng: random.Random) -> str:
    return special(rng.choice(files(cache)), rng)


def stretched(cache: Path, rng: random.Random) -> str:
    """A file with a hole at its end: of any size up to that of the largest caches' files."""
    path = rng.choice([*files(cache), *(cache / name for name in (".stamps", ".rows", "quarantine.jsonl"))])
    if path.exists() and (not is_plain(path) or path.stat().st_nlink > 1):
        raise NothingToDo(path.name)
    size = int(2 ** rng.uniform(12, 33))
    with open(path, "ab") as file:
        file.truncate(max(size, file.tell() + 1))
    return f"{path.name} has {size} bytes"


def gone(cache: Path, rng: random.Random) -> str:
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(files(cache))
        path.unlink()
        done.append(path.name)
    return f"without {', '.join(done)}"


def without_folder(cache: Path, rng: random.Random) -> str:
    name = rng.choice(("tasks", "index"))
    shutil.rmtree(cache / name)
    if rng.random() < 0.5:
        (cache / name).write_bytes(b"")
    return f"{name} is no folder"


def swapped(cache: Path, rng: random.Random) -> str:
    a, b = rng.sample(sorted((cache / rng.choice(("tasks", "index"))).iterdir()), 2)
    data, other = contents(a), contents(b)
    if rng.random() < 0.7:
        a.write_bytes(other)
    b.write_bytes(data)
    return f"{a.name} and {b.name}"


def renamed(cache: Path, rng: random.Random) -> str:
    path = rng.choice(files(cache))
    number = f"{rng.choice((0, 1, 2, 3, 7, 999_999)):06d}"
    name = rng.choice((f"{rng.getrandbits(32):08x}{path.name[8:]}", f"{path.name[:9]}{number}{path.suffix}", "x"))
    path.rename(path.with_name(name))
    return f"{path.name} renamed {name}"


def linked(cache: Path, rng: random.Random) -> str:
    """A name of the cache that leads outside, to a file of the same contents or to something else."""
    outside = cache.parent / "outside"
    names = [*(str(p.relative_to(cache)) for p in files(cache)), "tasks", "index", ".lock", "leases", "damaged"]
    name = rng.choice(names)
    path = cache / name
    target = outside / "target"
    if path.is_dir() or name in ("tasks", "index", "leases", "damaged"):
        if path.is_dir():
            shutil.copytree(path, target)
            shutil.rmtree(path)
        else:
            target.mkdir()
        (target / f"x.tmp-{'0' * 32}").write_bytes(b"mine")
        path.symlink_to(target)
        return f"{name} links to a folder"
    data = path.read_bytes() if path.exists() else b"mine"
    path.unlink(missing_ok=True)
    target.write_bytes(data)
    if rng.random() < 0.3:
        os.link(target, path)
        return f"{name} is a second name of a file outside"
    path.symlink_to(rng.choice((str(target), "../outside/target", "../../../../../../../../etc/passwd")))
    return f"{name} links outside"


def leftovers(cache: Path, rng: random.Random) -> str:
    folder = rng.choice((cache, cache / "tasks", cache / "index"))
    plan8 = next((cache / "index").iterdir()).name[:8]
    name = rng.choice((f"{plan8}-000001.parquet", f"{plan8}-000009.safetensors", "plan.json", "x"))
    name = f"{name}{rng.choice(('', '.tmp-', f'.tmp-{rng.getrandbits(128):032x}'))}"
    if not (folder / name).exists():
        (folder / name).write_bytes(rng.randbytes(50))
    if rng.random() < 0.3:
        (cache / "leases").mkdir(exist_ok=True)
        owner = {"host": rng.choice((os.uname().nodename, "elsewhere")), "pid": rng.choice((1 << 22, 0, -1, 10**30))}
        (cache / "leases" / f"{plan8}-{rng.choice((0, 1, 7)):06d}").write_text(json.dumps({**owner, "start": 1}))
        for path in (cache / "leases").iterdir():
            os.utime(path, (1, 1))
    return f"{name} left"


def lines(cache: Path, rng: random.Random) -> str:
    """Lines of the log dropped, repeated, moved, torn or exchanged for others."""
    logs = sorted(p.name for p in cache.iterdir() if p.name.startswith(("commits", "carried")))
    path = cache / rng.choice((*logs, *logs, "quarantine.jsonl", ".stamps"))
    old = contents(path).splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 4))):
        what = rng.randrange(6)
        at = rng.randrange(len(old) or 1)
        if what == 0 and old:
            del old[at]
        elif what == 1 and old:
            old.insert(rng.randint(0, len(old)), old[at])
        elif what == 2:
            rng.shuffle(old)
        elif what == 3 and old:
            old[at] = old[at][: rng.randrange(len(old[at]) or 1)]
        elif what == 4:
            old.insert(at, rng.choice(VALUES).encode("utf-8", "surrogatepass") + b"\n")
        elif old:
            old[at] = old[at].replace(b"\n", rng.choice((b"", b"\r\n", b" \n", b"\n\n", b"\0\n")))
    path.write_bytes(b"".join(old))
    return f"lines of {path.name}"


def log_fields(cache: Path, rng: random.Random) -> str:
    """A line that says something else and has the right hash of its own."""
    from capacitor_rt.cache.commits import Commit

    path = log_of(cache, rng)
    old = contents(path).splitlines(keepends=True)
    at = rng.randrange(len(old))
    before: dict[str, Any] = json.loads(old[at])
    del before["sum"]
    fields = dict(before)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(fields))
        value: Any = before[key]
        if isinstance(value, str):
            other = json.loads(rng.choice(old))
            value = rng.choice((f"{rng.getrandbits(128):032x}", other[key], other["data_xxh3"], "", value.upper()))
        else:
            value = rng.choice((0, 1, 2, 3, value + 1, value - 1, -1, 2**40, 2**70, True, None, "4", 1.0))
        fields[key] = value
    old[at] = Commit(**fields).line()
    path.write_bytes(b"".join(old))
    return f"a line of the log: {key} {value}"


def plan_fields(cache: Path, rng: random.Random) -> str:
    """A plan with another value anywhere, mostly with the right hash of its own."""
    from capacitor_rt.cache.hashing import canonical_json

    path = cache / "plan.json"
    fields = json.loads(contents(path))
    checksum = fields.pop("sha256")
    place: Any = fields
    trail = []
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        trail.append(str(key))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.15:
            break
        place = place[key]
    what = rng.randrange(4)
    if what == 0:
        del place[key]
    elif what == 1 and isinstance(place, dict):
        place[rng.choice(("x", "sha256", "format", "\x1b[31m"))] = place[key]
    else:
        numbers = (0, -1, 1, 2, 3, 17, 32, 1e300, 2**31, 2**62, 2**63 - 1, True)
        place[key] = rng.choice((*numbers, None, "", "../x", "latents", [], {}, [[32, 32]], ["latents"]))
    with suppress(ValueError):
        checksum = hashlib.sha256(canonical_json(fields)).hexdigest() if rng.random() < 0.8 else checksum
    path.write_text(json.dumps({**fields, "sha256": checksum}, indent=1, sort_keys=True))
    return f"plan: {'.'.join(trail)}"


def plan_text(cache: Path, rng: random.Random) -> str:
    path = cache / "plan.json"
    text = contents(path).decode("utf-8", "surrogateescape")
    at = rng.randrange(len(text))
    value = rng.choice(VALUES)
    data = value.encode("utf-8", "surrogatepass")
    rest = text[at + rng.choice((0, 1, 5)) :]
    path.write_bytes(text[:at].encode("utf-8", "surrogateescape") + data + rest.encode("utf-8", "surrogateescape"))
    return f"plan: {value[:20]!r} at {at}"


def index_cells(cache: Path, rng: random.Random) -> str:
    """An index that says something else; sometimes its commit line has its hash."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from capacitor_rt.cache.parquet_files import parquet_bytes

    path = rng.choice(sorted((cache / "index").iterdir()))
    table = pq.read_table(pa.BufferReader(contents(path)))
    name = rng.choice(table.column_names)
    at = rng.randrange(len(table))
    what = rng.randrange(5)
    if what == 0:
        table = table.drop_columns([name])
    elif what == 1:
        table = table.slice(*sorted((rng.randrange(len(table)), rng.randrange(len(table)))))
    elif what == 2:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"task": b"9"})
    else:
        values = table[name].to_pylist()
        kind = table.schema.field(name).type
        if pa.types.is_integer(kind):
            values[at] = rng.choice((None, 0, 1, -1, 5, 2**31 - 1))
        elif pa.types.is_floating(kind):
            values[at] = rng.choice((None, float("nan"), float("inf"), 0.0))
        elif pa.types.is_string(kind):
            values[at] = rng.choice((None, "ok", "quarantined", "", "../../etc/passwd", "x" * 9000))
        else:
            values[at] = rng.choice((None, bytes(16), rng.randbytes(16)))
        column = table.schema.get_field_index(name)
        table = table.set_column(column, pa.field(name, kind), pa.array(values, kind))
    body = bytes(parquet_bytes(table))
    path.write_bytes(body)
    if rng.random() < 0.5:
        refit(cache, path.stem, inputs=len(table))
    return f"index: {name}"


def refit(cache: Path, stem: str, header: bool = False, **fields: Any) -> None:
    """Make the commit line of a task agree with its files as they are, and with `header` its latents with its index.

    Args:
        fields: what else the line is to say.
    """
    from capacitor_rt.cache.commits import Commit
    from capacitor_rt.cache.hashing import xxh3

    own = cache / f"commits-{stem[:8]}.jsonl"
    log = own if own.exists() else cache / "commits.jsonl"
    old = contents(log).splitlines(keepends=True)
    at = next(at for at, line in enumerate(old) if json.loads(line)["task"] == int(stem[9:]))
    before = json.loads(old[at])
    del before["sum"]
    body = contents(cache / "index" / f"{stem}.parquet")
    fields |= {"index_bytes": len(body), "index_xxh3": xxh3(body).hexdigest()}
    if header:
        path = cache / "tasks" / f"{stem}.safetensors"
        data = contents(path).replace(before["index_xxh3"].encode(), fields["index_xxh3"].encode(), 1)
        path.write_bytes(data)
        fields |= {"data_bytes": len(data), "data_xxh3": xxh3(data).hexdigest()}
    old[at] = Commit(**{**before, **fields}).line()
    log.write_bytes(b"".join(old))


def row_table(cache: Path, rng: random.Random) -> str:
    """The table of rows with places that no file has, and the right hash of its own."""
    import pyarrow as pa

    from capacitor_rt.cache.hashing import xxh3
    from capacitor_rt.cache.rows import HEAD, MAGIC, _head

    path = cache / ".rows"
    data = contents(path)
    fields = json.loads(data[:HEAD].removeprefix(MAGIC).partition(b"\n")[0])
    table = pa.ipc.open_file(pa.py_buffer(data[HEAD:])).read_all()
    name, at = rng.choice(("file", "bucket", "row")), rng.randrange(len(table))
    values = table[name].to_pylist()
    # another row of the file, rather than none, is for its writer to answer for, as is an index of other contents
    values[at] = rng.choice((-1, -(2**31)) if name == "row" else (-1, -(2**31), 2**31 - 1, 999, len(table)))
    column = table.schema.get_field_index(name)
    table = table.set_column(column, table.schema.field(name), pa.array(values, pa.int32()))
    if rng.random() < 0.2:
        table = rng.choice((table.slice(0, 3), table.drop_columns(["id"]), table.slice(0, 0)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    body = sink.getvalue().to_pybytes()
    fields |= {"nbytes": len(body), "xxh3": xxh3(body).hexdigest()}
    info = path.stat()
    path.write_bytes(_head(fields) + body)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    return f".rows: {name} of row {at} is {values[at]}"


def uncommitted(cache: Path, rng: random.Random) -> str:
    """A task without its line in the log, as a crash leaves it; sometimes its files are not as they were, either."""
    log = log_of(cache, rng)
    old = contents(log).splitlines(keepends=True)
    at = rng.randrange(len(old))
    number = int(json.loads(old[at])["task"])
    old[at] = rng.choice((b"", b"", old[at].replace(b":", b";", 1)))
    log.write_bytes(b"".join(old))
    parts = [p for sub in ("tasks", "index") for p in (cache / sub).iterdir() if p.stem.endswith(f"-{number:06d}")]
    path = rng.choice(sorted(parts))
    what = rng.choice(("whole", "gone", "bit", "bit", "padding", "padding"))
    data = bytearray(contents(path))
    if what == "gone":
        path.unlink()
    elif what in ("bit", "padding"):
        places = padding(data) if what == "padding" else []
        at = rng.choice(places or [rng.randrange(len(data))])
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
    return f"no line of task {number}, {path.name}: {what}"


def padding(data: bytes) -> list[int]:
    """A few places of a file of latents that are between its tensors."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        spans = [entry["data_offsets"] for name, entry in header.items() if name.startswith("padding/")]
    except (ValueError, KeyError, TypeError):
        return []
    return [8 + length + at for begin, end in spans for at in (begin, (begin + end) // 2, end - 1)]


MUTATORS: dict[str, Callable[[Path, random.Random], str]] = {
    f.__name__: f
    for f in (
        some_bytes, one_bit, another_kind, gone, without_folder, swapped, renamed, linked, leftovers, lines, log_fields,
        plan_fields, plan_text, index_cells, uncommitted, row_table, draft_bit, stretched,
    )
}  # fmt: skip
WEIGHTS = (20, 14, 6, 4, 1, 4, 4, 10, 4, 10, 8, 10, 5, 10, 6, 3, 1, 3)
