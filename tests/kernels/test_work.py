"""FLOPs and bytes of every op against independent counts: torch's FLOP counter, the tensors' storages, figures."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from capacitor_kernels import (
    OPS,
    dwconv_partials_shape,
    dwconv_sumsq_shape,
    expand_partials_shape,
    project_sumsq_shape,
    project_workspace_shape,
    reference,
)
from capacitor_kernels.gemm import GemmConfig
from capacitor_kernels.launch import Work, nbytes_of, recording
from capacitor_kernels.ops.channel_attention import ChannelAttentionConfig
from capacitor_kernels.ops.dwconv import DwconvConfig
from capacitor_kernels.ops.grn import GrnConfig
from capacitor_kernels.pictures import Field, between_bytes
from capacitor_rt.runtime.pictures import table

BF16, F32, U8, E4M3 = torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn
BATCH, HEIGHT, WIDTH, PATCH = 2, 3, 5, 4
PER_IMAGE = HEIGHT * WIDTH
TOKENS = BATCH * PER_IMAGE
DIM, HIDDEN, Z = 24, 72, 10
PIXELS = 3 * PATCH * PATCH
GEMM = GemmConfig(16, 16, 16, 4, 4, 2)
SPLIT = GemmConfig(16, 16, 16, 4, 4, 2, split_k=3)
CONV = DwconvConfig(cols=5, strips_x=1, strips_y=4, block_c=16, num_warps=1)


def t(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@dataclass(frozen=True)
class Call:
    """How an op is called, and which of its tensors (or their descriptions) move twice."""

    op: str
    tensors: dict[str, Any]
    options: dict[str, Any]
    twice: tuple[str, ...] = ()

    def work(self) -> Work:
        return importlib.import_module(f"capacitor_kernels.ops.{self.op}").work(**self.tensors, **self.options)


def image_of(layout: str, dtype: torch.dtype) -> torch.Tensor:
    height, width = HEIGHT * PATCH, WIDTH * PATCH
    return t(BATCH, 3, height, width, dtype=dtype) if layout == "nchw" else t(BATCH, height, width, 3, dtype=dtype)


def patchify(layout: str, dtype: torch.dtype, latents: torch.Tensor | None) -> Call:
    depth = PIXELS if latents is None else PIXELS + Z
    tensors = {"image": image_of(layout, dtype), "w": t(depth, DIM), "b": t(DIM, dtype=F32), "tokens": t(TOKENS, DIM)}
    extra = {} if latents is None else {"latents": latents}
    return Call("patchify", tensors | extra, {"patch": PATCH, "layout": layout, "config": GEMM})


def project(config: GemmConfig) -> Call:
    tensors = {"h": t(TOKENS, HIDDEN), "gain": t(BATCH, HIDDEN), "w2": t(HIDDEN, DIM), "b2": t(DIM, dtype=F32)}
    tensors |= dict.fromkeys(("residual", "out"), t(TOKENS, DIM))
    shape = project_workspace_shape(TOKENS, DIM, config)
    if shape is not None:
        tensors["workspace"] = t(*shape, dtype=F32)
    return Call("project", tensors, {"tokens_per_image": PER_IMAGE, "config": config}, ("workspace",))


def project_fp8(config: GemmConfig) -> Call:
    tensors = {"h": t(TOKENS, HIDDEN, dtype=E4M3), "gain": t(BATCH, HIDDEN, dtype=torch.float16)}
    tensors |= {"w2": t(DIM, HIDDEN, dtype=torch.float16), "w2_scale": t(DIM, dtype=F32), "b2": t(DIM, dtype=F32)}
    tensors |= dict.fromkeys(("residual", "out"), t(TOKENS, DIM))
    shape = project_workspace_shape(TOKENS, DIM, config)
    if shape is not None:
        tensors["workspace"] = t(*shape, dtype=F32)
    return Call("project_fp8", tensors, {"tokens_per_image": PER_IMAGE, "config": config}, ("workspace",))


def project_with_sums(config: GemmConfig) -> Call:
    call = project(config)
    sums = t(*project_sumsq_shape(TOKENS, DIM, config), dtype=F32)
    tensors = call.tensors | {"sumsq": sums, "scale": t(DIM, dtype=F32), "scaled_sumsq": t(*sums.shape, dtype=F32)}
    return Call("project", tensors, call.options | {"multiply": True}, call.twice)


def channel_attention(split: bool, twice: tuple[str, ...] = ()) -> Call:
    tensors = {
        "partials": t(BATCH, 4, DIM, dtype=F32),
        "w": t(DIM, DIM),
        "b": t(DIM, dtype=F32),
        "factor": t(BATCH, DIM),
    }
    config = ChannelAttentionConfig(split, block_c=16, block_n=16, block_k=16, num_warps=1, num_stages=1)
    if split:
        tensors["sums"] = t(BATCH, 1, DIM, dtype=F32)
    return Call("channel_attention", tensors, {"tokens_per_image": PER_IMAGE, "config": config}, twice)


def grn(config: GrnConfig, twice: tuple[str, ...] = ()) -> Call:
    tensors = {"partials": t(BATCH, 4, HIDDEN, dtype=F32), "gamma": t(HIDDEN, dtype=F32)}
    tensors |= {"gain": t(BATCH, HIDDEN), "norms": t(BATCH, HIDDEN, dtype=F32)}
    return Call("grn", tensors, {"config": config}, twice)


def head(width: int, **outputs: torch.Tensor) -> Call:
    tensors = {"x": t(TOKENS, DIM), "w": t(DIM, width), "b": t(width, dtype=F32)}
    return Call("head", tensors | outputs, {"norm": False, "config": GEMM})


def latents_of(dtype: torch.dtype) -> torch.Tensor:
    return t(BATCH, Z, HEIGHT, WIDTH, dtype=dtype)


def whiten() -> Call:
    statistics = {"mean": t(Z, dtype=F32), "rstd": t(Z, dtype=F32)}
    return Call("whiten", {"z": latents_of(BF16), "out": latents_of(F32)} | statistics, {})


def resize() -> Call:
    # two rows of 5 pixels become three of four by 3 and 2 taps, and 7 of 5 by 5 and 5
    sizes, source, weights = table([(2, 5), (7, 5)], 3, 4)
    tensors = {"source": t(source, dtype=U8), "weights": t(weights, dtype=torch.int32), "images": sizes}
    between = t(int(between_bytes(sizes).sum()), dtype=U8)
    tensors |= {"workspace": between, "out": t(2, 3, 4, 3, dtype=U8)}
    return Call("resize", tensors, {"sizes": sizes}, ("workspace",))


PER_TOKENS = {"tokens_per_image": PER_IMAGE}
SUMSQ = t(*dwconv_sumsq_shape(TOKENS, DIM, CONV), dtype=F32)
CONV_TENSORS = {"x": t(TOKENS, DIM), "w": t(49, DIM, dtype=F32), "b": t(DIM, dtype=F32), "y": t(TOKENS, DIM)}
EXPAND_TENSORS = {"y": t(TOKENS, DIM), "w1": t(DIM, HIDDEN), "b1": t(HIDDEN, dtype=F32), "h": t(TOKENS, HIDDEN)}
PARTIALS = t(*expand_partials_shape(BATCH, PER_IMAGE, HIDDEN, GEMM), dtype=F32)
NORMED = {"x": t(TOKENS, DIM), "weight": t(DIM, dtype=F32), "bias": t(DIM, dtype=F32), "out": t(TOKENS, DIM)}
OUT = {"tokens": t(TOKENS, DIM), "w": t(DIM, PIXELS), "b": t(PIXELS, dtype=F32)}
CALLS = {
    "patchify uint8": patchify("nhwc", U8, None),
    "patchify latents": patchify("nchw", F32, latents_of(BF16)),
    "dwconv": Call(
        "dwconv",
        CONV_TENSORS | {"sumsq": SUMSQ},
        {"batch": BATCH, "height": HEIGHT, "width": WIDTH, "config": CONV},
    ),
    "expand": Call(
        "expand",
        EXPAND_TENSORS | {"sumsq": SUMSQ, "partials": PARTIALS},
        {"tokens_per_image": PER_IMAGE, "gelu": "fit", "config": GEMM},
    ),
    "expand_fp8": Call(
        "expand_fp8",
        {
            "y": t(TOKENS, DIM, dtype=E4M3),
            "w1": t(HIDDEN, DIM, dtype=E4M3),
            **{name: t(HIDDEN, dtype=F32) for name in ("scale", "b1", "h_inverse")},
            "sumsq": SUMSQ,
            "h": t(TOKENS, HIDDEN, dtype=E4M3),
            "partials": PARTIALS,
        },
        PER_TOKENS | {"config": GEMM},
    ),
    "dwconv for fp8": Call(
        "dwconv",
        CONV_TENSORS | {"y": t(TOKENS, DIM, dtype=E4M3), "y_inverse": t(1, dtype=F32), "sumsq": SUMSQ},
        {"batch": BATCH, "height": HEIGHT, "width": WIDTH, "config": CONV},
    ),
    "project_fp8": project_fp8(GEMM),
    "project_fp8 split": project_fp8(SPLIT),
    "channel_attention": channel_attention(False),
    "channel_attention in two launches": channel_attention(True, ("sums",)),
    "rmsnorm": Call("rmsnorm", NORMED | {"sumsq": t(TOKENS, 1, dtype=F32)}, {}),
    "sums of squares": Call("rmsnorm", {"x": t(TOKENS, DIM), "sumsq": t(TOKENS, 1, dtype=F32)}, {}),
    "expand behind two norms": Call(
        "expand",
        EXPAND_TENSORS | {"sumsq": SUMSQ, "scaled_sumsq": t(*SUMSQ.shape, dtype=F32)},
        PER_TOKENS | {"gelu": "fit", "config": GEMM},
    ),
    "dwconv with SiLU": Call(
        "dwconv",
        CONV_TENSORS | {"partials": t(*dwconv_partials_shape(BATCH, HEIGHT, WIDTH, DIM, CONV), dtype=F32)},
        {"batch": BATCH, "height": HEIGHT, "width": WIDTH, "config": CONV},
    ),
    "project with sums": project_with_sums(GEMM),
    "project split with sums": project_with_sums(SPLIT),
    "patchify of latents alone": Call(
        "patchify",
        {"latents": latents_of(F32), "w": t(Z, DIM), "b": t(DIM, dtype=F32), "tokens": t(TOKENS, DIM)},
        {"image": None, "patch": PATCH, "layout": "nchw", "config": GEMM},
    ),
    "grn": grn(GrnConfig(split=False, block_f=16, num_warps=1)),
    "grn in two launches": grn(GrnConfig(split=True, block_f=16, num_warps=1), ("norms",)),
    "project": project(GEMM),
    "project split": project(SPLIT),
    "head whitened": head(2 * Z, latents=latents_of(F32), whiten_mean=t(Z, dtype=F32), whiten_rstd=t(Z, dtype=F32)),
    "head raw": head(2 * Z, mean=latents_of(F32), logsnr=latents_of(F32)),
    "head without posterior": head(Z, latents=latents_of(BF16)),
    "fuse_skip": Call(
        "fuse_skip",
        {"s": t(TOKENS, DIM), "m": t(TOKENS, DIM), "w": t(2 * DIM, DIM), "b": t(DIM), "out": t(TOKENS, DIM)},
        {"tokens_per_image": PER_IMAGE, "config": GEMM},
    ),
    "unpatchify": Call("unpatchify", OUT | {"image": image_of("nchw", U8)}, {"patch": PATCH, "config": GEMM}),
    "unpatchify noise": Call(
        "unpatchify",
        OUT | {"image": image_of("nchw", F32), "noise": image_of("nchw", F32)},
        {"patch": PATCH, "scale_x0": 0.5, "scale_noise": 0.5, "config": GEMM},
    ),
    "whiten": whiten(),
    "attention": Call("attention", {name: t(TOKENS, DIM) for name in "qkv"} | {"out": t(TOKENS, DIM)}, PER_TOKENS),
    "resize": resize(),
}


NO_PRODUCTS = ("grn", "whiten", "rmsnorm", "channel_attention", "resize")


def test_every_op_is_here():
    assert {call.op for call in CALLS.values()} == set(OPS)


@pytest.mark.parametrize("name", CALLS)
def test_the_op_takes_these_arguments(name):
    call = CALLS[name]
    op = getattr(importlib.import_module(f"capacitor_kernels.ops.{call.op}"), call.op)
    with recording(90) as launches:
        op(**{name: tensor.to("meta") for name, tensor in call.tensors.items()}, **call.options)
    assert launches


@pytest.mark.parametrize("name", CALLS)
def test_bytes_are_those_of_the_storages(name):
    call = CALLS[name]
    sizes = {argument: tensor.untyped_storage().nbytes() for argument, tensor in call.tensors.items()}
    again = sum(sizes.get(argument, 0) for argument in call.twice)
    assert call.work().nbytes == sum(sizes.values()) + again


class Spec(NamedTuple):
    """What a plan knows of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@pytest.mark.parametrize("name", CALLS)
