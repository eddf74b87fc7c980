"""The siblings with channel attention through the launches: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import dataclasses
import warnings
from functools import cache

import pytest
import torch
from golden_cases import GOLDEN, inference_of
from measures import relative_error
from models import TINY_SIBLINGS, random_model
from runtime_cases import DEVICE, TOLERANCE
from safetensors.torch import load_file

from capacitor_kernels import reference
from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig
from capacitor_rt.blocks import DicoBlock
from capacitor_rt.config import READINGS
from capacitor_rt.errors import UnverifiedModelWarning
from capacitor_rt.runtime import weights
from capacitor_rt.runtime.fold import fold_decoder
from capacitor_rt.runtime.fold_dico import fold_dico_block

OTHERS = {name: choices[1] for name, choices in READINGS.items()}


@cache
def golden(name: str) -> tuple[FullCapacitor, dict[str, torch.Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedModelWarning)
        model = FullCapacitor.from_pretrained(GOLDEN / name, device=DEVICE, backend="triton")
    return model, load_file(GOLDEN / name / "io_b.safetensors")


@pytest.mark.parametrize("name", ["dico_ir", "dico_m2"])
def test_golden(name):
    model, io = golden(name)
    assert relative_error(model.encode(io["image"].to(DEVICE)).cpu(), io["latents"]) < TOLERANCE
    # samplers and guidance are compared below
    decodes = [key for key in io if key.startswith("decode_ddim1_")]
    for key in decodes:
        image = model.decode(io["latents"].to(DEVICE), inference_config=inference_of(key))
        assert relative_error(image.cpu(), io[key]) < TOLERANCE, key
    assert model.stats().eager + model.stats().replays == 1 + len(decodes)


def pair(name: str, **reading: str) -> tuple[FullCapacitor, FullCapacitor]:
    """(by torch, by the launches) of one tiny model."""
    config = TINY_SIBLINGS[name]
    config = dataclasses.replace(config, dico=dataclasses.replace(config.dico, **reading))
    plain, fast = (random_model(config, options={"backend": backend}) for backend in ("torch", "triton"))
    return plain, fast.to(DEVICE)


@pytest.mark.parametrize("reading", [{}, OTHERS], ids=["ours", "others"])
@pytest.mark.parametrize("name", TINY_SIBLINGS)
def test_every_reading_and_guidance(name, reading):
    plain, fast = pair(name, **reading)
    torch.manual_seed(1)
    image = torch.rand(2, 3, 24, 8) * 2 - 1
    latents = plain.encode(image)
    assert relative_error(fast.encode(image.to(DEVICE)).cpu(), latents) < TOLERANCE
    mean, logsnr = fast.encode_posterior(image.to(DEVICE))
    assert logsnr is None and relative_error(mean.cpu(), latents) < TOLERANCE
    for drop in plain.config.drops:
        settings = FullCapacitorInferenceConfig(num_steps=2, pdg=True, pdg_drop=drop, seed=4)
        expected = plain.decode(latents, inference_config=settings)
        got = fast.decode(latents.to(DEVICE), inference_config=settings).cpu()
        assert relative_error(got, expected) < TOLERANCE, drop
    assert fast.stats().eager + fast.stats().replays == 2 + len(plain.config.drops)


def test_a_mask_of_dropped_tokens_goes_with_its_image(monkeypatch):
    plain, fast = pair("mdiffae_v2")
    fast._options.memory_budget = 1
    torch.manual_seed(2)
    latents, noise = torch.randn(2, 8, 2, 1), torch.randn(2, 3, 16, 8)
    dropped = torch.tensor([[1, 0], [0, 1]]).view(2, 1, 2, 1).bool()
    settings = FullCapacitorInferenceConfig(pdg=True, pdg_drop="tokens")
    given = {"noise": noise, "dropped": dropped}
    expected = plain.decode(latents, inference_config=settings, **given)
    on_device = {key: t.to(DEVICE) for key, t in given.items()}
    whole = fast.decode(latents.to(DEVICE), inference_config=settings, **on_device)
    # micro-batches of one
    assert fast.stats().eager + fast.stats().replays == 2
    assert relative_error(whole.cpu(), expected) < TOLERANCE
    alone = {key: t[1:2] for key, t in on_device.items()}
    assert torch.equal(fast.decode(latents[1:2].to(DEVICE), inference_config=settings, **alone), whole[1:2])
    # step by step, where the weights of all times are too many
    monkeypatch.setattr(weights, "MAX_TIMES", 1)
    settings = dataclasses.replace(settings, num_steps=2)
    expected = plain.decode(latents, inference_config=settings, **given)
    got = fast.decode(latents.to(DEVICE), inference_config=settings, **on_device)
    assert relative_error(got.cpu(), expected) < TOLERANCE


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("reading", [{}, OTHERS, {"mlp_norm": "single"}], ids=["ours", "others", "single"])
def test_a_folded_block_is_the_block(reading, modulated):
    config = TINY_SIBLINGS["irdiffae_v1"]
    config = dataclasses.replace(config, dico=dataclasses.replace(config.dico, **reading))
    dim, grid = config.model_dim, (3, 5)
    torch.manual_seed(3)
    block = DicoBlock(config, gates=not modulated).double().requires_grad_(False)
    for p in block.parameters():
        p.copy_(torch.randn(p.shape) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.5))
    modulation = torch.randn(4 * dim).double() if modulated else None
    x = torch.randn(2, dim, *grid).double()
    expected = block(x, None if modulation is None else modulation.expand(2, -1))
    packed = fold_dico_block(block, modulation)
    rows = {"tokens_per_image": 15}
    tokens = x.permute(0, 2, 3, 1).reshape(-1, dim)
    h, _ = reference.expand(tokens, packed.w1, packed.b1, reference.row_squares(tokens), gelu="none", **rows)
    h, sums = reference.dwconv_silu(h, packed.dw_w, packed.dw_b, batch=2, height=3, width=5)
    factor = reference.channel_attention(sums, packed.cca_w, packed.cca_b, **rows)
    mid = reference.project(h, factor, packed.w2, packed.b2, tokens, multiply=True, **rows)
    double = config.dico.mlp_norm == "double"
    assert (packed.norm_scale is not None) == (double and modulated)
    scaled = reference.row_squares(mid, packed.norm_scale) if double else None
    h, _ = reference.expand(mid, packed.w3, packed.b3, reference.row_squares(mid), scaled_sumsq=scaled, **rows)
    out = reference.project(h, None, packed.w4, packed.b4, mid, **rows)
    got = out.view(2, *grid, dim).permute(0, 3, 1, 2)
    assert relative_error(got, expected) < 1e-13


def test_guidance_by_tokens_is_one_more_latent():
    """The folded form of a dropped token against the mask feature put in its place."""
    model = random_model(TINY_SIBLINGS["mdiffae_v2"]).double()
    packed = fold_decoder(model, 1.0, image_scale=1.0)
    torch.manual_seed(4)
    x_t, latents = torch.randn(1, 3, 16, 24).double(), torch.randn(1, 8, 2, 3).double()
    dropped = torch.tensor([1, 0, 0, 1, 1, 0]).view(1, 1, 2, 3)
    expected = model.decoder._fused_inputs(x_t, latents, dropped)
    masked = torch.cat([latents * (1 - dropped), dropped.double()], 1)
    tokens = reference.patchify(x_t, packed.masked_in_w, packed.in_b, patch=8, latents=masked)
    assert relative_error(tokens.view(1, 2, 3, -1).permute(0, 3, 1, 2), expected) < 1e-13


def test_edits_are_noticed():
    plain, fast = pair("irdiffae_v1")
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    before = fast.encode(image.to(DEVICE))
    with torch.no_grad():
        for model in (plain, fast):
            model.encoder.blocks[0].cca.proj.bias += 2.0
    after = fast.encode(image.to(DEVICE))
    assert not torch.equal(before, after)
    assert relative_error(after.cpu(), plain.encode(image)) < TOLERANCE
