"""Attention against float64: any number of tokens, widths, scales, dtypes, stray accesses, memory, bad inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    Guarded,
    assert_close,
    assert_same_bits,
    exact,
    guarded_input,
    guarded_output,
    needs_gpu,
    randn,
    rms,
    tolerance,
)

from capacitor_kernels import reference
from capacitor_kernels.launch import recording
from capacitor_kernels.ops.attention import AttentionConfig, attention

DIM = 72
CONFIG = AttentionConfig(64, 32, 64, num_warps=8, num_stages=2)


@dataclass
class Case:
    """Inputs of one call and its output between guard bands."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: Guarded
    tokens_per_image: int
    config: AttentionConfig | None = CONFIG
    scale: float | None = None

    def run(self) -> torch.Tensor:
        options = {"tokens_per_image": self.tokens_per_image, "scale": self.scale, "config": self.config}
        attention(self.q, self.k, self.v, self.out.tensor, **options)
        self.out.check()
        return self.out.tensor

    def reference(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        inputs = (t.to(dtype) for t in (self.q, self.k, self.v))
        return reference.attention(*inputs, tokens_per_image=self.tokens_per_image, scale=self.scale)


def make_case(
    batch: int, tokens: int, dtype: torch.dtype, *, dim: int = DIM, spread: float = 1.5, heavy: bool = False
) -> Case:
    """Scores of a standard deviation of `spread` squared: above one, few keys decide."""
    q, k, v = (guarded_input(randn(batch * tokens, dim, seed=i, scale=spread, heavy=heavy), dtype) for i in range(3))
    return Case(q, k, v, guarded_output(batch * tokens, dim, dtype=dtype), tokens)


def check_case(case: Case, dtype: torch.dtype) -> None:
    assert_close("out", case.run(), case.reference(), case.reference(dtype), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 12, 35, 64, 196])
def test_matches_float64(tokens, batch, dtype):
    check_case(make_case(batch, tokens, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_width_of_the_flux2_vae_errs_no_more_than_torch(dtype):
    case = replace(make_case(2, 100, dtype, dim=512), config=None)
    out, truth = case.run(), case.reference()
    heads = [t.view(2, 1, 100, 512) for t in (case.q, case.k, case.v)]
    torchs = F.scaled_dot_product_attention(*heads).reshape(out.shape)
    eager = case.reference(dtype)
    mine, plain, fused = (rms(t.double() - truth) / rms(truth) for t in (out, eager, torchs))
    assert mine <= max(plain, fused) + (1e-6 if dtype == torch.float32 else 0.0), (mine, plain, fused)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 90),
    dim=st.integers(1, 150),
    block_m=st.sampled_from([16, 64]),
    block_n=st.sampled_from([16, 64]),
    block_k=st.sampled_from([16, 32, 128]),
)
def test_any_shape(tokens, dim, block_m, block_n, block_k):
    config = AttentionConfig(block_m, block_n, block_k, num_warps=4, num_stages=2)
    check_case(replace(make_case(1, tokens, torch.float32, dim=dim), config=config), torch.float32)


def test_scores_far_apart_overflow_nothing():
    # a softmax that is not shifted by its maximum is infinite from 89 on
    case = replace(make_case(1, 70, torch.float32, spread=4.0), scale=3.0)
    scores = case.q @ case.k.T * case.scale
    assert scores.max() > 300
    check_case(case, torch.float32)


def test_the_largest_score_may_come_last():
    case = make_case(1, 70, torch.float32)
    scores = case.q @ case.k.T
    case.k.copy_(case.k[scores.mean(0).argsort()])
    case.k[-1] = case.q.mean(0) * 40
    check_case(case, torch.float32)


def test_one_key_is_its_own_value():
    case = make_case(3, 1, torch.float32)
    assert_same_bits("values", case.run(), case.v)


def test_equal_scores_give_the_mean():
    case = make_case(2, 50, torch.float32)
    case.q.zero_()
    mean = case.v.view(2, 50, DIM).mean(1, keepdim=True).expand(-1, 50, -1).reshape(case.v.shape)
    torch.testing.assert_close(case.run(), mean)


