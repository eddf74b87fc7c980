"""Expand against float64: shapes, dtypes, stray accesses, determinism, bad inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    GRIDS,
    Guarded,
    assert_close,
    assert_same_bits,
    grid_id,
    guarded_input,
    guarded_output,
    needs_gpu,
    randn,
    tolerance,
)

from capacitor_kernels import reference, tuning
from capacitor_kernels.config_rows import ConfigRow
from capacitor_kernels.gemm import GemmConfig
from capacitor_kernels.launch import INTERPRETED, cdiv, compute_capability, recording
from capacitor_kernels.ops.expand import HOPPER, expand, expand_partials_shape
from capacitor_kernels.tuning import lookup

DIM, HIDDEN = 72, 200
CONFIG = GemmConfig(128, 128, 64, group_m=4, num_warps=4, num_stages=2)


@dataclass
class Case:
    """Inputs of one call and its outputs between guard bands."""

    inputs: tuple[torch.Tensor, ...]
    tokens_per_image: int
    h: Guarded
    partials: Guarded
    config: GemmConfig

    def run(self, gelu: str = "fit") -> tuple[torch.Tensor, torch.Tensor]:
        expand(
            *self.inputs,
            self.h.tensor,
            self.partials.tensor,
            tokens_per_image=self.tokens_per_image,
            gelu=gelu,
            config=self.config,
        )
        self.h.check()
        self.partials.check()
        return self.h.tensor, self.partials.tensor

    def reference(self, gelu: str = "erf", dtype: torch.dtype = torch.float64):
        y, w1, b1, sumsq = self.inputs
        wide = torch.promote_types(dtype, torch.float32)
        return reference.expand(y.to(dtype), w1, b1, sumsq.to(wide), tokens_per_image=self.tokens_per_image, gelu=gelu)


def make_case(
    batch: int,
    tokens_per_image: int,
    dtype: torch.dtype,
    *,
    dim: int = DIM,
    hidden: int = HIDDEN,
    config: GemmConfig = CONFIG,
    heavy: bool = False,
    seed: int = 0,
) -> Case:
    tokens = batch * tokens_per_image
    y = guarded_input(randn(tokens, dim, seed=seed, heavy=heavy), dtype)
    w1 = guarded_input(randn(dim, hidden, seed=seed + 1, scale=dim**-0.5), dtype)
    b1 = guarded_input(randn(hidden, seed=seed + 2, scale=0.1))
    chunks = torch.nn.functional.pad(y.float().square(), (0, -dim % 64)).view(tokens, -1, 64)
    return Case(
        (y, w1, b1, guarded_input(chunks.sum(2))),
        tokens_per_image,
        guarded_output(tokens, hidden, dtype=dtype),
        guarded_output(*expand_partials_shape(batch, tokens_per_image, hidden, config), dtype=torch.float32),
        config,
    )


def check_case(case: Case, dtype: torch.dtype, gelu: str = "fit") -> None:
    h, partials = case.run(gelu)
    truth_h, truth_sums = case.reference(gelu)
    base_h, _ = case.reference(gelu, dtype)
    assert_close("h", h, truth_h, base_h, **tolerance(dtype))
    # the sums are of unrounded values: float32 accuracy whatever the dtype of h, and no baseline to lean on
    assert_close("sums", partials.double().sum(1), truth_sums, floor=5e-6, max_ratio=5e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_matches_float64(grid, batch, dtype):
    if grid == (32, 32) and batch == 3 and dtype == torch.float16 and INTERPRETED:
        pytest.skip("numpy's float16 takes seconds here; batch 1 and the smaller grids cover it")
    check_case(make_case(batch, grid[0] * grid[1], dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_gelu(dtype):
    check_case(make_case(2, 35, dtype), dtype, gelu="erf")


def test_fit_stays_close_to_the_exact_gelu():
    case = make_case(1, 70, torch.float32)
    h, _ = case.run("fit")
    exact, _ = case.reference("erf")
    assert (h.double() - exact).abs().max() < 3e-5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fit_over_every_bfloat16():
    """Every bit pattern as the argument of the fit: one column is the value, the others and the bias are zero."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    tokens, dim = x.numel(), 16
    y, w1 = torch.zeros(tokens, dim), torch.zeros(dim, 16)
    y[:, 0], w1[0] = x, 1.0
    # few programs: the interpreter runs them one by one
    config = GemmConfig(4096 if INTERPRETED else 128, 16, 16, 8, 4, 2)
    h = torch.empty(tokens, 16, device=DEVICE)
    partials = torch.empty(expand_partials_shape(1, tokens, 16, config), device=DEVICE)
    # a mean square of one and no eps: nothing is scaled
    inputs = [t.to(DEVICE) for t in (y, w1, torch.zeros(16), torch.full((tokens, 1), float(dim)))]
    expand(*inputs, h, partials, tokens_per_image=tokens, eps=0.0, config=config)
    got = h[:, 0].cpu()
    exact = torch.nn.functional.gelu(x.double())
    finite = x.isfinite()
    close = finite & (x.abs() < 2.0**20)
    assert (got.double() - exact)[close].abs().max() < 2.54e-5
    # beyond, the fit is x or zero
    beyond = finite & ~close
    torch.testing.assert_close(got[beyond], x[beyond].clamp_min(0.0), rtol=1e-6, atol=0)
    assert got[x.isnan()].isnan().all() and got[x == float("inf")].isinf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heavy_tails(dtype):
    check_case(make_case(2, 70, dtype, heavy=True, seed=7), dtype)


