"""Mutants of finished caches: bytes, lines of the log, fields of the plan, and the files themselves.

A mutant is opened, checked, and gone on with. It is a finding if a row is returned that is not the one that was
cached, if rows lack in silence, if `verify` finds nothing wrong with what is wrong, if a run ends well over what is
wrong, or if a file outside is touched. Each is named by its mutator and a seed: a case of the corpus is a line of JSON.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .checkpoints import GOLDEN, VALUES, damage, special

CORPUS = Path(__file__).parent / "corpus" / "caches"
CASE = "case.json"
FILES = ("plan.json", "source.parquet", "commits.jsonl", "quarantine.jsonl", ".stamps")


def files(cache: Path) -> list[Path]:
    """Every file of a cache, the ones of tasks twice: they are most of it."""
    parts = sorted(p for sub in ("tasks", "index") for p in (cache / sub).iterdir())
    found = [*(cache / name for name in FILES), *parts, *parts]
    # what an earlier edit has made a pipe, a device or a terabyte is not read
    return [p for p in found if p.is_file() and not p.is_symlink() and p.stat().st_size < 1 << 20]


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


def another_kind(cache: Path, rng: random.Random) -> str:
    return special(rng.choice(files(cache)), rng)


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
    data = a.read_bytes()
    if rng.random() < 0.7:
        a.write_bytes(b.read_bytes())
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
    path = cache / rng.choice(("commits.jsonl", "commits.jsonl", "quarantine.jsonl", ".stamps"))
    old = path.read_bytes().splitlines(keepends=True)
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
            old[at] = old[at][: rng.randrange(len(old[at]))]
        elif what == 4:
            old.insert(at, rng.choice(VALUES).encode("utf-8", "surrogatepass") + b"\n")
        elif old:
            old[at] = old[at].replace(b"\n", rng.choice((b"", b"\r\n", b" \n", b"\n\n", b"\0\n")))
    path.write_bytes(b"".join(old))
    return f"lines of {path.name}"


def log_fields(cache: Path, rng: random.Random) -> str:
    """A line that says something else and has the right hash of its own."""
    from capacitor_rt.cache.commits import Commit

    path = cache / "commits.jsonl"
    old = path.read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(old))
    fields: dict[str, Any] = json.loads(old[at])
    del fields["sum"]
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(fields))
        value: Any = fields[key]
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
    fields = json.loads(path.read_bytes())
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
    text = path.read_text()
    at = rng.randrange(len(text))
    value = rng.choice(VALUES)
    path.write_bytes((text[:at] + value + text[at + rng.choice((0, 1, 5)) :]).encode("utf-8", "surrogatepass"))
    return f"plan: {value[:20]!r} at {at}"


def index_cells(cache: Path, rng: random.Random) -> str:
    """An index that says something else; sometimes its commit line has its hash."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from capacitor_rt.cache.commits import Commit
    from capacitor_rt.cache.hashing import xxh3
    from capacitor_rt.cache.parquet_files import parquet_bytes

    path = rng.choice(sorted((cache / "index").iterdir()))
    table = pq.read_table(path)
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
        log = cache / "commits.jsonl"
        old = log.read_bytes().splitlines(keepends=True)
        number = int(path.stem[9:])
        fields = json.loads(old[number])
        del fields["sum"]
        fields |= {"index_bytes": len(body), "index_xxh3": xxh3(body).hexdigest(), "inputs": len(table)}
        old[number] = Commit(**fields).line()
        log.write_bytes(b"".join(old))
    return f"index: {name}"


def several(cache: Path, rng: random.Random) -> str:
    names = [name for name in MUTATORS if name not in ("several", "linked")]
    done = []
    for _ in range(rng.choice((2, 3))):
        try:
            done.append(MUTATORS[rng.choice(names)](cache, rng))
        except (OSError, ValueError, IndexError, StopIteration, KeyError, TypeError, AttributeError, MemoryError):
            # what the one before has left has no such part
            continue
    return "; ".join(done)


MUTATORS: dict[str, Callable[[Path, random.Random], str]] = {
    f.__name__: f
    for f in (
        some_bytes, one_bit, another_kind, gone, without_folder, swapped, renamed, linked, leftovers, lines, log_fields,
        plan_fields, plan_text, index_cells, several,
    )
}  # fmt: skip
WEIGHTS = (20, 14, 6, 4, 1, 4, 4, 10, 4, 10, 8, 10, 5, 10, 8)


