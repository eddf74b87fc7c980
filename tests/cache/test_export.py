"""Exporting: nothing is written before all is checked, nothing twice or over anything, and every row is read back."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_cases import flip_byte, snapshot, stamps
from export_cases import CLASSES, export, label_of, make_cache, rows_by_id
from safetensors.torch import load_file

from capacitor_rt.cache.export import lightningdit, pieces
from capacitor_rt.cache.export.base import relative_path, same
from capacitor_rt.cache.export.columns import MOST_CAPTION_BYTES
from capacitor_rt.cache.export.files import locked
from capacitor_rt.cache.export.pieces import cut
from capacitor_rt.cache.export.request import FORMATS, ExportRequest
from capacitor_rt.cache.folder import CacheFolder
from capacitor_rt.cache.leases import Leases
from capacitor_rt.cache.mutex import Mutex
from capacitor_rt.cache.plan import load_plan
from capacitor_rt.errors import CacheError, InputError

FOLDERS = {"labels": "folder"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("export"), flip=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Rows without flips or posterior, of two sizes."""
    return make_cache(tmp_path_factory.mktemp("bare"), area=True)


def refused(cache, tmp_path, match, format, **request):
    """The export ends in an InputError that says `match`, and has written nothing."""
    with pytest.raises(InputError, match=match):
        export(cache, tmp_path / "out", format, **request)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_goes_on_and_ends_in_the_same_bytes(cache, tmp_path, monkeypatch):
    export(cache, tmp_path / "whole", "lightningdit", labels="folder", shard_rows=2)
    real = lightningdit.LightningDiT.record
    seen: list[int] = []

    def stop(self, i):
        seen.append(i)
        if i == 5 and len([s for s in seen if s == 5]) == 2:
            raise KeyboardInterrupt
        return real(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(lightningdit.LightningDiT, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            export(cache, tmp_path / "out", "lightningdit", labels="folder", shard_rows=2)
    before = stamps(tmp_path / "out")
    shards = sorted(name for name in before if name.endswith(".safetensors"))
    assert len(shards) == 2 and not [name for name in before if ".tmp-" in name]
    report = export(cache, tmp_path / "out", "lightningdit", labels="folder", shard_rows=2)
    after = stamps(tmp_path / "out")
    assert report.new_rows == 5 and all(after[name] == before[name] for name in shards)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    again = export(cache, tmp_path / "out", "lightningdit", labels="folder", shard_rows=2)
    assert again.new_rows == 0 and stamps(tmp_path / "out") == after


@pytest.mark.parametrize(
    ("format", "request_"),
    [("mds", {"shard_bytes": 2000}), ("wds", {"shard_bytes": 40_000}), ("mar", FOLDERS), ("automodel", {})],
)
def test_a_kill_between_publishing_and_logging_costs_nothing(cache, tmp_path, format, request_):
    if format == "automodel":
        request_ = {"space": "whitened"}
    whole = export(cache, tmp_path / "out", format, **request_)
    kept = snapshot(tmp_path / "out")
    # as a kill leaves it: the last line torn, a temporary file, no index
    log = tmp_path / "out" / pieces.LOG
    data = log.read_bytes()
    log.write_bytes(data[: data.rstrip(b"\n").rfind(b"\n") + 8])
    (tmp_path / "out" / f"shard.tmp-{0:032x}").write_bytes(b"half")
    for name in ("index.json", "metadata.json"):
        (tmp_path / "out" / name).unlink(missing_ok=True)
    before = stamps(tmp_path / "out")
    report = export(cache, tmp_path / "out", format, **request_)
    assert 0 < report.new_rows <= whole.rows and snapshot(tmp_path / "out") == kept
    after = stamps(tmp_path / "out")
    changed = {name for name in after if after[name] != before.get(name) and (tmp_path / "out" / name).is_file()}
    assert changed <= {pieces.LOG, pieces.STAMPS, "index.json", "metadata.json"}


@pytest.mark.parametrize("call", ["link", "write", "unlink"])
def test_killed_at_any_call_it_goes_on_and_ends_in_the_same_bytes(cache, tmp_path, call):
    export(cache, tmp_path / "whole", "ddt", labels="folder")
    out = tmp_path / "out"
    real, killed = getattr(os, call), 0
    for at in (1, 4, 9, 13):
        left = at

        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                # as SIGKILL: nothing is cleaned up
                os._exit(9)
            return real(*args, **kwargs)

        child = os.fork()
        if child == 0:
            try:
                setattr(os, call, counted)
                export(cache, out, "ddt", labels="folder")
            finally:
                os._exit(0)
        killed += os.waitpid(child, 0)[1] == 9 << 8
    assert killed >= 3
    export(cache, out, "ddt", labels="folder")
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_missing_piece_is_written_again_and_a_damaged_one_named(cache, tmp_path):
    export(cache, tmp_path, "lightningdit", labels="folder", shard_rows=3)
    kept = snapshot(tmp_path)
    path = tmp_path / "latents_rank00_shard001.safetensors"
    path.unlink()
    assert export(cache, tmp_path, "lightningdit", labels="folder", shard_rows=3).new_rows == 3
    assert {k: v for k, v in snapshot(tmp_path).items() if k != pieces.LOG} == {
        k: v for k, v in kept.items() if k != pieces.LOG
    }
    with open(path, "ab") as f:
        f.write(b"x")
    with pytest.raises(CacheError, match=r"shard001.safetensors is damaged: its size has changed; move it away"):
        export(cache, tmp_path, "lightningdit", labels="folder", shard_rows=3)


@pytest.mark.parametrize(("format", "request_"), [("lightningdit", {"shard_rows": 3}), ("ddt", {})])
def test_a_changed_byte_of_a_finished_piece_is_found(cache, tmp_path, monkeypatch, format, request_):
    """By a hash, unless the files are those that this machine has written: a size tells of nothing."""
    out = tmp_path / "out"
    export(cache, out, format, labels="folder", **request_)
    hashed = []
    real = pieces.files_hash
    monkeypatch.setattr(pieces, "files_hash", lambda paths: hashed.append(1) or real(paths))
    export(cache, out, format, labels="folder", **request_)
    assert not hashed
    path = next(p for p in sorted(out.rglob("*")) if p.suffix in (".safetensors", ".pt") and p.stat().st_size > 500)
    info, kept = path.stat(), path.read_bytes()
    flip_byte(path, info.st_size - 5)
    # a program may set this time, and not that of the status
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(CacheError, match="is damaged: its bytes have changed; move it away, and export again"):
        export(cache, out, format, labels="folder", **request_)
    path.write_bytes(kept)
    hashed.clear()
    assert export(cache, out, format, labels="folder", **request_).new_rows == 0 and len(hashed) == 1
    # a copy elsewhere is read once, whatever its notes say
    shutil.copytree(out, tmp_path / "copy")
    count = len((out / pieces.LOG).read_bytes().splitlines())
    for times in (count, 0):
        hashed.clear()
        assert export(cache, tmp_path / "copy", format, labels="folder", **request_).new_rows == 0
        assert len(hashed) == times
    (out / pieces.STAMPS).unlink()
    (out / pieces.STAMPS).symlink_to(tmp_path / "elsewhere")
    export(cache, out, format, labels="folder", **request_)
    assert not (tmp_path / "elsewhere").exists()


def test_other_settings_do_not_go_on_with_an_export(cache, bare, tmp_path):
    export(cache, tmp_path, "lightningdit", labels="folder")
    before = stamps(tmp_path)
    with pytest.raises(InputError, match=r'latents.layout "patchified" -> "unpatchified"'):
        export(cache, tmp_path, "lightningdit", labels="folder", layout="unpatchified")
    with pytest.raises(InputError, match='export "lightningdit" -> "mds"'):
        export(bare, tmp_path, "mds")
    labels = {row["id"]: 1 - min(1, label_of(row["id"])) for row in rows_by_id(cache)}
    (tmp_path.parent / "other.json").write_text(json.dumps(labels))
    with pytest.raises(InputError, match=r"contents.labels "):
        export(cache, tmp_path, "lightningdit", labels=str(tmp_path.parent / "other.json"))
    assert stamps(tmp_path) == before


def test_nothing_that_exists_is_overwritten(cache, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'mine.txt' and is no export: give a new or an empty folder"):
        export(cache, tmp_path / "out", "wds")
    with pytest.raises(InputError, match="lies in the cache"):
        export(cache, cache / "out", "wds")
    with pytest.raises(InputError, match="is a file: give a folder"):
        export(cache, tmp_path / "out" / "mine.txt", "wds")
    # a file of ours in name only
    export(cache, tmp_path / "made", "mar", labels="folder")
    name = "bee/001.png.npz"
    (tmp_path / "made" / pieces.LOG).unlink()
    (tmp_path / "made" / name).write_bytes(b"other")
    with pytest.raises(CacheError, match=r"001.png.npz exists and differs"):
        export(cache, tmp_path / "made", "mar", labels="folder")
    assert (tmp_path / "made" / name).read_bytes() == b"other"
    assert snapshot(tmp_path / "out") == {"mine.txt": b"mine"}


def test_two_exports_at_once_are_kept_apart(cache, tmp_path):
    with locked(tmp_path), pytest.raises(CacheError, match="is being written by another export"):
        export(cache, tmp_path, "wds")


@pytest.mark.parametrize("line", [b"[]", b"nonsense", b'{"piece": 0}', b'{"piece": "0", "files": 1}'])
def test_a_damaged_log_is_named(cache, tmp_path, line):
    export(cache, tmp_path, "wds")
    (tmp_path / pieces.LOG).write_bytes(line + b"\n")
    with pytest.raises(CacheError, match=r"capacitor.jsonl line 1 is damaged: delete that line"):
        export(cache, tmp_path, "wds")
    (tmp_path / pieces.MANIFEST).write_bytes(line)
    with pytest.raises((CacheError, InputError), match=r"capacitor.json cannot be read|was exported otherwise"):
        export(cache, tmp_path, "wds")


def test_a_row_that_does_not_read_back_is_found(cache, tmp_path, monkeypatch):
    real = lightningdit.LightningDiT.chunk

    def wrong(self, tensor):
        return real(self, -tensor if torch.equal(tensor, middle) else tensor)

    middle = rows_by_id(cache)[4]["latents_flip"]
    monkeypatch.setattr(lightningdit.LightningDiT, "chunk", wrong)
    with pytest.raises(CacheError, match=r"does not read back .*: latents_flip of 'bee/001.png' differs"):
        export(cache, tmp_path, "lightningdit", labels="folder")
    assert (tmp_path / pieces.LOG).read_bytes() == b""


def test_a_damaged_cache_is_not_exported(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    (shard, *_) = sorted((tmp_path / "cache").rglob("*.safetensors"))
    flip_byte(shard, shard.stat().st_size - 5)
    with pytest.raises(CacheError, match="does not match its hash"):
        export(tmp_path / "cache", tmp_path / "out", "wds")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_caches_that_are_none_or_not_finished_are_refused(cache, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "latents_rank00_shard000.safetensors").write_bytes(b"")
    with pytest.raises(CacheError, match="is no latent cache"):
        export(tmp_path / "foreign", tmp_path / "out", "wds")
    with pytest.raises(CacheError, match="is not a folder"):
        export(tmp_path / "nowhere", tmp_path / "out", "wds")
    shutil.copytree(cache, tmp_path / "part")
    commits = tmp_path / "part" / "commits.jsonl"
    commits.write_bytes(b"".join(commits.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(CacheError, match="is not finished: "):
        export(tmp_path / "part", tmp_path / "out", "wds")
    # as a run holds the task that it is at
    with CacheFolder(tmp_path / "part") as folder:
        mutex = Mutex(folder)
        leases = Leases(folder, mutex, load_plan(folder).plan8)
        with mutex:
            assert leases.take(2)
        with pytest.raises(CacheError, match=r"is being written, 8 of 9 inputs done \(.*\): wait for it to end"):
            export(tmp_path / "part", tmp_path / "out", "wds")
        leases.release(2)
    assert not (tmp_path / "out").exists()


def test_what_a_reader_cannot_take_is_refused_with_what_to_do(cache, bare, tmp_path):
    refused(bare, tmp_path, "holds no latents of mirrored images.*cache with --flip", "lightningdit", labels="folder")
    refused(bare, tmp_path, r"2 image sizes \(32x128, 64x64.*stacks rows of one", "ddt", labels="folder")
    refused(cache, tmp_path, "holds no logsnr: cache with --posterior", "wds", posterior=True)
    refused(cache, tmp_path, "reads a label per row.*--labels folder", "lightningdit")
    refused(cache, tmp_path, "would misread --layout patchified", "mds", layout="patchified")
    refused(cache, tmp_path, "REPA, SRA would misread the stride", "repa", layout="patchified", labels="folder")
    refused(cache, tmp_path, "reads latents of FLUX.2: pass --space flux2", "musubi")
    refused(cache, tmp_path, "--space flux2 needs --calibration", "musubi", space="flux2")
    (tmp_path / "labels.json").write_text(json.dumps({row["id"]: 0 for row in rows_by_id(cache)}))
    refused(cache, tmp_path, "DDT takes labels from the folders", "ddt", labels=str(tmp_path / "labels.json"))
    refused(cache, tmp_path, "'nope.csv' is not a file", "mar", labels="nope.csv")
    refused(cache, tmp_path, "--captions does not go with --format mar", "mar", labels="folder", captions="txt")
    refused(cache, tmp_path, "--images DIR is missing", "wds", captions="txt")
    refused(cache, tmp_path, "--scale 0.0 is no positive number", "wds", scale=0.0)
    refused(cache, tmp_path, "--shard-rows does not go with --format wds: use --shard-bytes", "wds", shard_rows=5)
    refused(cache, tmp_path, "--prefix 'a/b'", "wds", prefix="a/b")
    refused(cache, tmp_path, "micro_diffusion reads caption_latents", "mds", preset="micro")
    refused(cache, tmp_path, "format 'zip' is unknown: use one of lightningdit", "zip")


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in ("lightningdit", "mar", "repa", "repae", "musubi")])
def test_the_manifest_says_what_the_files_hold(cache, tmp_path, format):
    request = {"labels": "folder"} if FORMATS[format].labels != "unused" else {}
    request |= {"space": "whitened"} if FORMATS[format].space is None else {}
    export(cache, tmp_path, format, **request)
    manifest = json.loads((tmp_path / "capacitor.json").read_bytes())
    assert manifest["format"] == "capacitor-export/1" and manifest["export"] == format
    assert manifest["cache"]["rows"] == 9 and "/whitened@" in manifest["cache"]["latent_space"]
    latents = manifest["latents"]
    layout = "unpatchified" if format in ("mds", "ddt") else "patchified"
    assert (latents["layout"], latents["space"], latents["scale"], latents["approximate"]) == (
        layout,
        "whitened",
        1.0,
        False,
    )
    assert (latents["channels"], latents["stride"]) == ((2, 8) if layout == "unpatchified" else (8, 16))
    assert manifest["classes"] == (list(CLASSES) if request.get("labels") else None)


@pytest.mark.parametrize("id", ["../x.png", "/etc/x.png", "a//b.png", "a/./b.png", "a/../b.png", "x" * 250])
def test_ids_that_are_no_names_of_files_are_refused(id):
    with pytest.raises(InputError, match="use mds or wds"):
        relative_path(id)
    assert os.fspath(relative_path("a/b\\\\c\\xff.png")) == os.fsdecode(b"a/b\\c\xff.png")


def test_cut_keeps_to_the_limit_and_to_at_least_a_row():
    rows = np.arange(10, 18)
    sizes = np.array([3, 3, 3, 9, 1, 1, 1, 12])
    assert [p.tolist() for p in cut(rows, sizes, 7)] == [[10, 11], [12], [13], [14, 15, 16], [17]]
    assert [p.tolist() for p in cut(rows, 2, 4)] == [[10, 11], [12, 13], [14, 15], [16, 17]]
    assert list(cut(np.arange(0), 1, 1)) == []


def test_values_are_the_same_only_to_the_bit():
    zero, minus = torch.tensor([0.0]), torch.tensor([-0.0])
    assert torch.equal(zero, minus) and not same(zero, minus) and same(zero, zero.clone())
    assert not same(zero, zero.double()) and not same(zero, zero[None]) and not same(zero, 0.0)
    assert not same(1, True) and same({"a": 1}, {"a": 1})


def test_what_float16_cannot_hold_is_refused_or_told(tmp_path):
    cache = make_cache(tmp_path, each=1, dtype="fp32")
    report = export(cache, tmp_path / "half", "mds")
    assert 0 < report.rounding < 4 * 2**-11
    assert export(cache, tmp_path / "full", "mds", dtype="fp32").rounding == 0
    with pytest.raises(InputError, match=r"holds [\d.e+]+, which torch.float16 cannot: use --dtype fp32"):
        export(cache, tmp_path / "out", "mds", scale=1e5)
    assert not (tmp_path / "out").exists()


def test_rows_are_in_the_order_of_their_ids_whatever_the_cache_s(bare, tmp_path, monkeypatch):
    from capacitor_rt.cache import LatentDataset

    whole = LatentDataset.column

    def shuffled(self, name):
        column = whole(self, name)
        # ids as another source might give them
        return column if name != "id" else column.take(list(range(len(column)))[::-1])

    export(bare, tmp_path / "a", "comfy", space="whitened")
    found = {p.name: load_file(p)["latent_tensor"] for p in (tmp_path / "a").glob("*.latent")}
    assert len(found) == 9
    monkeypatch.setattr(LatentDataset, "column", shuffled)
    rows = ExportRequest("comfy", space="whitened").resolved()
    from capacitor_rt.cache.export.rows import Rows, open_cache

    reversed_ = Rows(open_cache(bare), rows)
    assert list(reversed_.ids) == sorted(reversed_.ids) and reversed_.order.tolist() == list(range(9))[::-1]


def test_the_page_gives_the_defaults_that_the_rules_have():
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| [^|]* \| (\w+), ([\w ]+) \|$", page, re.M)
    assert {row[0] for row in rows} == set(FORMATS)
    for name, _, layout, dtype in rows:
        rules = FORMATS[name]
        assert (layout, dtype.replace("as cached", "stored")) == (rules.layouts[0], rules.dtypes[0]), name
    assert f"more than {MOST_CAPTION_BYTES // 1024} KiB" in page


def test_the_readme_has_a_command_for_each_format_that_is_taken():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    commands = re.findall(r"`capacitor-rt export latents/ (\S+) ([^`]+)`", text)
    assert {re.search(r"-f (\w+)", options)[1] for _, options in commands} == set(FORMATS)
    for _, options in commands:
        words = options.split()
        given = {
            word.lstrip("-").replace("-", "_"): words[n + 1 : n + 2] for n, word in enumerate(words) if word[0] == "-"
        }
        values = {k: (v[0] if v and v[0][0] != "-" else True) for k, v in given.items()}
        ExportRequest(values.pop("f"), **values).resolved()
