"""Images that the device resizes: the files are those of a run whose workers resize, whatever the images are."""

from __future__ import annotations

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
from capacitor_rt.cache import CacheRequest, begin, cache_images
from capacitor_rt.cache import resizing as module
from capacitor_rt.cache.decoding import DecodePool
from capacitor_rt.cache.options import RunOptions
from capacitor_rt.cache.resizing import Resizer, by_device
from capacitor_rt.cache.sources import ColumnsRequest
from capacitor_rt.cache.sources.files import folder_source
from capacitor_rt.images.deferred import ready_bytes
from capacitor_rt.images.geometry import Size
from capacitor_rt.images.load import PixelPolicy, load_image

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
                resizer.put(rows, batch, 1)
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
