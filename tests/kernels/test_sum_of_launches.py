"""All launches in a row equal the golden vectors: encode, the raw posterior, one block, and a one-step decode.

Weights go from the checkpoint's tensors to the launches' layouts right here, with every simplification of
docs/numbers.md ("Numerics") that the kernels count on, so that this holds kernels and algebra together against numbers
that this project did not compute.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE, guarded_input, guarded_output
from safetensors.torch import load_file
from torch.nn.functional import silu

from capacitor_kernels.launch import compute_capability
from capacitor_kernels.ops.dwconv import dwconv, dwconv_sumsq_shape
from capacitor_kernels.ops.expand import expand, expand_partials_shape
from capacitor_kernels.ops.fuse_skip import fuse_skip
from capacitor_kernels.ops.grn import grn
from capacitor_kernels.ops.head import head
from capacitor_kernels.ops.patchify import pack_patchify_weight, patchify
from capacitor_kernels.ops.project import project
from capacitor_kernels.ops.unpatchify import unpatchify
from capacitor_kernels.ops.whiten import dewhiten, whiten
from capacitor_kernels.tuning import lookup

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("p16", "p8")
LIMIT = 1e-4
EPS = 1e-4
# t = 1 of the schedule with log-SNR from -10 to 10, and the point after it, t = 0
SIGMA_1, ALPHA_1 = math.sqrt(1 / (1 + math.exp(-10.0))), math.sqrt(1 / (1 + math.exp(10.0)))
SIGMA_0, ALPHA_0 = ALPHA_1, SIGMA_1
NOISE_STD = 0.558


@cache
def golden(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(config, weights in float64, inputs and outputs)."""
    folder = GOLDEN / name
    weights = {key: value.double() for key, value in load_file(folder / "model.safetensors").items()}
    return json.loads((folder / "config.json").read_text()), weights, load_file(folder / "io.safetensors")


def matrix(weight: torch.Tensor) -> torch.Tensor:
    """[N, K, ...] convolution weight as [K, N]."""
    return weight.flatten(1).t()


def ready(t: torch.Tensor) -> torch.Tensor:
    """float32 on the test device, between guard bands."""
    return guarded_input(t.float().contiguous())


def empty(*shape: int) -> torch.Tensor:
    """An output of NaN."""
    return guarded_output(*shape, dtype=torch.float32).tensor


def run_block(x: torch.Tensor, w: dict[str, torch.Tensor], prefix: str, size: dict, scale, gate) -> torch.Tensor:
    """dwconv, expand, grn, project: one block of the model on tokens x [T, D]."""
    w1, w2 = matrix(w[f"{prefix}.pwconv1.weight"]), matrix(w[f"{prefix}.pwconv2.weight"])
    beta, gamma = w[f"{prefix}.grn.beta"].flatten(), w[f"{prefix}.grn.gamma"].flatten()
    b2 = (w[f"{prefix}.pwconv2.bias"] + beta @ w2) * gate
    tokens, (dim, hidden) = x.shape[0], w1.shape
    per_image = size["height"] * size["width"]
    cc = compute_capability(DEVICE)

    config = lookup("dwconv", cc, {"height": size["height"], "width": size["width"], "dim": dim}, x.dtype)
    y, sumsq = empty(tokens, dim), empty(*dwconv_sumsq_shape(tokens, dim, config))
    taps = ready(w[f"{prefix}.dwconv.weight"].flatten(1).t())
    dwconv(x, taps, ready(w[f"{prefix}.dwconv.bias"]), y, sumsq, **size)

    config = lookup("expand", cc, {"tokens_per_image": per_image, "dim": dim, "hidden": hidden}, x.dtype)
    h, partials = empty(tokens, hidden), empty(*expand_partials_shape(size["batch"], per_image, hidden, config))
    w1, b1 = ready(w1 * (1 + scale)[:, None]), ready(w[f"{prefix}.pwconv1.bias"])
    expand(y, w1, b1, sumsq, h, partials, tokens_per_image=per_image, gelu="erf")

    gain, norms = empty(size["batch"], hidden), empty(size["batch"], hidden)
    grn(partials, ready(gamma), gain, norms=norms)
    out = empty(tokens, dim)
    project(h, gain, ready(w2 * gate), ready(b2), x, out, tokens_per_image=per_image)
    return out


