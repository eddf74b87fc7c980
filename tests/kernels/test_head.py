"""Head against float64: latents and raw posterior, whitening, the norm, stability, determinism, bad inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    Guarded,
    assert_close,
    assert_same_bits,
    exact,
    grid_id,
    guarded_input,
    guarded_output,
    needs_gpu,
    randn,
    tolerance,
)

from capacitor_kernels import reference
from capacitor_kernels.gemm import GemmConfig
from capacitor_kernels.ops.head import head
from capacitor_kernels.tuning import lookup

DIM, CHANNELS = 72, 24
CONFIG = GemmConfig(128, 32, 64, group_m=4, num_warps=4, num_stages=2)
GRIDS = [(1, 1), (2, 6), (7, 5), (14, 14), (16, 16)]


@dataclass
class Case:
    """Inputs of one call and its outputs between guard bands, by name."""

    x: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor
    outputs: dict[str, Guarded]
    grid: tuple[int, int]
    channels: int
    config: GemmConfig | None
    whiten: dict[str, torch.Tensor] = field(default_factory=dict)
    norm: bool = False

    def run(self) -> dict[str, torch.Tensor]:
        tensors = {name: output.tensor for name, output in self.outputs.items()}
        head(self.x, self.w, self.b, **tensors, **self.whiten, norm=self.norm, config=self.config)
        for output in self.outputs.values():
            output.check()
        return tensors

    def reference(self, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        options = {"grid": self.grid, "channels": self.channels, "norm": self.norm} | self.whiten
        results = reference.head(self.x.to(dtype), self.w.to(dtype), self.b, **options)
        return dict(zip(("latents", "mean", "logsnr"), results, strict=True))


def make_case(
    batch: int,
    grid: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    outputs: tuple[str, ...] = ("latents", "mean", "logsnr"),
    out: torch.dtype | None = None,
    dim: int = DIM,
    channels: int = CHANNELS,
    posterior: bool = True,
    whiten: bool = True,
    norm: bool = False,
    config: GemmConfig | None = CONFIG,
    heavy: bool = False,
) -> Case:
    width = 2 * channels if posterior else channels
    statistics = {
        "whiten_mean": guarded_input(randn(channels, seed=4)),
        "whiten_rstd": guarded_input(randn(channels, seed=5).abs() + 0.1),
    }
    return Case(
        guarded_input(randn(batch * grid[0] * grid[1], dim, seed=0, heavy=heavy), dtype),
        guarded_input(randn(dim, width, seed=1, scale=dim**-0.5), dtype),
        guarded_input(randn(width, seed=2)),
        {
            name: guarded_output(batch, channels, *grid, dtype=(out or dtype) if name == "latents" else torch.float32)
            for name in outputs
        },
        grid,
        channels,
        config,
        statistics if whiten else {},
        norm,
    )


def check_case(case: Case, dtype: torch.dtype) -> None:
    truth, base = case.reference(), case.reference(dtype)
    for name, got in case.run().items():
        assert_close(name, got, truth[name], base[name].to(got.dtype), **tolerance(got.dtype))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_matches_float64(grid, batch):
    check_case(make_case(batch, grid), torch.float32)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("whiten", [False, True], ids=["raw", "whitened"])
@pytest.mark.parametrize("posterior", [False, True], ids=["deterministic", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_form(dtype, posterior, whiten, norm):
    outputs = ("latents", "mean", "logsnr") if posterior else ("latents", "mean")
    form = {"posterior": posterior, "whiten": whiten, "norm": norm}
    check_case(make_case(2, (3, 5), dtype, outputs=outputs, **form), dtype)


def test_outputs_do_not_depend_on_which_are_asked_for():
    everything = make_case(2, (7, 5)).run()
    for outputs in (("latents",), ("mean", "logsnr")):
        whiten = "latents" in outputs
        for name, got in make_case(2, (7, 5), outputs=outputs, whiten=whiten).run().items():
            assert_same_bits(name, got, everything[name])


def test_latents_keep_float32_accuracy_from_half_tokens():
    case = make_case(2, (7, 5), torch.float16, out=torch.float32)
    truth = case.reference()
    for name, got in case.run().items():
        # products of float16 are exact in float32, and nothing is rounded to float16 after them
        assert_close(name, got, truth[name], **tolerance(torch.float32))


def test_logsnr_of_any_size_gives_a_finite_mode():
    case = make_case(1, (2, 6), whiten=False)
    # -150 and beyond: sigmoid underflows float32, its logarithm does not
    case.b[CHANNELS:] = torch.linspace(-150.0, 150.0, CHANNELS, device=DEVICE)
    case.w[:, CHANNELS:] = 0.0
    latents, truth = case.run()["latents"], case.reference()["latents"]
    assert latents.isfinite().all()
    assert ((latents - truth).abs() <= 3e-5 * truth.abs() + 1e-36).all()


def test_heavy_tails():
    check_case(make_case(2, (7, 5), heavy=True), torch.float32)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    dim=st.integers(1, 90),
    channels=st.integers(1, 70),
    posterior=st.booleans(),
    block_m=st.sampled_from([16, 64]),
)
def test_any_shape(grid, dim, channels, posterior, block_m):
    config = GemmConfig(block_m, 32, 32, 2, 4, 2)
    form = {"dim": dim, "channels": channels, "posterior": posterior, "config": config, "outputs": ("latents",)}
    check_case(make_case(2, grid, **form), torch.float32)


def test_an_image_does_not_see_its_batch_and_runs_repeat():
    whole = exact(make_case(3, (7, 5)))
    first = {name: t.clone() for name, t in whole.run().items()}
    for name, got in whole.run().items():
        assert_same_bits(f"{name}, second run", first[name], got)
    for i in range(3):
        alone = exact(make_case(1, (7, 5)))
        alone.x = guarded_input(whole.x[i * 35 : (i + 1) * 35])
        for name, got in alone.run().items():
            assert_same_bits(f"{name} of image {i}", first[name][i : i + 1], got)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("channels", [24, 130])
def test_config_is_looked_up_by_the_shape_of_one_image(channels, norm):
    check_case(make_case(1, (3, 5), channels=channels, norm=norm, config=None), torch.float32)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def _out(*shape: int, dtype: torch.dtype = torch.float32) -> Guarded:
    return guarded_output(*shape, dtype=dtype)


GOOD_OUT = (2, CHANNELS, 3, 5)
BAD = {
    "x dtype": ({"x": _zeros(30, DIM, dtype=torch.float64)}, TypeError, "x is float64"),
    "x rows": ({"x": _zeros(29, DIM)}, ValueError, "x has shape .* dimension 0 is 29, not 30"),
    "w rows": ({"w": _zeros(DIM + 1, 48)}, ValueError, "w has shape .* dimension 0 is 73, not 72"),
    "w columns": ({"w": _zeros(DIM, 40)}, ValueError, "w has 40 columns, expected 48 .* or 24"),
    "w dtype": ({"w": _zeros(DIM, 48, dtype=torch.float16)}, TypeError, "w is fp16, expected fp32"),
    "b size": ({"b": _zeros(24)}, ValueError, "b has shape"),
    "no output": ({"outputs": {}}, ValueError, "neither latents nor mean is given"),
    "mean alone": ({"outputs": {"mean": _out(*GOOD_OUT)}, "whiten": {}}, ValueError, "both or neither"),
    "logsnr alone": (
        {"outputs": {"latents": _out(*GOOD_OUT), "logsnr": _out(*GOOD_OUT)}},
        ValueError,
        "both or neither",
    ),
    "latents rank": ({"outputs": {"latents": _out(30, CHANNELS)}}, ValueError, "latents has shape .* 4 dimensions"),
    "latents dtype": ({"outputs": {"latents": _out(*GOOD_OUT, dtype=torch.uint8)}}, TypeError, "latents is uint8"),
    "empty": ({"outputs": {"latents": _out(0, CHANNELS, 3, 5)}}, ValueError, "at least one image"),
    "whiten alone": ({"whiten": {"whiten_mean": _zeros(CHANNELS)}}, ValueError, "whiten_mean and whiten_rstd both"),
    "whiten size": (
        {"whiten": {"whiten_mean": _zeros(CHANNELS), "whiten_rstd": _zeros(23)}},
        ValueError,
        "whiten_rstd has shape .* is 23, not 24",
    ),
    "norm": ({"norm": True, "config": GemmConfig(64, 16, 32, 1, 4, 2)}, ValueError, "norm needs all 24 channels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, error, message = BAD[name]
    case = replace(make_case(2, (3, 5)), **changes)
    with pytest.raises(error, match=message):
        case.run()


def test_statistics_without_latents_and_raw_in_half_are_refused():
    case = make_case(2, (3, 5), outputs=("mean", "logsnr"))
    with pytest.raises(ValueError, match="statistics are given but latents is None"):
        case.run()
    case = make_case(2, (3, 5))
    case.outputs["mean"] = _out(*GOOD_OUT, dtype=torch.float16)
    with pytest.raises(TypeError, match="mean is fp16, expected fp32"):
        case.run()
    assert case.outputs["latents"].tensor.isnan().all(), "refused after the launch"


def test_norm_over_too_many_channels_is_refused():
    case = make_case(1, (1, 1), channels=520, norm=True, config=None)
    with pytest.raises(ValueError, match="norm over 520 channels does not fit one tile of at most 512"):
        case.run()


@pytest.mark.slow
def test_real_size_under_the_interpreter():
    config = lookup("head", 90, {"tokens_per_image": 256, "dim": 896, "channels": 128}, torch.bfloat16)
    check_case(make_case(1, (16, 16), dim=896, channels=128, config=config), torch.float32)


@needs_gpu
@pytest.mark.parametrize(("batch", "grid"), [(128, (16, 16)), (3, (14, 14)), (1, (128, 128)), (2, (2, 6))])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_bf16_at_real_size(batch, grid, norm):
    form = {"dim": 896, "channels": 128, "norm": norm, "config": None}
    case = make_case(batch, grid, torch.bfloat16, **form)
    truth, base = case.reference(), case.reference(torch.bfloat16)
    for name, got in case.run().items():
        assert_close(name, got, truth[name], base[name].to(got.dtype), max_ratio=0.1)
    first = {name: output.tensor.clone() for name, output in case.outputs.items()}
    for name, got in case.run().items():
        assert_same_bits(f"{name}, second run", first[name], got)
