"""Mutators of a finished cache that forge: hashes that agree, files of other generations, strange names and locks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .cache_mutators import NothingToDo, contents, files, log_of, refit
from .checkpoints import VALUES


def another_index(cache: Path, rng: random.Random) -> tuple[Path, Any]:
    """An index and its table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = rng.choice(sorted((cache / "index").iterdir()))
    return path, pq.read_table(pa.BufferReader(contents(path)))


def index_told(cache: Path, rng: random.Random) -> str:
    """An index that says something else of a row, with every hash above it made to agree."""
    import pyarrow as pa

    from capacitor_rt.cache.parquet_files import parquet_bytes

    path, table = another_index(cache, rng)
    names = [n for n in ("row_hash", "row", "bucket", "input", "file", "status") if n in table.column_names]
    cached = [i for i, status in enumerate(table["status"].to_pylist()) if status == "ok"]
    if not cached:
        raise NothingToDo("no rows")
    name, at = rng.choice((*names, "row_hash", "row_hash")), rng.choice(cached)
    values = table[name].to_pylist()
    others = [v for v in values if v != values[at]]
    fresh: dict[str, list[Any]] = {
        "row_hash": [bytes(16), rng.randbytes(16)], "row": [0, 1, 2, 5, 2**31 - 1], "bucket": [0, 1, 2, 3, 2**31 - 1],
        "input": [0, 99], "status": ["ok", "quarantined"],
        "file": [f"{path.stem[:8]}-000000", f"{path.stem[:8]}-000009", "../x"],
    }  # fmt: skip
    values[at] = rng.choice([*others, *fresh[name]])
    column = table.schema.get_field_index(name)
    array = pa.array(values, table.schema.field(column).type)
    path.write_bytes(parquet_bytes(table.set_column(column, table.schema.field(column), array)))
    refit(cache, path.stem, header=True)
    return f"{path.name}: {name} of {at}, every hash agrees"


def rows_exchanged(cache: Path, rng: random.Random) -> str:
    """An index that says of one input what is true of another; sometimes its commit line has its hash."""
    import pyarrow as pa

    from capacitor_rt.cache.parquet_files import parquet_bytes

    path, table = another_index(cache, rng)
    if len(table) < 2:
        raise NothingToDo("one row")
    a, b = rng.sample(range(len(table)), 2)
    names = rng.choice((["row_hash"], ["bytes_hash"], ["row", "row_hash", "bucket"], table.column_names[3:], ["id"]))
    for name in names:
        values = table[name].to_pylist()
        values[a], values[b] = values[b], values[a]
        column = table.schema.get_field_index(name)
        array = pa.array(values, table.schema.field(column).type)
        table = table.set_column(column, table.schema.field(column), array)
    path.write_bytes(parquet_bytes(table))
    if rng.random() < 0.8:
        refit(cache, path.stem)
    return f"{path.name}: {len(names)} columns of {a} and {b}"