def statistics(w: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of the latents, [Z]."""
    return w["latent_norm_running_mean"], (w["latent_norm_running_var"] + EPS).sqrt()


def encode(name: str) -> dict[str, torch.Tensor]:
    """latents, mean and logsnr of the golden image."""
    config, w, io = golden(name)
    patch, dim = config["patch_size"], config["model_dim"]
    image = io["image"]
    batch, height, width = image.shape[0], image.shape[2] // patch, image.shape[3] // patch
    size = {"batch": batch, "height": height, "width": width}
    x = empty(batch * height * width, dim)
    patch_w = ready(pack_patchify_weight(w["encoder.patchify.proj.weight"], patch=patch))
    patchify(ready(image), patch_w, ready(w["encoder.patchify.proj.bias"]), x, patch=patch)
    for i in range(config["encoder_depth"]):
        prefix = f"encoder.blocks.{i}"
        x = run_block(x, w, prefix, size, torch.zeros(dim).double(), w[f"{prefix}.layer_scale"])
    mean, std = statistics(w)
    outputs = {key: empty(batch, config["bottleneck_dim"], height, width) for key in ("latents", "mean", "logsnr")}
    head_w, head_b = matrix(w["encoder.to_bottleneck.weight"]), w["encoder.to_bottleneck.bias"]
    head(x, ready(head_w), ready(head_b), **outputs, whiten_mean=ready(mean), whiten_rstd=ready(1 / std))
    return outputs


def modulations(w: dict[str, torch.Tensor], count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(scale, gate) of every decoder block at t = 1."""
    angle = 1000.0 * 10000.0 ** (-torch.arange(128).double() / 127)
    embedding = torch.cat([angle.sin(), angle.cos()])
    for name in ("proj_in", "proj_out"):
        weight, bias = w[f"decoder.time_embed.{name}.weight"], w[f"decoder.time_embed.{name}.bias"]
        embedding = weight @ (embedding if name == "proj_in" else silu(embedding)) + bias
    a = silu(embedding)
    base = w["decoder.adaln_base.proj.weight"] @ a + w["decoder.adaln_base.proj.bias"]
    deltas = [
        w[f"decoder.adaln_deltas.{i}.up.weight"] @ (w[f"decoder.adaln_deltas.{i}.down.weight"] @ a)
        for i in range(count)
    ]
    return [tuple((base + delta).chunk(2)) for delta in deltas]


def decode(name: str, seed: int) -> torch.Tensor:
    """One step of DDIM from the golden latents."""
    config, w, io = golden(name)
    patch, dim = config["patch_size"], config["model_dim"]
    latents = io["latents"]
    batch, _, height, width = latents.shape
    size = {"batch": batch, "height": height, "width": width}
    shape = (batch, 3, height * patch, width * patch)
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))

    # patchify, latent_up, fuse_in and dewhitening in one matrix; the start state is a multiple of the noise
    mean, std = statistics(w)
    fuse = matrix(w["decoder.fuse_in.weight"])
    up = matrix(w["decoder.latent_up.weight"]) @ fuse[dim:]
    pixels = pack_patchify_weight(w["decoder.patchify.proj.weight"], patch=patch) @ fuse[:dim]
    in_w = torch.cat([NOISE_STD * SIGMA_1 * pixels, std[:, None] * up])
    in_b = w["decoder.fuse_in.bias"] + w["decoder.patchify.proj.bias"] @ fuse[:dim] + mean @ up
    in_b = in_b + w["decoder.latent_up.bias"] @ fuse[dim:]
    x = empty(batch * height * width, dim)
    patchify(ready(noise), ready(in_w), ready(in_b), x, patch=patch, latents=ready(latents))

    starts, ends = config["decoder_start_blocks"], config["decoder_end_blocks"]
    middles = config["decoder_depth"] - starts - ends
    names = [f"start_blocks.{i}" for i in range(starts)] + [f"middle_blocks.{i}" for i in range(middles)]
    names += [f"end_blocks.{i}" for i in range(ends)]
    skip = x
    for i, ((scale, gate), block) in enumerate(zip(modulations(w, len(names)), names, strict=True)):
        if i == starts + middles:
            fused = empty(*x.shape)
            skip_w, skip_b = matrix(w["decoder.fuse_skip.weight"]), w["decoder.fuse_skip.bias"]
            fuse_skip(skip, x, ready(skip_w), ready(skip_b), fused, tokens_per_image=height * width)
            x = fused
        x = run_block(x, w, f"decoder.{block}", size, scale, gate)
        if i == starts - 1:
            skip = x
    # x0 = alpha_0 x0 + sigma_0 eps, eps = (start - alpha_1 x0) / sigma_1
    ratio = SIGMA_0 / SIGMA_1
    scales = {"scale_x0": ALPHA_0 - ratio * ALPHA_1, "scale_noise": ratio * SIGMA_1 * NOISE_STD}
    image = empty(*shape)
    out_w, out_b = matrix(w["decoder.out_proj.weight"]), w["decoder.out_proj.bias"]
    unpatchify(x, ready(out_w), ready(out_b), image, patch=patch, noise=ready(noise), **scales)
    return image


