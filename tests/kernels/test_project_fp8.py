"""Project in e4m3 against float64, under Triton's interpreter: the rounded weights, both forms, slices of K, masks."""

from __future__ import annotations

import pytest
import torch

from capacitor_kernels import GemmConfig, project_fp8, project_workspace_shape
from capacitor_kernels import reference as ref
from capacitor_kernels.launch import E4M3, recording

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(batch: int, tokens: int, hidden: int, dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(batch + tokens + hidden)
    found = {
        "h": ref.e4m3(torch.nn.functional.gelu(torch.randn(batch * tokens, hidden, generator=g)) * 60),
        "gain": (torch.randn(batch, hidden, generator=g) * 0.4).half(),
        "w2": (torch.randn(dim, hidden, generator=g) * 50).half(),
        "w2_scale": (torch.rand(dim, generator=g) + 0.5) / (3000 * hidden**0.5),
        "b2": torch.randn(dim, generator=g) * 0.1,
        "residual": torch.randn(batch * tokens, dim, generator=g).to(dtype),
    }
    return {name: t.to(DEVICE) for name, t in found.items()}


def run(t: dict[str, torch.Tensor], tokens: int, config: GemmConfig) -> torch.Tensor:
    out = torch.full_like(t["residual"], float("nan"))
    shape = project_workspace_shape(*out.shape, config)
    workspace = None if shape is None else torch.full(shape, float("nan"), device=DEVICE)
    project_fp8(**t, out=out, tokens_per_image=tokens, workspace=workspace, config=config)
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "hidden", "dim", "config"),
    [
        (2, 16, 96, 64, GemmConfig(16, 32, 32, 8, 4, 2)),
        # last rows, columns and K masked
        (2, 35, 72, 40, GemmConfig(16, 32, 32, 2, 4, 2)),
        (1, 20, 160, 40, GemmConfig(16, 32, 32, 8, 4, 2, split_k=3)),
        (1, 64, 128, 64, GemmConfig(64, 64, 64, 8, 4, 2, tma=True)),
    ],
)
def test_it_is_near_float64(batch, tokens, hidden, dim, config, transposed):
    t = inputs(batch, tokens, hidden, dim, torch.float32)
    config = GemmConfig(**{**vars(config), "transposed": transposed})
    out = run(t, tokens, config)
    wide = {name: x.double() if name in ("b2", "residual", "w2_scale") else x for name, x in t.items()}
    truth = ref.project_fp8(**wide, tokens_per_image=tokens)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    # without the gain, and without its rounding, it is something else
    plain = ref.project_fp8(**{**wide, "gain": t["gain"] * 0}, tokens_per_image=tokens)
    exact = t["h"].double() @ (t["w2"].double() * (1 + t["gain"][0].double())).t() * t["w2_scale"].double()
    assert (truth - plain).abs().max() > 0.05
    assert (truth[:tokens] - exact[:tokens] - wide["b2"] - wide["residual"][:tokens]).abs().max() > 1e-3


def test_float16_streams_are_rounded_once_and_updated_in_place():
    t = inputs(1, 32, 64, 32, torch.float16)
    config = GemmConfig(16, 32, 32, 8, 4, 2)
    expected = run(t, 32, config)
    truth = ref.project_fp8(**{**t, "residual": t["residual"].double()}, tokens_per_image=32)
    torch.testing.assert_close(expected.float(), truth.float(), rtol=1e-3, atol=1e-3)
    project_fp8(**t, out=t["residual"], tokens_per_image=32, config=config)
    assert torch.equal(t["residual"], expected)


def test_weights_beyond_the_range_are_cut_off():
    t = inputs(1, 16, 64, 32, torch.float32)
    t["gain"] = t["gain"] * 0 + 100
    out = run(t, 16, GemmConfig(16, 32, 32, 8, 4, 2))
    limit = 448 * t["h"].float().abs().sum(1, keepdim=True) * t["w2_scale"] + 10
    assert out.isfinite().all() and (out.abs() <= limit).all()


def test_it_refuses_what_it_cannot_take():
    t = inputs(1, 16, 64, 32, torch.float32)
    out, config = torch.empty_like(t["residual"]), GemmConfig(16, 32, 32, 8, 4, 2)
    with recording(86), pytest.raises(ValueError, match=r"compute capability 8\.6 has no fp8"):
        project_fp8(**t, out=out, tokens_per_image=16, config=config)
    with pytest.raises(TypeError, match="gain is fp32, expected fp16"):
        project_fp8(**{**t, "gain": t["gain"].float()}, out=out, tokens_per_image=16, config=config)
    with pytest.raises(TypeError, match="w2 is bf16, expected fp16"):
        project_fp8(**{**t, "w2": t["w2"].bfloat16()}, out=out, tokens_per_image=16, config=config)
    with pytest.raises(ValueError, match="workspace is missing: split_k 2"):
        project_fp8(**t, out=out, tokens_per_image=16, config=GemmConfig(16, 32, 32, 8, 4, 2, split_k=2))
    with pytest.raises(TypeError, match="h is fp16, expected e4m3"):
        project_fp8(**{**t, "h": t["h"].half()}, out=out, tokens_per_image=16, config=config)
    assert t["h"].dtype == E4M3
