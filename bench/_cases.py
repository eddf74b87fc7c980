"""What the benchmarks of single ops time: steps of the runtime's plans on random values, beside plain torch.

A case is one step of the plan of a model, full_capacitor or on the CPU a tiny one: its tensors have the plan's shapes
and dtypes, its options are the plan's, launch config included, and its FLOPs and bytes are the step's.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capacitor_kernels import reference, tuning
from capacitor_kernels.launch import Launch, recording
from capacitor_kernels.ops.attention import work as attention_work
from capacitor_kernels.ops.whiten import work as whiten_work
from capacitor_rt import ModelConfig
from capacitor_rt.config import DicoConfig
from capacitor_rt.runtime.arena import TensorSpec
from capacitor_rt.runtime.host_ops import host_function
from capacitor_rt.runtime.launch_cases import Y_SCALE, as_in_the_model, resize_step, squares
from capacitor_rt.runtime.pictures import tables
from capacitor_rt.runtime.plan import PlanKey, Step, make_plan


class Images(NamedTuple):
    """Images of one batch, in pixels; `use` picks throughput or latency configs."""

    batch: int
    height: int
    width: int
    use: str = "throughput"

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}"


# the batches of the model card, one image at a time, and one large image
GPU_IMAGES = (Images(128, 256, 256), Images(32, 512, 512), Images(1, 256, 256, "latency"), Images(1, 2048, 2048))
TINY_IMAGES = (Images(2, 64, 64), Images(1, 48, 80, "latency"))
FLUX2_STRIDE, FLUX2_WIDTH = 8, 512


@dataclass(frozen=True)
class Prepared:
    """One set of tensors: the call of the op, what it leaves behind, and the arguments of the plain torch function."""

    call: Callable[[], None]
    outputs: Callable[[], Sequence[Tensor]]
    plain_args: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        images, model, dtype, cc: what it was made from.
        step: as the plan has it; `specs` are its tensors by argument.
        plain: the same maths in plain torch, one function for every set of tensors.
    """

    op: str
    images: Images
    model: ModelConfig
    dtype: torch.dtype
    cc: int
    step: Step
    specs: Mapping[str, TensorSpec]
    plain: Callable[..., Any]

    def prepare(self, device: torch.device) -> Prepared:
        """Fresh random inputs, and outputs of their own, so that a call can be repeated."""
        _, outputs = PLAIN[self.op]
        inputs = _inputs(self.op, self.specs)
        tensors = {
            name: _values(self.step, name, spec, device)
            if name in inputs or name in READ_BY_THE_OP_ALONE
            else torch.empty(spec.shape, dtype=spec.dtype, device=device)
            for name, spec in self.specs.items()
        }
        if self.op in ("expand", "expand_fp8"):
            y = tensors["y"] if self.op == "expand" else tensors["y"].float() / Y_SCALE
            tensors["sumsq"] = squares(y, self.specs["sumsq"].shape[1])
        call = partial(host_function(self.op), **tensors, **self.step.options)
        plain_args = tuple(tensors[name] for name in inputs)
        return Prepared(call, lambda: [REDUCED.get(name, _same)(tensors[name]) for name in outputs], plain_args)

    def launches(self) -> list[Launch]:
        """What a call queues, on tensors of the meta device."""
        tensors = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in self.specs.items()}
        with recording(cc=self.cc) as found:
            host_function(self.op)(**tensors, **self.step.options)
        return list(found)

    def with_config(self, config: Any) -> Case:
        """The same with another launch config, on which the shapes of partial sums and workspaces depend."""
        with tuning.using(self.op, config):
            return make_case(self.op, self.images, self.model, self.dtype, self.cc)


