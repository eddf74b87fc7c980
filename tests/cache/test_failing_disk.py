"""Disks that are full, broken or read-only, at each stage of a run: nothing is lost, and the same command goes on."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cache_cases import commits_of, snapshot, write_images
from failing_disk import FailingDisk, after
from models import random_model

from capacitor_rt.cache import CacheRequest, LatentDataset, RunOptions, cache_images
from capacitor_rt.cache import meters as meters_module
from capacitor_rt.cache import run as run_module
from capacitor_rt.cache import watch as watch_module
from capacitor_rt.cache.folder import DiskFull
from capacitor_rt.cache.verify import verify
from capacitor_rt.errors import CacheError, CapacitorError

REQUEST = CacheRequest(32, dtype="fp32", task_inputs=3, batch=2)
TMP = r"\.tmp-[0-9a-f]{32}"


def run(src, out, **options):
    chosen = RunOptions(workers=0, progress=False, backoff=(0.0,), **options)
    return cache_images(src, out, random_model(), REQUEST, options=chosen)


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing") / "src"
    write_images(folder, 11, sizes=((40, 40),))
    (folder / "text.jpg").write_text("text")
    return folder


@pytest.fixture(scope="module")
def whole(src):
    run(src, src.parent / "whole")
    return snapshot(src.parent / "whole")


# stage, the call that fails there, how often it succeeds before, what it is called for
STAGES = {
    "plan: list": ("write", 0, rf"source\.parquet{TMP}"),
    "plan: list fsync": ("fsync", 0, rf"source\.parquet{TMP}"),
    "plan: list renamed": ("rename", 0, rf"source\.parquet{TMP}"),
    "plan": ("write", 0, rf"plan\.json{TMP}"),
    "plan fsync": ("fsync", 0, rf"plan\.json{TMP}"),
    "plan named": ("link", 0, rf"plan\.json{TMP}"),
    "folder synced": ("fsync", 0, r"\."),
    "leases made": ("mkdir", 0, "leases"),
    "lease": ("open", 1, rf"leases/[0-9a-f]{{8}}-\d+{TMP}"),
    "lease named": ("rename", 1, rf"leases/[0-9a-f]{{8}}-\d+{TMP}"),
    "latents made": ("open", 1, rf"tasks/.*{TMP}"),
    "tasks made": ("mkdir", 0, "tasks"),
    "latents": ("write", 3, rf"tasks/.*{TMP}"),
    "latents fsync": ("fsync", 1, rf"tasks/.*{TMP}"),
    "latents named": ("link", 1, rf"tasks/.*{TMP}"),
    "latents synced": ("fsync", 1, "tasks"),
    "index": ("write", 1, rf"index/.*{TMP}"),
    "index fsync": ("fsync", 1, rf"index/.*{TMP}"),
    "index named": ("link", 1, rf"index/.*{TMP}"),
    "index synced": ("fsync", 1, "index"),
    "commit": ("write", 1, r"commits\.jsonl"),
    "commit fsync": ("fsync", 1, r"commits\.jsonl"),
    "first commit": ("open", 0, r"commits\.jsonl"),
    "quarantine": ("write", 0, rf"quarantine\.jsonl{TMP}"),
    "quarantine fsync": ("fsync", 0, rf"quarantine\.jsonl{TMP}"),
    "quarantine renamed": ("rename", 0, rf"quarantine\.jsonl{TMP}"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
def test_at_every_stage_nothing_is_lost_and_the_same_command_goes_on(src, whole, tmp_path, monkeypatch, stage, code):
    call, count, pattern = STAGES[stage]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, out, getattr(errno, code), after(count, call, pattern))
        with pytest.raises(DiskFull if code == "ENOSPC" else CacheError) as raised:
            run(src, out)
        assert disk.calls and {c[0] for c in disk.calls} == {call}
    said = str(raised.value)
    assert str(out) in said and os.strerror(getattr(errno, code)) in said, said
    if code == "ENOSPC":
        assert "run the same command again" in said
    left = snapshot(out) if out.exists() else {}
    assert not [name for name in left if ".tmp-" in name]
    if "plan.json" in left:
        found = verify(out)
        assert not found.problems or not found.unfinished
        rows = found.rows
        if rows:
            assert len(LatentDataset(out, verify=True, allow_partial=True)) == rows
        lines = left.get("commits.jsonl", b"").splitlines()
        assert set(lines) <= set(whole["commits.jsonl"].splitlines())
    run(src, out)
    assert snapshot(out) == whole


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS"])
@pytest.mark.parametrize("name", [r"\.stamps", r"\.rows.*"])
def test_what_is_no_part_of_the_cache_may_be_refused_its_place(src, whole, tmp_path, monkeypatch, name, code):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, tmp_path / "out", getattr(errno, code), after(0, "open", name))
        run(src, tmp_path / "out")
        assert len(LatentDataset(tmp_path / "out", verify=True)) == 11
        assert disk.calls
    assert snapshot(tmp_path / "out") == whole


@pytest.mark.parametrize("commits", [0, 1, 3])
def test_a_disk_that_becomes_read_only_in_the_middle(src, whole, tmp_path, monkeypatch, commits):
    """As a file server or a kernel makes it after errors: no call that writes succeeds, cleaning up neither."""
    out = tmp_path / "out"

    def fails(name, path):
        return (out / "plan.json").exists() and len(commits_of(out)) >= commits

    with monkeypatch.context() as patch:
        disk = FailingDisk(patch, out, errno.EROFS, fails)
        with pytest.raises(CacheError, match="Read-only file system") as raised:
            run(src, out)
        assert disk.calls and str(out) in str(raised.value)
        # what is there can be looked at meanwhile
        assert len(commits_of(out)) == commits
        assert not verify(out).problems
        if commits:
            assert len(LatentDataset(out, verify=True, allow_partial=True)) == 3 * commits
        with pytest.raises(CacheError, match="give an OUT that you may write to"):
            run(src, out)
    # the lease that could not be removed is of a process that lives, this one, which knows that it gave it back
    monkeypatch.setattr(run_module.time, "sleep", lambda seconds: pytest.fail("it waits for a lease"))
    run(src, out)
    assert snapshot(out) == whole


@pytest.mark.parametrize("suffix", [".json", ".prom"])
def test_metrics_that_find_no_room_do_not_end_a_run(src, whole, tmp_path, monkeypatch, suffix, caplog):
    """But a place where they can never be written is told before the work begins."""
    monkeypatch.setattr(watch_module, "METRICS_SECONDS", 0.0)
    written = []
    real = Path.write_text

    def full(self, text, *args, **kwargs):
        if not self.name.startswith("metrics"):
            return real(self, text, *args, **kwargs)
        written.append(text)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, text, *args, **kwargs)

    monkeypatch.setattr(meters_module.Path, "write_text", full)
    report = run(src, tmp_path / "out", metrics=tmp_path / f"metrics{suffix}")
    assert report.exit_code == 3 and len(written) > 2
    assert snapshot(tmp_path / "out") == whole
    told = [r.message for r in caplog.records if "metrics" in r.message]
    assert len(told) == 1 and "No space left" in told[0]
    assert not list(tmp_path.glob("metrics*.tmp-*"))
    monkeypatch.undo()
    with pytest.raises(CapacitorError, match="cannot write metrics to"):
        run(src, tmp_path / "other", metrics=tmp_path / "missing" / "metrics.json")
    assert not commits_of(tmp_path / "other") if (tmp_path / "other").exists() else True


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and what changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(size, flags=0):
        done = libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, f"size={size}".encode())
        return done == 0

    if not mount("256k"):
        pytest.skip("mounting needs root")
    try:
        yield folder, lambda size: mount(size, 32)
    finally:
        libc.umount2(os.fsencode(folder), 2)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_real_disk_of_a_few_kilobytes_by_the_command(src, tmp_path, small_disk):
    """Through the command, with workers: filled up by degrees it ends with 1 and one line, until there is room."""
    folder, resize = small_disk
    random_model().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "capacitor_rt", "cache", str(src), "OUT", "--model", str(tmp_path / "model")]
    command += ["--size", "64", "--dtype", "fp32", "--task-inputs", "3", "--workers", "1", "--quiet"]
    command += ["--device", "cpu"]

    def cache(out):
        chosen = [str(out) if word == "OUT" else word for word in command]
        return subprocess.run(chosen, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert cache(tmp_path / "whole").returncode == 3
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as e:
            assert e.errno == errno.ENOSPC
    done = []
    for room in (0, 14):
        os.truncate(filler, max(0, os.stat(filler).st_size - room * 4096))
        found = cache(folder / "out")
        assert found.returncode in (1, 3), found
        assert "Traceback" not in found.stderr
        if found.returncode == 1:
            assert "No space left on device" in found.stderr, found.stderr
        done.append(len(commits_of(folder / "out")) if (folder / "out" / "plan.json").exists() else 0)
    assert done == sorted(done) and done[0] == 0
    assert resize("8m")
    found = cache(folder / "out")
    assert found.returncode == 3, found.stderr
    assert snapshot(folder / "out") == snapshot(tmp_path / "whole")
