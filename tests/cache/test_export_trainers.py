"""Exports in the hands of those that they are for: the packages of readers, and the trainers' code from checkouts.

    CAPACITOR_TRAINERS=DIR pytest -m trainers

DIR holds LightningDiT, REPA, mar, PRX, micro_diffusion, musubi-tuner, Automodel and ComfyUI as their repositories are
called; what is missing is skipped. Facts about them are in docs/trainers.md.
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
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torchvision_ops import import_beside_torchvision
from trainer_code import checkout, cut, load, package, streaming


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


def test_streaming_reads_mds(one, tmp_path):
    package_ = streaming()
    report = export(one, tmp_path / "out", "mds", posterior=True)
    assert report.read_back == ("mosaicml-streaming 0.13.0",)
    dataset = package_.StreamingDataset(local=str(tmp_path / "out"), batch_size=1, shuffle=False)
    rows = rows_by_id(one)
    assert len(dataset) == len(rows)
    for i, row in enumerate(rows):
        sample = dataset[i]
        assert sample["id"] == row["id"]
        assert np.array_equal(sample["img_latent"][:2], unpatchified(row["latents"]).half().numpy())
    package_.base.util.clean_stale_shared_memory()


def test_energon_reads_wds(many, tmp_path):
    energon = pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    save_file({row["id"]: torch.randn(3, 4) for row in rows_by_id(many)}, tmp_path / "text.safetensors")
    report = export(many, tmp_path / "out", "wds", preset="energon", text_latents=tmp_path / "text.safetensors")
    assert report.advice == (f"prepared for energon: its path is {tmp_path / 'out'}",)

    @energon.stateless
    def cook(sample):
        # as NeMo's cook, nemo/collections/diffusion/data/diffusion_taskencoder.py
        return {**energon.basic_sample_keys(sample), **{k: sample[k] for k in ("json", "pth", "pickle")}}

    class Encoder(energon.DefaultTaskEncoder):
        cookers = [energon.Cooker(cook)]  # noqa: RUF012

        @energon.stateless
        def batch(self, samples):
            return samples

    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_train_dataset(
        str(tmp_path / "out"),
        batch_size=1,
        worker_config=workers,
        task_encoder=Encoder(),
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
    )
    samples = [sample for batch in energon.get_loader(dataset) for sample in batch]
    rows = {row["id"]: row for row in rows_by_id(many)}
    for sample in samples:
        row = rows.pop(sample["json"]["id"])
        assert sample["pth"].dtype == torch.bfloat16
        assert torch.equal(sample["pth"], unpatchified(row["latents"])[:, None])
        assert sample["pickle"].shape == (3, 4)
    assert not rows


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
