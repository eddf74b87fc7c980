"""The encoder in e4m3, emulated: rounding against a list of all numbers, each step against float64, and its ranges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import random_model

from capacitor_kernels import reference
from capacitor_kernels.reference import e4m3
from capacitor_rt import InputError
from capacitor_rt.runtime import fold_fp8
from capacitor_rt.runtime.fold import PackedBlock, fold_encoder
from capacitor_rt.runtime.fold_fp8 import BlockRange, fold_fp8_block
from capacitor_rt.runtime.fp8 import Fp8Encoder
from capacitor_rt.runtime.packed import PackedFp8Block, named_tensors, pack

D, F, T, IMAGES = 24, 40, 12, 2


def all_numbers() -> torch.Tensor:
    """Every finite e4m3 number, by its definition: sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    found = []
    for bits in range(128):
        exponent, mantissa = bits >> 3, bits & 7
        if bits == 127:
            continue
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        found += [value, -value]
    return torch.tensor(sorted(set(found)), dtype=torch.float64)


def test_rounding_is_to_the_nearest_even_and_cut_off_at_448():
    numbers = all_numbers()
    assert numbers.max() == fold_fp8.E4M3_LARGEST == 448 and len(numbers) == 253
    x = torch.cat([torch.randn(4000) * scale for scale in (1e-3, 0.1, 1.0, 100.0, 1000.0)]).double()
    x = torch.cat([x, (numbers[1:] + numbers[:-1]) / 2, numbers, torch.tensor([1e30, -1e30], dtype=torch.float64)])
    got = e4m3(x).double()
    distance = (x.clamp(-448, 448)[:, None] - numbers).abs()
    nearest = distance.amin(1)
    torch.testing.assert_close((x.clamp(-448, 448) - got).abs(), nearest, rtol=1e-6, atol=1e-12)
    # of two equally near the one with an even mantissa
    middle = (numbers[1:] + numbers[:-1]) / 2
    even = numbers[torch.arange(len(numbers)) % 2 == (len(numbers) // 2) % 2]
    assert torch.isin(e4m3(middle).double().abs(), even.abs()).all()


@pytest.fixture
def block():
    """A block's folded weights in float64, and values that it meets."""
    g = torch.Generator().manual_seed(3)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * scale

    packed = PackedBlock(
        randn(49, D), randn(D), randn(D, F, scale=D**-0.5), randn(F, scale=0.1), randn(F), randn(F, D, scale=F**-0.5),
        randn(D, scale=0.1),
    )  # fmt: skip
    y, residual = randn(IMAGES * T, D, scale=3.0), randn(IMAGES * T, D)
    sumsq = y.square().sum(1, keepdim=True)
    h, sums = reference.expand(y, packed.w1, packed.b1, sumsq, tokens_per_image=T, gelu="fit")
    gain = reference.grn(sums, packed.gamma)
    seen = BlockRange(y.abs().amax().float(), h.abs().amax(0).float(), (1 + gain).abs().amax(0).float())
    return packed, seen, y, residual, sumsq, h, sums, gain


def expand(y: torch.Tensor, sumsq: torch.Tensor, made: PackedFp8Block) -> tuple[torch.Tensor, torch.Tensor]:
    """h in e4m3 and the sums, of y in float64."""
    y8, b1 = e4m3(y.float() * made.y_inverse), made.b1.float()
    h, sums = reference.expand_fp8(y8, made.w1, made.scale, b1, sumsq.float(), made.h_inverse, tokens_per_image=T)
    return e4m3(h), sums


def project(h8: torch.Tensor, gain: torch.Tensor, residual: torch.Tensor, made: PackedFp8Block) -> torch.Tensor:
    weights = made.w2, made.w2_scale, made.b2.float()
    return reference.project_fp8(h8, gain, *weights, residual.float(), tokens_per_image=T)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()).item()


def test_expand_is_near_float64_and_its_sums_are_of_unrounded_values(block):
    packed, seen, y, _, sumsq, h, _, _ = block
    made = fold_fp8_block(packed, seen)
    h8, got = expand(y, sumsq, made)
    assert h8.dtype == made.w1.dtype == torch.float8_e4m3fn and h8.shape == (IMAGES * T, F)
    back = h8.double() / made.h_inverse
    # a rounding of 3 bits errs by 2.6 % in the mean at most; three of them meet here
    assert 0.002 < relative(back, h) < 0.06
    # the products alone, with operands as they were rounded, in float64
    y8 = e4m3(y.float() * made.y_inverse).double() / made.y_inverse.double()
    w1 = made.w1.double() * (made.scale.double() * made.y_inverse.double())[:, None]
    assert relative(w1, packed.w1.t()) < 0.04
    exact = reference.gelu_fit((y8 @ w1.t()) * torch.rsqrt(sumsq / D + 1e-6) + packed.b1)
    torch.testing.assert_close(got.double(), exact.square().view(IMAGES, T, F).sum(1), rtol=1e-5, atol=1e-5)
    assert relative(e4m3((exact * made.h_inverse).float()).double(), h8.double()) < 5e-3


def test_project_folds_the_scales_and_rounds_the_weights_of_each_image(block):
    packed, seen, _, residual, _, h, _, gain = block
    made = fold_fp8_block(packed, seen)
    h8 = e4m3(h * made.h_inverse)
    gain = gain.half()
    out = project(h8, gain, residual, made)
    truth = reference.project(h, gain.double(), packed.w2, packed.b2, torch.zeros_like(residual), tokens_per_image=T)
    assert 0.002 < relative(out.double() - residual, truth) < 0.08
    for image in range(IMAGES):
        rows = slice(image * T, (image + 1) * T)
        weights = e4m3((made.w2.double() * (1 + gain[image].double())).half()).double() * made.w2_scale[:, None]
        exact = h8[rows].double() @ weights.t() + packed.b2 + residual[rows]
        torch.testing.assert_close(out[rows].double(), exact, rtol=1e-5, atol=1e-5)
    # nothing that the calibration has seen is cut off
    scaled = (made.w2.float() * (1 + gain.float())[:, None, :]).abs()
    most = fold_fp8.E4M3_LARGEST / fold_fp8.HEADROOM
    assert 0.9 * most < scaled.max() <= 1.01 * most and (h * made.h_inverse).max() <= 1.001 * most


def test_values_beyond_the_calibration_are_cut_off_and_stay_finite(block):
    packed, seen, y, residual, _, _, _, gain = block
    made = fold_fp8_block(packed, replace(seen, y=seen.y / 100))
    h8, _ = expand(y, y.square().sum(1, keepdim=True), made)
    out = project(h8, gain.half() * 50, residual, made)
    assert h8.float().isfinite().all() and out.isfinite().all()


@pytest.fixture
def model():
    return random_model()


def ranges(model, images: torch.Tensor) -> tuple[BlockRange, ...]:
    found = {}
    Fp8Encoder(model, None, torch.float32).posterior(images, found.__setitem__)
    return tuple(found[i] for i in range(len(found)))


IMAGE = torch.linspace(-1, 1, 2 * 3 * 64 * 32).reshape(2, 3, 64, 32).sin()


def test_without_ranges_it_is_the_model(model):
    exact = Fp8Encoder(model, None, torch.float32)
    # the launches' GELU is a fit
    torch.testing.assert_close(exact.encode(IMAGE), model.encode(IMAGE), rtol=1e-3, atol=2e-4)
    mean, logsnr = exact.posterior(IMAGE)
    theirs = model.encode_posterior(IMAGE)
    torch.testing.assert_close(mean, theirs.mean, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(logsnr, theirs.logsnr, rtol=1e-3, atol=2e-4)


def test_eight_bits_cost_more_than_sixteen_and_little(model):
    truth = Fp8Encoder(model, None, torch.float32).encode(IMAGE)
    sixteen = relative(Fp8Encoder(model, None, torch.bfloat16).encode(IMAGE), truth.double())
    eight = relative(Fp8Encoder(model, ranges(model, IMAGE), torch.bfloat16).encode(IMAGE), truth.double())
    assert sixteen < eight < 0.1


def test_an_image_does_not_see_its_batch(model):
    encoder = Fp8Encoder(model, ranges(model, IMAGE), torch.bfloat16)
    both = encoder.encode(IMAGE)
    for i in range(2):
        torch.testing.assert_close(encoder.encode(IMAGE[i : i + 1])[0], both[i], rtol=0.02, atol=0.02)
    pixels = ((IMAGE + 1) * 127.5).round().to(torch.uint8)
    nhwc = encoder.encode(pixels.permute(0, 2, 3, 1))
    torch.testing.assert_close(nhwc, encoder.encode(pixels))


def test_weights_are_scaled_by_what_was_seen(model):
    seen = ranges(model, IMAGE)[0]
    made = fold_fp8_block(fold_encoder(model).blocks[0], seen)
    assert made.y_inverse.item() == pytest.approx(448 / fold_fp8.HEADROOM / seen.y.item())
    torch.testing.assert_close(made.h_inverse, 448 / (fold_fp8.HEADROOM * seen.hidden))
    assert made.w1.float().abs().amax(1).min() > 400


def test_hardly_used_channels_keep_their_weights_in_range(block):
    packed, seen = block[:2]
    made = fold_fp8_block(packed, replace(seen, gain=torch.zeros(F)))
    assert made.w2.isfinite().all() and made.w2.float().abs().max() > 1000


def test_packing_keeps_the_types_that_launches_take(block):
    made = pack(fold_fp8_block(*block[:2]), torch.bfloat16, "cpu")
    assert isinstance(made, PackedFp8Block)
    kinds = {name: t.dtype for name, t in named_tensors(made).items()}
    assert kinds.pop("w1") == torch.float8_e4m3fn and kinds.pop("w2") == torch.float16
    assert set(kinds.values()) == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: (), "the calibration has 0 blocks and the encoder"),
        (
            lambda r: (replace(r[0], hidden=r[0].hidden[1:]), *r[1:]),
            "hidden of block 0 of the calibration",
        ),
        (lambda r: (replace(r[0], gain=-r[0].gain), *r[1:]), "gain of block 0"),
        (lambda r: (replace(r[0], y=torch.tensor(float("nan"))), *r[1:]), "y of block 0"),
    ],
)
def test_ranges_of_another_model_are_refused(model, change, message):
    with pytest.raises(InputError, match=message):
        Fp8Encoder(model, change(ranges(model, IMAGE)))