def test_eps_counts_where_the_input_is_faint():
    case = make_case(1, 35, torch.float32)
    y, w1, b1, sumsq = case.inputs
    # mean square near 1e-6, the size of eps; and one row of zeros
    scale = torch.full((35, 1), 1e-3, device=DEVICE)
    scale[7] = 0
    case.inputs = (guarded_input(y * scale), w1, b1, guarded_input(sumsq * scale.square()))
    check_case(case, torch.float32)


@pytest.mark.parametrize("tokens_per_image", [128, 70])
def test_descriptor_loads_give_the_same_bits(tokens_per_image):
    plain = make_case(2, tokens_per_image, torch.float32)
    config = replace(CONFIG, tma=True)
    tma = make_case(2, tokens_per_image, torch.float32, config=config)
    for name, a, b in zip(("h", "partials"), plain.run(), tma.run(), strict=True):
        assert_same_bits(name, a, b)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 90),
    dim=st.integers(1, 90),
    hidden=st.integers(1, 150),
    block_m=st.sampled_from([16, 32, 64]),
    group_m=st.integers(1, 5),
)
def test_any_shape(batch, tokens, dim, hidden, block_m, group_m):
    config = GemmConfig(block_m, 64, 32, group_m, 4, 2)
    case = make_case(batch, tokens, torch.float32, dim=dim, hidden=hidden, config=config)
    check_case(case, torch.float32)


@pytest.mark.parametrize("tokens_per_image", [128, 35])
def test_an_image_does_not_see_its_batch(tokens_per_image):
    whole = make_case(3, tokens_per_image, torch.float32)
    h, partials = whole.run()
    for image in range(3):
        rows = slice(image * tokens_per_image, (image + 1) * tokens_per_image)
        alone = make_case(1, tokens_per_image, torch.float32)
        y, w1, b1, sumsq = whole.inputs
        alone.inputs = (guarded_input(y[rows]), w1, b1, guarded_input(sumsq[rows]))
        one_h, one_partials = alone.run()
        assert_same_bits(f"h of image {image}", h[rows], one_h)
        assert_same_bits(f"partials of image {image}", partials[image : image + 1], one_partials)


def test_runs_repeat_bit_for_bit():
    case = make_case(2, 70, torch.float16)
    first = [t.clone() for t in case.run()]
    for name, a, b in zip(("h", "partials"), first, case.run(), strict=True):
        assert_same_bits(name, a, b)


def test_config_is_looked_up_by_the_shape_of_one_image():
    case = make_case(1, 35, torch.float32)
    shape = {"tokens_per_image": 35, "dim": DIM, "hidden": HIDDEN}
    config = lookup("expand", compute_capability(DEVICE), shape, torch.float32)
    case.partials = guarded_output(*expand_partials_shape(1, 35, HIDDEN, config), dtype=torch.float32)
    case.config = None
    check_case(case, torch.float32)


def _replace(index: int, value: torch.Tensor):
    def change(case: Case) -> None:
        case.inputs = (*case.inputs[:index], value, *case.inputs[index + 1 :])

    return change


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


