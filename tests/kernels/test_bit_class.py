"""Bit classes: which configs leave the same bits, and that few images are launched within the class of many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capacitor_kernels.config_rows import get_family
from capacitor_kernels.gemm import GemmConfig, gemm_smem, product_bits
from capacitor_kernels.gpu_limits import COMPUTE_CAPABILITIES, limits
from capacitor_kernels.launch import E4M3, E4M3_COMPUTE_CAPABILITY
from capacitor_kernels.ops.dwconv import DwconvConfig, dwconv_sumsq_shape
from capacitor_kernels.ops.expand import HOPPER, expand_partials_shape
from capacitor_kernels.ops.expand_fp8 import expand_fp8_partials_shape
from capacitor_kernels.ops.project import project_workspace_shape
from capacitor_kernels.tuning import lookup

BF16 = torch.bfloat16
TALL = GemmConfig(128, 128, 64, group_m=8, num_warps=8, num_stages=3)
DIMS = {"dim": 896, "hidden": 3584, "depth": 768, "channels": 128, "width": 896}
# families whose launches change with the number of images
OPS = ("expand", "project", "dwconv", "patchify", "head", "fuse_skip", "unpatchify")
IN_FP8 = ("expand_fp8", "project_fp8")


def shape_of(family: str, height: int, width: int) -> dict[str, int]:
    known = {"height": height, "width": width, "tokens_per_image": height * width, "tiles": 4} | DIMS
    return {key: known[key] for key in (*get_family(family).exact, *get_family(family).near)}


def same(a: object, b: object, cc: int = 90, family: str = "project", dtype: torch.dtype = BF16) -> bool:
    return get_family(family).same_bits(a, b, cc, dtype)


@pytest.mark.parametrize("cc", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize(
    "change",
    [{"block_n": 64}, {"block_k": 32}, {"group_m": 1}, {"num_stages": 4}, {"tma": True}, {"maxnreg": 128}],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_no_order_of_sums_changes_no_bits(cc, change):
    assert same(TALL, replace(TALL, **change), cc)
    assert same(TALL, replace(TALL, **change), cc, "expand")


@pytest.mark.parametrize(
    "change", [{"split_k": 2}, {"transposed": True}, {"block_m": 32}], ids=lambda change: next(iter(change))
)
def test_what_may_change_bits_is_another_class(change):
    assert not same(TALL, replace(TALL, **change))
    # slices begin at multiples of k
    sliced = replace(TALL, split_k=2)
    assert not same(sliced, replace(sliced, block_k=32)) and same(sliced, replace(sliced, block_n=64))


def test_the_kind_of_instruction_follows_the_rows_of_the_first_operand():
    small = replace(TALL, block_m=32, num_warps=4)
    assert product_bits(small, 90, BF16)[0] == "mma" and product_bits(TALL, 90, BF16)[0] == "wgmma"
    assert product_bits(TALL, 100, BF16)[0] == "tcgen05" and product_bits(TALL, 120, BF16)[0] == "mma"
    # transposed, the columns of the weights are the rows of the product
    turned = replace(small, transposed=True)
    assert product_bits(turned, 90, BF16)[0] == "wgmma"
    assert same(turned, replace(turned, block_m=256, num_warps=8))


def test_sums_of_squares_are_of_as_many_tokens_whatever_the_tile():
    for rows in (128, 64):
        assert expand_partials_shape(2, 200, 3584, replace(TALL, block_m=rows)) == (2, 4, 3584)
    assert same(TALL, replace(TALL, block_m=64, num_warps=4), family="expand") and same(TALL, HOPPER, family="expand")
    assert not same(TALL, replace(TALL, block_m=32), 120, "expand")
    # a thread of tcgen05 has a row: which ones hangs on the tile
    assert not same(TALL, replace(TALL, block_m=64), 100, "expand")


def test_float32_and_ops_without_classes_change_nothing():
    assert not same(TALL, replace(TALL, block_n=64), dtype=torch.float32)
    grn = get_family("grn")
    one = lookup("grn", 90, {"tiles": 4, "hidden": 3584}, BF16)
    assert grn.same_bits(one, one, 90, BF16) and not grn.same_bits(one, replace(one, num_warps=4), 90, BF16)
    assert lookup("grn", 90, {"tiles": 4, "hidden": 3584}, BF16, images=1) == one


def test_dwconv_keeps_tiles_of_channels_and_what_a_thread_has_of_them():
    one = DwconvConfig(16, 1, 4, 128, 4)
    assert same(one, DwconvConfig(4, 2, 2, 128, 4), family="dwconv")
    assert not same(one, DwconvConfig(16, 1, 4, 64, 4), family="dwconv")
    assert not same(one, DwconvConfig(16, 1, 4, 128, 8), family="dwconv")


@pytest.mark.parametrize("family", OPS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cc=st.sampled_from(COMPUTE_CAPABILITIES),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    images=st.integers(1, 64),
    dtype=st.sampled_from([BF16, torch.float16, torch.float32]),
)
def test_few_images_stay_in_the_class_of_many(family, cc, height, width, images, dtype):
    shape = shape_of(family, height, width)
    many, few = lookup(family, cc, shape, dtype), lookup(family, cc, shape, dtype, images=images)
    assert get_family(family).same_bits(many, few, cc, dtype)
    tokens = height * width
    if isinstance(few, DwconvConfig):
        assert dwconv_sumsq_shape(tokens, 896, few) == dwconv_sumsq_shape(tokens, 896, many)
        return
    assert few.block_m <= many.block_m and few.block_n <= many.block_n
    assert gemm_smem(few, dtype.itemsize) <= limits(cc).smem_per_cta
    if family == "expand":
        assert expand_partials_shape(images, tokens, 3584, few) == expand_partials_shape(images, tokens, 3584, many)
    assert project_workspace_shape(tokens, 896, few) == project_workspace_shape(tokens, 896, many)


@pytest.mark.parametrize("family", IN_FP8)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cc=st.sampled_from([cc for cc in COMPUTE_CAPABILITIES if cc >= E4M3_COMPUTE_CAPABILITY]),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    images=st.integers(1, 64),
)
def test_few_images_in_fp8_stay_in_the_class_of_many(family, cc, height, width, images):
    shape = shape_of(family, height, width)
    many, few = lookup(family, cc, shape, E4M3), lookup(family, cc, shape, E4M3, images=images)
    assert get_family(family).same_bits(many, few, cc, E4M3)
    assert few.block_m <= many.block_m and few.block_n <= many.block_n
    # weights of two bytes meet activations of one in project
    assert gemm_smem(few, 2 if family == "project_fp8" else 1) <= limits(cc).smem_per_cta
    # without wgmma or tcgen05 these GPUs have no product of e4m3
    rows = few.block_n if few.transposed else few.block_m
    assert rows >= min(64, many.block_n if many.transposed else many.block_m) or cc not in (90, 100)
    if family == "expand_fp8":
        shapes = (expand_fp8_partials_shape(images, height * width, 3584, config) for config in (few, many))
        assert len(set(shapes)) == 1


@pytest.mark.parametrize("cc", [cc for cc in COMPUTE_CAPABILITIES if cc >= E4M3_COMPUTE_CAPABILITY])
@pytest.mark.parametrize("family", IN_FP8)
def test_one_image_in_fp8_gets_more_programs(family, cc):
    shape = shape_of(family, 16, 16)
    many, one = lookup(family, cc, shape, E4M3), lookup(family, cc, shape, E4M3, images=1)
    assert lookup(family, cc, shape, E4M3, images=128) == many
    # on sm_100 the tiles of many are half as wide already
    assert one.block_m * one.block_n < many.block_m * many.block_n or (cc, family) == (100, "expand_fp8")


@pytest.mark.parametrize("cc", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("family", OPS)
def test_many_images_are_launched_as_they_were(family, cc):
    shape = shape_of(family, 16, 16)
    many = lookup(family, cc, shape, BF16)
    assert lookup(family, cc, shape, BF16, images=128) == many
    if family in ("expand", "project"):
        one = lookup(family, cc, shape, BF16, images=1)
        assert one.block_m * one.block_n < many.block_m * many.block_n


def test_one_image_of_256_gets_a_program_for_most_sms():
    config = lookup("project", 90, shape_of("project", 16, 16), BF16, images=1)
    assert (config.block_m, config.block_n, config.split_k, config.transposed) == (32, 64, 1, True)
    assert 256 // config.block_m * 896 // config.block_n == 112