def test_descriptions_will_do_for_tensors(name):
    call = CALLS[name]
    specs = {argument: Spec(tuple(tensor.shape), tensor.dtype) for argument, tensor in call.tensors.items()}
    assert Call(call.op, specs, call.options).work() == call.work()


def _reference(call: Call) -> None:
    """Run the op of reference.py on the operands of a call."""
    inputs = {
        "patchify": ("image", "w", "b"),
        "dwconv": ("x", "w", "b"),
        "expand": ("y", "w1", "b1", "sumsq"),
        "expand_fp8": ("y", "w1", "scale", "b1", "sumsq", "h_inverse"),
        "project_fp8": ("h", "gain", "w2", "w2_scale", "b2", "residual"),
        "project": ("h", "gain", "w2", "b2", "residual"),
        "head": ("x", "w", "b"),
        "fuse_skip": ("s", "m", "w", "b"),
        "unpatchify": ("tokens", "w", "b"),
        "attention": ("q", "k", "v"),
    }[call.op]
    options = {key: value for key, value in call.options.items() if key in ("patch", "layout", "tokens_per_image")}
    if call.op == "dwconv":
        options = {"batch": BATCH, "height": HEIGHT, "width": WIDTH}
    elif call.op == "head":
        options = {"grid": (HEIGHT, WIDTH), "channels": Z}
    elif call.op == "unpatchify":
        options["grid"] = (HEIGHT, WIDTH)
    elif call.op == "fuse_skip":
        options = {}
    if call.op == "patchify":
        options["latents"] = call.tensors.get("latents")
    getattr(reference, call.op)(*(call.tensors.get(name) for name in inputs), **options)


