"""A cache by ADM's crop: what is encoded, what its plan says, and that nothing else is mixed with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cache_cases import index_rows, open_cache, write_images
from export_cases import CLASSES, export
from models import random_model
from PIL import Image

from capacitor_rt.cache import CacheRequest, LatentDataset, RunOptions, cache_images, dry_run
from capacitor_rt.errors import CacheError, InputError
from capacitor_rt.images.load import PixelPolicy, load_image

ADM = CacheRequest(32, crop="adm", dtype="fp32", flip=True, posterior=True, batch=1)


def run(src, out, model, request=ADM):
    return cache_images(src, out, model, request, options=RunOptions(workers=0, progress=False))


@pytest.fixture
def cached(tmp_path):
    for name in CLASSES:
        write_images(tmp_path / "src" / name, 2, sizes=((90, 70), (65, 130)))
    model = random_model()
    run(tmp_path / "src", tmp_path / "out", model)
    return tmp_path / "src", tmp_path / "out", model


def test_rows_are_of_adms_pixels(cached):
    src, out, model = cached
    rows, index = LatentDataset(out, verify=True), index_rows(out)
    for i, entry in enumerate(index):
        loaded = load_image((src / entry["id"]).read_bytes(), PixelPolicy(crop="adm"), rows.buckets)
        assert torch.equal(rows[i]["latents"], model.encode(torch.from_numpy(loaded.pixels)[None])[0])
        placed = loaded.placement
        assert (entry["resize_height"], entry["resize_width"]) == (placed.resize.height, placed.resize.width)
        assert (entry["crop_top"], entry["crop_left"]) == (placed.top, placed.left)


def test_the_plan_names_the_crop_and_is_never_mixed(cached, tmp_path):
    src, out, model = cached
    _, plan = open_cache(out)
    assert (plan.fields["geometry"]["crop"], plan.fields["geometry"]["resize"]) == ("adm", "cover")
    assert (plan.fields["pixels"]["filter"], plan.fields["pixels"]["resample"]) == ("box+bicubic", "pillow")
    assert "crop" not in plan.fields["pixels"]
    assert plan.policy == PixelPolicy(crop="adm")
    center = CacheRequest(32, dtype="fp32", flip=True, posterior=True, batch=1)
    with pytest.raises(CacheError, match="planned otherwise") as caught:
        run(src, out, model, center)
    for change in ("geometry.crop adm -> center", "pixels.filter box+bicubic -> lanczos"):
        assert change in str(caught.value)
    run(src, tmp_path / "other", model, center)
    assert open_cache(tmp_path / "other")[1].id != plan.id
    assert open_cache(tmp_path / "other")[1].fields["pixels"]["filter"] == "lanczos"


def test_exports_name_it_and_show_its_pixels(cached, tmp_path):
    src, out, _ = cached
    export(out, tmp_path / "repa", "repa", labels="folder", images=src, posterior=True)
    manifest = json.loads((tmp_path / "repa" / "capacitor.json").read_text())
    assert manifest["pixels"] == {"crop": "adm", "filter": "box+bicubic"}
    ids = sorted((row["id"] for row in index_rows(out)), key=str.encode)
    for i, id in enumerate(ids):
        wanted = load_image((src / id).read_bytes(), PixelPolicy(crop="adm"), LatentDataset(out).buckets).pixels
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "repa" / f"images/00000/img{i:08d}.png")), wanted)


def test_dry_run_knows_it(cached, tmp_path):
    src, _, model = cached
    found = dry_run(src, tmp_path / "new", model, ADM)
    assert {str(size): n for size, n in found.buckets.items()} == {"32x32": 6}


def test_refuses_areas_and_fast_decoding():
    with pytest.raises(InputError, match=r"crop adm is square.*use --size"):
        CacheRequest(64, area=True, crop="adm")
    with pytest.raises(InputError, match="use exact"):
        CacheRequest(64, crop="adm", decode="fast")
