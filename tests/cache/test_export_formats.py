"""Formats of the exporters, read as their readers read them: each row has the bits of the cache."""

from __future__ import annotations

import json
import math
import re
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_cases import pixels
from calibrations import document
from export_cases import deviation, export, label_of, make_cache, many, one, plain, read_mds, rows_by_id, unpatchified
from models import random_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from capacitor_rt.cache import LatentDataset
from capacitor_rt.errors import CacheError, InputError
from capacitor_rt.flux2_space import Flux2Calibration, to_flux2

GOLDEN = Path(__file__).parents[1] / "golden" / "mds"


__all__ = ["many", "one", "plain"]


@pytest.mark.parametrize("layout", ["patchified", "unpatchified"])
def test_lightningdit_shards_hold_both_views_and_the_labels(one, tmp_path, layout):
    report = export(one, tmp_path / "out", "lightningdit", labels="folder", shard_rows=4, layout=layout)
    assert (report.rows, report.files, report.rounding, report.conversion) == (9, 3, 0.0, None)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [f.name for f in files] == [f"latents_rank00_shard{n:03d}.safetensors" for n in range(3)]
    shards = [load_file(f) for f in files]
    assert [len(s["labels"]) for s in shards] == [4, 4, 1]
    rows = rows_by_id(one)
    form = unpatchified if layout == "unpatchified" else lambda x: x
    for name in ("latents", "latents_flip"):
        stacked = torch.cat([s[name] for s in shards])
        assert stacked.dtype == torch.bfloat16
        assert torch.equal(stacked, form(torch.stack([row[name] for row in rows])))
    assert not torch.equal(shards[0]["latents"], shards[0]["latents_flip"])
    labels = torch.cat([s["labels"] for s in shards])
    assert labels.dtype == torch.int64 and labels.tolist() == [label_of(row["id"]) for row in rows]
    stats = torch.load(tmp_path / "out" / "latents_stats.pt")
    channels = 2 if layout == "unpatchified" else 8
    assert {k: v.shape for k, v in stats.items()} == {"mean": (1, channels, 1, 1), "std": (1, channels, 1, 1)}
    assert not stats["mean"].any() and torch.equal(stats["std"], torch.ones(1, channels, 1, 1))
    assert any(f"downsample_ratio: {8 if channels == 2 else 16}" in line for line in report.advice)


def test_measured_statistics_are_those_of_the_rows(one, tmp_path):
    export(one, tmp_path, "lightningdit", labels="folder", stats="dataset")
    stats = torch.load(tmp_path / "latents_stats.pt")
    latents = torch.stack([row["latents"] for row in rows_by_id(one)]).double()
    torch.testing.assert_close(stats["mean"].double(), latents.mean((0, 2, 3), keepdim=True), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stats["std"].double(), latents.std((0, 2, 3), keepdim=True), rtol=1e-6, atol=0)