def assert_golden(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((got.double().cpu() - expected.double()).norm() / expected.double().norm()).item()
    print(f"{what}: relative error {error:.2e}")
    assert error < LIMIT, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_encode(name):
    outputs, io = encode(name), golden(name)[2]
    assert_golden("latents", outputs["latents"], io["latents"])
    assert_golden("mean", outputs["mean"], io["posterior_mean"])
    assert_golden("logsnr", outputs["logsnr"], io["posterior_logsnr"])


@pytest.mark.parametrize("name", NAMES)
def test_decode_in_one_step(name):
    keys = [key for key in golden(name)[2] if key.startswith("decode_ddim1_linear_seed")]
    assert keys, "the golden file has no one-step decode"
    for key in keys:
        assert_golden(key, decode(name, seed=int(key.rpartition("seed")[2])), golden(name)[2][key])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_block(name, part):
    config, w, io = golden(name)
    block_in = io["block_in"]
    batch, dim, height, width = block_in.shape
    size = {"batch": batch, "height": height, "width": width}
    if part == "encoder":
        prefix, scale, gate = "encoder.blocks.0", torch.zeros(dim).double(), w["encoder.blocks.0.layer_scale"]
    else:
        prefix = "decoder.start_blocks.0"
        scale, gate = modulations(w, config["decoder_depth"])[0]
        assert_golden("modulation", torch.cat([scale, gate]), io["decoder_block0_modulation_t1"][0])
    x = ready(block_in.permute(0, 2, 3, 1).reshape(-1, dim))
    out = run_block(x, w, prefix, size, scale, gate)
    got = out.view(batch, height, width, dim).permute(0, 3, 1, 2)
    assert_golden("block", got, io[f"{part}_block0_out"])


@pytest.mark.parametrize("name", NAMES)
def test_whitening_of_the_posterior_mode(name):
    _, w, io = golden(name)
    mean, std = statistics(w)
    mode = torch.exp(0.5 * torch.nn.functional.logsigmoid(io["posterior_logsnr"])) * io["posterior_mean"]
    white, back = empty(*mode.shape), empty(*mode.shape)
    whiten(ready(mode), ready(mean), ready(1 / std), white)
    assert_golden("latents", white, io["latents"])
    dewhiten(white, ready(mean), ready(std), back)
    assert_golden("mode", back, mode)
