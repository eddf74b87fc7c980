"""Expand in e4m3 against float64, under Triton's interpreter: rounding, masks, sums of unrounded values, refusals."""

from __future__ import annotations

import pytest
import torch

from capacitor_kernels import GemmConfig, expand_fp8, expand_fp8_partials_shape, tuning
from capacitor_kernels import reference as ref
from capacitor_kernels.launch import E4M3, recording

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(batch: int, tokens: int, dim: int, hidden: int, spread: float = 30.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(batch + tokens + dim)
    y = torch.randn(batch * tokens, dim, generator=g)
    scaled = {
        "y": ref.e4m3(y * spread),
        "w1": ref.e4m3(torch.randn(hidden, dim, generator=g) * 100),
        "scale": (torch.rand(hidden, generator=g) + 0.5) / (spread * 100 * dim**0.5),
        "b1": torch.randn(hidden, generator=g) * 0.1,
        "sumsq": y.square().view(batch * tokens, 2, -1).sum(2),
        "h_inverse": torch.rand(hidden, generator=g) * 50 + 10,
    }
    return {name: t.to(DEVICE) for name, t in scaled.items()}


def run(t: dict[str, torch.Tensor], batch: int, tokens: int, config: GemmConfig) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = t["w1"].shape[0]
    h = torch.full((batch * tokens, hidden), float("nan"), device=DEVICE).to(E4M3)
    partials = torch.full(expand_fp8_partials_shape(batch, tokens, hidden, config), float("nan"), device=DEVICE)
    expand_fp8(**t, h=h, partials=partials, tokens_per_image=tokens, config=config)
    return h, partials


@pytest.mark.parametrize(
    ("batch", "tokens", "dim", "hidden", "config"),
    [
        (2, 16, 64, 96, GemmConfig(16, 32, 32, 8, 4, 2)),
        # last rows, columns and K masked
        (2, 35, 40, 72, GemmConfig(16, 32, 32, 2, 4, 2)),
        (1, 64, 64, 64, GemmConfig(64, 64, 64, 8, 4, 2, tma=True)),
    ],
)
def test_it_is_the_emulation_and_near_float64(batch, tokens, dim, hidden, config):
    t = inputs(batch, tokens, dim, hidden)
    h, partials = run(t, batch, tokens, config)
    wide = {name: x.double() for name, x in t.items()}
    truth, sums = ref.expand_fp8(**wide, tokens_per_image=tokens)
    torch.testing.assert_close(partials.double().sum(1), sums, rtol=1e-5, atol=1e-6)
    # a value that lies on the edge between two numbers may fall to either; no others
    off = h.float() != ref.e4m3(truth).float()
    assert off.double().mean() < 2e-3
    nearest = (ref.e4m3(truth).double() - truth).abs()
    assert ((h.double() - truth).abs() <= nearest * 1.001 + 1e-4 * truth.abs() + 1e-6).all()
    assert (h.float().abs() > 16).any() and h.float().abs().max() < 448


def test_values_beyond_the_range_are_cut_off():
    t = inputs(1, 16, 32, 32)
    t["h_inverse"] *= 1000
    h, partials = run(t, 1, 16, GemmConfig(16, 32, 32, 8, 4, 2))
    assert h.float().max() == 448 and h.float().isfinite().all() and partials.isfinite().all()


def test_an_image_does_not_see_its_batch():
    t = inputs(2, 20, 32, 64)
    config = GemmConfig(16, 32, 32, 8, 4, 2)
    h, partials = run(t, 2, 20, config)
    second = {name: x[20:] if x.shape[0] == 40 else x for name, x in t.items()}
    alone, sums = run(second, 1, 20, config)
    assert torch.equal(alone.view(torch.uint8), h[20:].view(torch.uint8)) and torch.equal(sums[0], partials[1])


def test_it_refuses_what_it_cannot_take(monkeypatch):
    t = inputs(1, 16, 32, 32)
    config = GemmConfig(16, 32, 32, 8, 4, 2)
    out = {"h": torch.empty(16, 32).to(E4M3), "partials": torch.empty(1, 1, 32)}
    out = {name: x.to(DEVICE) for name, x in out.items()}
    with recording(80), pytest.raises(ValueError, match=r"compute capability 8\.0 has no fp8: it needs 8\.9 or later"):
        expand_fp8(**t, **out, tokens_per_image=16, config=config)
    with pytest.raises(TypeError, match="y is fp32, expected e4m3"):
        expand_fp8(**{**t, "y": t["y"].float()}, **out, tokens_per_image=16, config=config)
    with pytest.raises(ValueError, match="scale has shape"):
        expand_fp8(**{**t, "scale": t["scale"][:-1]}, **out, tokens_per_image=16, config=config)
    with pytest.raises(TypeError, match="h is bf16, expected e4m3"):
        expand_fp8(**t, **{**out, "h": out["h"].bfloat16()}, tokens_per_image=16, config=config)


def test_sm_120_takes_the_block_scaled_product():
    t = {name: x.to("meta") for name, x in inputs(1, 16, 64, 32).items()}
    found = {}
    for cc in (89, 90, 100, 120):
        config = tuning.lookup("expand_fp8", cc, {"tokens_per_image": 16, "dim": 64, "hidden": 32}, E4M3)
        partials = torch.empty(expand_fp8_partials_shape(1, 16, 32, config), device="meta")
        with recording(cc) as launches:
            expand_fp8(**t, h=torch.empty(16, 32, dtype=E4M3, device="meta"), partials=partials, tokens_per_image=16)
        found[cc] = launches[0].args["PRODUCTS"]
    # the interpreter of Triton 3.6 has no dot_scaled
    from capacitor_kernels.launch import INTERPRETED

    assert found == {89: "plain", 90: "plain", 100: "plain", 120: "plain" if INTERPRETED else "scaled"}