def test_repa_pairs_moments_pictures_and_labels_by_their_names(one, tmp_path):
    source = one.parent / "src"
    export(one, tmp_path, "repa", labels="folder", images=source, posterior=True)
    features = sorted((tmp_path / "vae-sd").rglob("*.npy"))
    images = sorted(p for p in (tmp_path / "images").rglob("*") if p.is_file())
    labels = dict(json.loads((tmp_path / "vae-sd" / "dataset.json").read_bytes())["labels"])
    for i, row in enumerate(rows_by_id(one)):
        assert features[i].relative_to(tmp_path) == Path(f"vae-sd/00000/img-mean-std-{i:08d}.npy")
        assert images[i].relative_to(tmp_path) == Path(f"images/00000/img{i:08d}.png")
        mean, std = np.split(np.load(features[i]), 2)
        assert mean.dtype == np.float32 and np.array_equal(mean, unpatchified(row["latents"]).float().numpy())
        np.testing.assert_allclose(std, unpatchified(deviation(one, row)).numpy(), rtol=1e-6)
        assert labels[str(features[i].relative_to(tmp_path / "vae-sd"))] == label_of(row["id"])
    # the pictures are what was encoded
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in images])
    latents = torch.stack([row["latents"] for row in rows_by_id(one)]).float()
    error = (random_model().encode(pictures) - latents).abs()
    assert (error <= latents.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("layout", ["patchified", "unpatchified"])
def test_repae_s_files_link_to_shards_of_whole_rows(one, tmp_path, layout):
    h5py = pytest.importorskip("h5py")
    request = {"labels": "folder", "images": one.parent / "src", "posterior": True, "layout": layout}
    report = export(one, tmp_path / "out", "repae", **request, shard_bytes=30_000)
    assert report.read_back == (f"h5py {h5py.__version__}",) and report.files > 4
    # the whole may be moved, and read from another folder
    (tmp_path / "out").rename(tmp_path / "moved")
    names = {n: json.loads((tmp_path / "moved" / f"{n}_h5.json").read_bytes()) for n in ("capacitor", "images")}
    form = unpatchified if layout == "unpatchified" else lambda x: x
    with (
        h5py.File(tmp_path / "moved" / "capacitor.h5") as moments,
        h5py.File(tmp_path / "moved" / "images.h5") as images,
    ):
        labels = dict(json.loads(moments["dataset.json"][()].tobytes())["labels"])
        assert list(labels) == names["capacitor"] == sorted(names["capacitor"])
        for i, row in enumerate(rows_by_id(one)):
            mean, std = np.split(moments[names["capacitor"][i]][()], 2)
            assert np.array_equal(mean, form(row["latents"]).float().numpy())
            np.testing.assert_allclose(std, form(deviation(one, row)).numpy(), rtol=1e-6)
            assert labels[names["capacitor"][i]] == label_of(row["id"])
            assert Image.open(BytesIO(images[names["images"][i]][()].tobytes())).size == (64, 64)
    stats = torch.load(tmp_path / "moved" / "capacitor-latents-stats.pt", weights_only=True)
    assert stats["latents_scale"].eq(1).all() and stats["latents_bias"].shape == (1, len(mean), 1, 1)


def test_repae_goes_on_after_a_missing_shard(one, tmp_path):
    pytest.importorskip("h5py")
    request = {"labels": "folder", "images": one.parent / "src", "shard_bytes": 30_000}
    export(one, tmp_path, "repae", **request)
    kept = {path.name: path.read_bytes() for path in tmp_path.rglob("*.h5")}
    (tmp_path / "shards" / "capacitor-00001.h5").unlink()
    assert 0 < export(one, tmp_path, "repae", **request).new_rows < len(rows_by_id(one))
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.h5")} == kept


def test_repa_refuses_pictures_that_have_changed(plain, tmp_path):
    shutil.copytree(plain.parent / "src", tmp_path / "src")
    changed = tmp_path / "src" / "bee" / "000.png"
    Image.fromarray(pixels(48, 64, seed=99)).save(changed)
    with pytest.raises(CacheError, match=r"bee/000.png is not the file that was cached"):
        export(plain, tmp_path / "out", "repa", labels="folder", images=tmp_path / "src")
    changed.unlink()
    with pytest.raises(InputError, match=r"lacks 1 of 3 cached images \('bee/000.png'\)"):
        export(plain, tmp_path / "other", "repa", labels="folder", images=tmp_path / "src")
    assert not (tmp_path / "other").exists()


def test_mar_samples_have_the_latents_mean_and_deviation_after_its_loop(one, tmp_path):
    report = export(one, tmp_path, "mar", labels="folder", posterior=True)
    assert "0.2325" in report.conversion
    # as torchvision's DatasetFolder lists them
    classes = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert classes == ["ant", "bee", "cat"]
    row = next(r for r in rows_by_id(one) if r["id"] == "bee/001.png")
    for key, suffix in (("moments", ""), ("moments_flip", "_flip")):
        moments = torch.from_numpy(np.load(tmp_path / "bee" / "001.png.npz")[key])
        assert moments.dtype == torch.float32 and moments.shape == (16, 4, 4)
        mean, logvar = moments.chunk(2)
        torch.testing.assert_close(mean * 0.2325, row[f"latents{suffix}"].float(), rtol=1e-6, atol=1e-7)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(64, *mean.shape, generator=generator)
        # its DiagonalGaussianDistribution, then its factor
        samples = (mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise) * 0.2325
        ratio = (samples - row[f"latents{suffix}"].float()).double() / deviation(one, row, suffix)
        assert abs(ratio.std().item() - 1) < 0.02


def test_moments_without_a_posterior_are_the_mode_alone(plain, tmp_path):
    export(plain, tmp_path, "ddt", labels="folder")
    for row in rows_by_id(plain):
        found = torch.load(tmp_path / f"{row['id']}.pt", weights_only=True)
        assert torch.equal(found["mean"], unpatchified(row["latents"]))
        assert torch.equal(found["logvar"], torch.full_like(found["mean"], -30.0))


def test_mar_counts_folders_so_labels_may_have_no_gap(one, tmp_path):
    labels = {row["id"]: [0, 2, 3][label_of(row["id"])] for row in rows_by_id(one)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(InputError, match="no row has the label 1, and MAR numbers the folders"):
        export(one, tmp_path / "out", "mar", labels=str(tmp_path / "labels.json"))
    (tmp_path / "labels.json").write_text(json.dumps({k: {0: 1, 2: 0, 3: 2}[v] for k, v in labels.items()}))
    export(one, tmp_path / "out", "mar", labels=str(tmp_path / "labels.json"))
    assert (tmp_path / "out" / "0001" / "ant" / "000.webp.npz").exists()


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_musubi_s_names_and_keys(plain, tmp_path, dtype, name):
    source = tmp_path / "labelled"
    with pytest.raises(InputError, match=r"'ant/000.webp' and 'bee/000.png' would both be written to 000_0064x0"):
        export(plain, source, "musubi", space="whitened")
    cache = make_cache(tmp_path / "c", each=1, sizes=((40, 40),), distinct=True)
    export(cache, tmp_path / "out", "musubi", space="whitened", dtype=dtype, architecture="f2k4b")
    for row in rows_by_id(cache):
        file = tmp_path / "out" / f"{Path(row['id']).stem}_0064x0064_f2k4b.safetensors"
        with safe_open(file, framework="pt") as f:
            assert f.metadata() == {
                "architecture": "flux_2_klein_4b",
                "width": "64",
                "height": "64",
                "format_version": "1.0.1",
            }
            (key,) = f.keys()
            assert key == f"latents_4x4_{name}"
            # what its loader makes of the key: the dtype and the size are cut off
            assert key.rsplit("_", 1)[0].rsplit("_", 1)[0] == "latents"
            assert torch.equal(f.get_tensor(key), row["latents"].to(getattr(torch, name)))
        # what its loader makes of the name
        *stem, size, _ = file.name.split("_")
        assert ("_".join(stem), tuple(map(int, size.split("x")))) == (Path(row["id"]).stem, (64, 64))


def test_automodel_finds_every_row_by_its_index(many, tmp_path):
    export(many, tmp_path, "automodel", space="whitened")
    shards = json.loads((tmp_path / "metadata.json").read_bytes())["shards"]
    items = [item for shard in shards for item in json.loads((tmp_path / shard).read_bytes())]
    rows = rows_by_id(many)
    assert len(items) == len(rows)
    for item, row in zip(items, rows, strict=True):
        data = torch.load(item["cache_file"], weights_only=True)
        assert data["image_path"] == row["id"] and data["prompt"] == ""
        assert data["latent"].dtype == torch.float16 and torch.equal(data["latent"], row["latents"].half())
        assert item["bucket_resolution"] == [row["width"], row["height"]]
        assert math.isclose(item["aspect_ratio"], row["width"] / row["height"])
    same_bucket = {tuple(i["bucket_resolution"]): i["bucket_id"] for i in items}
    assert sorted(same_bucket.values()) == [0, 1]


def test_comfy_s_loader_takes_the_latents_as_they_are(many, tmp_path):
    export(many, tmp_path, "comfy", space="whitened")
    files = sorted(tmp_path.glob("*.latent"))
    rows = {re.sub("/", "_", row["id"]): row for row in rows_by_id(many)}
    assert [f.name.removesuffix(".latent") for f in files] == sorted(rows)
    for file in files:
        found = load_file(file)
        assert "latent_format_version_0" in found
        expected = rows[file.name.removesuffix(".latent")]["latents"].float()[None]
        assert torch.equal(found["latent_tensor"], expected)


@pytest.mark.parametrize("posterior", [True, False])
def test_flux2_s_space_is_what_the_calibration_makes_of_the_latents(one, plain, tmp_path, posterior):
    # a cache with logsnr goes through the lines of the mean, without alpha
    cache = one if posterior else plain
    rows = rows_by_id(cache)
    values = document(8, latent_space=LatentDataset(cache).latent_space)
    (tmp_path / "calibration.json").write_text(json.dumps(values))
    request = {"space": "flux2", "calibration": tmp_path / "calibration.json"}
    calibration = Flux2Calibration.from_dict(values)
    report = export(cache, tmp_path / "after", "automodel", dtype="fp32", **request)
    assert report.conversion == "converted to FLUX.2's space, approximately"
    export(cache, tmp_path / "before", "mds", dtype="fp32", **request)
    before = list(read_mds(tmp_path / "before"))
    for i, row in enumerate(rows):
        kept = {"logsnr": row.get("logsnr")}
        data = torch.load(tmp_path / "after" / "64x64" / f"{i:08d}.pt", weights_only=True)
        assert torch.equal(data["latent"], to_flux2(row["latents"], calibration, **kept))
        # as the encoder of FLUX.2 gives them: 32 channels, before its batch norm
        raw = to_flux2(row["latents"], calibration, normalised=False, **kept)
        assert np.array_equal(np.split(before[i]["img_latent"], 2)[0], unpatchified(raw).numpy())
    manifest = json.loads((tmp_path / "after" / "capacitor.json").read_bytes())
    assert manifest["latents"]["approximate"] and manifest["latents"]["divided_by_alpha"] == posterior
    values["latent_space"] = "other/whitened@1"
    (tmp_path / "calibration.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="calibrate the model that made them"):
        export(cache, tmp_path / "other", "comfy", **request)
