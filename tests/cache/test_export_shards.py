"""Shards of MDS and of tar files, read as their readers read them: each row has the bits of the cache."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import deviation, export, label_of, make_cache, many, one, plain, read_mds, rows_by_id, unpatchified
from safetensors.torch import save_file

from capacitor_rt.cache import LatentDataset
from capacitor_rt.cache.export import wds
from capacitor_rt.cache.export.mds_format import encode_sample, index_bytes, shard_config, shard_head, shard_info
from capacitor_rt.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "mds"
__all__ = ["many", "one", "plain"]


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