def test_flops_of_what_siblings_add():
    sums, products = BATCH * 4 * DIM, 2 * BATCH * DIM * DIM
    for name in ("channel_attention", "channel_attention in two launches"):
        assert CALLS[name].work().flops == sums + products
    with Elementwise() as counter:
        reference.rmsnorm(*(NORMED[name].float() for name in ("x", "weight", "bias")))
    # the squares and their sum, which torch takes in other words; the products with rstd and weight; the bias
    assert counter.count == 3 * TOKENS * DIM + TOKENS
    assert CALLS["rmsnorm"].work().flops == 5 * TOKENS * DIM
    assert CALLS["sums of squares"].work().flops == 2 * TOKENS * DIM


def test_flops_of_resizing_are_two_for_each_value_and_tap():
    # the second picture is turned: its height comes first
    first = 3 * (2 * 4 * 5 + 5 * 4 * 5)
    second = 3 * (3 * 4 * 3 + 3 * 4 * 5)
    sizes = CALLS["resize"].options["sizes"]
    taps = [[row[Field.TAPS_A], row[Field.TAPS_B]] for row in sizes.tolist()]
    assert taps == [[5, 3], [5, 5]]
    assert CALLS["resize"].work().flops == 2 * (first + second)


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.op not in NO_PRODUCTS])
def test_flops_of_products_are_what_torch_counts(name):
    with FlopCounterMode(display=False) as counter:
        _reference(CALLS[name])
    assert counter.get_total_flops() > 0
    assert CALLS[name].work().flops == counter.get_total_flops()


