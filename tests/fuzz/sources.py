"""What caches are made of: mutants of tar and Parquet files, of lists, and of tables of labels and captions.

A mutant is cached, and the cache is gone on with and read: a hostile name or value costs itself or is refused, the plan
that is written can be read again, and nothing outside is touched.
"""

from __future__ import annotations

import io
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .archives import EDITS, LONG, Member, archive, lengths
from .checkpoints import GOLDEN, VALUES, damage, special
from .forked import Surface, scratch

CORPUS = Path(__file__).parent / "corpus" / "sources"
SETTINGS = "settings.json"
HUB_NAMES = '{"info": {"features": {"label": {"names": [?]}}}}'
COUNT = 4
CELLS = (
    "", "0", "1", "-1", "cat", "1" * 30, "9" * 5000, "1e999", "nan", "\x00", "\x1b[2J", "\u202e", "x" * 140_000, '"',
    "'",
    "true", "None", "\ufeff", "a,b", "a\nb", "=1+1", "[" * 2000, "1.0", "\ud800", "\U0001f600", "9223372036854775808",
)  # fmt: skip


def pictures() -> list[bytes]:
    from PIL import Image

    rng = np.random.default_rng(0)
    found = []
    for _ in range(COUNT):
        buffer = io.BytesIO()
        # a few colours, so that a case of the corpus is small
        small = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(small).resize((32, 32), Image.Resampling.NEAREST).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


class Sources(Surface):
    """Four pictures with labels and captions, as a tar file, as Parquet, as a list, or with a table of a file."""

    name = "sources"
    corpus = CORPUS

    def warm(self) -> None:
        from capacitor_rt import FullCapacitor
        from capacitor_rt.cache import CacheRequest

        self.pictures = pictures()
        self.model = FullCapacitor.from_pretrained(GOLDEN / "p16", strict_size=False)
        self.request = CacheRequest(32, task_inputs=3, batch=2)
        for kind, _ in KINDS:
            with tempfile.TemporaryDirectory(dir=scratch()) as folder:
                kind(self, Path(folder), None)
                self.read(Path(folder))

    def write(self, seed: int, number: int, folder: Path) -> str:
        rng = random.Random(f"{seed}:{number}")
        (kind,) = rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])
        return f"{kind.__name__}: {kind(self, folder, rng)}"

    def read(self, folder: Path) -> None:
        import torch

        from capacitor_rt import LatentDataset
        from capacitor_rt.cache import ColumnsRequest, RunOptions, cache_images
        from capacitor_rt.cache.export.base import relative_path
        from capacitor_rt.errors import CacheError, CapacitorError

        settings = json.loads((folder / SETTINGS).read_text())
        names = {"labels": settings.get("labels"), "captions": settings.get("captions")}
        columns = ColumnsRequest(
            **{key: name and name.replace("HERE", str(folder)) for key, name in names.items()},
            keep=tuple(settings.get("keep", ())),
        )
        options = RunOptions(
            workers=0, progress=False, backoff=(0.0,), give_up=True, source=settings["source"], columns=columns,
            image_column=settings.get("image_column"),
        )  # fmt: skip
        before = _names(folder)
        out = folder / "out"

        def run() -> Any:
            return cache_images(folder / settings["src"], out, self.model, self.request, options=options)

        try:
            report = run()
        except CapacitorError as error:
            str(error).encode()
            if out.exists() and "plan.json" in os.listdir(out):
                again(run)
            raise
        if report.exit_code == 1:
            raise CacheError("tasks are not finished")
        if again(run).new_images:
            raise AssertionError("a finished cache is cached again")
        if report.cached:
            rows = LatentDataset(out, verify=True)
            for row, id in zip(rows.__getitems__(range(len(rows))), rows.ids, strict=True):
                json.dumps({k: v for k, v in row.items() if not isinstance(v, torch.Tensor)}).encode()
                try:
                    inside = os.path.normpath(folder / "files" / relative_path(id))
                except CapacitorError:
                    continue
                if not inside.startswith(f"{folder}/files/"):
                    raise AssertionError(f"{id!r} leads out of a folder")
        if _names(folder) != before:
            raise AssertionError(f"{_names(folder) ^ before} outside of the cache")


