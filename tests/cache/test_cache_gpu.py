"""The pipeline on a GPU: batches under way while the next is stacked, page-locked copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cache_cases import pixels, snapshot, write_images
from models import random_model
from PIL import Image

from capacitor_rt.cache import CacheRequest, LatentDataset, cache_images, cache_views, parse_views
from capacitor_rt.cache.options import RunOptions

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("flip", [False, True])
def test_rows_are_those_of_the_model_on_the_gpu(tmp_path, flip):
    model = random_model().to("cuda", torch.bfloat16)
    paths = write_images(tmp_path / "src", 37, sizes=((64, 64), (32, 128)))
    (tmp_path / "src" / "bad.png").write_text("no image")
    request = CacheRequest(64, area=True, dtype="fp32", posterior=True, flip=flip, batch=4, task_inputs=10)
    for name in ("one", "two"):
        report = cache_images(tmp_path / "src", tmp_path / name, model, request, workers=4, progress=False)
    assert report.cached == 37 and report.meters.seconds["encode"] > 0
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    rows = LatentDataset(tmp_path / "one", verify=True)
    for i, path in enumerate(paths):
        image = torch.from_numpy(np.array(Image.open(path)))[None].cuda()
        expected = model.encode(image)[0].cpu()
        error = (rows[i]["latents"] - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        # of another batch size, so to bfloat16's accuracy only
        assert error < 0.02, (path, error)


def test_an_overflowing_row_is_found_on_the_gpu(tmp_path):
    model = random_model().to("cuda")
    model.encoder.to_bottleneck.weight.mul_(1e9)
    (tmp_path / "src").mkdir()
    Image.fromarray(pixels(32, 32)).save(tmp_path / "src" / "a.png")
    report = cache_images(tmp_path / "src", tmp_path / "out", model, CacheRequest(32, dtype="fp16"), progress=False)
    assert report.quarantined == {"nan_latent": 1}


def test_files_do_not_depend_on_where_images_are_resized(tmp_path):
    model = random_model().to("cuda", torch.bfloat16)
    write_images(tmp_path / "src", 37, sizes=((640, 480), (321, 777), (64, 64)))
    for resize in ("cpu", "gpu"):
        options = RunOptions(workers=4, progress=False, resize=resize)
        cache_images(tmp_path / "src", tmp_path / resize, model, CacheRequest(64, area=True, batch=4), options=options)
    assert snapshot(tmp_path / "cpu") == snapshot(tmp_path / "gpu")


@pytest.mark.parametrize("workers", [0, 4])
def test_jpegs_that_the_gpu_decodes(tmp_path, workers):
    """Rows are near those of `exact`, and the same again in a run that goes on, by a decoder that is tried first."""
    pytest.importorskip("torchvision")
    model = random_model().to("cuda", torch.bfloat16)
    write_images(tmp_path / "src", 40, sizes=((640, 480), (321, 777), (64, 64)), suffix=".jpg")
    whole = (tmp_path / "src" / "000.jpg").read_bytes()
    (tmp_path / "src" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for name, decode in (("gpu", "gpu"), ("again", "gpu"), ("exact", "exact")):
        request = CacheRequest(64, area=True, batch=4, task_inputs=10, decode=decode)
        options = RunOptions(workers=workers, progress=False)
        report = cache_images(tmp_path / "src", tmp_path / name, model, request, options=options)
        assert report.cached == 40 and report.quarantined == {"truncated": 1}
        if name == "again":
            log = tmp_path / "again" / "commits.jsonl"
            log.write_text("".join(log.read_text().splitlines(keepends=True)[:1]))
            cache_images(tmp_path / "src", tmp_path / name, model, request, options=options)
    assert snapshot(tmp_path / "gpu") == snapshot(tmp_path / "again")
    one, other = (LatentDataset(tmp_path / name, verify=True) for name in ("gpu", "exact"))
    ids = {other[i]["id"]: other[i]["latents"].float() for i in range(len(other))}
    for i in range(len(one)):
        expected = ids[one[i]["id"]]
        error = (one[i]["latents"].float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.2, (one[i]["id"], error)


def test_views_are_resized_on_the_gpu_from_one_upload(tmp_path):
    model = random_model().to("cuda", torch.bfloat16)
    write_images(tmp_path / "src", 37, sizes=((640, 480), (321, 777), (64, 64)))
    views = parse_views(["64@area", "96"], CacheRequest(64, batch=4))
    for resize in ("cpu", "gpu"):
        options = RunOptions(workers=4, progress=False, resize=resize)
        cache_views(tmp_path / "src", tmp_path / resize, model, views, note=str, options=options)
    assert snapshot(tmp_path / "cpu") == snapshot(tmp_path / "gpu")