def test_an_image_does_not_see_its_batch_and_runs_repeat():
    whole = exact(make_case(3, 35, torch.float32))
    out = whole.run().clone()
    assert_same_bits("second run", out, whole.run())
    for image in range(3):
        rows = slice(image * 35, (image + 1) * 35)
        alone = exact(make_case(1, 35, torch.float32))
        alone.q, alone.k, alone.v = (guarded_input(t[rows]) for t in (whole.q, whole.k, whole.v))
        assert_same_bits(f"image {image}", out[rows], alone.run())


@pytest.mark.parametrize("side", [1024, 2048])
def test_large_images_need_no_matrix_of_scores(side):
    tokens = (side // 8) ** 2
    with recording(90) as launches:
        tensors = (torch.empty(tokens, 512, dtype=torch.bfloat16, device="meta") for _ in "qkvo")
        attention(*tensors, tokens_per_image=tokens)
    (launch,) = launches
    held = [t for t in launch.args.values() if isinstance(t, torch.Tensor)]
    assert sum(t.nbytes for t in held) == 4 * tokens * 512 * 2
    # in bfloat16 that matrix is 512 MiB for one image of 1024 x 1024, and 8 GiB for one of 2048 x 2048
    assert 2 * tokens**2 == (512 << 20) * (side // 1024) ** 4 > 7 * sum(t.nbytes for t in held)
    assert math.prod(launch.grid) == tokens // 64


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


BAD = {
    "q dtype": ({"q": _zeros(70, DIM, dtype=torch.float64)}, TypeError, "q is float64"),
    "q rows": ({"q": _zeros(69, DIM)}, ValueError, "q has 69 rows, not a positive multiple"),
    "k shape": ({"k": _zeros(70, DIM - 1)}, ValueError, "k has shape .* is 71, not 72"),
    "v dtype": ({"v": _zeros(70, DIM, dtype=torch.float16)}, TypeError, "v is fp16, expected fp32"),
    "v stride": ({"v": _zeros(DIM, 70).t()}, ValueError, "v of shape .* row-major"),
    "k alignment": ({"k": _zeros(70 * DIM + 1)[1:].view(70, DIM)}, ValueError, "k starts at an address 4 bytes past"),
    "tokens_per_image": ({"tokens_per_image": 0}, ValueError, "tokens_per_image is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, error, message = BAD[name]
    case = replace(make_case(2, 35, torch.float32), **changes)
    with pytest.raises(error, match=message):
        case.run()
    assert case.out.tensor.isnan().all(), "refused after the launch"


def test_bad_outputs_and_widths_are_named():
    case = make_case(2, 35, torch.float32)
    with pytest.raises(ValueError, match="out shares its memory with v"):
        attention(case.q, case.k, case.v, case.v, tokens_per_image=35)
    with pytest.raises(TypeError, match="out is fp16, expected fp32"):
        replace(case, out=guarded_output(70, DIM, dtype=torch.float16)).run()
    with pytest.raises(ValueError, match="q has 520 columns, expected 1 to 512"):
        make_case(1, 4, torch.float32, dim=520).run()
    # 2^22 tokens of 512 columns are 2^31 elements
    with recording(90), pytest.raises(ValueError, match=r"elements of one image is \d+, over the 32-bit limit"):
        attention(*(torch.empty(2**22, 512, device="meta") for _ in "qkvo"), tokens_per_image=2**22)


@needs_gpu
@pytest.mark.parametrize(("batch", "tokens"), [(2, 1024), (3, 4356), (1, 16384)])
def test_bf16_at_real_size(batch, tokens):
    case = replace(make_case(batch, tokens, torch.bfloat16, dim=512), config=None)
    assert_close("out", case.run(), case.reference(), case.reference(torch.bfloat16), max_ratio=0.1)
    first = case.run().clone()
    assert_same_bits("second run", first, case.run())
