"""Exports in the hands of those that they are for: the trainers' own code, from checkouts.

    CAPACITOR_TRAINERS=DIR pytest -m trainers

DIR holds LightningDiT, REPA, REPA-E, mar, DDT, PRX, micro_diffusion, NeMo, musubi-tuner, Automodel and ComfyUI as their
repositories are called; what is missing is skipped. Facts about them are in docs/trainers.md.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_cases import export, label_of, make_cache, rows_by_id
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torchvision_ops import import_beside_torchvision
from trainer_code import checkout, cook, cut, energon_samples, load, package, streaming


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Nine rows of 64x64, with flips and posterior."""
    return make_cache(tmp_path_factory.mktemp("trainers"), flip=True, posterior=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Nine rows of two sizes whose stems differ."""
    return make_cache(tmp_path_factory.mktemp("many"), area=True, distinct=True)


def unpatchified(latents):
    return F.pixel_shuffle(latents, 2)


@pytest.mark.trainers
@pytest.mark.parametrize("layout", ["patchified", "unpatchified"])
def test_lightningdit(one, tmp_path, layout):
    module = load(checkout("LightningDiT", "datasets", "img_latent_dataset.py"))
    export(one, tmp_path, "lightningdit", labels="folder", layout=layout, shard_rows=4)
    dataset = module.ImgLatentDataset(str(tmp_path), latent_norm=True, latent_multiplier=1.0)
    rows, form = rows_by_id(one), unpatchified if layout == "unpatchified" else lambda x: x
    assert len(dataset) == len(rows)
    np.random.seed(0)
    seen = set()
    for i, row in enumerate(rows):
        for _ in range(8):
            feature, label = dataset[i]
            views = {name: form(row[name]).float() for name in ("latents", "latents_flip")}
            (view,) = [name for name, expected in views.items() if torch.equal(feature, expected)]
            seen.add((i, view))
            assert label.dtype == torch.int64 and int(label) == label_of(row["id"])
    assert len(seen) == 2 * len(rows)
    batch, labels = next(iter(DataLoader(dataset, batch_size=9)))
    assert batch.dtype == torch.float32 and len(labels) == 9


@pytest.mark.trainers
def test_repa(one, tmp_path):
    module = load(checkout("REPA", "dataset.py"))
    export(one, tmp_path, "repa", labels="folder", images=one.parent / "src", posterior=True)
    dataset = module.CustomDataset(str(tmp_path))
    rows = rows_by_id(one)
    assert len(dataset) == len(rows)
    for i, row in enumerate(rows):
        image, moments, label = dataset[i]
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        # as train.py cuts them
        mean, std = torch.chunk(moments, 2)
        assert torch.equal(mean, unpatchified(row["latents"]).float()) and std.min() > 0
        assert int(label) == label_of(row["id"])


@pytest.mark.trainers
@pytest.mark.parametrize("layout", ["patchified", "unpatchified"])
def test_repae(one, tmp_path, layout):
    path = checkout("REPA-E", "dataset.py")
    h5py = pytest.importorskip("h5py")
    import io
    import json
    import os

    import PIL.Image
    from torch.utils.data import Dataset

    # the file imports a package `datasets` besides
    code = cut(
        path,
        "load_h5_file",
        "CustomH5Dataset",
        io=io,
        json=json,
        os=os,
        np=np,
        torch=torch,
        h5py=h5py,
        PIL=PIL,
        Dataset=Dataset,
    )
    request = {"labels": "folder", "images": one.parent / "src", "posterior": True, "layout": layout}
    export(one, tmp_path, "repae", **request, shard_bytes=30_000)
    dataset = code["CustomH5Dataset"](str(tmp_path), vae_latents_name="capacitor")
    stats = torch.load(tmp_path / "capacitor-latents-stats.pt", weights_only=True)
    rows, form = rows_by_id(one), unpatchified if layout == "unpatchified" else lambda x: x
    assert len(dataset) == len(rows)
    for i, row in enumerate(rows):
        image, moments, label = dataset[i]
        assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
        mean, std = torch.chunk(moments, 2)
        normalised = (mean[None] - stats["latents_bias"]) * stats["latents_scale"]
        assert torch.equal(normalised[0], form(row["latents"]).float()) and std.min() > 0
        assert int(label) == label_of(row["id"])


@pytest.mark.trainers
def test_ddt(tmp_path):
    path = checkout("DDT", "src", "data", "dataset", "imagenet.py")
    try:
        datasets = import_beside_torchvision("torchvision.datasets")
        functional = import_beside_torchvision("torchvision.transforms.functional")
    except ImportError:
        pytest.skip("torchvision is not installed")
    import os
    from functools import partial

    from PIL import Image

    def center_crop(image, height=64, width=64):
        return image.resize((width, height))

    code = cut(
        path,
        "LocalCachedDataset",
        os=os,
        torch=torch,
        partial=partial,
        Image=Image,
        ImageFolder=datasets.ImageFolder,
        to_tensor=functional.to_tensor,
        CenterCrop=lambda side: center_crop,
        center_crop_fn=center_crop,
    )
    cache = make_cache(tmp_path, flip=True)
    root = tmp_path / "src"
    export(cache, tmp_path / "src_64_latent", "ddt", labels="folder")
    dataset = code["LocalCachedDataset"](str(root), 64)
    dataset.cache_root = f"{root}_64_latent"
    rows = rows_by_id(cache)
    assert len(dataset) == len(rows)
    for (image, _), item, row in zip(dataset.samples, map(dataset.__getitem__, range(len(dataset))), rows, strict=True):
        want = unpatchified(row["latents"]).float()
        (latents,) = [part for part in item if torch.is_tensor(part) and part.shape == want.shape]
        # without a posterior its log-variance is -30
        assert Path(image).relative_to(root).as_posix() == row["id"] and (latents - want).abs().max() < 1e-5
        assert [part for part in item if isinstance(part, int)] == [label_of(row["id"])]


@pytest.mark.trainers
def test_nemo(many, tmp_path):
    path = checkout("NeMo", "nemo", "collections", "diffusion", "data", "diffusion_taskencoder.py")
    energon = pytest.importorskip("megatron.energon")
    rearrange = pytest.importorskip("einops").rearrange
    import dataclasses
    import typing

    def positions(t, h, w):
        return torch.stack(torch.meshgrid(*map(torch.arange, (t, h, w)), indexing="ij"), -1)

    names = ("DiffusionSample", "BasicDiffusionTaskEncoder")
    code = cut(
        path,
        *names,
        **vars(typing),
        **{
            name: getattr(energon, name)
            for name in ("Sample", "DefaultTaskEncoder", "Cooker", "SkipSample", "stateless")
        },
        dataclass=dataclasses.dataclass,
        torch=torch,
        F=F,
        rearrange=rearrange,
        pos_id_3d=SimpleNamespace(get_pos_id_3d=positions),
        IOMixin=object,
        cook=cook,
    )
    text = {row["id"]: torch.randn(3, 4) for row in rows_by_id(many)}
    save_file(text, tmp_path / "text.safetensors")
    export(many, tmp_path / "out", "wds", preset="energon", text_latents=tmp_path / "text.safetensors")
    rows = {f"{i:08d}": row for i, row in enumerate(rows_by_id(many))}
    encoder, sample_class = code["BasicDiffusionTaskEncoder"], code["DiffusionSample"]
    # of energon's before 7
    code["DiffusionSample"] = lambda __subflavor__=None, **fields: sample_class(**fields)
    for encoded in energon_samples(tmp_path / "out", encoder, text_embedding_padding_size=8):
        row = rows.pop(encoded.__key__.rpartition("/")[2])
        z = unpatchified(row["latents"])
        tokens = rearrange(z, "c (h a) (w b) -> (h w) (a b c)", a=2, b=2)
        assert torch.equal(encoded.video, tokens)
        assert torch.equal(encoded.t5_text_embeddings[:3], text[row["id"]].bfloat16())
        assert encoded.image_size[0, :2].tolist() == [row["height"], row["width"]]
    assert not rows


@pytest.mark.trainers
def test_mar(one, tmp_path):
    path = checkout("mar", "util", "loader.py")
    try:
        import_beside_torchvision("torchvision.datasets")
    except ImportError:
        pytest.skip("torchvision is not installed")
    export(one, tmp_path, "mar", labels="folder", posterior=True)
    dataset = load(path).CachedFolder(str(tmp_path))
    rows = rows_by_id(one)
    assert len(dataset) == len(rows)
    for i, row in enumerate(rows):
        for _ in range(4):
            moments, label = dataset[i]
            mean = torch.from_numpy(moments).chunk(2)[0] * 0.2325
            errors = [(mean - row[name].float()).abs().max() for name in ("latents", "latents_flip")]
            assert min(errors) < 1e-6 and label == label_of(row["id"])


@pytest.mark.trainers
def test_prx(one, tmp_path):
    path = checkout("PRX", "prx", "dataset", "dataset.py")
    streaming()
    from streaming import StreamingDataset

    keys = SimpleNamespace(**{k: k for k in ("IMAGE", "IMAGE_LATENT", "PROMPT", "CAPTION_KEY", "RESOLUTION")})
    names = ("sample_latent", "SampleProcessor", "CaptionSelector", "parse_caption_keys", "CaptionKeyAndWeight")

    def randn(shape, generator=None, device=None, dtype=None):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    import typing

    code = cut(
        path,
        *names,
        **vars(typing),
        np=np,
        torch=torch,
        random=random,
        BatchKeys=keys,
        randn_tensor=randn,
        EMPTY_SAMPLING_WEIGHT=1e-9,
        DEFAULT_DATA_AUG_TARGETS=["image"],
        DEFAULT_VAE_SPATIAL_SCALE_FACTOR=8,
    )
    export(one, tmp_path, "mds", dtype="fp32")
    selector = code["CaptionSelector"](code["parse_caption_keys"]("caption"), False, False, "none")
    processor = code["SampleProcessor"](selector, "none", False, False)
    dataset = StreamingDataset(local=str(tmp_path), batch_size=1, shuffle=False)
    for i, row in enumerate(rows_by_id(one)):
        sample = processor.process(dataset[i])
        # without a posterior the deviation is zero, so that a sample is the mode
        assert torch.equal(sample["IMAGE_LATENT"], unpatchified(row["latents"]).float())
        assert max(sample["RESOLUTION"].tolist()) <= 64


@pytest.mark.trainers
def test_micro_diffusion(tmp_path):
    path = checkout("micro_diffusion", "micro_diffusion", "datasets", "latents_loader.py")
    streaming()
    cache = make_cache(tmp_path, each=1, side=256)
    text = {row["id"]: torch.randn(5, 6).half() for row in rows_by_id(cache)}
    save_file(text, tmp_path / "text.safetensors")
    export(cache, tmp_path / "out", "mds", preset="micro", text_latents=tmp_path / "text.safetensors")
    loader = load(path).build_streaming_latents_dataloader(
        str(tmp_path / "out"), batch_size=1, image_size=256, cap_seq_size=5, cap_emb_dim=6, shuffle=False
    )
    for batch, row in zip(loader, rows_by_id(cache), strict=True):
        assert torch.equal(batch["image_latents"][0], unpatchified(row["latents"]).half())
        assert torch.equal(batch["caption_latents"][0, 0], text[row["id"]])


@pytest.mark.trainers
def test_musubi_tuner(many, tmp_path):
    folder = checkout("musubi-tuner", "src", "musubi_tuner", "dataset", "bucket.py").parent
    package("musubi_tuner.dataset", folder)
    # what bucket.py takes of a module that wants cv2 and av
    media = ModuleType("musubi_tuner.dataset.media_utils")
    media.divisible_by = lambda number, divisor: number - number % divisor
    import sys

    sys.modules[media.__name__] = media
    bucket = load(folder / "bucket.py")
    report = export(many, tmp_path, "musubi", space="whitened")
    side = int(report.advice[-1].partition("[")[2].partition(",")[0])
    selector = bucket.BucketSelector((side, side), enable_bucket=True, no_upscale=True, architecture="f2d")
    rows = {Path(row["id"]).stem: row for row in rows_by_id(many)}
    buckets: dict = {}
    # as ImageDataset.prepare_for_training goes through the files
    for file in sorted(tmp_path.glob("*_f2d.safetensors")):
        *key, size, _ = file.name.split("_")
        reso = selector.get_bucket_resolution(tuple(map(int, size.split("x"))))
        text = tmp_path / f"{'_'.join(key)}_f2d_te.safetensors"
        save_file({"ctx_vec_bfloat16": torch.zeros(2, 2).bfloat16()}, text)
        item = SimpleNamespace(
            latent_cache_path=str(file), text_encoder_output_cache_path=str(text), name="_".join(key)
        )
        buckets.setdefault(reso, []).append(item)
    assert {(r["width"], r["height"]) for r in rows.values()} == set(buckets)
    manager = bucket.BucketBatchManager(buckets, batch_size=2)
    seen = []
    for n in range(len(manager)):
        reso, batch = manager.bucket_batch_indices[n]
        items = buckets[reso][2 * batch : 2 * batch + 2]
        for latents, item in zip(manager[n]["latents"], items, strict=True):
            assert latents.dtype == torch.bfloat16 and torch.equal(latents, rows[item.name]["latents"])
            seen.append(item.name)
    assert sorted(seen) == sorted(rows)


@pytest.mark.trainers
def test_musubi_tuner_s_own_writer(many, tmp_path):
    import os

    def name_of(dtype):
        return str(dtype).removeprefix("torch.")

    path = checkout("musubi-tuner", "src", "musubi_tuner", "dataset", "cache_io.py")
    names = ("save_latent_cache_flux_2", "save_latent_cache_common")
    code = cut(path, *names, os=os, torch=torch, save_file=save_file, dtype_to_str=name_of)
    export(many, tmp_path / "ours", "musubi", space="whitened")
    for row in rows_by_id(many):
        name = f"{Path(row['id']).stem}_{row['width']:04d}x{row['height']:04d}_f2d.safetensors"
        size = (row["width"], row["height"])
        item = SimpleNamespace(original_size=size, frame_count=None, latent_cache_path=str(tmp_path / name))
        code["save_latent_cache_flux_2"](item, row["latents"].clone(), None, "flux_2_dev")
        with safe_open(tmp_path / name, "pt") as theirs, safe_open(tmp_path / "ours" / name, "pt") as ours:
            assert theirs.metadata() == ours.metadata() and list(theirs.keys()) == list(ours.keys())
            (key,) = ours.keys()
            assert torch.equal(theirs.get_tensor(key), ours.get_tensor(key))


@pytest.mark.trainers
def test_automodel(many, tmp_path):
    folder = checkout("Automodel", "nemo_automodel", "components", "datasets", "diffusion")
    name = "nemo_automodel.components.datasets.diffusion"
    package(name, folder)
    import importlib

    module = importlib.import_module(f"{name}.text_to_image_dataset")
    save_file({row["id"]: torch.randn(3, 4) for row in rows_by_id(many)}, tmp_path / "text.safetensors")
    text = load_file(tmp_path / "text.safetensors")
    export(many, tmp_path / "out", "automodel", space="whitened", text_latents=tmp_path / "text.safetensors")
    dataset = module.TextToImageDataset(str(tmp_path / "out"))
    rows = rows_by_id(many)
    assert len(dataset) == len(rows)
    for i, row in enumerate(rows):
        sample = dataset[i]
        assert sample["image_path"] == row["id"] and torch.equal(sample["latent"], row["latents"].half())
        assert sample["crop_resolution"].tolist() == [row["width"], row["height"]]
        assert torch.equal(sample["prompt_embeds"], text[row["id"]])
    groups = {key[1]: sorted(group["indices"]) for key, group in dataset.bucket_groups.items()}
    assert set(groups) == {(r["width"], r["height"]) for r in rows}
    assert sorted(i for indices in groups.values() for i in indices) == list(range(9))


@pytest.mark.trainers
def test_comfyui(one, tmp_path):
    path = checkout("ComfyUI", "nodes.py")
    import hashlib
    import os

    import safetensors.torch

    export(one, tmp_path, "comfy", space="whitened")
    folders = SimpleNamespace(
        get_annotated_filepath=lambda name: str(tmp_path / name),
        get_input_directory=lambda: str(tmp_path),
        exists_annotated_filepath=lambda name: (tmp_path / name).exists(),
    )
    code = cut(path, "LoadLatent", os=os, hashlib=hashlib, folder_paths=folders, safetensors=safetensors)
    node = code["LoadLatent"]()
    (names,) = [v[0] for v in code["LoadLatent"].INPUT_TYPES()["required"].values()]
    rows = {row["id"].replace("/", "_"): row for row in rows_by_id(one)}
    assert [n.removesuffix(".latent") for n in names] == sorted(rows)
    for name in names:
        (latent,) = node.load(name)
        assert torch.equal(latent["samples"], rows[name.removesuffix(".latent")]["latents"].float()[None])
