"""Exports in the hands of the packages of their readers, which `make test` installs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_cases import export, make_cache, rows_by_id
from safetensors.torch import save_file
from trainer_code import energon_samples, streaming


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Nine rows of 64x64, with flips and posterior."""
    return make_cache(tmp_path_factory.mktemp("readers"), flip=True, posterior=True)


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
    pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    save_file({row["id"]: torch.randn(3, 4) for row in rows_by_id(many)}, tmp_path / "text.safetensors")
    report = export(many, tmp_path / "out", "wds", preset="energon", text_latents=tmp_path / "text.safetensors")
    assert report.advice == (f"prepared for energon: its path is {tmp_path / 'out'}",)

    samples = list(energon_samples(tmp_path / "out"))
    rows = {row["id"]: row for row in rows_by_id(many)}
    for sample in samples:
        row = rows.pop(sample["json"]["id"])
        assert sample["pth"].dtype == torch.bfloat16
        assert torch.equal(sample["pth"], unpatchified(row["latents"])[:, None])
        assert sample["pickle"].shape == (3, 4)
    assert not rows