class Elementwise(TorchDispatchMode):
    """Counts the results of additions, subtractions and multiplications."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.sub, torch.ops.aten.mul):
            self.count += result.numel()
        return result


@pytest.mark.parametrize("form", ["whiten", "dewhiten"])
def test_flops_of_whitening_are_what_plain_torch_takes(form):
    tensors = dict(CALLS["whiten"].tensors)
    scale = tensors.pop("rstd")
    tensors["rstd" if form == "whiten" else "std"] = scale
    with Elementwise() as counter:
        getattr(reference, form)(tensors["z"], tensors["mean"], scale)
    assert Call("whiten", tensors, {}).work() == CALLS["whiten"].work()
    assert CALLS["whiten"].work().flops == counter.count > 0


def test_flops_of_grn_are_two_per_partial():
    assert CALLS["grn"].work().flops == CALLS["grn in two launches"].work().flops == 2 * BATCH * 4 * HIDDEN


def test_a_residual_updated_in_place_moves_twice_and_a_workspace_too():
    whole, split = CALLS["project"].work(), CALLS["project split"].work()
    assert CALLS["project"].tensors["out"] is CALLS["project"].tensors["residual"]
    operands = 2 * (TOKENS * HIDDEN + BATCH * HIDDEN + HIDDEN * DIM + 2 * TOKENS * DIM) + 4 * DIM
    assert whole.nbytes == operands
    assert split == (whole.flops, operands + 8 * 3 * TOKENS * DIM)


def test_figures_of_the_full_model():
    # 128 images of 256x256: 32 768 tokens of 896 channels, 3584 hidden
    tokens, dim, hidden = 32768, 896, 3584
    y, w1, b1 = Spec((tokens, dim), BF16), Spec((dim, hidden), BF16), Spec((hidden,), F32)
    sumsq, h, partials = Spec((tokens, 7), F32), Spec((tokens, hidden), BF16), Spec((128, 2, hidden), F32)
    tensors = {"y": y, "w1": w1, "b1": b1, "sumsq": sumsq, "h": h, "partials": partials}
    work = Call("expand", tensors, {"tokens_per_image": 256}).work()
    assert work.flops == 210_453_397_504
    assert work.nbytes == 58_720_256 + 6_422_528 + 14_336 + 917_504 + 234_881_024 + 3_670_016


def test_absent_tensors_weigh_nothing():
    assert nbytes_of() == nbytes_of(None) == 0
    assert nbytes_of(Spec((3, 5), BF16), None, Spec((), F32)) == 34
