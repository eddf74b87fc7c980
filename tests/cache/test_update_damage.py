"""Updates that were interrupted, and damage to what they build on: the cache is whole at every moment."""

from __future__ import annotations

from pathlib import Path

import pytest
from cache_cases import open_cache, snapshot
from update_cases import (
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

from capacitor_rt.cache import LatentDataset, accounts
from capacitor_rt.cache.garbage import collect
from capacitor_rt.cache.generations import recorded
from capacitor_rt.cache.repair import repair
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError

__all__ = ["out", "reads", "run", "src"]


def test_an_interrupted_update_leaves_the_old_cache_and_goes_on(src, out, tmp_path, monkeypatch, reads, run):
    image(src / "000a.png", 50)
    image(src / "zz.png", 51)
    before, old_rows = snapshot(out), rows_of(out)
    original = accounts._make_current

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(accounts, "_make_current", stop)
    with pytest.raises(KeyboardInterrupt):
        update(src, out)
    monkeypatch.setattr(accounts, "_make_current", original)
    after = snapshot(out)
    assert all(after[name] == data for name, data in before.items())
    assert list(rows_of(out)) == list(old_rows)
    found = verify(out)
    assert found.problems == [] and any("an update to 13 inputs is under way" in note for note in found.notes)
    _, text, _ = run("status", out)
    assert "an update is unfinished: 13 of 13 inputs done, 5 of 5 tasks" in text
    # what it has done is no litter
    assert collect(out) == []
    reads["read"].clear()
    report = update(src, out)
    assert report.generation == 1 and reads["read"] == []
    assert_as_fresh(src, out, tmp_path)


def test_a_source_that_changes_during_an_update_keeps_what_the_update_has_done(src, out, tmp_path, monkeypatch, reads):
    for i in range(4):
        image(src / f"a{i}.png", 50 + i)
    with monkeypatch.context() as patch:
        patch.setattr(accounts, "_make_current", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            update(src, out)
    image(src / "b.png", 60)
    reads["decoded"].clear()
    report = update(src, out)
    assert reads["decoded"] == ["b.png"] and report.generation == 2
    assert_as_fresh(src, out, tmp_path)
    # the one that was given up goes with gc, the rows that were taken from it stay
    collect(out)
    with open_cache(out)[0] as folder:
        assert recorded(folder) == []
    assert_as_fresh(src, out, tmp_path)


def begun(src, out, monkeypatch) -> str:
    """An update that is whole and was not made current; the digits of its plan."""
    image(src / "zz.png", 51)
    with monkeypatch.context() as patch:
        patch.setattr(accounts, "_make_current", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            update(src, out)
    return next(path.name[:8] for path in (out / "generations").iterdir())


@pytest.mark.parametrize("damage", ["latents", "index", "uncommitted", "carried", "source", "record", "lost record"])
def test_damage_to_an_unfinished_update_is_mended_by_doing_it_again(src, out, tmp_path, monkeypatch, damage):
    plan8 = begun(src, out, monkeypatch)
    name = {
        "latents": f"tasks/{plan8}-000003.safetensors",
        "index": f"index/{plan8}-000001.parquet",
        "uncommitted": f"tasks/{plan8}-000003.safetensors",
        "carried": f"carried-{plan8}.jsonl",
        "source": f"source-{plan8}.parquet",
    }.get(damage, f"generations/{plan8}.json")
    data = bytearray((out / name).read_bytes())
    data[-1 if damage == "latents" else len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    if damage == "uncommitted":
        (out / f"commits-{plan8}.jsonl").unlink()
    if damage == "lost record":
        for path in (out / "index").glob(f"{plan8}-*"):
            path.unlink()
    if "record" in damage:
        with pytest.raises(CacheError, match=r"the plan of another generation, is damaged: run .*--repair"):
            update(src, out)
        repair(out, verify(out))
    assert len(rows_of(out)) == 10
    assert update(src, out).cached == 11
    assert_as_fresh(src, out, tmp_path)


def test_damage_to_the_record_of_an_earlier_generation(src, out, tmp_path):
    image(src / "zz.png", 51)
    update(src, out)
    record = next((out / "generations").iterdir())
    record.write_bytes(b"{")
    repair(out, verify(out))
    assert verify(out).problems == [] and record.read_bytes() != b"{"
    collect(out)
    assert_as_fresh(src, out, tmp_path)


def test_unfinished_updates_can_be_given_up(src, out, tmp_path, monkeypatch):
    before = snapshot(out)
    image(src / "zz.png", 51)
    with monkeypatch.context() as patch:
        patch.setattr(accounts, "_make_current", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            update(src, out)
    collect(out, drop_updates=True)
    assert snapshot(out) == before


@pytest.mark.parametrize("kind", ["link", "folder", "large"])
def test_the_log_of_an_unfinished_update_is_none_of_the_cache(src, out, monkeypatch, kind):
    """Damage that keeps it from being read: the cache is sound, and what is under way can be given up."""
    before = snapshot(out)
    plan8 = begun(src, out, monkeypatch)
    log = out / f"commits-{plan8}.jsonl"
    log.unlink()
    if kind == "link":
        log.symlink_to("/dev/zero")
    elif kind == "folder":
        log.mkdir()
    else:
        log.write_bytes(bytes(3 << 20))
    found = verify(out)
    assert found.problems == [] and not found.unfinished
    (note,) = [note for note in found.notes if "is under way" in note]
    assert log.name in note and "gc --drop-updates" in note
    if kind == "folder":
        # it may hold anything
        log.rmdir()
    collect(out, drop_updates=True)
    assert snapshot(out) == before and verify(out).notes == []


def damaged_shared_file(out: Path) -> Path:
    ds = LatentDataset(out)
    return out / ds._carried[0].name


@pytest.mark.parametrize("how", ["bytes", "missing"])
def test_damage_in_a_file_of_an_earlier_generation(src, out, tmp_path, how):
    image(src / "zz.png", 51)
    update(src, out)
    collect(out)
    path = damaged_shared_file(out)
    if how == "bytes":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(CacheError, match=r"is damaged: run `capacitor-rt verify --repair"):
        cache(src, out)
    found = verify(out)
    assert found.damaged == [0] and path.name in found.problems[0]
    repair(out, found)
    report = cache(src, out)
    assert report.exit_code == 3 and report.new_images
    assert_as_fresh(src, out, tmp_path)


@pytest.mark.parametrize("is_old_kept", [True, False], ids=["with the old generation", "after gc"])
@pytest.mark.parametrize("how", ["missing", "torn", "a digit", "a line"])
def test_a_damaged_list_of_carried_files_is_restored_from_these(src, out, tmp_path, run, how, is_old_kept):
    image(src / "zz.png", 51)
    update(src, out)
    if not is_old_kept:
        collect(out)
    path = next(out.glob("carried-*.jsonl"))
    kept = path.read_bytes()
    lines = kept.splitlines(keepends=True)
    assert len(lines) > 2
    digit = bytearray(kept)
    at = kept.index(b'"data_xxh3":"') + 13
    digit[at] = ord("1" if digit[at] == ord("0") else "0")
    found = {
        "missing": None,
        "torn": kept[: len(kept) // 2],
        "a digit": bytes(digit),
        "a line": kept.replace(lines[1], b""),
    }
    path.unlink()
    if found[how] is not None:
        assert found[how] != kept
        path.write_bytes(found[how])
    for refused in (lambda: LatentDataset(out), lambda: cache(src, out), lambda: update(src, out)):
        with pytest.raises(CacheError, match="verify --repair"):
            refused()
    code, said, errors = run("verify", out)
    assert code == 1 and path.name in said + errors and "plan.json" not in said + errors
    code, said, errors = run("verify", "--repair", out)
    assert f"{path.name}: restored from the files of latents" in said + errors
    assert path.read_bytes() == kept and not verify(out).problems
    assert cache(src, out).new_images == 0
    assert_as_fresh(src, out, tmp_path)


def test_a_list_of_carried_files_that_nothing_tells_of_is_said_to_be_lost(src, out, tmp_path):
    image(src / "zz.png", 51)
    update(src, out)
    collect(out)
    path, data = next(out.glob("carried-*.jsonl")), damaged_shared_file(out)
    path.unlink()
    kept = data.read_bytes()
    data.unlink()
    lost = rf"1 of the \d files that rows lie in are missing or damaged too, such as {data.stem}"
    with pytest.raises(CacheError, match=lost):
        repair(out, verify(out))
    # and nothing is lost by asking
    data.write_bytes(kept)
    repair(out, verify(out))
    assert not verify(out).problems and LatentDataset(out, verify=True)[0]


def test_damage_in_the_old_generation_is_not_taken_over(src, out, tmp_path):
    path = sorted((out / "tasks").iterdir())[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    image(src / "zz.png", 51)
    told: list[str] = []
    report = update(src, out, told=told)
    assert report.reused == 9 and any("is encoded anew" in line and path.name in line for line in told)
    assert_as_fresh(src, out, tmp_path)


def test_a_lost_plan_is_that_of_the_current_generation(src, out, tmp_path):
    image(src / "zz.png", 51)
    update(src, out)
    before = (out / "plan.json").read_bytes()
    (out / "plan.json").write_bytes(b"{")
    repair(out, verify(out))
    assert (out / "plan.json").read_bytes() == before