def again(run: Callable[[], Any]) -> Any:
    """Go on with a cache: what is wrong with its inputs was said before, and what was written must be readable."""
    from capacitor_rt.errors import CapacitorError

    try:
        return run()
    except CapacitorError as error:
        if "plan.json is damaged" in str(error) or "was planned" in str(error):
            raise AssertionError(f"what was written is refused: {error}") from error
        raise


def _names(folder: Path) -> set[str]:
    out = str(folder / "out")
    return {os.path.join(at, n) for at, _, names in os.walk(folder) for n in names if not at.startswith(out)}


def settle(folder: Path, **settings: Any) -> None:
    (folder / SETTINGS).write_text(json.dumps(settings))


def spoil(path: Path, rng: random.Random, share: float = 0.4) -> str:
    """Sometimes other bytes than those, or no file at all."""
    if rng.random() > share:
        return ""
    if rng.random() < 0.15:
        return f", {special(path, rng)}"
    data, what = damage(path.read_bytes() or b"\n", rng)
    path.write_bytes(data)
    return f", {what}"


def tar(surface: Sources, folder: Path, rng: random.Random | None) -> str:
    members: list[Member] = []
    for i, picture in enumerate(surface.pictures):
        about = json.dumps({"caption": f"of {i}", "label": i, "score": i / 2}).encode()
        members += [
            Member(b"%d.png" % i, picture), Member(b"%d.txt" % i, b"caption %d" % i), Member(b"%d.json" % i, about),
            Member(b"%d.cls" % i, b"%d" % i),
        ]  # fmt: skip
    path = folder / "a.tar"
    if rng is None:
        settle(folder, src="a.tar", source="tar", labels="cls", captions="txt", keep=["score"])
        path.write_bytes(archive(members))
        return "whole"
    keep: list[str] = rng.choice(([], [], ["score"], ["score", "x"]))
    labels, captions = rng.choice((None, "cls", "json")), rng.choice((None, "txt", "json"))
    settle(folder, src=rng.choice(("a.tar", ".")), source="tar", labels=labels, captions=captions, keep=keep)
    done = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        if members:
            done.append(rng.choice(EDITS)(members, rng))
    beside = [m for m in members if m.name[-4:] in (b".txt", b"json", b".cls")]
    if beside and rng.random() < 0.4:
        member, value = rng.choice(beside), rng.choice((*VALUES, *CELLS, f'{{"label": {rng.choice(VALUES)}}}'))
        member.data = value.encode("utf-8", "surrogatepass")
        done.append(f"{member.name!r} says {value[:20]!r}")
    path.write_bytes(archive(members))
    if rng.random() < 0.1:
        path.write_bytes(lengths(path.read_bytes(), rng))
        done.append("other length")
    return "; ".join(done) + spoil(path, rng, 0.2)


def parquet(surface: Sources, folder: Path, rng: random.Random | None) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table() -> Any:
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(surface.pictures)]
        names = {"info": {"features": {"label": {"names": ["cat", "dog", "fox", "owl"]}}}}
        schema = pa.schema(
            [("image", struct), ("label", pa.int64()), ("caption", pa.string()), ("score", pa.float64())],
            metadata={"huggingface": json.dumps(names)},
        )
        columns = [images, list(range(COUNT)), [f"of {i}" for i in range(COUNT)], [i / 2 for i in range(COUNT)]]
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)

    path = folder / "a.parquet"
    if rng is None:
        settle(folder, src="a.parquet", source="parquet", labels="label", captions="caption", keep=["score"])
        pq.write_table(table(), path, row_group_size=2)
        return "whole"
    column = rng.choice((None, None, None, "image", "label", "caption", "x"))
    settle(
        folder, src=rng.choice(("a.parquet", ".")), source="parquet", image_column=column,
        labels=rng.choice((None, "label", "caption", "score")),
        captions=rng.choice((None, "caption", "label", "image")),
        keep=rng.choice(([], ["score"], ["label2"])),
    )  # fmt: skip
    done = []
    for name in ("a.parquet", *rng.choice(((), (), ("b.parquet",)))):
        one = table()
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            one, what = _other_column(one, rng)
            done.append(f"{name}: {what}")
        options = {"compression": rng.choice(("none", "snappy", "zstd")), "row_group_size": rng.choice((1, 2, 3, 100))}
        pq.write_table(one, folder / name, use_dictionary=rng.random() < 0.5, **options)
    if rng.random() < 0.25:
        done.append(_footer(path, rng))
    return "; ".join(done) + spoil(path, rng, 0.3)