def make_case(op: str, images: Images, model: ModelConfig, dtype: torch.dtype, cc: int) -> Case:
    """The case of one op: the first step of it in the plan that has one, of a sibling's where `model`'s has none."""
    if op in OF_SIBLINGS:
        model = dataclasses.replace(model, dico=DicoConfig("irdiffae_v1"))
    if op in BY_HAND:
        step, specs = BY_HAND[op](images, model, dtype, cc)
    else:
        size = images.batch, images.height, images.width
        if op in DECODES:
            key = PlanKey("decode", *size, dtype, dtype, "nchw", cc, images.use)
        else:
            precision = "fp8" if op in IN_FP8 else None
            key = PlanKey("encode", *size, dtype, torch.uint8, "nchw", cc, images.use, precision=precision)
        plan = make_plan(model, key)
        step = next(step for step in plan.steps if step.op == op)
        specs = {name: plan.spec(ref) for name, ref in step.args.items()}
    return Case(op, images, model, dtype, cc, step, specs, _plain(op, step, specs))


def make_cases(
    ops: Sequence[str], images: Sequence[Images], model: ModelConfig, dtype: torch.dtype, cc: int
) -> Iterator[Case]:
    """Every op at every size."""
    for op in ops:
        for size in images:
            yield make_case(op, size, model, dtype, cc)


def _whiten_step(images: Images, model: ModelConfig, dtype: torch.dtype, cc: int) -> tuple[Step, dict[str, TensorSpec]]:
    """By hand: plans fold whitening into the ops around it."""
    height, width = images.height // model.patch_size, images.width // model.patch_size
    latents = TensorSpec((images.batch, model.bottleneck_dim, height, width), dtype)
    statistics = TensorSpec((model.bottleneck_dim,), torch.float32)
    specs = {"z": latents, "mean": statistics, "rstd": statistics, "out": latents}
    args = {"z": "input:z", "mean": "weight:mean", "rstd": "weight:rstd", "out": "output:out"}
    config = tuning.lookup("whiten", cc, {"pixels": height * width}, dtype, use=images.use)
    return Step("whiten", args, {"config": config}, whiten_work(**specs)), specs


def _attention_step(
    images: Images, model: ModelConfig, dtype: torch.dtype, cc: int
) -> tuple[Step, dict[str, TensorSpec]]:
    """By hand: the middle of the FLUX.2 VAE, which has a token for 8 x 8 pixels; narrower beside a tiny model."""
    tokens, dim = images.height * images.width // FLUX2_STRIDE**2, min(FLUX2_WIDTH, model.model_dim)
    config = tuning.lookup("attention", cc, {"tokens_per_image": tokens, "dim": dim}, dtype, use=images.use)
    options = {"tokens_per_image": tokens, "config": config}
    args = {"q": "input:q", "k": "input:k", "v": "input:v", "out": "output:out"}
    specs = dict.fromkeys(args, TensorSpec((images.batch * tokens, dim), dtype))
    return Step("attention", args, options, attention_work(**specs, **options)), specs


def _resize_step(images: Images, model: ModelConfig, dtype: torch.dtype, cc: int) -> tuple[Step, dict[str, TensorSpec]]:
    """By hand: it makes the pixels that a plan begins with, here of pictures three times as high and four as wide."""
    return resize_step([(3 * images.height, 4 * images.width)] * images.batch, images.height, images.width, cc)


# ops that are no step of a plan
BY_HAND = {"whiten": _whiten_step, "attention": _attention_step, "resize": _resize_step}


def _attention(q: Tensor, k: Tensor, v: Tensor, tokens_per_image: int) -> Tensor:
    # by whichever of its kernels torch takes; products and a softmax would need the whole matrix of scores
    heads = [t.view(-1, 1, tokens_per_image, t.shape[1]) for t in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*heads).reshape(q.shape)


def _expand(y: Tensor, w1: Tensor, b1: Tensor, sumsq: Tensor, tokens_per_image: int) -> tuple[Tensor, Tensor]:
    # eager torch has the exact GELU, whichever the step asks for
    return reference.expand(y, w1, b1, sumsq, tokens_per_image=tokens_per_image)


def _expand_fp8(
    y: Tensor,
    w1: Tensor,
    scale: Tensor,
    b1: Tensor,
    sumsq: Tensor,
    h_inverse: Tensor,
    tokens_per_image: int,
) -> tuple[Tensor, Tensor]:
    h, sums = reference.expand_fp8(y, w1, scale, b1, sumsq, h_inverse, tokens_per_image=tokens_per_image)
    return reference.e4m3(h), sums