def another_schema(cache: Path, rng: random.Random) -> str:
    """A Parquet file of other columns, types or order, whose hashes agree, or of the same in another form."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from capacitor_rt.cache.index import index_schema

    path = rng.choice([*sorted((cache / "index").iterdir()), *sorted(cache.glob("source*.parquet"))])
    table = pq.read_table(pa.BufferReader(contents(path)))
    name, what = rng.choice(table.column_names), rng.randrange(7)
    at, options = table.schema.get_field_index(name), {}
    field = table.schema.field(at)
    if what == 0:
        table = table.append_column(rng.choice((name, "x", "", "__index_level_0__")), table[name])
    elif what == 1:
        order = rng.sample(table.column_names, table.num_columns)
        if order == table.column_names:
            raise NothingToDo("the same order")
        table = table.select(order)
    elif what == 2:
        kinds = {
            pa.int32(): (pa.uint32(), pa.date32(), pa.float32(), pa.int64()), pa.int64(): (pa.uint64(), pa.float64()),
            pa.float32(): (pa.int32(), pa.float64()), pa.binary(16): (pa.binary(), pa.binary(8)),
            pa.string(): (pa.large_string(), pa.binary()), pa.binary(): (pa.string(), pa.large_binary()),
            pa.float64(): (pa.float32(), pa.string()), pa.bool_(): (pa.uint8(), pa.string()),
        }  # fmt: skip
        kind = rng.choice(kinds[field.type])
        table = table.set_column(at, pa.field(name, kind), pa.nulls(len(table), kind))
    elif what == 3:
        # what was kept from the source nothing else tells
        is_kept = path.parent.name == "index" and name not in index_schema(is_update=True).names
        if is_kept or table[name].null_count == len(table):
            raise NothingToDo("nothing in it")
        table = table.set_column(at, name, pa.nulls(len(table), field.type))
    elif what == 4:
        table = pa.concat_tables([table] * rng.choice((2, 3, 2000)))
    elif what == 5:
        other = rng.choice((table.slice(0, 0), table.take(list(range(len(table)))[::-1])))
        if other.equals(table):
            raise NothingToDo("the same rows")
        table = other
    else:
        options = {"compression": rng.choice(("none", "snappy", "gzip", "lz4", "brotli")), "row_group_size": 1}
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, use_dictionary=rng.random() < 0.5, **options)
    path.write_bytes(sink.getvalue())
    if path.parent.name == "index":
        # the same contents in another form are no lie where all hashes agree
        refit(cache, path.stem, header=what < 6, inputs=len(table))
    return f"{path.name}: {name} by edit {what}"


def bomb(cache: Path, rng: random.Random) -> str:
    """A small Parquet file that says a great deal, whose hashes agree."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = rng.choice([*sorted((cache / "index").iterdir()), *sorted(cache.glob("source*.parquet"))])
    table = pq.read_table(pa.BufferReader(contents(path)))
    sink, what = pa.BufferOutputStream(), "rows"
    if rng.random() < 0.5:
        many = pa.concat_tables([table.slice(0, 1)] * 1000).combine_chunks()
        with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
            for _ in range(500):
                writer.write_table(many)
    else:
        texts = [n for n in table.column_names if table.schema.field(n).type in (pa.string(), pa.binary())]
        what = rng.choice(texts)
        field = table.schema.get_field_index(what)
        kind = table.schema.field(field).type
        # more than any table of so few rows may take: a smaller one could be what was cached
        one = pa.array([b"x" * (66 << 20)]).cast(kind)
        column = pa.chunked_array([one] * len(table))
        table = table.set_column(field, table.schema.field(field), column)
        pq.write_table(table, sink, compression="zstd", write_statistics=False)
    path.write_bytes(sink.getvalue())
    if path.parent.name == "index":
        refit(cache, path.stem, header=rng.random() < 0.5)
    return f"{path.name}: a bomb of {path.stat().st_size} bytes, {what} of {len(table)} rows"


def of_another(cache: Path, rng: random.Random) -> str:
    """A file of another generation, or of another name, in the place of one."""
    kinds = ("plan.json", "generations/*.json"), ("source*.parquet",), ("commits*.jsonl",), ("carried*.jsonl",)
    kinds = (*kinds, ("index/*",), ("tasks/*",))
    found = [p for pattern in rng.choice(kinds) for p in sorted(cache.glob(pattern))]
    if len(found) < 2:
        raise NothingToDo("one alone")
    a, b = rng.sample(found, 2)
    data = contents(a)
    how = rng.choice(("copied", "moved", "hard link", "exchanged"))
    if how == "exchanged":
        a.write_bytes(contents(b))
        b.write_bytes(data)
    else:
        b.unlink()
        if how == "hard link":
            os.link(a, b)
        else:
            b.write_bytes(data)
        if how == "moved":
            a.unlink()
    if b.parent.name == "index" and rng.random() < 0.6:
        with suppress(StopIteration, FileNotFoundError):
            refit(cache, b.stem, header=rng.random() < 0.3)
    return f"{a.name} {how} to {b.name}"


def json_forms(cache: Path, rng: random.Random) -> str:
    """Lines or documents of JSON in another form: keys twice, other numbers of the same value, marks, spaces."""
    found = [*cache.glob("*.jsonl"), cache / "plan.json", *cache.glob("generations/*.json")]
    path = rng.choice(sorted(found))
    old = contents(path).decode("utf-8", "surrogateescape")
    lines = old.splitlines(keepends=True) if path.suffix == ".jsonl" else [old]
    if not lines:
        raise NothingToDo("no lines")
    at, what = rng.randrange(len(lines)), rng.randrange(8)
    line = lines[at]
    with suppress(ValueError):
        fields = json.loads(line)
        key = rng.choice(sorted(fields))
        if what == 0:
            line = line.replace("{", "{" + f'"{key}":{rng.choice(VALUES[:40])},', 1)
        elif what == 1:
            line = line.replace("{", "\ufeff{", 1)
        elif what == 2:
            line = json.dumps(fields, indent=rng.choice((None, 3))).replace("\n", " ") + "\n"
        elif what == 3:
            line = json.dumps(dict(sorted(fields.items(), reverse=True)), separators=(",", ":")) + "\n"
        elif what == 4:
            escaped = "".join(f"\\u{ord(c):04x}" for c in key)
            line = line.replace(f'"{key}"', f'"{escaped}"', 1)
        elif what == 5 and isinstance(fields[key], int):
            line = line.replace(f":{fields[key]}", f":{fields[key]}{rng.choice(('.0', 'e0', 'E+0', '.00000'))}", 1)
        elif what == 6 and isinstance(fields[key], int):
            line = line.replace(f":{fields[key]}", f":{rng.choice(('-', '+', '0', ' '))}{fields[key]}", 1)
        else:
            line = line.replace(":", rng.choice((" : ", "\t:", ":\x0b", ":\xa0", ":\x00")), 1)
    lines[at] = line
    path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    return f"{path.name}: line {at} in form {what}"


