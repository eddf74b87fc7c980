"""The trainer: where it starts, what a step does, what a resumed run gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from capacitor_rt.config import ModelConfig
from capacitor_rt.errors import CapacitorError
from capacitor_rt.evaluation.metrics import psnr
from capacitor_rt.images.frames import to_uint8
from capacitor_rt.model import FullCapacitor
from capacitor_rt.sample import initial, pca, photos, report, train
from capacitor_rt.sample.augment import CropSampler

SMALL = ModelConfig(
    model_dim=48,
    bottleneck_dim=32,
    mlp_ratio=1.0,
    encoder_depth=1,
    decoder_depth=3,
    decoder_start_blocks=1,
    decoder_end_blocks=1,
    adaln_low_rank_rank=2,
)
RECIPE = train.Recipe(batch=2, crop=64, pca_crops=40, warmup_steps=1, drop_path_every=2)
CHOSEN = photos.TRAINING[:2]


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    return [photos.load(photo)[:192, :192] for photo in CHOSEN]


def new_run(pixels, seed: int = 3) -> train.TrainingRun:
    return train.start(CHOSEN, pixels, seed, RECIPE, SMALL)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def test_untrained_model_is_the_pca():
    image = photos.centre_crop(photos.load(photos.HELD_OUT[0]))
    fitted = pca.fit([image])
    expected = psnr(image, fitted.reconstruct(image, SMALL.bottleneck_dim))
    model = initial.from_pca(SMALL, fitted)
    assert psnr(image, report.reconstruct(model, image)) == pytest.approx(expected, abs=0.05)


def test_patches_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    flat = pca.to_patches(image, 16)
    assert flat.shape == (24, 768)
    restored = torch.from_numpy(pca.from_patches(flat, 16, 64, 96))
    np.testing.assert_array_equal(to_uint8(restored.permute(2, 0, 1)), image)
    np.testing.assert_array_equal(pca.fit([image]).reconstruct(image, 768), image)


def test_three_steps_change_every_part_and_export_loads(pixels, tmp_path):
    run = new_run(pixels)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    train.fit(run, RECIPE, tmp_path, steps=3, minutes=0)
    still = {name for name, p in run.model.named_parameters() if torch.equal(p, before[name])}
    assert not still, still
    exported = train.export(run.ema, pixels, tmp_path, {"seed": "3"})
    loaded = FullCapacitor.from_pretrained(tmp_path)
    assert same(exported, loaded) and same(exported, report.read_model(str(tmp_path)))
    latents = torch.cat([loaded.encode(torch.from_numpy(p)[None])[0].flatten(1) for p in pixels], 1)
    assert latents.mean(1).abs().max() < 1e-3
    assert (latents.var(1, unbiased=False) - 1).abs().max() < 0.05


def test_resumed_run_equals_an_undisturbed_one(pixels, tmp_path):
    whole = new_run(pixels)
    train.fit(whole, RECIPE, tmp_path, steps=4, minutes=0)
    first = new_run(pixels)
    for step in range(2):
        train.train_step(first, RECIPE, step / 4)
    first.save(tmp_path / train.STATE)
    second = new_run(pixels, seed=99)
    second.load(tmp_path / train.STATE)
    train.fit(second, RECIPE, tmp_path, steps=4, minutes=0)
    assert second.step == 4
    assert same(whole.model, second.model)
    assert same(whole.ema, second.ema)


def test_dead_channels_leave_the_gradient_finite(pixels):
    run = new_run(pixels)
    block = run.model.encoder.blocks[0]
    with torch.no_grad():
        # GELU of a very negative number is exactly 0
        block.pwconv1.bias[0] = -1e4
        block.pwconv2.weight.normal_()
    before = block.pwconv1.weight.clone()
    train.train_step(run, RECIPE, 0.0)
    assert run.skipped == 0
    assert not torch.equal(block.pwconv1.weight, before)
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_objective_measures_the_decoded_error(pixels):
    run = new_run(pixels)
    image = run.sampler.batch(2, 64)
    recipe = dataclasses.replace(RECIPE, random_time_share=0.0)
    _, decibels = train.objective(run.model, image, run.generator, recipe)
    with torch.no_grad():
        restored = run.model.decode(run.model.encode(image)).clamp(-1, 1)
    expected = (10 * torch.log10(4.0 / (restored - image).square().mean((1, 2, 3)))).mean()
    # the objective's posterior is sampled, the reconstruction's is not
    assert decibels.item() == pytest.approx(expected.item(), abs=0.5)


def test_crops_follow_the_generator_and_stay_in_range(pixels):
    def draw(seed: int) -> torch.Tensor:
        grey = dataclasses.replace(CHOSEN[1], grey=True)
        return CropSampler((CHOSEN[0], grey), pixels, torch.Generator().manual_seed(seed)).batch(8, 48)

    first = draw(0)
    assert first.shape == (8, 3, 48, 48)
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))


def test_centre_crop():
    image = np.arange(70 * 101 * 3, dtype=np.uint32).astype(np.uint8).reshape(70, 101, 3)
    np.testing.assert_array_equal(photos.centre_crop(image), image[3:67, 2:98])


def test_missing_photograph_names_the_package():
    with pytest.raises(CapacitorError, match="scikit-image"):
        photos.load(photos.Photo("no-such-photograph.png"))
