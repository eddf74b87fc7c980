"""Indexes that say of rows what the rows are not, with hashes that agree: nothing is built on them, and all are named.

An index is vouched for by its commit line and by the header of its task's latents; a row by its own hash alone.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_cases import commits_of
from fuzz.cache_mutators import refit
from parquet_damage import end_of_process
from update_cases import assert_as_fresh, cache, image, out, rows_of, src, update

from capacitor_rt.cache import accounts, soundness
from capacitor_rt.cache.hashing import canonical_json
from capacitor_rt.cache.parquet_files import parquet_bytes, parse_table
from capacitor_rt.cache.repair import repair
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError

__all__ = ["out", "src"]


def claim(out, task, value, column="row_hash", *, plan8=None, id=None, header=False):
    """Have an index say `value` of a row, its first or that of `id`, with hashes that agree."""
    plan8 = plan8 or min(out.glob("index/*")).name[:8]
    path = out / "index" / f"{plan8}-{task:06d}.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    at = table["id"].to_pylist().index(id) if id else next(i for i, v in enumerate(values) if v is not None)
    values[at] = value
    field = table.schema.get_field_index(column)
    table = table.set_column(field, table.schema.field(field), pa.array(values, table.schema.field(field).type))
    path.write_bytes(parquet_bytes(table))
    refit(out, path.stem, header)
    return table["id"][at].as_py()


def log_plans(out):
    """First digits of the plans of the first generation and of its update."""
    (log,) = out.glob("commits-*.jsonl")
    plan8 = log.stem[8:]
    return next(p.name[:8] for p in sorted(out.glob("index/*")) if p.name[:8] != plan8), plan8


def test_an_update_takes_no_row_by_an_index_that_its_latents_do_not_name(src, out, tmp_path):
    image(src / "000a.png", 51)
    update(src, out)
    old, new = log_plans(out)
    # of two indexes that tell of the row one is damaged, and the other lies; a third vouches for the file
    path = out / "index" / f"{new}-000001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    claim(out, 1, bytes(16), plan8=old)
    image(src / "zzz.png", 52)
    told: list[str] = []
    update(src, out, told=told)
    assert_as_fresh(src, out, tmp_path)
    assert any(f"nothing of task 1 of plan {old} can be reused" in line and "names" in line for line in told), told


LIES = {"row_hash": bytes(16), "mean": 7.0, "crop_top": 1, "bytes_hash": b"x" * 16}


@pytest.mark.parametrize("column", LIES)
def test_an_update_takes_nothing_that_an_index_says_which_its_latents_do_not_name(src, out, tmp_path, column):
    claim(out, 1, LIES[column], column)
    image(src / "zz.png", 51)
    told: list[str] = []
    update(src, out, told=told)
    assert_as_fresh(src, out, tmp_path)
    assert any("nothing of task 1" in line for line in told), told


def test_rows_are_compared_where_every_hash_above_them_agrees(src, out, tmp_path):
    id = claim(out, 1, bytes(16), header=True)
    (problem,) = verify(out).problems
    assert "000001.parquet is damaged: 1 rows of" in problem and f"{id!r}" in problem and "--repair" in problem
    with pytest.raises(CacheError, match="do not match their hashes"):
        cache(src, out)
    # asking twice makes it no better
    with pytest.raises(CacheError):
        cache(src, out)
    done = repair(out, verify(out))
    assert any("000001.safetensors: moved" in line for line in done)
    assert cache(src, out).new_images == 3
    assert_as_fresh(src, out, tmp_path)


def test_an_update_compares_the_rows_that_it_takes(src, out, tmp_path):
    claim(out, 1, bytes(16), header=True)
    image(src / "zz.png", 51)
    told: list[str] = []
    assert update(src, out, told=told).reused == 8
    assert any("nothing of task 1" in line and "do not match their hashes" in line for line in told), told
    assert_as_fresh(src, out, tmp_path)


def test_rows_in_files_of_earlier_generations_are_compared(src, out, tmp_path):
    image(src / "zz.png", 51)
    update(src, out)
    _, new = log_plans(out)
    id = claim(out, 0, bytes(16), plan8=new, header=True)
    (problem,) = verify(out).problems
    assert f"{new}-000000.parquet is damaged" in problem and f"{id!r}" in problem
    for _ in range(2):
        with pytest.raises(CacheError, match="do not match their hashes"):
            cache(src, out)
    image(src / "zzz.png", 52)
    update(src, out)
    assert_as_fresh(src, out, tmp_path)


def test_a_task_whose_line_was_lost_is_not_committed_over_rows_that_lie_elsewhere_and_differ(src, out):
    image(src / "zz.png", 51)
    update(src, out)
    _, new = log_plans(out)
    claim(out, 0, bytes(16), plan8=new, header=True)
    log = out / f"commits-{new}.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(CacheError, match="is not committed, and does not match its index"):
        cache(src, out)


def test_a_copy_is_read_once(src, out, monkeypatch):
    """Rows are compared where a file is not known to this machine, and the file is not read for that again."""
    image(src / "zz.png", 51)
    update(src, out)
    read: list[str] = []
    original = soundness.file_hashes
    monkeypatch.setattr(
        soundness, "file_hashes", lambda f, name, placed: read.append(name) or original(f, name, placed)
    )
    (out / ".stamps").unlink()
    wanted = rows_of(out)
    cache(src, out)
    assert sorted(read) == sorted(set(read)) and len(read) == len(list(out.glob("tasks/*")))
    read.clear()
    assert not cache(src, out).new_images and not read
    verify(out)
    assert len(read) == len(set(read)) == len(list(out.glob("tasks/*")))
    assert rows_of(out).keys() == wanted.keys() and commits_of(out)


def test_a_run_goes_on_with_no_index_that_names_other_inputs(src, out):
    claim(out, 1, "another.png", "id", header=True)
    with pytest.raises(CacheError, match=r"000001\.parquet does not list the inputs of its task"):
        cache(src, out)


def test_padding_belongs_to_a_file(src, out):
    path = sorted((out / "tasks").iterdir())[1]
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin, _ = next(v["data_offsets"] for k, v in header.items() if k.startswith("padding/"))
    data[8 + int.from_bytes(data[:8], "little") + begin] = 1
    path.write_bytes(data)
    refit(out, path.stem, header=True)
    assert "what lies between its tensors is not zero" in verify(out).problems[0]
    with pytest.raises(CacheError, match="between its tensors"):
        cache(src, out)


def test_an_index_of_a_few_bytes_that_says_gigabytes_is_refused(out):
    path = sorted((out / "index").iterdir())[0]
    table = pq.read_table(path)
    text = pa.chunked_array([pa.array(["x" * (40 << 20)])] * len(table))
    field = table.schema.get_field_index("message")
    bomb = table.set_column(field, table.schema.field(field), text)
    with pytest.raises(CacheError, match=r"'message', and .* is the most that can be read back"):
        parquet_bytes(bomb)
    pq.write_table(bomb, path, compression="zstd", write_page_checksum=True)
    assert path.stat().st_size < 1 << 16
    refit(out, path.stem)
    assert "it takes more than" in verify(out).problems[0]


def test_an_update_goes_on_with_no_plan_that_names_another_latent_space(src, out, tmp_path, monkeypatch):
    image(src / "zz.png", 51)
    monkeypatch.setattr(accounts, "_make_current", lambda *_: pytest.fail("planned"))
    with pytest.raises(pytest.fail.Exception):
        update(src, out)
    monkeypatch.undo()
    (record,) = (out / "generations").iterdir()
    fields = json.loads(record.read_bytes())
    del fields["sha256"]
    fields["model"]["latent_space"] = "another"
    record.write_text(json.dumps({**fields, "sha256": hashlib.sha256(canonical_json(fields)).hexdigest()}))
    update(src, out)
    assert_as_fresh(src, out, tmp_path)


def test_an_update_of_a_plan_that_names_another_latent_space_is_refused(src, out):
    image(src / "zz.png", 51)
    fields = json.loads((out / "plan.json").read_bytes())
    del fields["sha256"]
    fields["model"]["latent_space"] = "another"
    text = json.dumps(
        {**fields, "sha256": hashlib.sha256(canonical_json(fields)).hexdigest()}, indent=1, sort_keys=True
    )
    (out / "plan.json").write_text(text)
    with pytest.raises(CacheError, match=r"plan\.json is not that of the cache"):
        update(src, out)
    repair(out, verify(out))
    assert not verify(out).problems


@pytest.mark.parametrize("message", ["x", None])
def test_a_message_belongs_to_an_input_that_failed(out, message):
    tables = [(path, pq.read_table(path)) for path in sorted((out / "index").iterdir())]
    path, table = next((p, t) for p, t in tables if message or "quarantined" in t["status"].to_pylist())
    field = table.schema.get_field_index("message")
    text = pa.array([message] * len(table), pa.string())
    path.write_bytes(parquet_bytes(table.set_column(field, table.schema.field(field), text)))
    refit(out, path.stem, header=True)
    assert "message and status do not agree" in verify(out).problems[0]


def test_no_damage_of_what_a_footer_says_ends_the_process():
    """Of a column's size statistics a bit is enough: asked for the column, Arrow throws where nobody catches."""
    table = pa.table({"id": [f"{i:03}.png" for i in range(20)], "size": range(20)})
    data = bytes(parquet_bytes(table))

    def read(damaged: bytes) -> None:
        with suppress(CacheError):
            parse_table(damaged, "an index", table.schema)

    assert not end_of_process(data, 5, read)