class Caches:
    """A small cache with two sizes, mirrored and with logsnr, two of whose inputs are quarantined."""

    name = "caches"
    corpus = CORPUS

    def __init__(self) -> None:
        self.home: Path | None = None

    def warm(self) -> None:
        import numpy as np
        from PIL import Image

        from capacitor_rt import FullCapacitor, LatentDataset
        from capacitor_rt.cache import CacheRequest
        from capacitor_rt.errors import CacheError

        if self.home is not None:
            return
        self.home = Path(tempfile.mkdtemp(prefix="capacitor-caches-"))
        atexit.register(shutil.rmtree, self.home, ignore_errors=True)
        rng = np.random.default_rng(0)
        source = self.home / "src"
        source.mkdir()
        for i in range(9):
            size = ((32, 32), (24, 64))[i % 2]
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(source / f"{i}.png")
        (source / "4b.png").write_bytes(b"no image")
        (source / "7b.png").write_bytes(b"")
        self.model = FullCapacitor.from_pretrained(GOLDEN / "p16", strict_size=False)
        self.request = CacheRequest(48, area=True, posterior=True, task_inputs=4, batch=2)
        self.go_on(self.home / "whole")
        rows = LatentDataset(self.home / "whole", verify=True)
        self.truth = {rows.ids[i]: rows.tensors(i) for i in range(len(rows))}
        # everything that a child uses is imported
        for name in ("one_bit", "index_cells"):
            with suppress(CacheError):
                self.read_case({"mutator": name, "seed": "0"}, Path(tempfile.mkdtemp(dir=self.home)))

    def go_on(self, out: Path) -> Any:
        from capacitor_rt.cache import RunOptions, cache_images

        assert self.home is not None
        options = RunOptions(workers=0, progress=False, backoff=(0.0,))
        return cache_images(self.home / "src", out, self.model, self.request, options=options)

    def write(self, seed: int, number: int, folder: Path) -> str:
        rng = random.Random(f"{seed}:{number}")
        (name,) = rng.choices(list(MUTATORS), WEIGHTS)
        case = {"mutator": name, "seed": f"{seed}:{number}"}
        (folder / CASE).write_text(json.dumps(case))
        return json.dumps(case)

    def read(self, folder: Path) -> None:
        self.read_case(json.loads((folder / CASE).read_text()), folder)

    def read_case(self, case: dict[str, str], folder: Path) -> None:
        from capacitor_rt.errors import CacheError, CapacitorError

        assert self.home is not None
        cache, outside = folder / "cache", folder / "outside"
        shutil.copytree(self.home / "whole", cache)
        outside.mkdir()
        (outside / "mine").write_bytes(b"mine")
        MUTATORS[case["mutator"]](cache, random.Random(case["seed"]))
        before = _snapshot(outside)
        refusals: list[CapacitorError] = []
        for step in (self.look, self.check, self.resume):
            try:
                step(cache)
            except CacheError as error:
                str(error).encode()
                refusals.append(error)
            if _snapshot(outside) != before:
                raise AssertionError(f"{step.__name__} touched a file outside")
        if refusals:
            raise refusals[-1]

    def look(self, cache: Path) -> None:
        """Every row is the one that was cached, and none lacks."""
        from capacitor_rt import LatentDataset

        for partial in (False, True):
            rows = LatentDataset(cache, verify=True, allow_partial=partial)
            found = rows.__getitems__(range(len(rows)))
            if not partial and sorted(rows.ids) != sorted(self.truth):
                raise AssertionError(f"{len(rows)} rows of {len(self.truth)}")
            for i, row in enumerate(found):
                truth = self.truth[rows.ids[i]]
                if not all(torch.equal(row[kind], t) for kind, t in truth.items()):
                    raise AssertionError(f"row {i} is not the one that was cached")

    def check(self, cache: Path) -> None:
        """What `verify` finds nothing wrong with is what was written."""
        from capacitor_rt.cache.verify import verify
        from capacitor_rt.errors import CacheError

        found = verify(cache, workers=0)
        for line in (*found.problems, *found.notes):
            line.encode()
        if found.problems or found.unfinished:
            raise CacheError("\n".join(found.problems) or "unfinished")
        assert self.home is not None
        whole = self.home / "whole"
        for name in found.files:
            if name == "commits.jsonl":
                # lines in another order, or there twice, are no damage
                same = {*(whole / name).read_bytes().split(b"\n")} == {*(cache / name).read_bytes().split(b"\n")}
            elif name == "plan.json":
                same = json.loads((whole / name).read_bytes()) == json.loads((cache / name).read_bytes())
            else:
                same = name == "source.parquet" or (cache / name).read_bytes() == (whole / name).read_bytes()
            if not same:
                raise AssertionError(f"verify finds nothing wrong with {name}")

    def resume(self, cache: Path) -> None:
        """A run that ends well has left what an undisturbed one has."""
        from capacitor_rt.cache.verify import verify
        from capacitor_rt.errors import CacheError

        report = self.go_on(cache)
        if report.exit_code == 1:
            raise CacheError("tasks are not finished")
        found = verify(cache, workers=0)
        if found.problems or found.unfinished:
            raise AssertionError(f"a run ended with {report.exit_code} over {found.problems}")
        self.look(cache)
        self.check(cache)


def _snapshot(folder: Path) -> dict[str, tuple[bytes | None, int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        data = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (data, info.st_ino, info.st_mtime_ns)
    return found
