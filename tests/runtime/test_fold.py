"""Each fold against the unfolded arithmetic, in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from golden_cases import GOLDEN
from measures import relative_error

from capacitor_rt import FullCapacitor, ModelConfig
from capacitor_rt.runtime import fold
from capacitor_rt.runtime.shapes_alone import ShapesAlone

TIGHT = 1e-12


@pytest.fixture(scope="module")
def model() -> FullCapacitor:
    return FullCapacitor.from_pretrained(GOLDEN / "p16", dtype=torch.float64, strict_size=False)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def packed_block(block: fold.PackedBlock, x: torch.Tensor) -> torch.Tensor:
    """The launches' arithmetic for one block: NCHW in and out."""
    dim = x.shape[1]
    y = torch.nn.functional.conv2d(x, block.dw_w.t().reshape(dim, 1, 7, 7), block.dw_b, padding=3, groups=dim)
    rstd = torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6)
    h = torch.einsum("bchw,cf->bfhw", y, block.w1) * rstd + block.b1[:, None, None]
    h = torch.nn.functional.gelu(h)
    norm = h.square().sum((2, 3), keepdim=True).sqrt()
    gain = block.gamma[:, None, None] * norm / (norm.mean(1, keepdim=True) + 1e-6)
    return torch.einsum("bfhw,fc->bchw", h * (1 + gain), block.w2) + block.b2[:, None, None] + x


def test_encoder_block(model):
    block, x = model.encoder.blocks[0], random(2, 56, 4, 6)
    folded = fold.fold_block(block, None, block.layer_scale)
    assert relative_error(packed_block(folded, x), block(x)) < TIGHT


def test_decoder_block(model):
    block, x = model.decoder.start_blocks[1], random(2, 56, 4, 6)
    modulation = random(112)
    folded = fold.fold_block(block, modulation[:56], modulation[56:])
    assert relative_error(packed_block(folded, x), block(x, modulation.expand(2, -1))) < TIGHT


@pytest.mark.parametrize("t", [1.0, 0.37, 0.0])
def test_modulations_follow_the_time(model, t):
    truth = model.decoder.modulations(torch.full((1,), t, dtype=torch.float64))
    for got, expected in zip(fold.modulations_at(model, t), truth, strict=True):
        assert relative_error(got, expected[0]) < TIGHT


@pytest.mark.parametrize("image_scale", [1.0, 0.25])
def test_decoder_input_collapses_into_one_matrix(model, image_scale):
    decoder = fold.fold_decoder(model, 1.0, image_scale)
    noise, latents = random(2, 3, 64, 96), random(2, 16, 4, 6)
    d = model.decoder
    truth = d.fuse_in(torch.cat([d.patchify(image_scale * noise), d.latent_up(model_dewhiten(model, latents))], 1))
    patches = torch.nn.functional.unfold(noise, 16, stride=16)  # [B, 3pp, T], rows (channel, row, column)
    rows = torch.cat([patches, latents.flatten(2)], 1).transpose(1, 2)
    got = (rows @ decoder.in_w + decoder.in_b).transpose(1, 2).view_as(truth)
    assert relative_error(got, truth) < TIGHT


def model_dewhiten(model, z):
    std = (model.latent_norm_running_var + model.config.latent_running_stats_eps).sqrt()
    return z * std[:, None, None] + model.latent_norm_running_mean[:, None, None]


def test_encoder_ends(model):
    encoder = fold.fold_encoder(model)
    image = random(1, 3, 32, 48)
    patches = torch.nn.functional.unfold(image, 16, stride=16).transpose(1, 2)
    truth = model.encoder.patchify(image).flatten(2).transpose(1, 2)
    assert relative_error(patches @ encoder.patch_w + encoder.patch_b, truth) < TIGHT
    z = random(1, 16, 2, 3)
    whitened = (z - encoder.whiten_mean[:, None, None]) * encoder.whiten_rstd[:, None, None]
    assert relative_error(model_dewhiten(model, whitened), z) < TIGHT


def test_output_and_skip_are_plain_transposes(model):
    decoder = fold.fold_decoder(model, 1.0)
    tokens = random(1, 56, 2, 2)
    truth = torch.nn.functional.pixel_shuffle(model.decoder.out_proj(tokens), 16)
    rows = tokens.flatten(2).transpose(1, 2) @ decoder.out_w + decoder.out_b
    got = torch.nn.functional.fold(rows.transpose(1, 2), (32, 32), 16, stride=16)
    assert relative_error(got, truth) < TIGHT
    s, m = random(1, 56, 2, 2), random(1, 56, 2, 2)
    got = torch.einsum("bkhw,kd->bdhw", torch.cat([s, m], 1), decoder.skip_w) + decoder.skip_b[:, None, None]
    assert relative_error(got, model.decoder.fuse_skip(torch.cat([s, m], 1))) < TIGHT


