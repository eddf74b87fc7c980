"""Depthwise 7x7 against float64: borders, tilings, dtypes, stray accesses, determinism, bad inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
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

from capacitor_kernels import reference
from capacitor_kernels.gpu_limits import COMPUTE_CAPABILITIES
from capacitor_kernels.launch import compute_capability
from capacitor_kernels.ops.dwconv import DwconvConfig, dwconv, dwconv_sumsq_shape
from capacitor_kernels.tuning import lookup

CHANNELS = 72
# few large programs, since the interpreter's time goes by their number; together they cover a tile as wide as the
# grid, tiles that divide it, and tiles that overhang it
TILES = {
    (1, 1): DwconvConfig(cols=1, strips_x=1, strips_y=1, block_c=128, num_warps=1),
    (2, 6): DwconvConfig(cols=6, strips_x=1, strips_y=2, block_c=128, num_warps=2),
    (7, 5): DwconvConfig(cols=2, strips_x=4, strips_y=8, block_c=128, num_warps=8),
    (14, 14): DwconvConfig(cols=7, strips_x=2, strips_y=16, block_c=128, num_warps=8),
    (16, 16): DwconvConfig(cols=4, strips_x=4, strips_y=16, block_c=128, num_warps=8),
    (32, 32): DwconvConfig(cols=3, strips_x=8, strips_y=32, block_c=128, num_warps=8),
}


@dataclass
class Case:
    """Inputs of one call and its outputs between guard bands."""

    x: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor
    size: dict[str, int]
    y: Guarded
    sumsq: Guarded
    config: DwconvConfig | None

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        dwconv(self.x, self.w, self.b, self.y.tensor, self.sumsq.tensor, **self.size, config=self.config)
        self.y.check()
        self.sumsq.check()
        return self.y.tensor, self.sumsq.tensor

    def reference(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.dwconv(self.x.to(dtype), self.w, self.b, **self.size)


def make_case(
    batch: int,
    grid: tuple[int, int],
    dtype: torch.dtype,
    config: DwconvConfig,
    *,
    channels: int = CHANNELS,
    out: torch.dtype | None = None,
    heavy: bool = False,
    seed: int = 0,
) -> Case:
    tokens = batch * grid[0] * grid[1]
    return Case(
        guarded_input(randn(tokens, channels, seed=seed, heavy=heavy), dtype),
        guarded_input(randn(49, channels, seed=seed + 1, scale=1 / 7)),
        guarded_input(randn(channels, seed=seed + 2)),
        {"batch": batch, "height": grid[0], "width": grid[1]},
        guarded_output(tokens, channels, dtype=out or dtype),
        guarded_output(*dwconv_sumsq_shape(tokens, channels, config), dtype=torch.float32),
        config,
    )


def check_case(case: Case, dtype: torch.dtype) -> None:
    y, sumsq = case.run()
    truth_y, truth_sums = case.reference()
    base_y, base_sums = case.reference(dtype)
    assert_close("y", y, truth_y, base_y, **tolerance(dtype))
    # the sums are of unrounded values: float32 accuracy whatever the dtype of y
    assert_close("sums", sumsq.double().sum(1, keepdim=True), truth_sums, base_sums, floor=2e-6, max_ratio=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
@pytest.mark.parametrize("batch", [1, 3])
def test_matches_float64(grid, batch):
    check_case(make_case(batch, grid, torch.float32, TILES[grid]), torch.float32)


@pytest.mark.parametrize("grid", [(7, 5), (16, 16)], ids=grid_id)
def test_float16(grid):
    config = TILES[grid] if grid == (7, 5) else DwconvConfig(cols=16, strips_x=1, strips_y=16, block_c=128, num_warps=8)
    check_case(make_case(1, grid, torch.float16, config), torch.float16)


@pytest.mark.parametrize("channels", [72, 128])
def test_bfloat16_words_are_unpacked_exactly(channels):
    # the output is float32, so that the interpreter's truncating bfloat16 store does not matter
    case = make_case(1, (2, 6), torch.bfloat16, TILES[2, 6], channels=channels, out=torch.float32)
    assert_close("y", case.run()[0], case.reference()[0], **tolerance(torch.float32))


def test_bfloat16_with_an_odd_number_of_channels():
    case = make_case(1, (2, 6), torch.bfloat16, TILES[2, 6], channels=33, out=torch.float32)
    assert_close("y", case.run()[0], case.reference()[0], **tolerance(torch.float32))


def test_channel_tiles_and_heavy_tails():
    config = replace(TILES[7, 5], block_c=32, num_warps=2)
    case = make_case(1, (7, 5), torch.float32, config, heavy=True, seed=7)
    assert case.sumsq.tensor.shape == (35, 3)
    check_case(case, torch.float32)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cols=st.integers(1, 5),
    strips_x=st.sampled_from([1, 2]),
    channels=st.integers(1, 40),
)
def test_any_shape(grid, cols, strips_x, channels):
    config = DwconvConfig(cols, strips_x, strips_y=8, block_c=64, num_warps=4)
    check_case(make_case(1, grid, torch.float32, config, channels=channels), torch.float32)


def test_impulse_lands_on_the_right_tap():
    # one pixel of one channel set: y shows the flipped taps around it
    case = make_case(1, (7, 5), torch.float32, TILES[7, 5])
    case.x.zero_()
    case.b.zero_()
    case.x[3 * 5 + 2, 9] = 1.0
    y, _ = case.run()
    for h in range(7):
        for w in range(5):
            tap = (3 - h + 3) * 7 + (2 - w + 3)
            assert y[h * 5 + w, 9] == case.w[tap, 9]
    assert y[:, :9].count_nonzero() == 0


def test_an_image_does_not_see_its_batch():
    whole = make_case(3, (7, 5), torch.float32, TILES[7, 5])
    y, sumsq = whole.run()
    for image in (0, 2):
        rows = slice(image * 35, (image + 1) * 35)
        alone = make_case(1, (7, 5), torch.float32, TILES[7, 5])
        alone.x = guarded_input(whole.x[rows])
        one_y, one_sumsq = alone.run()
        assert_same_bits("y", y[rows], one_y)
        assert_same_bits("sumsq", sumsq[rows], one_sumsq)


def test_bits_do_not_depend_on_the_tiling_or_the_run():
    case = make_case(1, (7, 5), torch.float16, TILES[7, 5])
    first = [t.clone() for t in case.run()]
    second = case.run()
    assert_same_bits("y of a second run", first[0], second[0])
    assert_same_bits("sumsq of a second run", first[1], second[1])
    other = make_case(1, (7, 5), torch.float16, DwconvConfig(5, 1, 8, 128, 8))
    assert_same_bits("y of another tiling", first[0], other.run()[0])


@pytest.mark.parametrize("use", ["throughput", "latency"])
def test_config_is_looked_up_by_the_grid(use):
    config = lookup("dwconv", compute_capability(DEVICE), {"height": 4, "width": 6, "dim": 40}, torch.float32, use)
    case = make_case(1, (4, 6), torch.float32, config, channels=40)
    if use == "throughput":
        case.config = None
    check_case(case, torch.float32)


@pytest.mark.parametrize("cc", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("use", ["throughput", "latency"])
def test_every_grid_gets_a_tiling_that_fits_it(cc, use):
    for height in (1, 2, 3, 7, 14, 16, 31, 32, 64, 128):
        for width in (1, 2, 5, 13, 14, 16, 18, 20, 32, 50, 64, 128):
            shape = {"height": height, "width": width, "dim": 896}
            config = lookup("dwconv", cc, shape, torch.bfloat16, use)
            strips = config.strips_x * config.strips_y
            assert strips & (strips - 1) == 0
            # four channels a thread: 32-bit words of two, and sums that stay within a warp
            assert strips * config.block_c == 128 * config.num_warps
            padded = -(-width // (config.strips_x * config.cols)) * config.strips_x * config.cols
            if use == "throughput":
                assert padded <= max(1.2 * width, config.cols), (shape, config)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


BAD = {
    "x dtype": ({"x": _zeros(35, CHANNELS, dtype=torch.float64)}, TypeError, "x is float64"),
    "x rank": ({"x": _zeros(7, 5, CHANNELS)}, ValueError, "x has shape .* expected 2 dimensions"),
    "x rows": ({"x": _zeros(70, CHANNELS)}, ValueError, "x has 70 rows, expected batch 1 x height 7 x width 5"),
    "x remainder": ({"x": _zeros(36, CHANNELS)}, ValueError, "x has 36 rows, not a positive multiple"),
    "x stride": ({"x": _zeros(CHANNELS, 35).t()}, ValueError, "x of shape .* row-major"),
    "w layout": ({"w": _zeros(CHANNELS, 49)}, ValueError, "w has shape .* dimension 0 is 72, not 49"),
    "w dtype": ({"w": _zeros(49, CHANNELS, dtype=torch.int32)}, TypeError, "w is int32"),
    "b size": ({"b": _zeros(CHANNELS + 4)}, ValueError, "b has shape"),
    "b dtype": ({"b": _zeros(CHANNELS, dtype=torch.float16)}, TypeError, "b is fp16, expected fp32"),
    "b alignment": ({"b": _zeros(CHANNELS + 1)[1:]}, ValueError, "b starts at an address 4 bytes past"),
    "height": ({"size": {"batch": 1, "height": 0, "width": 5}}, ValueError, "height is 0"),
    "batch": ({"size": {"batch": 2, "height": 7, "width": 5}}, ValueError, "x has 35 rows, expected batch 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, error, message = BAD[name]
    case = replace(make_case(1, (7, 5), torch.float32, TILES[7, 5]), **changes)
    with pytest.raises(error, match=message):
        case.run()
    assert case.y.tensor.isnan().all(), "refused after the launch"


def test_bad_outputs_are_named():
    case = make_case(1, (7, 5), torch.float32, TILES[7, 5])
    with pytest.raises(ValueError, match=r"sumsq has shape .* dimension 1 is 2, not 1"):
        replace(case, sumsq=guarded_output(35, 2, dtype=torch.float32)).run()
    with pytest.raises(ValueError, match="y has shape"):
        replace(case, y=guarded_output(35, CHANNELS - 1, dtype=torch.float32)).run()


@pytest.mark.slow
def test_real_size_under_the_interpreter():
    config = replace(lookup("dwconv", 90, {"height": 16, "width": 16, "dim": 896}, torch.bfloat16), strips_y=16)
    check_case(make_case(1, (16, 16), torch.float32, config, channels=896), torch.float32)


@needs_gpu
@pytest.mark.parametrize(
    ("batch", "grid"),
    [(128, (16, 16)), (32, (32, 32)), (3, (14, 14)), (1, (128, 128)), (2, (1, 1)), (2, (7, 5))],
)
@pytest.mark.parametrize("use", ["throughput", "latency"])
def test_bf16_at_real_size(batch, grid, use):
    shape = {"height": grid[0], "width": grid[1], "dim": 896}
    config = lookup("dwconv", compute_capability(DEVICE), shape, torch.bfloat16, use)
    case = make_case(batch, grid, torch.bfloat16, config, channels=896)
    y, sumsq = case.run()
    truth_y, truth_sums = case.reference()
    base_y, base_sums = case.reference(torch.bfloat16)
    assert_close("y", y, truth_y, base_y, max_ratio=0.1)
    assert_close("sums", sumsq.double().sum(1, keepdim=True), truth_sums, base_sums, floor=2e-6, max_ratio=1e-4)
    first = [t.clone() for t in (y, sumsq)]
    for name, a, b in zip(("y", "sumsq"), first, case.run(), strict=True):
        assert_same_bits(name, a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_y_in_e4m3_is_scaled_and_rounded_and_its_sums_are_of_what_it_was(dtype):
    size = {"batch": 2, "height": 7, "width": 5}
    x, w, b = (
        randn(*shape, seed=i).to(DEVICE) for i, shape in enumerate(((70, CHANNELS), (49, CHANNELS), (CHANNELS,)))
    )
    x = x.to(dtype)
    config, inverse = TILES[7, 5], torch.tensor([9.0], device=DEVICE)
    plain = torch.empty(70, CHANNELS, device=DEVICE)
    sums = torch.empty(dwconv_sumsq_shape(70, CHANNELS, config), device=DEVICE)
    dwconv(x, w, b, plain, sums, **size, config=config)
    y, sumsq = torch.empty(70, CHANNELS, device=DEVICE).to(torch.float8_e4m3fn), torch.empty_like(sums)
    dwconv(x, w, b, y, sumsq, **size, y_inverse=inverse, config=config)
    assert torch.equal(y.view(torch.uint8), reference.e4m3(plain * inverse).view(torch.uint8))
    assert torch.equal(sumsq, sums) and 20 < y.float().abs().max() < 448
    dwconv(x, w, b, y, sumsq, **size, y_inverse=inverse * 1000, config=config)
    assert y.float().abs().max() == 448
    with pytest.raises(TypeError, match="y is fp32, expected e4m3"):
        dwconv(x, w, b, plain, sums, **size, y_inverse=inverse, config=config)
