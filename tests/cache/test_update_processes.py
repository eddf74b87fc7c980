"""Updates by several processes, and by such as are killed: the bytes are those of an undisturbed one."""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path

import pytest
from cache_cases import snapshot, write_images
from kill_driver import REQUEST as DRIVEN
from update_cases import (
    SIZES,
    age,
    cache,
    drive,
    image,
    out,
    src,
    update,
)

__all__ = ["out", "src"]


def test_workers_write_the_same_bytes(src, out, tmp_path):
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    os.utime(src / "004.png")
    for i in range(3):
        image(src / f"a{i}.png", 50 + i)
    update(src, out)
    update(src, copy, workers=2)
    assert snapshot(out) == snapshot(copy)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A source that has grown, shrunk and changed, the cache of what it was, and its update that nothing disturbed."""
    folder = tmp_path_factory.mktemp("grown")
    src = folder / "src"
    write_images(src, 30, sizes=SIZES)
    (src / "004b.png").write_bytes(b"no image")
    age(src)
    cache(src, folder / "old", request=DRIVEN)
    for i in range(8):
        image(src / f"{3 * i:03d}-new.png", 100 + i, SIZES[i % 3])
    for i in (3, 17, 18):
        (src / f"{i:03d}.png").unlink()
    image(src / "022.png", 200, SIZES[1])
    os.utime(src / "023.png")
    whole = Path(shutil.copytree(folder / "old", folder / "whole"))
    report = update(src, whole, request=DRIVEN)
    # of the 27 old ones that are left and unchanged all, and the one that is quarantined
    assert (report.reused, report.new_images) == (27, 10)
    return src, folder / "old", whole


def test_a_killed_update_leaves_the_old_rows_and_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, grown):
    src, old, whole = grown
    kills = 0
    for attempt in range(4):
        seed, out = random.randrange(1 << 30), Path(shutil.copytree(old, tmp_path / f"out-{attempt}"))
        died = drive("kill-update", src, out, 6, seed).split()
        assert snapshot(out) == snapshot(whole), f"seed {seed}"
        kills += len(died)
        if kills >= 4:
            return
    raise AssertionError(f"only {kills} of 24 kills struck an update")


@pytest.mark.parametrize(("count", "kills"), [(2, 0), (3, 1)])
def test_several_processes_share_an_update(tmp_path, grown, count, kills):
    src, old, whole = grown
    out = Path(shutil.copytree(old, tmp_path / "out"))
    seed = random.randrange(1 << 30)
    text = drive("share-update", src, out, count, kills, seed)
    codes = text.partition("codes ")[2].split()
    assert codes.count("3") >= count - kills, (seed, text)
    if not kills:
        # nothing is encoded twice
        assert sum(map(int, re.findall(r"read (\d+)", text))) == 10
    assert snapshot(out) == snapshot(whole), seed
