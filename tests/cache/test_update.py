"""`cache --update`: a cache that follows its source, encodes what is new, and says what it has done."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_cases import Forbidden, open_cache, snapshot
from models import random_model
from PIL import Image
from update_cases import (
    OLD,
    SIZES,
    assert_as_fresh,
    cache,
    image,
    out,
    reads,
    rows_of,
    run,
    src,
    update,
)

from capacitor_rt.cache import CacheRequest, LatentDataset
from capacitor_rt.cache.garbage import collect
from capacitor_rt.cache.reuse import KnownContents
from capacitor_rt.cache.status import status
from capacitor_rt.errors import CacheError

__all__ = ["out", "reads", "run", "src"]


def test_new_files_alone_are_read_and_encoded(src, out, tmp_path, reads):
    before = snapshot(out)
    image(src / "000a.png", 50)
    image(src / "zz.png", 51, (90, 24))
    report = update(src, out)
    assert (report.cached, report.reused, report.new_images, report.generation) == (12, 11, 2, 1)
    assert len(reads["read"]) == 2 and sorted(reads["decoded"]) == ["000a.png", "zz.png"]
    # the old generation lies there as it was
    after = snapshot(out)
    _, plan = open_cache(out)
    assert all(after[name] == data for name, data in before.items() if name != "plan.json")
    assert [p for p in after if p.startswith("generations/")] == [
        f"generations/{plan.fields['generation']['of'][:8]}.json"
    ]
    assert after[f"generations/{plan.fields['generation']['of'][:8]}.json"] == before["plan.json"]
    assert_as_fresh(src, out, tmp_path)


def test_rows_are_not_copied(src, out):
    """An update writes what is new: the files of latents of the old rows are read where they lie."""
    image(src / "zz.png", 51)
    sizes = {path.name: path.stat().st_size for path in (out / "tasks").iterdir()}
    update(src, out)
    new = [path for path in (out / "tasks").iterdir() if path.name not in sizes]
    rows = LatentDataset(out)
    row = sum(t.nbytes for t in rows.tensors(0).values())
    assert sum(path.stat().st_size for path in new) < 5 * 8192 + 2 * row


def test_deleted_changed_renamed_and_restored_files(src, out, tmp_path, reads):
    (src / "001.png").unlink()
    os.rename(src / "002.png", src / "900.png")
    shutil.copy(src / "004.png", src / "004-copy.png")
    image(src / "005.png", 70, SIZES[2])
    (src / "sub").mkdir()
    os.rename(src / "003b.png", src / "sub" / "bad.png")
    report = update(src, out)
    # what has another name is read, and decoded only if no row has its bytes
    assert report.exit_code == 3 and sorted(reads["decoded"]) == ["005.png", "sub/bad.png"]
    assert len(reads["read"]) == 4
    assert_as_fresh(src, out, tmp_path)
    image(src / "001.png", 1, SIZES[1])
    reads["decoded"].clear()
    reads["read"].clear()
    report = update(src, out)
    # its row still lies there, and the generation that says so: it is read, as is the copy, which is too young
    assert report.generation == 2 and len(reads["read"]) == 2 and reads["decoded"] == []
    assert_as_fresh(src, out, tmp_path)


def test_a_touched_file_is_read_and_not_decoded(src, out, tmp_path, reads):
    os.utime(src / "004.png")
    image(src / "zz.png", 51)
    update(src, out)
    assert len(reads["read"]) == 2 and reads["decoded"] == ["zz.png"]
    assert_as_fresh(src, out, tmp_path)


def test_an_edit_of_the_same_size_is_found(src, out, tmp_path):
    data = np.zeros((40, 40, 3), np.uint8)
    Image.fromarray(data).save(src / "a.bmp")
    update(src, out)
    data[3, 3] = 200
    Image.fromarray(data).save(src / "a.bmp")
    report = update(src, out)
    assert (report.generation, report.new_images) == (2, 1)
    assert_as_fresh(src, out, tmp_path)


def test_a_file_written_just_before_it_was_listed_is_read_again(src, out, tmp_path, reads):
    """Its time may stand still while its bytes change."""
    data = np.zeros((40, 40, 3), np.uint8)
    Image.fromarray(data).save(src / "a.bmp")
    update(src, out)
    info = (src / "a.bmp").stat()
    data[3, 3] = 200
    Image.fromarray(data).save(src / "a.bmp")
    os.utime(src / "a.bmp", ns=(info.st_atime_ns, info.st_mtime_ns))
    image(src / "zz.png", 51)
    update(src, out)
    assert "a.bmp" in reads["decoded"]
    assert_as_fresh(src, out, tmp_path)


def test_rehash_trusts_no_time(src, out, tmp_path, reads):
    data = (src / "000.png").read_bytes()
    other = image(tmp_path / "other.bmp", 3)
    Image.open(other).convert("RGB").save(src / "b.bmp")
    os.utime(src / "b.bmp", (OLD, OLD))
    update(src, out)
    assert not update(src, out, rehash=True).reused
    changed = bytearray((src / "b.bmp").read_bytes())
    changed[-1] ^= 0xFF
    (src / "b.bmp").write_bytes(changed)
    os.utime(src / "b.bmp", (OLD, OLD))
    # by its size and time it is the same
    assert update(src, out).generation == 1
    reads["decoded"].clear()
    report = update(src, out, rehash=True)
    assert report.generation == 2 and reads["decoded"] == ["003b.png", "b.bmp"]
    assert (src / "000.png").read_bytes() == data
    assert_as_fresh(src, out, tmp_path)


def test_without_changes_nothing_is_touched(src, out, run):
    before = snapshot(out)
    report = update(src, out, Forbidden(random_model()))
    assert (report.generation, report.new_images, report.reused) == (0, 0, 0)
    assert snapshot(out) == before


def test_update_of_what_is_not_there_makes_it(src, tmp_path, out):
    update(src, tmp_path / "new")
    assert snapshot(tmp_path / "new") == snapshot(out)


def test_an_unfinished_cache_is_updated_too(src, tmp_path, out):
    """Inputs that change while a long run is going on: what is done is kept."""
    for path in (out / "index", out / "tasks"):
        sorted(path.iterdir())[-1].unlink()
    log = (out / "commits.jsonl").read_bytes().splitlines(keepends=True)
    (out / "commits.jsonl").write_bytes(b"".join(log[:-1]))
    image(src / "zz.png", 51)
    with pytest.raises(CacheError, match=r"was planned for other inputs.*add --update"):
        cache(src, out)
    report = update(src, out)
    assert report.reused == 9
    assert_as_fresh(src, out, tmp_path)


@pytest.mark.parametrize(
    "request_", [CacheRequest(48, area=True, dtype="fp32", posterior=True), CacheRequest(32, area=True, dtype="fp32")]
)
def test_other_settings_are_refused(src, out, request_):
    image(src / "zz.png", 51)
    before = snapshot(out)
    with pytest.raises(CacheError, match=r"was planned otherwise.*cache into a new OUT\n"):
        update(src, out, request=request_)
    with pytest.raises(CacheError, match=r"(?s)was planned otherwise.*model.sha256"):
        update(src, out, random_model(seed=1))
    assert snapshot(out) == before


def test_a_run_on_an_updated_cache_finds_it_finished(src, out):
    image(src / "zz.png", 51)
    update(src, out)
    before = snapshot(out)
    report = cache(src, out, Forbidden(random_model()))
    assert report.exit_code == 3 and snapshot(out) == before


def test_an_open_reader_goes_on_with_the_old_generation(src, out):
    ds = LatentDataset(out, verify=True)
    wanted = {id: ds.tensors(i) for i, id in enumerate(ds.ids)}
    again = LatentDataset(out, verify=True)
    (src / "001.png").unlink()
    image(src / "005.png", 70, SIZES[2])
    update(src, out)
    assert [*again.ids] == [*ds.ids]
    for i, id in enumerate(again.ids):
        assert torch.equal(again.tensors(i)["latents"], wanted[id]["latents"])
    assert "001.png" not in [*LatentDataset(out).ids]
    assert again.entries(1)["id"] == again.ids[1]


def test_gc_removes_the_old_generation_and_what_no_row_lies_in(src, out, tmp_path, run):
    for name in ("000.png", "001.png", "002.png"):
        # the first task has no row that is needed
        (src / name).unlink()
    image(src / "zz.png", 51)
    update(src, out)
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    planned = {name for name, _ in collect(out, dry_run=True)}
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == names
    assert {"commits.jsonl", "source.parquet"} <= planned
    assert status(out).litter_nbytes > 0
    code, text, _ = run("gc", out)
    assert code == 0 and "removed" in text
    left = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert left == names - planned and not (out / "generations").exists()
    assert len([n for n in left if n.startswith("tasks/")]) == 3 + 3
    assert_as_fresh(src, out, tmp_path)
    assert collect(out) == []
    # and from what is left it is updated again
    image(src / "zzz.png", 52)
    assert update(src, out).new_images == 1
    assert_as_fresh(src, out, tmp_path)
    collect(out)
    assert_as_fresh(src, out, tmp_path)


def test_the_page_of_the_format_reads_an_updated_cache(src, tmp_path, monkeypatch):
    cache(src, tmp_path / "latents")
    image(src / "zz.png", 51)
    update(src, tmp_path / "latents")
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text(), re.S
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    wanted = rows_of(tmp_path / "latents")
    assert names["latents"].keys() == wanted.keys()
    assert all(torch.equal(names["latents"][id], wanted[id]["latents"]) for id in wanted)


def test_the_command(src, out, run, tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    shutil.rmtree(out)
    command = ("cache", src, out, "--model", tmp_path / "model", "--size", 32, "--update", "--quiet", "--device", "cpu")
    code, text, _ = run(*command)
    assert code == 3 and text.startswith("cached 10 of 11 images")
    code, text, _ = run(*command)
    assert code == 3 and text.startswith("nothing to do")
    image(src / "zz.png", 51)
    code, text, _ = run(*command)
    assert code == 3 and "cached 11 of 12 images" in text and "11 rows reused for generation 1" in text
    code, text, err = run(*command[:-4], "--rehash")
    assert code == 2 and "--rehash is for --update" in err
    code, _, err = run("cache", src, out, "--model", tmp_path / "model", "--size", 64, "--update", "--device", "cpu")
    assert code == 1 and "was planned otherwise" in err and "geometry.side 32 -> 64" in err


def test_known_contents():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**63, (50, 2)).astype(np.uint64)
    # equal first halves
    keys[10:20, 0] = keys[10, 0]
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys = keys[order]
    known = KnownContents(keys[:, 0].copy(), keys[:, 1].copy())
    assert [known.find(key.tobytes()) for key in keys] == list(range(50))
    others = keys ^ np.uint64(1)
    assert [known.find(key.tobytes()) for key in others] == [-1] * 50
    empty = KnownContents(keys[:0, 0], keys[:0, 1])
    assert empty.find(keys[0].tobytes()) == -1
