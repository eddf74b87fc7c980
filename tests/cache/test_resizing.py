"""Images that the device resizes: the files are those of a run whose workers resize, whatever the images are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import image_files as files
import numpy as np
import pytest
import torch
from cache_cases import snapshot
from models import random_model

from capacitor_kernels.launch import INTERPRETED
from capacitor_kernels.ops.resize import ResizeConfig
from capacitor_kernels.tuning import using
from capacitor_rt import InputError
from capacitor_rt.cache import CacheRequest, begin, cache_images, cache_views, parse_views
from capacitor_rt.cache import resizing as module
from capacitor_rt.cache.decoding import DecodePool
from capacitor_rt.cache.options import RunOptions
from capacitor_rt.cache.resizing import Resizer, by_device
from capacitor_rt.cache.sources import ColumnsRequest
from capacitor_rt.cache.sources.files import folder_source
from capacitor_rt.images.deferred import ready_bytes
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.load import PixelPolicy, View, load_image, load_views

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU it is one of tests/cache/test_cache_gpu.py")
BUCKETS = (Size(32, 48), Size(40, 40), Size(48, 32))
SIZES = ((70, 90), (90, 70), (33, 35), (40, 40), (200, 61), (48, 48))


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    """Photographs of many sizes in every orientation, one PNG, one with a profile, one broken."""
    folder = tmp_path_factory.mktemp("src")
    for i in range(12):
        picture = files.texture(*SIZES[i % len(SIZES)], i)
        options = {"exif": files.exif(i % 8 + 1)} | ({"icc_profile": files.icc_profile()} if i == 9 else {})
        data = files.encoded(picture, "JPEG", **options) if i != 7 else files.encoded(picture, "PNG")
        (folder / f"{i:03}.{'png' if i == 7 else 'jpg'}").write_bytes(data[:-90] if i == 5 else data)
    return folder


@pytest.fixture(autouse=True)
def large_tiles():
    # few programs: the interpreter takes as long for a large tile as for a small one
    with using("resize", ResizeConfig(64, 512, 4)):
        yield


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("request_", [CacheRequest(32, batch=3, task_inputs=7), CacheRequest(40, area=True, batch=3)])
def test_the_files_are_those_of_the_cpu(src, tmp_path, monkeypatch, workers, request_):
    monkeypatch.setattr(begin, "BYTES_PER_WORKER", 1)
    for name, resize in (("cpu", "cpu"), ("gpu", "gpu")):
        options = RunOptions(workers=workers, progress=False, resize=resize)
        report = cache_images(src, tmp_path / name, random_model(), request_, options=options)
        assert report.quarantined == {"truncated": 1} and report.cached == 11
    assert snapshot(tmp_path / "gpu") == snapshot(tmp_path / "cpu")


def test_a_run_goes_on_with_the_other(src, tmp_path):
    request = CacheRequest(32, batch=3, task_inputs=4)
    options = RunOptions(workers=0, progress=False, resize="cpu")
    cache_images(src, tmp_path / "cpu", random_model(), request, options=options)
    cache_images(src, tmp_path / "both", random_model(), request, options=options)
    log = tmp_path / "both" / "commits.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:1]))
    options = RunOptions(workers=0, progress=False, resize="gpu")
    cache_images(src, tmp_path / "both", random_model(), request, options=options)
    assert snapshot(tmp_path / "both") == snapshot(tmp_path / "cpu")


@pytest.mark.parametrize(("workers", "decode"), [(0, "fast"), (2, "exact")])
def test_several_views_are_those_of_the_cpu_and_pictures_go_up_once(src, tmp_path, monkeypatch, workers, decode):
    monkeypatch.setattr(begin, "BYTES_PER_WORKER", 1)
    views = parse_views(["32", "48@area", "32@adm"], CacheRequest(32, decode="exact", batch=3, task_inputs=5))
    if decode == "fast":
        views = {name: replace(request, decode=decode) for name, request in views.items() if request.crop == "center"}
    taken = []
    take = Resizer.take
    monkeypatch.setattr(Resizer, "take", lambda self, chunk: taken.append(chunk.columns.num_rows) or take(self, chunk))
    for resize in ("cpu", "gpu"):
        options = RunOptions(workers=workers, progress=False, resize=resize)
        report = cache_views(src, tmp_path / resize, random_model(), views, note=str, options=options)
        assert {r.cached for r in report.views.values()} == {11}
        assert sum(taken) == (12 if resize == "gpu" else 0)
    assert snapshot(tmp_path / "gpu") == snapshot(tmp_path / "cpu")


@pytest.mark.parametrize("room", [0, 5000, 1 << 20])
def test_views_share_a_pictures_pixels_where_there_is_room(src, room):
    """Records of several windows of it, resized alone or together: the pixels are the same, and lie there once."""
    views = [
        View(PixelPolicy(), BUCKETS),
        View(PixelPolicy(crop="adm"), (Size(32, 32),)),
        View(PixelPolicy(), (Size(48, 48),)),
    ]
    least = sum(max(ready_bytes(b.height, b.width) for b in view.buckets) for view in views)
    resizer = Resizer(torch.device("cpu"))
    # upright and turned, a PNG, one with a profile, one of a bucket's size
    for path in [sorted(src.iterdir())[i] for i in (0, 3, 6, 7, 9)]:
        records = np.zeros(-(-(least + room) // 16) * 16, np.uint8)
        found = load_views(path.read_bytes(), views, records=records)
        offsets = np.array([loaded.offset for loaded in found])
        resizer.take(Records(offsets, records))
        end = max(loaded.offset + len(loaded.pixels) for loaded in found)
        assert len(resizer._host) == end <= len(records)
        for view, loaded in zip(views, found, strict=True):
            alone = load_image(path.read_bytes(), view.policy, view.buckets)
            batch = resizer.buffer(1, *alone.pixels.shape[:2])
            resizer.put(np.array([loaded.offset]), batch, 0)
            np.testing.assert_array_equal(batch[0], alone.pixels)
            assert (loaded.bucket, loaded.placement) == (alone.bucket, alone.placement)


class Records:
    """Of one chunk."""

    def __init__(self, offsets, pixels):
        self.records = lambda: (offsets, pixels)

    def release(self):
        pass


def test_records_of_views_are_smaller_together(src):
    data = next(path for path in sorted(src.iterdir()) if path.name == "000.jpg").read_bytes()
    nbytes = {}
    for sides in ((32,), (48,), (32, 48)):
        views = [View(PixelPolicy(), (Size(side, side),)) for side in sides]
        found = load_views(data, views, records=np.zeros(1 << 20, np.uint8))
        nbytes[sides] = max(loaded.offset + len(loaded.pixels) for loaded in found)
    picture = 3 * 70 * 70
    assert nbytes[32, 48] < nbytes[32,] + nbytes[48,] - picture + 64


@pytest.mark.parametrize("room", [16, 9008, 1 << 20])
def test_what_finds_no_room_is_resized_by_its_worker(src, room):
    source = folder_source(src, src / "none", ColumnsRequest())
    resizer = Resizer(torch.device("cpu"))
    found = {}
    with DecodePool(source, PixelPolicy(), BUCKETS, workers=0, record_bytes=room) as pool:
        assert pool._job.slot >= max(ready_bytes(b.height, b.width) for b in BUCKETS)
        for chunk in pool.decode([range(5), range(5, 12)]):
            resizer.take(chunk)
            for rows, bucket in chunk.groups():
                batch = resizer.buffer(len(rows) + 1, BUCKETS[bucket].height, BUCKETS[bucket].width)
                resizer.put(chunk.offsets(rows), batch, 1)
                found |= {chunk.columns["input"][int(r)].as_py(): p for r, p in zip(rows, batch[1:], strict=True)}
    assert sorted(found) == [i for i in range(12) if i != 5]
    for ordinal, pixels in found.items():
        data = sorted(src.iterdir())[ordinal].read_bytes()
        np.testing.assert_array_equal(pixels, load_image(data, PixelPolicy(), BUCKETS).pixels)


def test_where_images_are_resized():
    assert not by_device("auto", 90) and not by_device("cpu", None) and by_device("gpu", 90) and by_device("gpu", None)
    with pytest.raises(InputError, match="resize 'tpu' is unknown: use one of auto, cpu, gpu"):
        by_device("tpu", 90)


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)
    with pytest.raises(InputError, match="needs an NVIDIA GPU that the kernels run on: use resize cpu"):
        by_device("gpu", None)


def test_a_refused_run_leaves_nothing(src, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)
    with pytest.raises(InputError, match="resize gpu needs"):
        cache_images(src, tmp_path / "out", random_model(), CacheRequest(32), options=RunOptions(resize="gpu"))
    assert not (tmp_path / "out").exists()