def _other_column(table: Any, rng: random.Random) -> tuple[Any, str]:
    """The table with a column that lacks, or holds something else."""
    import pyarrow as pa

    at = rng.randrange(table.num_columns)
    name = table.column_names[at]
    what = rng.randrange(8)
    if what == 0 and table.num_columns > 1:
        return table.remove_column(at), f"without {name}"
    if what == 1:
        return table.slice(0, rng.choice((0, 0, 1))), "few rows"
    if what == 2:
        names = rng.choice((*VALUES, HUB_NAMES.replace("?", rng.choice(VALUES))))
        return table.replace_schema_metadata({"huggingface": names.encode("utf-8", "surrogatepass")}), "metadata"
    if what == 3:
        names = [*table.column_names[:at], "label2", *table.column_names[at + 1 :]]
        return table.rename_columns(names), f"{name} renamed"
    kinds: tuple[tuple[Any, Any], ...] = (
        (pa.binary(), b"\xff"), (pa.large_binary(), b"x"), (pa.string(), "x"), (pa.int64(), 2**63 - 1),
        (pa.uint64(), 2**64 - 1),
        (pa.int8(), -1), (pa.float64(), float("nan")), (pa.float64(), 1e300), (pa.bool_(), True), (pa.null(), None),
        (pa.list_(pa.int64()), [1, 2]), (pa.struct([("bytes", pa.string())]), {"bytes": "x"}), (pa.date32(), 5),
        (pa.struct([("bytes", pa.binary())]), {"bytes": None}), (pa.timestamp("ns"), 2**62), (pa.binary(2), b"ab"),
        (pa.map_(pa.string(), pa.string()), [("a", "b")]), (pa.decimal128(38, 2), 5), (pa.string(), "x" * 2**21),
        (pa.string(), rng.choice(CELLS).encode("utf-8", "replace").decode()), (pa.duration("s"), 2**62),
        (pa.struct([("bytes", pa.int64())]), {"bytes": 5}), (pa.float16(), np.float16(2)), (pa.time64("ns"), 5),
    )  # fmt: skip
    kind, value = rng.choice(kinds)
    values = [rng.choice((value, value, None)) for _ in range(len(table))]
    return table.set_column(at, pa.field(name, kind), pa.array(values, kind)), f"{name} {kind}"