def record_fields(cache: Path, rng: random.Random) -> str:
    """A plan, current or not, that says something else outside its identity, under a hash that agrees."""
    from capacitor_rt.cache.hashing import canonical_json

    path = rng.choice([cache / "plan.json", *sorted(cache.glob("generations/*.json")) * 2])
    fields = json.loads(contents(path))
    fields.pop("sha256")
    value = rng.choice(("x", "\x1b[2J", "\ud800", "x" * 100_000, "../x"))
    place, key = rng.choice(
        ((fields["model"], "id"), (fields["model"], "latent_space"), (fields["code"], "torch"), (fields["code"], value))
    )
    place[key] = value
    checksum = hashlib.sha256(canonical_json(fields)).hexdigest()
    path.write_text(json.dumps({**fields, "sha256": checksum}, indent=1, sort_keys=True))
    return f"{path.name}: {key[:20]!r}"


def latents_header(cache: Path, rng: random.Random) -> str:
    """Latents under a header of the same meaning in another form, whose hash the commit line has."""
    path = rng.choice(sorted((cache / "tasks").iterdir()))
    data = contents(path)
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip(b" ")
    header = json.loads(text)
    what = rng.randrange(6)
    if what == 0:
        text = json.dumps(dict(sorted(header.items(), reverse=True)), separators=(",", ":")).encode()
    elif what == 1:
        text = json.dumps(header).encode()
    elif what == 2:
        code = rng.choice(("F32", "BF16", "F16", "I32", "U32", "F8_E4M3", "I8", "U8"))
        text = text.replace(rng.choice((b'"F32"', b'"BF16"', b'"I8"')), f'"{code}"'.encode(), 1)
    elif what == 3:
        text = text.replace(b'"data_offsets":[', rng.choice((b'"data_offsets":[ ', b'"data_offsets":[-')), 1)
    elif what == 4:
        text = text.replace(b"{", b'{"__metadata__":{},', 1)
    else:
        header["__metadata__"][rng.choice(("plan", "task", "latent_space", "x"))] = "1"
        text = json.dumps(header, separators=(",", ":")).encode()
    align = rng.choice((8, 4096, 4096))
    text += rng.choice((b" ", b" ", b"\n", b"\0")) * (-(8 + len(text)) % align)
    body = data[8 + length :]
    if what == 5 and rng.random() < 0.5:
        body = rng.choice((body[::-1], body + bytes(4096), body[:-1]))
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with suppress(StopIteration):
        refit(cache, path.stem, header=True)
    return f"{path.name}: header in form {what}"


def latents_bytes(cache: Path, rng: random.Random) -> str:
    """Latents other than those that were cached, whose hash the commit line has; sometimes only their padding."""
    from .cache_mutators import padding

    path = rng.choice(sorted((cache / "tasks").iterdir()))
    data = bytearray(contents(path))
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin >= len(data):
        raise NothingToDo("no latents")
    places = padding(data) if rng.random() < 0.3 else []
    at = rng.choice(places or [rng.randrange(begin, len(data))])
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))
    with suppress(StopIteration):
        refit(cache, path.stem, header=True)
    return f"{path.name}: a bit of byte {at}, every hash agrees"


