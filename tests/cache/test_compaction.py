"""Rows of hardly needed files are copied: the same bytes for every reader, and nothing is lost whenever it ends."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from cache_cases import snapshot
from update_cases import OLD, assert_as_fresh, cache, drive, image, rows_of, run, update

from capacitor_rt.cache import CacheRequest
from capacitor_rt.cache.commits import read_log
from capacitor_rt.cache.compaction import compact, usage
from capacitor_rt.cache.folder import TMP, CacheFolder
from capacitor_rt.cache.garbage import collect, used_in_part
from capacitor_rt.cache.mutex import me, owner_bytes
from capacitor_rt.cache.plan import load_plan
from capacitor_rt.cache.status import status
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError, InputError

__all__ = ["run"]
SIZES = ((40, 40), (20, 80), (90, 24))


@pytest.fixture(scope="module")
def worn(tmp_path_factory) -> tuple[Path, Path]:
    """A source, and its cache after updates by which files of three rows have one or two left that are needed."""
    folder = tmp_path_factory.mktemp("worn")
    src, out = folder / "src", folder / "out"
    src.mkdir()
    for i in range(15):
        image(src / f"{i:03d}.png", i, SIZES[i % 3])
    (src / "004b.png").write_bytes(b"no image")
    os.utime(src / "004b.png", (OLD, OLD))
    cache(src, out)
    for i in (0, 1, 4, 5, 8, 12):
        (src / f"{i:03d}.png").unlink()
        if i in (5, 12):
            update(src, out)
    image(src / "zz.png", 99)
    update(src, out)
    return src, out


@pytest.fixture
def places(worn, tmp_path) -> tuple[Path, Path]:
    return worn[0], Path(shutil.copytree(worn[1], tmp_path / "out"))


def same(one: dict, other: dict) -> bool:
    return [*one] == [*other] and all(torch.equal(one[id][kind], other[id][kind]) for id in one for kind in one[id])


def uses(out: Path) -> dict[str, float]:
    with CacheFolder(out) as folder:
        return {use.name.partition("-")[2]: use.live for use in usage(folder, load_plan(folder))}


def test_gc_says_how_much_of_each_file_is_needed_and_compacts(places, run, tmp_path):
    src, out = places
    before, size = rows_of(out), sum(p.stat().st_size for p in (out / "tasks").iterdir())
    code, text, lines = run("gc", out, "--dry-run")
    assert code == 0 and "1 of 3 rows needed (33%)" in lines and "`gc --compact` copies the rest" in text
    code, _, lines = run("gc", out, "--compact", "--min-live", "0.6")
    assert code == 0 and "of which less than 60% is needed" in lines
    assert same(rows_of(out), before) and not verify(out).problems
    assert all(live >= 0.6 for live in uses(out).values())
    assert sum(p.stat().st_size for p in (out / "tasks").iterdir()) < size
    assert not (out / "generations").exists() and collect(out) == []
    assert not (out / ".lock").exists() and not (out / "leases").exists()
    assert status(out).generation == 4
    # what comes after is what would have come without
    assert_as_fresh(src, out, tmp_path)
    (src / "900.png").write_bytes((src / "002.png").read_bytes())
    try:
        assert update(src, out).new_images == 1
        assert_as_fresh(src, out, tmp_path)
    finally:
        (src / "900.png").unlink()


def test_nothing_is_done_where_all_is_needed(places):
    src, out = places
    before = snapshot(out)
    assert compact(out, 0.1) == 0 and snapshot(out) == before
    with pytest.raises(InputError, match="min_live 0 is no share"):
        compact(out, 0)
    fresh = out.parent / "fresh"
    cache(src, fresh)
    assert compact(fresh, 1.0) == 0 and used_in_part(fresh) == []


def test_what_one_has_left_that_was_killed_at_its_end_is_removed(places):
    _, out = places
    compact(out)
    whole = snapshot(out)
    (out / "leases").mkdir()
    lost = [".lock", "leases/.clock", "leases/01234567-000001", f"quarantine.jsonl{TMP}{'0' * 32}"]
    for name in lost:
        (out / name).write_bytes(owner_bytes(me()._replace(start=1)))
    assert compact(out) == 0 and snapshot(out) == whole and not (out / "leases").exists()
    # the lock alone, too
    (out / ".lock").touch()
    assert compact(out) == 0 and snapshot(out) == whole


def test_the_old_generation_is_whole_until_it_is_removed(places):
    _, out = places
    from capacitor_rt.cache import LatentDataset

    ds = LatentDataset(out, verify=True)
    wanted = [ds.tensors(i)["latents"] for i in range(len(ds))]
    assert compact(out) > 0
    assert all(torch.equal(ds.tensors(i)["latents"], wanted[i]) for i in range(len(ds)))
    assert {name for name, _ in collect(out)}


def test_kills_at_random_moments_lose_nothing(places, tmp_path):
    """Meanwhile and after each the cache is read, all of it; what comes out is what an undisturbed run gives."""
    src, worn = places
    whole = Path(shutil.copytree(worn, tmp_path / "whole"))
    wanted = rows_of(whole)
    compact(whole)
    kills = 0
    for attempt in range(4):
        seed, out = random.randrange(1 << 30), Path(shutil.copytree(worn, tmp_path / f"out-{attempt}"))
        died = drive("kill-update-compact", src, out, 6, seed).split()
        assert snapshot(out) == snapshot(whole), f"seed {seed}"
        kills += len(died)
        if kills >= 4:
            break
    assert kills >= 4 and same(rows_of(out), wanted) and not verify(out).problems


def test_what_is_under_way_or_damaged_is_left_alone(places, monkeypatch):
    src, out = places
    victim = next(out / use.name for use in used_in_part(out) if use.live < 0.5)
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    before = snapshot(out)
    with pytest.raises(CacheError, match="is damaged"):
        compact(out)
    data[-3] ^= 1
    victim.write_bytes(data)
    assert snapshot(out).keys() == before.keys()
    with CacheFolder(out) as folder:
        plan = load_plan(folder)
        log = out / plan.log_name
    lines = log.read_bytes()
    log.write_bytes(b"".join(lines.splitlines(keepends=True)[:-1]))
    with pytest.raises(CacheError, match="is not finished"):
        compact(out)
    log.write_bytes(lines)
    # an update that was begun: its plan lies there
    image(src / "new.png", 7)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("capacitor_rt.cache.run._write_tasks", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                update(src, out)
        with pytest.raises(CacheError, match=r"an update of .* is under way: .*--drop-updates"):
            compact(out)
        collect(out, drop_updates=True)
        assert compact(out) > 0
    finally:
        (src / "new.png").unlink()


def test_a_task_that_was_written_otherwise_keeps_it_from_becoming_current(places, monkeypatch):
    """As by an update of files of other bytes and equal names and sizes, which goes on with the plan that it finds."""
    _, out = places
    from capacitor_rt.cache import compaction

    with CacheFolder(out) as folder:
        before = load_plan(folder).id
    with monkeypatch.context() as patch:
        patch.setattr(compaction, "account", lambda store, tasks: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compact(out)
    original = compaction.read_index

    def read_index(folder, plan, commit):
        table = original(folder, plan, commit)
        if plan.id != before and commit.task == 1:
            table = table.set_column(table.column_names.index("bytes_hash"), "bytes_hash", table["row_hash"])
        return table

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "read_index", read_index)
        with pytest.raises(CacheError, match=r"differs from that of the generation before \(bytes_hash\)"):
            compact(out)
    with CacheFolder(out) as folder:
        assert load_plan(folder).id == before
    assert compact(out) > 0 and not verify(out).problems


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_rows_that_inputs_share_and_rows_of_integers(tmp_path, dtype):
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    request = CacheRequest(32, area=True, dtype=dtype, task_inputs=4, batch=2, dedupe=True)
    for i in range(8):
        image(src / f"{i}.png", i, SIZES[i % 3])
    shutil.copy2(src / "3.png", src / "3-copy.png")
    cache(src, out, request=request)
    for i in (0, 1, 2, 4, 5, 6):
        (src / f"{i}.png").unlink()
    update(src, out, request=request)
    before = rows_of(out)
    assert compact(out, 0.9) > 0
    collect(out)
    assert same(rows_of(out), before) and not verify(out).problems
    with CacheFolder(out) as folder:
        plan = load_plan(folder)
        assert sum(commit.rows for commit in read_log(folder, plan).commits.values()) == 3


def test_damage_of_what_one_that_ended_early_has_left_is_done_again(places, tmp_path, monkeypatch):
    _, out = places
    from capacitor_rt.cache import compaction

    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    compact(whole)
    with monkeypatch.context() as patch:
        patch.setattr(compaction, "account", lambda store, tasks: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compact(out)
    with CacheFolder(whole) as folder:
        plan8 = load_plan(folder).plan8
    victim = max(out.glob(f"tasks/{plan8}-*"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    notes = []
    assert compact(out, note=notes.append) > 0 and any("moved to damaged/" in line for line in notes)
    assert not verify(out).problems and same(rows_of(out), rows_of(whole))
    assert victim.read_bytes() == (whole / "tasks" / victim.name).read_bytes()