def _footer(path: Path, rng: random.Random) -> str:
    """Bytes of the footer, which says where everything is and how much of it there is."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[-8:-4], "little")
    begin = max(4, len(data) - 8 - length)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(begin, len(data) - 4)
        data[at : at + 1] = rng.choice((b"\xff", b"\x00", b"\x7f", bytes([rng.randrange(256)]), b"\xff" * 9 + b"\x01"))
    if rng.random() < 0.5:
        data[-8:-4] = (len(data) - 8 - begin).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    return "footer"


def paths(surface: Sources, folder: Path, rng: random.Random | None) -> str:
    lines = [b"%d.png" % i for i in range(COUNT)]
    for line, data in zip(lines, surface.pictures, strict=True):
        (folder / os.fsdecode(line)).write_bytes(data)
    path = folder / "a.txt"
    settle(folder, src="a.txt", source="list")
    done = "whole"
    if rng is not None:
        for _ in range(rng.choice((1, 1, 3))):
            more = (
                b"",
                b"#",
                b"\0",
                b"\r",
                b"0.png\0",
                b"x" * 100_000,
                b"../" * 50 + b"etc/passwd",
                b"/dev/zero",
            )
            lines.insert(rng.randint(0, len(lines)), rng.choice((*LONG, *more)))
        os.mkfifo(folder / "a.tar")
        lines += rng.choice(([], [b"a.tar"]))
        done = f"{len(lines)} lines"
    path.write_bytes(b"\n".join(lines))
    return done + (spoil(path, rng) if rng else "")


def tables(surface: Sources, folder: Path, rng: random.Random | None) -> str:
    """A folder of pictures with a table beside it, or with a file of its caption beside each."""
    for i, data in enumerate(surface.pictures):
        (folder / "src").mkdir(exist_ok=True)
        (folder / "src" / f"{i}.png").write_bytes(data)
        (folder / "src" / f"{i}.txt").write_text(f"caption {i}")
        (folder / "src" / f"{i}.json").write_text(json.dumps({"caption": f"caption {i}"}))
    if rng is not None and rng.random() < 0.25:
        kind = rng.choice(("txt", "json"))
        settle(folder, src="src", source="folder", captions=kind)
        path = folder / "src" / f"1.{kind}"
        if rng.random() < 0.6:
            text = rng.choice((*CELLS, *VALUES, f'{{"caption": {rng.choice(VALUES)}}}'))
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"captions as {kind}" + spoil(path, rng)
    rows: list[dict[str, Any]] = [
        {"file_name": f"{i}.png", "label": i, "caption": f"c{i}", "score": i / 2} for i in range(COUNT)
    ]
    kind = rng.choice(("csv", "tsv", "jsonl", "json", "mapping", "parquet")) if rng else "csv"
    path = folder / f"table.{kind.replace('mapping', 'json')}"
    name = f"HERE/{path.name}"
    keep: list[str] = [] if kind == "mapping" else ["score"]
    settle(folder, src="src", source="folder", labels=name, captions=rng and rng.choice((None, name)), keep=keep)
    done = kind
    if rng is not None:
        for _ in range(rng.choice((0, 1, 1, 2))):
            row, key = rng.choice(rows), rng.choice(("file_name", "label", "label", "caption", "score", "more"))
            row[key] = rng.choice((*CELLS, 10**30, 2**63, 1e300, None, True, [1], {"a": 1}, -5, 10**400))
            done += f", {key} {str(row[key])[:20]!r}"
    path.write_bytes(_table_bytes(rows, kind, rng))
    return done + (spoil(path, rng) if rng else "")


def _table_bytes(rows: list[dict[str, Any]], kind: str, rng: random.Random | None) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        buffer = io.BytesIO()
        texts = [{key: str(v).encode("utf-8", "replace").decode() for key, v in row.items()} for row in rows]
        pq.write_table(pa.Table.from_pylist(texts), buffer)
        return buffer.getvalue()
    if kind in ("csv", "tsv"):
        between = "," if kind == "csv" else "\t"
        names = list(dict.fromkeys(key for row in rows for key in row))
        lines = [between.join(names), *(between.join(str(row.get(key, "")) for key in names) for row in rows)]
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    texts = [json.dumps(row) for row in rows]
    if rng is not None and rng.random() < 0.3:
        texts.insert(rng.randrange(len(texts)), rng.choice(VALUES))
    if kind == "mapping":
        text = "{" + ",".join(f"{json.dumps(str(r['file_name']))}: {json.dumps(r['label'])}" for r in rows) + "}"
    else:
        text = "\n".join(texts) if kind == "jsonl" else f"[{','.join(texts)}]"
    return text.encode("utf-8", "surrogatepass")


KINDS: tuple[tuple[Callable[[Sources, Path, random.Random | None], str], int], ...] = (
    (tar, 8), (parquet, 8), (paths, 2), (tables, 6),
)  # fmt: skip