def test_no_statistics_fold_as_the_identity(model):
    bare = FullCapacitor(dataclasses.replace(model.config, encoder_depth=0)).double()
    bare.decoder.load_state_dict(model.decoder.state_dict())
    latents, noise = random(1, 16, 2, 2), random(1, 3, 32, 32)
    d = bare.decoder
    truth = d.fuse_in(torch.cat([d.patchify(noise), d.latent_up(latents)], 1))
    packed = fold.fold_decoder(bare, 1.0)
    rows = torch.cat([torch.nn.functional.unfold(noise, 16, stride=16), latents.flatten(2)], 1).transpose(1, 2)
    assert relative_error((rows @ packed.in_w + packed.in_b).transpose(1, 2).view_as(truth), truth) < TIGHT


def test_pack_rounds_once(model):
    folded = fold.fold_encoder(model)
    packed = fold.pack(folded, torch.bfloat16, "cpu")
    block, truth = packed.blocks[1], folded.blocks[1]
    assert torch.equal(block.w2, truth.w2.to(torch.bfloat16)) and block.w2.is_contiguous()
    assert torch.equal(block.b2, truth.b2.float()) and block.dw_w.dtype == torch.float32
    named = fold.named_tensors(packed)
    assert named["blocks.1.w2"] is block.w2 and len(named) == 7 + 7 * len(packed.blocks)


def test_rows_of_nhwc_images(model):
    folded = fold.fold_encoder(model)
    image = random(1, 3, 32, 16)
    nhwc = image.permute(0, 2, 3, 1).reshape(2, 16 * 16 * 3)
    truth = torch.nn.functional.unfold(image, 16, stride=16)[0].t() @ folded.patch_w
    assert relative_error(nhwc @ folded.patch_w_nhwc, truth) < TIGHT


@pytest.mark.parametrize("name", ["p8", "dico_ir", "dico_m2"])
def test_shapes_are_those_that_torch_gives(monkeypatch, name):
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    fields.pop("pdg_mask_ratio", None)
    asked = [("encoder", torch.bfloat16, None), ("decoder", torch.float32, None)]
    if name == "p8":
        asked.append(("encoder", torch.bfloat16, "fp8"))
    specs = fold.packed_specs.__wrapped__
    ours = [specs(ModelConfig.from_dict(fields), *rest) for rest in asked]
    monkeypatch.setattr(fold, "ShapesAlone", contextlib.nullcontext)
    assert ours == [specs(ModelConfig.from_dict(fields), *rest) for rest in asked]


def test_operations_alone_are_those_that_torch_gives():
    m = torch.empty(3, 4, device="meta", dtype=torch.float64)
    h, zero = m.to(torch.float16), torch.empty((), device="meta")

    def results() -> list[tuple[torch.Size, torch.dtype]]:
        found = [
            *(m * h, h + zero, zero * h, 2 * h, 1 / m, m[:, None] - m, -m, m / 3, h * torch.float64.itemsize),
            *(m @ m.t(), torch.addmm(m[0], m.t() @ m, m.t() @ m), torch.cat([m, m]), torch.cat([h, m], -1)),
            *(m.amax(0), m.amax((0, -1)), m.amax(-1, keepdim=True), h.abs(), m.sqrt(), m.clamp_min(1), m.exp()),
            *(m > 0, (m > 0) * 2, torch.arange(3, device="meta") / 2, m.sum(0)),
        ]
        return [(t.shape, t.dtype) for t in found]

    with ShapesAlone():
        ours = results()
    assert ours == results()


def test_a_plan_waits_for_no_compiler():
    code = (
        "import sys, torch\n"
        "from capacitor_rt.config import ModelConfig\n"
        "from capacitor_rt.runtime.fold import packed_specs\n"
        "for asked in (('encoder', None), ('encoder', 'fp8'), ('decoder', None)):\n"
        "    packed_specs(ModelConfig(), asked[0], torch.bfloat16, asked[1])\n"
        "print(sorted({'torch._dynamo', 'sympy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