BAD = {
    "y dtype": (_replace(0, _zeros(70, DIM, dtype=torch.float64)), TypeError, "y is float64"),
    "y rank": (_replace(0, _zeros(2, 35, DIM)), ValueError, "y has shape .* expected 2 dimensions"),
    "y stride": (_replace(0, _zeros(DIM, 70).t()), ValueError, "y of shape .* row-major"),
    "tokens": (_replace(0, _zeros(69, DIM)), ValueError, "y has 69 rows, not a positive multiple .* 35"),
    "w1 size": (_replace(1, _zeros(DIM + 1, HIDDEN)), ValueError, r"w1 has .* dimension 0 is 73, not 72"),
    "w1 dtype": (_replace(1, _zeros(DIM, HIDDEN, dtype=torch.float16)), TypeError, "w1 is fp16, expected fp32"),
    "b1 size": (_replace(2, _zeros(HIDDEN - 8)), ValueError, "b1 has shape"),
    "b1 alignment": (_replace(2, _zeros(HIDDEN + 1)[1:]), ValueError, "b1 starts at an address 4 bytes past"),
    "sumsq rows": (_replace(3, _zeros(35, 2)), ValueError, "sumsq has shape"),
    "sumsq dtype": (_replace(3, _zeros(70, 2, dtype=torch.float16)), TypeError, "sumsq is fp16, expected fp32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    change, error, message = BAD[name]
    case = make_case(2, 35, torch.float32)
    change(case)
    with pytest.raises(error, match=message):
        case.run()
    assert case.h.tensor.isnan().all(), "refused after the launch"


def test_bad_outputs_and_options_are_named():
    case = make_case(2, 35, torch.float32)
    with pytest.raises(ValueError, match="gelu is 'tanh', expected one of"):
        case.run("tanh")
    partials, case.partials = case.partials, guarded_output(2, 5, HIDDEN, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"partials has shape .* dimension 1 is 5, not 1"):
        case.run()
    case.partials = partials
    case.h = guarded_output(70, HIDDEN, dtype=torch.float16)
    with pytest.raises(TypeError, match="h is fp16, expected fp32"):
        case.run()


def test_descriptors_refuse_rows_off_16_bytes():
    config = replace(CONFIG, tma=True)
    case = make_case(1, 35, torch.float32, dim=71, config=config)
    with pytest.raises(ValueError, match="y has rows of 71 elements"):
        case.run()


@pytest.mark.slow
def test_real_size_under_the_interpreter():
    config = lookup("expand", 90, {"tokens_per_image": 256, "dim": 896, "hidden": 3584}, torch.bfloat16)
    check_case(make_case(1, 256, torch.float16, dim=896, hidden=3584, config=config), torch.float16)


SHAPE = {"tokens_per_image": 256, "dim": 896, "hidden": 3584}
MODULE = import_module("capacitor_kernels.ops.expand")


@pytest.fixture
def compiled(monkeypatch):
    """As if kernels were compiled: under the interpreter the form in Gluon is never chosen."""
    monkeypatch.setattr(MODULE, "INTERPRETED", False)
    monkeypatch.delenv("CAPACITOR_EXPAND", raising=False)


def test_specialised_warps_are_asked_for(compiled, monkeypatch):
    plain = lookup("expand", 90, SHAPE, torch.bfloat16)
    assert not plain.gluon
    monkeypatch.setenv("CAPACITOR_EXPAND", "gluon")
    assert lookup("expand", 90, SHAPE, torch.bfloat16) == HOPPER
    assert lookup("expand", 90, SHAPE, torch.float16) == HOPPER
    # sums per 64 rows, whatever the tile
    assert expand_partials_shape(2, 256, 3584, HOPPER) == (2, 4, 3584)
    monkeypatch.setenv("CAPACITOR_EXPAND", "Gluon")
    with pytest.raises(ValueError, match="CAPACITOR_EXPAND is 'Gluon', expected gluon or plain"):
        lookup("expand", 90, SHAPE, torch.bfloat16)


@pytest.mark.parametrize(
    ("cc", "change", "dtype", "use"),
    [
        (120, {}, torch.bfloat16, "throughput"),
        (90, {"tokens_per_image": 196}, torch.bfloat16, "throughput"),
        (90, {"hidden": 200}, torch.bfloat16, "throughput"),
        (90, {"dim": 72}, torch.bfloat16, "throughput"),
        (90, {}, torch.float32, "throughput"),
        (90, {}, torch.bfloat16, "latency"),
    ],
)
def test_the_plain_kernel_serves_the_rest(compiled, monkeypatch, cc, change, dtype, use):
    plain = lookup("expand", cc, SHAPE | change, dtype, use)
    monkeypatch.setenv("CAPACITOR_EXPAND", "gluon")
    assert lookup("expand", cc, SHAPE | change, dtype, use) == plain
    assert not plain.gluon


def test_a_row_asks_for_it_where_triton_has_it(compiled, monkeypatch):
    row = ConfigRow("expand", 90, SHAPE, "bf16", "throughput", HOPPER, {})
    monkeypatch.setattr(tuning, "rows", lambda cc, family: (row,))
    tuning._cached_lookup.cache_clear()
    try:
        assert lookup("expand", 90, SHAPE, torch.bfloat16) == HOPPER
        monkeypatch.setenv("CAPACITOR_EXPAND", "plain")
        assert not lookup("expand", 90, SHAPE, torch.bfloat16).gluon
        monkeypatch.delenv("CAPACITOR_EXPAND")
        monkeypatch.setattr(MODULE, "_hopper", lambda: None)
        assert not lookup("expand", 90, SHAPE, torch.bfloat16).gluon
        monkeypatch.setattr(MODULE, "INTERPRETED", True)
        assert not lookup("expand", 90, SHAPE, torch.bfloat16).gluon
    finally:
        tuning._cached_lookup.cache_clear()


def test_what_it_cannot_take_is_named(compiled):
    case = make_case(1, 128, torch.float16, dim=64, hidden=256, config=HOPPER)
    with (
        recording(90),
        pytest.raises(ValueError, match="form in Gluon: it has the fitted GELU, not 'erf': use a config"),
    ):
        case.run("erf")
    with recording(80), pytest.raises(ValueError, match="it is for sm_90, not for sm_80"):
        case.run()
    case.config = replace(HOPPER, block_n=128)
    with recording(90), pytest.raises(ValueError, match="its tile is 128x256x64"):
        case.run()
    case = make_case(1, 70, torch.float16, dim=64, hidden=256, config=HOPPER)
    with recording(90), pytest.raises(ValueError, match="70 is no multiple of 128"):
        case.run()


@needs_gpu
@pytest.mark.parametrize(("batch", "tokens"), [(128, 256), (32, 1024), (1, 16384)])
def test_specialised_warps_at_real_size(batch, tokens):
    if compute_capability(DEVICE) != 90:
        pytest.skip("needs sm_90")
    made = {"dim": 896, "hidden": 3584}
    ours = make_case(batch, tokens, torch.bfloat16, config=HOPPER, **made)
    plain = make_case(batch, tokens, torch.bfloat16, config=GemmConfig(128, 128, 64, 8, 8, 3), **made)
    h, partials = ours.run()
    truth_h, truth_sums = ours.reference("erf")
    assert_close("h", h, truth_h, ours.reference("erf", torch.bfloat16)[0], max_ratio=0.1)
    assert_close("sums", partials.double().sum(1), truth_sums, floor=2e-4, max_ratio=5e-3)
    for name, a, b in zip(("h", "partials"), (h, partials), plain.run(), strict=True):
        assert_same_bits(name, a, b)


@needs_gpu
@pytest.mark.parametrize(("batch", "tokens"), [(128, 256), (32, 1024), (3, 196), (1, 16384)])
def test_bf16_at_real_size(batch, tokens):
    shape = {"tokens_per_image": tokens, "dim": 896, "hidden": 3584}
    config = lookup("expand", compute_capability(DEVICE), shape, torch.bfloat16)
    case = make_case(batch, tokens, torch.bfloat16, dim=896, hidden=3584, config=config)
    assert case.partials.tensor.shape[1] == cdiv(tokens, 64)
    h, partials = case.run()
    truth_h, truth_sums = case.reference("erf")
    base_h, base_sums = case.reference("erf", torch.bfloat16)
    assert_close("h", h, truth_h, base_h, max_ratio=0.1)
    assert_close("sums", partials.double().sum(1), truth_sums, base_sums, floor=2e-4, max_ratio=5e-3)
    repeat = [t.clone() for t in (h, partials)]
    for name, a, b in zip(("h", "partials"), repeat, case.run(), strict=True):
        assert_same_bits(name, a, b)