def _channel_attention(partials: Tensor, w: Tensor, b: Tensor, tokens_per_image: int) -> Tensor:
    return reference.channel_attention(partials.sum(1), w, b, tokens_per_image=tokens_per_image)


def _grn(partials: Tensor, gamma: Tensor) -> Tensor:
    return reference.grn(partials.sum(1), gamma)


def _head(
    x: Tensor, w: Tensor, b: Tensor, whiten_mean: Tensor, whiten_rstd: Tensor, grid: tuple[int, int], channels: int
) -> Tensor:
    statistics = {"whiten_mean": whiten_mean, "whiten_rstd": whiten_rstd}
    return reference.head(x, w, b, grid=grid, channels=channels, **statistics)[0]


# op -> (the same maths, with the op's names for tensors and options, the outputs that are compared)
PLAIN: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "patchify": (reference.patchify, ("tokens",)),
    "dwconv": (reference.dwconv, ("y", "sumsq")),
    "expand": (_expand, ("h", "partials")),
    "expand_fp8": (_expand_fp8, ("h", "partials")),
    "grn": (_grn, ("gain",)),
    "channel_attention": (_channel_attention, ("factor",)),
    "project": (reference.project, ("out",)),
    "project_fp8": (reference.project_fp8, ("out",)),
    "rmsnorm": (reference.rmsnorm, ("out",)),
    "head": (_head, ("latents",)),
    "fuse_skip": (reference.fuse_skip, ("out",)),
    "unpatchify": (reference.unpatchify, ("image",)),
    "whiten": (reference.whiten, ("out",)),
    "attention": (_attention, ("out",)),
    "resize": (reference.resize, ("out",)),
}
# the table of pictures, which plain torch takes from the CPU
READ_BY_THE_OP_ALONE = ("images",)
DECODES = ("fuse_skip", "unpatchify")
IN_FP8 = ("expand_fp8", "project_fp8")
OF_SIBLINGS = ("channel_attention", "rmsnorm")
# an op leaves sums per tile, the plain function sums over all of them
REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "sumsq": lambda t: t.sum(1, keepdim=True),
    "partials": lambda t: t.sum(1),
}


def _same(t: Tensor) -> Tensor:
    return t


def _parameters(op: str) -> list[str]:
    return list(inspect.signature(PLAIN[op][0]).parameters)


def _inputs(op: str, specs: Mapping[str, TensorSpec]) -> list[str]:
    """The tensors that the plain function takes, in its order."""
    return [name for name in _parameters(op) if name in specs]


def _plain(op: str, step: Step, specs: Mapping[str, TensorSpec]) -> Callable[..., Any]:
    function, outputs = PLAIN[op]
    names = _inputs(op, specs)
    known = dict(step.options)
    if op == "unpatchify":
        known["grid"] = tuple(size // step.options["patch"] for size in specs["image"].shape[2:])
    if op == "head":
        _, known["channels"], *grid = specs["latents"].shape
        known["grid"] = tuple(grid)
    if op == "resize":
        known["shape"] = specs["out"].shape
    options = {name: known[name] for name in _parameters(op) if name in known}
    dtypes = [specs[name].dtype for name in outputs]

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = function(**dict(zip(names, tensors, strict=True)), **options)
        results = found if isinstance(found, tuple) else (found,)
        return tuple(result.to(dtype) for result, dtype in zip(results, dtypes, strict=True))

    return plain


def _values(step: Step, name: str, spec: TensorSpec, device: torch.device) -> Tensor:
    """Normal values at the scale that the model has them, never zeros, on which GPUs run faster."""
    if step.op == "resize" and (known := tables(step.options["sizes"])).get(name) is not None:
        return known[name].to(device)
    if spec.dtype == torch.uint8:
        return torch.randint(0, 256, spec.shape, dtype=torch.uint8, device=device)
    x = torch.randn(spec.shape, device=device)
    return as_in_the_model(step, name, x).to(spec.dtype)