def strange_names(cache: Path, rng: random.Random) -> str:
    """Names that no run gives, some of them no text, of files, folders and sockets."""
    plan8 = next((cache / "index").iterdir()).name[:8]
    folder = rng.choice(("", "tasks", "index", "leases", "generations", "damaged"))
    (cache / folder).mkdir(exist_ok=True)
    base = rng.choice((
        b"\xff\xfe", b"\x1b[2J", b"a\nb", b"x" * 255, b"-rf", "\u0663".encode() * 9, b".rows",
        f"{plan8}-0000001.parquet".encode(), b".stamps",
        f"{plan8}-\u0660\u0660\u0660\u0660\u0660\u0661.safetensors".encode(), f"{plan8}-000001".encode(),
        f"{plan8.upper()}-000001.safetensors".encode(), f"{plan8}.json".encode(), b"00000000.json", b"....", b".lock",
        f"{plan8}-000001.safetensors".encode() + b"\n", f"{plan8}-99999999999999999999.parquet".encode(),
        b"x.tmp-" + b"0" * 32, f"{plan8}-000001.parquet.tmp-".encode() + b"0" * 32, b".lock.held", b".clock",
    ))  # fmt: skip
    path = os.path.join(os.fsencode(cache / folder), base)
    if os.path.lexists(path):
        raise NothingToDo("there is one")
    kind = rng.choice(("file", "file", "file", "folder", "full folder", "socket", "link"))
    if kind == "file":
        with open(path, "wb") as file:
            file.write(rng.choice((b"", b"{}", b"x" * 99)))
    elif kind in ("folder", "full folder"):
        os.mkdir(path)
        if kind == "full folder":
            os.mkdir(path + b"/x")
    elif kind == "link":
        os.symlink(rng.choice((b"/", b"gone", b"../outside/mine", base)), path)
    else:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as one:
            one.bind(path)
    return f"{folder}/{base!r}: {kind}"


def times(cache: Path, rng: random.Random) -> str:
    """Times of files before the epoch, or beyond what 64 bits of nanoseconds hold."""
    found = files(cache)
    if not found:
        raise NothingToDo("no files")
    chosen = rng.choices(found, k=3)
    second = rng.choice((-1, -(2**31), 0, 2**31, 2**33, 2**34, 9_223_372_036, 9_223_372_037, 2**40))
    for path in dict.fromkeys([*chosen, *(p for p in chosen[:1] for p in sorted(cache.glob("source*")))]):
        with suppress(OSError):
            os.utime(path, (second, second))
    return f"{chosen[0].name}: written at {second}"


def locks(cache: Path, rng: random.Random) -> str:
    """Locks and leases whose holders are nobody, or nonsense."""
    plan8 = rng.choice(sorted((cache / "index").iterdir())).name[:8]
    host = rng.choice((os.uname().nodename, "elsewhere", "\x1b[2J", "\ud800", "h" * 4000))
    pid = rng.choice(
        ("1", "0", "-1", "1e999", "NaN", "1.5", '"7"', "null", "9" * 5000, "4194305", "[]", "true", "1e30")
    )
    text = rng.choice((f'{{"host":{json.dumps(host)},"pid":{pid},"start":{rng.choice(("1", pid))}}}', "", "[", pid))
    name = rng.choice((".lock", ".lock.held", "leases/{}-000000", "leases/{}-000002", "leases/{}-000007", "leases/x"))
    path = cache / name.format(plan8)
    path.parent.mkdir(exist_ok=True)
    if rng.random() < 0.2:
        path.mkdir()
        (path / "x").touch()
        return f"{path.name}: a folder"
    path.write_text(text)
    second = rng.choice((1, 0, -5, 2**33, 2**34))
    os.utime(path, (second, second))
    return f"{path.name}: {text[:60]!r} at {second}"


def moved(cache: Path, rng: random.Random) -> str:
    """Files in folders where others belong, or a folder of the cache within itself."""
    what = rng.randrange(3)
    if what == 0:
        shutil.copytree(cache, cache / rng.choice(("copy", "damaged", "leases")))
        return "a copy of the cache in itself"
    path = rng.choice(sorted(p for sub in ("tasks", "index", "generations") for p in (cache / sub).glob("*")))
    folder = rng.choice([f for f in ("tasks", "index", "generations", "damaged", ".") if f != path.parent.name])
    (cache / folder).mkdir(exist_ok=True)
    shutil.copy(path, cache / folder / path.name) if what == 1 else path.rename(cache / folder / path.name)
    return f"{path.name} into {folder}"


def log_at_length(cache: Path, rng: random.Random) -> str:
    """A log with very many lines, sound or not, or with a very long one."""
    path = log_of(cache, rng)
    old = contents(path)
    line = rng.choice(old.splitlines(keepends=True)[:1] or [b"{}\n"])
    more = rng.choice((line * 3000, b"x" * 3_000_000, b"\n" * 20_000, b"[" * 100_000 + b"\n", line[:-1] * 2000 + b"\n"))
    path.write_bytes(rng.choice((old + more, more + old, more)))
    return f"{path.name}: {len(more)} bytes more"


FORGERIES: dict[str, Callable[[Path, random.Random], str]] = {
    f.__name__: f
    for f in (
        index_told, rows_exchanged, another_schema, bomb, of_another, json_forms, record_fields, latents_header,
        latents_bytes, strange_names, times, locks, moved, log_at_length,
    )
}  # fmt: skip
WEIGHTS = (10, 8, 6, 2, 8, 8, 4, 5, 5, 8, 5, 8, 4, 3)
