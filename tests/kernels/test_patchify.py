"""Patchify against float64: layouts, pixel types, the decoder's form, odd grids, determinism, bad inputs."""

from __future__ import annotations

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
    grid_id,
    guarded_input,
    guarded_output,
    needs_gpu,
    randn,
    tolerance,
)

from capacitor_kernels import reference
from capacitor_kernels.gemm import GemmConfig
from capacitor_kernels.launch import compute_capability
from capacitor_kernels.ops.patchify import pack_patchify_weight, patchify
from capacitor_kernels.tuning import lookup

DIM, PATCH, LATENTS = 40, 8, 24
CONFIG = GemmConfig(128, 64, 64, group_m=4, num_warps=4, num_stages=2)
GRIDS = [(1, 1), (2, 6), (7, 5), (14, 14), (16, 16)]


def make_image(shape: tuple[int, ...], dtype: torch.dtype, heavy: bool = False) -> torch.Tensor:
    """Random NCHW pixels between guard bands: bytes, or about the range [-1, 1]."""
    if dtype == torch.uint8:
        values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return Guarded(shape, dtype, values).tensor
    return guarded_input(randn(*shape, seed=0, scale=0.5, heavy=heavy), dtype)


@dataclass
class Case:
    """Inputs of one call and its output between guard bands."""

    image: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor
    tokens: Guarded
    latents: torch.Tensor | None
    patch: int
    layout: str
    config: GemmConfig | None

    def options(self) -> dict:
        return {"patch": self.patch, "layout": self.layout, "latents": self.latents}

    def run(self) -> torch.Tensor:
        patchify(self.image, self.w, self.b, self.tokens.tensor, **self.options(), config=self.config)
        self.tokens.check()
        return self.tokens.tensor

    def reference(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return reference.patchify(self.image, self.w.to(dtype), self.b, **self.options())


def make_case(
    batch: int,
    grid: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    pixels: torch.dtype | None = None,
    layout: str = "nchw",
    latents: int = 0,
    patch: int = PATCH,
    dim: int = DIM,
    config: GemmConfig | None = CONFIG,
    heavy: bool = False,
) -> Case:
    image = make_image((batch, 3, grid[0] * patch, grid[1] * patch), pixels or dtype, heavy)
    if layout == "nhwc":
        values = image.permute(0, 2, 3, 1)
        image = Guarded(tuple(values.shape), values.dtype, values).tensor
    depth = 3 * patch * patch + latents
    w = randn(depth, dim, seed=1, scale=depth**-0.5)
    w[: 3 * patch * patch] = pack_patchify_weight(w[: 3 * patch * patch].t(), patch=patch, layout=layout)
    return Case(
        image,
        guarded_input(w, dtype),
        guarded_input(randn(dim, seed=2, scale=0.1)),
        guarded_output(batch * grid[0] * grid[1], dim, dtype=dtype),
        guarded_input(randn(batch, latents, *grid, seed=3, heavy=heavy), dtype) if latents else None,
        patch,
        layout,
        config,
    )


def check_case(case: Case, dtype: torch.dtype) -> None:
    assert_close("tokens", case.run(), case.reference(), case.reference(dtype), **tolerance(dtype))


@pytest.mark.parametrize("latents", [0, LATENTS], ids=["encoder", "decoder"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_matches_float64(grid, batch, latents):
    check_case(make_case(batch, grid, latents=latents), torch.float32)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("pixels", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_and_pixel_type(layout, pixels, dtype):
    check_case(make_case(2, (3, 5), dtype, pixels=pixels, layout=layout), dtype)


def test_bfloat16_pixels_and_latents_widen_exactly():
    case = make_case(2, (3, 5), pixels=torch.bfloat16, latents=LATENTS)
    case.latents = guarded_input(case.latents, torch.bfloat16)
    check_case(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heavy_tails(dtype):
    check_case(make_case(2, (7, 5), dtype, latents=LATENTS, heavy=True), dtype)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_is_the_convolution(layout):
    weight = randn(DIM, 3, PATCH, PATCH, seed=5, scale=0.1).to(DEVICE)
    case = make_case(2, (3, 5), layout=layout)
    case.w = guarded_input(pack_patchify_weight(weight, patch=PATCH, layout=layout))
    nchw = case.image if layout == "nchw" else case.image.permute(0, 3, 1, 2)
    conv = F.conv2d(nchw.double(), weight.double(), case.b.double(), stride=PATCH)
    assert_close("tokens", case.run(), conv.permute(0, 2, 3, 1).reshape(-1, DIM), **tolerance(torch.float32))


def test_layouts_agree_and_bytes_are_their_normalised_values():
    nchw = make_case(2, (3, 5), pixels=torch.uint8).run()
    nhwc = make_case(2, (3, 5), pixels=torch.uint8, layout="nhwc").run()
    assert (nchw - nhwc).abs().max() < 5e-6
    floats = make_case(2, (3, 5), pixels=torch.uint8)
    floats.image = guarded_input(floats.image.float() / 127.5 - 1.0)
    assert (floats.run() - nchw).abs().max() < 5e-6


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    patch=st.sampled_from([1, 2, 3, 5, 16]),
    dim=st.integers(1, 90),
    latents=st.integers(0, 40),
    layout=st.sampled_from(["nchw", "nhwc"]),
)
def test_any_shape(batch, grid, patch, dim, latents, layout):
    config = GemmConfig(32, 64, 64, 2, 4, 2)
    case = make_case(batch, grid, layout=layout, latents=latents, patch=patch, dim=dim, config=config)
    check_case(case, torch.float32)


@pytest.mark.parametrize("latents", [0, LATENTS], ids=["encoder", "decoder"])
def test_an_image_does_not_see_its_batch_and_runs_repeat(latents):
    whole = exact(make_case(3, (7, 5), latents=latents))
    tokens = whole.run().clone()
    assert_same_bits("second run", tokens, whole.run())
    for image in range(3):
        alone = exact(make_case(1, (7, 5), latents=latents))
        alone.image = guarded_input(whole.image[image : image + 1])
        if latents:
            alone.latents = guarded_input(whole.latents[image : image + 1])
        assert_same_bits(f"image {image}", tokens[image * 35 : (image + 1) * 35], alone.run())


@pytest.mark.parametrize("use", ["throughput", "latency"])
def test_config_is_looked_up_by_the_shape_of_one_image(use):
    key = {"tokens_per_image": 15, "dim": DIM, "depth": 3 * PATCH * PATCH}
    config = lookup("patchify", compute_capability(DEVICE), key, torch.float32, use)
    check_case(make_case(2, (3, 5), config=None if use == "throughput" else config), torch.float32)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


DEPTH = 3 * PATCH * PATCH
BAD = {
    "image dtype": ({"image": _zeros(2, 3, 24, 40, dtype=torch.int32)}, TypeError, "image is int32"),
    "image channels": ({"image": _zeros(2, 4, 24, 40)}, ValueError, "image has shape .* dimension 1 is 4, not 3"),
    "image layout": ({"layout": "nhwc"}, ValueError, "image has shape .* dimension 3 is 40, not 3"),
    "image height": ({"image": _zeros(2, 3, 25, 40)}, ValueError, "height 25 of image .* 8: use 24 or 32"),
    "image width": ({"image": _zeros(2, 3, 24, 7)}, ValueError, "width 7 of image .* 8: use 8 or 16"),
    "image empty": ({"image": _zeros(0, 3, 24, 40)}, ValueError, "image has no images"),
    "image stride": ({"image": _zeros(2, 24, 40, 3).permute(0, 3, 1, 2)}, ValueError, "image of shape .* row-major"),
    "layout": ({"layout": "chwn"}, ValueError, "layout is 'chwn', expected one of"),
    "patch": ({"patch": 0}, ValueError, "patch is 0"),
    "w size": ({"w": _zeros(DEPTH + 1, DIM)}, ValueError, "w has shape .* dimension 0 is 193, not 192"),
    "latents grid": ({"latents": _zeros(2, 24, 5, 3)}, ValueError, "latents has shape"),
    "latents weight": ({"latents": _zeros(2, 24, 3, 5)}, ValueError, "w has shape .* dimension 0 is 192, not 216"),
    "b dtype": ({"b": _zeros(DIM, dtype=torch.float16)}, TypeError, "b is fp16, expected fp32"),
    "tokens": ({"tokens": guarded_output(15, DIM, dtype=torch.float32)}, ValueError, "tokens has shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, error, message = BAD[name]
    case = replace(make_case(2, (3, 5)), **changes)
    with pytest.raises(error, match=message):
        case.run()
    assert case.tokens.tensor.isnan().all(), "refused after the launch"


def test_weight_of_another_patch_is_refused():
    with pytest.raises(ValueError, match=r"weight has shape \[40, 3, 8, 8\], expected \[D, 3, 16, 16\]"):
        pack_patchify_weight(_zeros(DIM, 3, 8, 8), patch=16)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_real_size_under_the_interpreter(layout):
    config = lookup("patchify", 90, {"tokens_per_image": 256, "dim": 896, "depth": 768}, torch.bfloat16)
    case = make_case(1, (16, 16), pixels=torch.uint8, layout=layout, patch=16, dim=896, config=config)
    check_case(case, torch.float32)


@needs_gpu
@pytest.mark.parametrize(("batch", "grid"), [(128, (16, 16)), (3, (14, 14)), (1, (128, 128)), (2, (2, 6))])
@pytest.mark.parametrize("form", ["nchw bf16", "nchw uint8", "nhwc uint8", "decoder"])
def test_bf16_at_real_size(batch, grid, form):
    layout = "nhwc" if form.startswith("nhwc") else "nchw"
    pixels = torch.float32 if form == "decoder" else torch.uint8 if form.endswith("uint8") else torch.bfloat16
    latents = 128 if form == "decoder" else 0
    key = {"tokens_per_image": grid[0] * grid[1], "dim": 896, "depth": 768 + latents}
    config = lookup("patchify", compute_capability(DEVICE), key, torch.bfloat16)
    shape = {"patch": 16, "dim": 896, "layout": layout, "latents": latents, "config": config}
    case = make_case(batch, grid, torch.bfloat16, pixels=pixels, **shape)
    assert_close("tokens", case.run(), case.reference(), case.reference(torch.bfloat16), max_ratio=0.1)
    first = case.run().clone()
    assert_same_bits("second run", first, case.run())
