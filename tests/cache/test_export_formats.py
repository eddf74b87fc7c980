"""Every format of the exporters, read as its reader reads it: each row has the bits of the cache."""

from __future__ import annotations

import json
import math
import re
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cache_cases import pixels
from calibrations import document
from export_cases import export, label_of, make_cache, rows_by_id
from models import random_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from capacitor_rt.cache import LatentDataset
from capacitor_rt.cache.export import wds
from capacitor_rt.cache.export.mds_format import encode_sample, index_bytes, shard_config, shard_head, shard_info
from capacitor_rt.errors import CacheError, InputError
from capacitor_rt.flux2_space import Flux2Calibration, to_flux2

GOLDEN = Path(__file__).parents[1] / "golden" / "mds"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Nine rows of one size, with flips and posterior, in bfloat16."""
    return make_cache(tmp_path_factory.mktemp("one"), flip=True, posterior=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Nine rows of two sizes."""
    return make_cache(tmp_path_factory.mktemp("many"), area=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Rows of one size, latents alone, whose stems differ."""
    return make_cache(tmp_path_factory.mktemp("plain"), each=1, sizes=((48, 64),), dtype="fp32")


def deviation(cache, row, suffix=""):
    """sigma / std of a row in float64."""
    logsnr = row[f"logsnr{suffix}"].double()
    std = torch.tensor(LatentDataset(cache).plan.fields["whitening"]["std"]).double()
    return torch.sigmoid(-logsnr).sqrt() / std[:, None, None]


def unpatchified(latents):
    return F.pixel_shuffle(latents, 2)


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


def test_mds_has_the_bytes_of_streaming_s_own_writer():
    columns = {
        "caption": "str",
        "id": "str",
        "img_latent": "ndarray:float16:4,2,3",
        "original_height": "int",
        "original_width": "int",
    }
    base = torch.arange(24).reshape(4, 2, 3) - 12.0
    captions = ["", "a cat", "ein Bär \u2013 zwei", "x" * 40, "\n"]
    records = [
        {
            "caption": captions[i],
            "id": f"cat/{i:03d}.png",
            "img_latent": (base * (i + 1) / 8).half(),
            "original_height": 40 + i,
            "original_width": 3000 * i,
        }
        for i in range(5)
    ]
    config, samples, infos = shard_config(columns, 500), [encode_sample(r, columns) for r in records], []
    counts = [s["samples"] for s in json.loads((GOLDEN / "index.json").read_bytes())["shards"]]
    assert len(counts) > 1 and sum(counts) == 5
    for number, count in enumerate(counts):
        mine, samples = samples[:count], samples[count:]
        data = shard_head(config, [len(s) for s in mine]) + b"".join(mine)
        name = f"shard.{number:05d}.mds"
        assert data == (GOLDEN / name).read_bytes()
        infos.append(shard_info(config, name, len(data), count))
    assert index_bytes(infos) == (GOLDEN / "index.json").read_bytes()


def read_mds(folder):
    """Samples of a folder of MDS shards, by the index alone."""
    index = json.loads((folder / "index.json").read_bytes())
    for shard in index["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        offsets = np.frombuffer(data, "<u4", shard["samples"] + 1, 4)
        assert np.frombuffer(data, "<u4", 1)[0] == shard["samples"]
        for start in offsets[:-1].tolist():
            sample = {}
            fixed = dict(zip(shard["column_names"], shard["column_sizes"], strict=True))
            free = [name for name, size in fixed.items() if size is None]
            sizes = fixed | dict(zip(free, np.frombuffer(data, "<u4", len(free), start).tolist(), strict=True))
            at = start + 4 * len(free)
            for name, encoding in zip(shard["column_names"], shard["column_encodings"], strict=True):
                raw, at = data[at : at + sizes[name]], at + sizes[name]
                kind, _, rest = encoding.partition(":")
                if kind == "ndarray":
                    dtype, shape = rest.split(":")
                    sample[name] = np.frombuffer(raw, dtype).reshape([int(n) for n in shape.split(",")])
                else:
                    decode = {"str": bytes.decode, "int": lambda b: int.from_bytes(b, "little"), "bytes": bytes}
                    sample[name] = decode[kind](raw)
            yield sample


@pytest.mark.parametrize("posterior", [True, False])
def test_mds_for_prx_holds_mode_and_deviation_unpatchified(one, tmp_path, posterior):
    captions = {row["id"]: f"a {row['id']}" for row in rows_by_id(one)}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    report = export(one, tmp_path / "out", "mds", posterior=posterior, captions=str(tmp_path / "captions.json"))
    assert report.rounding == 0  # of bfloat16 of this size float16 loses nothing
    samples, rows = list(read_mds(tmp_path / "out")), rows_by_id(one)
    assert [s["id"] for s in samples] == [row["id"] for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        mean, std = np.split(sample["img_latent"], 2)
        assert mean.dtype == np.float16 and mean.shape == (2, 8, 8)
        assert np.array_equal(mean, unpatchified(row["latents"]).half().numpy())
        expected = unpatchified(deviation(one, row)).numpy() if posterior else 0.0
        np.testing.assert_allclose(std.astype(np.float64), expected, rtol=2**-10)
        assert sample["caption"] == captions[row["id"]]
        entry = next(e for e in [LatentDataset(one).entries(i) for i in range(9)] if e["id"] == row["id"])
        assert (sample["original_height"], sample["original_width"]) == (entry["height"], entry["width"])


def test_mds_of_several_sizes_is_a_folder_with_an_index_for_each(many, tmp_path):
    export(many, tmp_path, "mds", preset="plain", layout="patchified", dtype="fp32", scale=0.5)
    assert not (tmp_path / "index.json").exists()
    rows = {row["id"]: row for row in rows_by_id(many)}
    found = {folder: list(read_mds(folder)) for folder in tmp_path.iterdir() if folder.is_dir()}
    assert {f.name for f in found} == {"64x64", "32x128"}
    for folder, samples in found.items():
        assert [s["id"] for s in samples] == sorted(s["id"] for s in samples)
        for sample in samples:
            row = rows.pop(sample["id"])
            assert folder.name == f"{row['height']}x{row['width']}"
            assert np.array_equal(
                np.split(sample["img_latent"], 2)[0], row["latents"].float().numpy() * np.float32(0.5)
            )
    assert not rows


def test_micro_diffusion_s_reshape_gives_the_latents_back(tmp_path):
    cache = make_cache(tmp_path, each=1, side=256)
    rows = rows_by_id(cache)
    text = {row["id"]: torch.randn(5, 6).half() for row in rows}
    save_file(text, tmp_path / "text.safetensors")
    export(cache, tmp_path / "out", "mds", preset="micro", text_latents=tmp_path / "text.safetensors")
    for sample, row in zip(read_mds(tmp_path / "out"), rows, strict=True):
        # as its loader reads them, datasets/latents_loader.py
        latents = np.frombuffer(sample["latents_256"], np.float16).reshape(-1, 32, 32)
        assert np.array_equal(latents, unpatchified(row["latents"]).half().numpy())
        caption = np.frombuffer(sample["caption_latents"], np.float16).reshape(1, 5, 6)
        assert np.array_equal(caption[0], text[row["id"]].numpy())


def test_micro_diffusion_would_scramble_other_sizes(one, tmp_path):
    save_file({row["id"]: torch.zeros(2, 2) for row in rows_by_id(one)}, tmp_path / "text.safetensors")
    with pytest.raises(InputError, match=r"64x64 have latents of 2x8x8.*scrambles any other.*--size 256 or 512"):
        export(one, tmp_path / "out", "mds", preset="micro", text_latents=tmp_path / "text.safetensors")
    assert not (tmp_path / "out").exists()


def tar_samples(path):
    """Members of a tar by key, in order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for info in tar:
            key, _, name = info.name.partition(".")
            samples.setdefault(key, {})[name] = tar.extractfile(info).read()
            assert (info.mtime, info.uid, info.uname) == (0, 0, "")
    return samples


def test_wds_members_are_those_of_tread(one, tmp_path):
    export(one, tmp_path, "wds", labels="folder", posterior=True, prefix="run-1", shard_bytes=60_000)
    tars = sorted(tmp_path.glob("*.tar"))
    assert len(tars) > 1 and [t.name for t in tars] == [f"run-1-train-{n:06d}.tar" for n in range(len(tars))]
    assert all(t.stat().st_size <= 60_000 for t in tars)
    samples = {key: sample for tar in tars for key, sample in tar_samples(tar).items()}
    rows = rows_by_id(one)
    assert list(samples) == [f"{i:08d}" for i in range(9)]
    for row, sample in zip(rows, samples.values(), strict=True):
        assert set(sample) == {"cls", "json", "latent.npy", "latent_flip.npy", "std.npy", "std_flip.npy"}
        for name in ("latent", "latent_flip"):
            array = np.load(BytesIO(sample[f"{name}.npy"]))
            assert array.dtype == np.float32
            assert np.array_equal(array, row[name.replace("latent", "latents")].float().numpy())
        for suffix in ("", "_flip"):
            array = np.load(BytesIO(sample[f"std{suffix}.npy"]))
            np.testing.assert_allclose(array, deviation(one, row, suffix).numpy(), rtol=1e-6)
        assert int(sample["cls"]) == label_of(row["id"])
        assert json.loads(sample["json"])["id"] == row["id"]


def test_wds_of_several_sizes_has_a_folder_for_each(many, tmp_path):
    export(many, tmp_path, "wds")
    sizes = {row["id"]: f"{row['height']}x{row['width']}" for row in rows_by_id(many)}
    found = {}
    for tar in tmp_path.glob("*/*.tar"):
        for sample in tar_samples(tar).values():
            found[json.loads(sample["json"])["id"]] = tar.parent.name
    assert found == sizes and not list(tmp_path.glob("*.tar"))


def test_webdataset_reads_what_was_written(one, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    report = export(one, tmp_path, "wds", labels="folder")
    assert report.read_back[0].startswith("webdataset ")
    (tar,) = tmp_path.glob("*.tar")
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
    for sample, row in zip(samples, rows_by_id(one), strict=True):
        assert np.array_equal(sample["latent.npy"], row["latents"].float().numpy())
        assert sample["cls"] == label_of(row["id"]) and sample["json"]["id"] == row["id"]


def test_energon_s_tensors_are_their_own_and_of_one_frame(many, tmp_path, monkeypatch):
    monkeypatch.setattr(wds, "is_installed", lambda name: name != "megatron.energon")
    save_file({row["id"]: torch.randn(3, 4) for row in rows_by_id(many)}, tmp_path / "text.safetensors")
    report = export(many, tmp_path / "out", "wds", preset="energon", text_latents=tmp_path / "text.safetensors")
    # without it, what to run where it is
    assert report.advice[0].startswith("energon prepare --non-interactive --split-parts")
    rows = {row["id"]: row for row in rows_by_id(many)}
    for tar in (tmp_path / "out").glob("*/*.tar"):
        for sample in tar_samples(tar).values():
            info = json.loads(sample["json"])
            row = rows.pop(info["id"])
            latents = torch.load(BytesIO(sample["pth"]), weights_only=True)
            assert latents.dtype == torch.bfloat16 and latents.untyped_storage().nbytes() == latents.nbytes
            assert torch.equal(latents, unpatchified(row["latents"])[:, None])
            assert (info["image_height"], info["image_width"]) == (row["height"], row["width"])
    assert not rows


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
