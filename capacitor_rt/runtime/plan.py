"""Plans: (model, direction, sizes) -> launches in order, buffers in one arena, FLOPs and bytes. Pure: no GPU needed.

An argument of a step is a string `place:name`; places are `weight` (packed tensors), `buffer`, `input` and `output`.
The last three lie in the arena: an input from the first step until its last use, an output from its first use on.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from capacitor_kernels import tuning
from capacitor_kernels.ops.dwconv import dwconv_sumsq_shape
from capacitor_kernels.ops.expand import expand_partials_shape
from capacitor_kernels.ops.project import project_workspace_shape

from ..config import FullCapacitorInferenceConfig, ModelConfig
from ..diffusion import NoiseLevel, noise_levels
from .arena import Buffer, lay_out

DIRECTIONS = ("encode", "posterior", "decode", "predict")
Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class PlanKey:
    """What a plan is for; the key under which its CUDA graph is kept.

    Attributes:
        direction: "encode" (image to whitened latents), "posterior" (image to raw mean and logsnr), "decode" (noise and
            latents to image, all steps) or "predict" (x_t and latents to x0, one step at `time`).
        batch, height, width: images, in pixels.
        dtype: of the weights and activations.
        image_dtype, layout: of the input image, "nchw" or "nhwc"; in decoding, dtype of the latents and "nchw".
        cc: compute capability, e.g. 90.
        use: "throughput" (a row's bits depend on neither the batch nor its place) or "latency" (one image at a time).
        inference: sampler settings of "decode", guidance of "predict"; the seed plays no part.
    """

    direction: str
    batch: int
    height: int
    width: int
    dtype: torch.dtype
    image_dtype: torch.dtype
    layout: str
    cc: int
    use: str = "throughput"
    inference: FullCapacitorInferenceConfig | None = None
    time: float | None = None


@dataclass(frozen=True)
class Step:
    """One launch.

    Attributes:
        kernel: name of the launcher.
        args: launcher argument -> "place:name".
        options: further keyword arguments, the launch config among them.
        flops, nbytes: work, and memory traffic if every tensor is read and written once.
    """

    kernel: str
    args: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    flops: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class LaunchPlan:
    """Steps and memory of one request. `times` are the decoder's `(t, image_scale)`, weights `t{i}.*` in this order."""

    request: PlanKey
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    inputs: Tensors
    outputs: Tensors
    times: tuple[tuple[float, float], ...] = ()

    @property
    def flops(self) -> int:
        return sum(s.flops for s in self.steps)

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.steps)

    def expected_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Sum over the steps of the slower of arithmetic and memory, at the given ceilings."""
        return sum(max(s.flops / flops_per_second, s.nbytes / bytes_per_second) for s in self.steps)


def make_plan(config: ModelConfig, request: PlanKey) -> LaunchPlan:
    """Plan a request for a model of `config`.

    Raises:
        ValueError: an unknown direction, or a size that is not whole tokens.
    """
    if request.direction not in DIRECTIONS:
        raise ValueError(f"direction {request.direction!r} is unknown: use one of {DIRECTIONS}")
    p = config.patch_size
    if request.height % p or request.width % p or min(request.batch, request.height, request.width) < 1:
        raise ValueError(
            f"{request.batch} images of {request.height}x{request.width} are not whole patches of {p} pixels"
        )
    builder = _Builder(config, request)
    return builder.decode() if request.direction in ("decode", "predict") else builder.encode()


class _Builder:
    """Collects steps; a buffer lives from the first to the last step that names it."""

    def __init__(self, config: ModelConfig, request: PlanKey):
        self.config, self.request = config, request
        self.h, self.w = request.height // config.patch_size, request.width // config.patch_size
        self.per_image = self.h * self.w
        self.tokens = request.batch * self.per_image
        self.dim, self.hidden, self.z = config.model_dim, config.hidden_dim, config.bottleneck_dim
        self.steps: list[Step] = []
        self.tensors: Tensors = {}
        self.inputs: Tensors = {}
        self.outputs: Tensors = {}

    # the model's parts

    def encode(self) -> LaunchPlan:
        r = self.request
        shape = (r.batch, 3, r.height, r.width) if r.layout == "nchw" else (r.batch, r.height, r.width, 3)
        self.inputs["image"] = (shape, r.image_dtype)
        patches = "patch_w" if r.layout == "nchw" else "patch_w_nhwc"
        self.patchify("input:image", patches, "patch_b", "x", r.layout)
        for i in range(self.config.encoder_depth):
            self.block(f"blocks.{i}", "x", "x")
        self.head()
        return self.finish(())

    def decode(self) -> LaunchPlan:
        r = self.request
        self.inputs["noise"] = ((r.batch, 3, r.height, r.width), torch.float32)
        self.inputs["latents"] = ((r.batch, self.z, self.h, self.w), r.image_dtype)
        self.outputs["image"] = ((r.batch, 3, r.height, r.width), torch.float32)
        inference = r.inference or FullCapacitorInferenceConfig()
        if r.direction == "predict":
            self.predict(0, "input:noise", "output:image", 1.0, None, inference)
            return self.finish(((r.time, 1.0),))
        levels = noise_levels(self.config, inference)
        start = levels[0].sigma * self.config.pixel_noise_std
        times = tuple((level.t, start if i == 0 else 1.0) for i, level in enumerate(levels[:-1]))
        sampler = {"ddim": self.ddim, "dpmpp_2m": self.dpmpp_2m}[inference.sampler]
        sampler(levels, start, inference)
        return self.finish(times)

    def ddim(self, levels: list[NoiseLevel], start: float, inference: FullCapacitorInferenceConfig) -> None:
        """x' = ratio x + weight x0, in the epilogue of the pass that predicts x0."""
        state, scale = "input:noise", start
        for i in range(len(levels) - 1):
            now, after = levels[i], levels[i + 1]
            ratio = after.sigma / now.sigma
            last = i == len(levels) - 2
            target = "output:image" if last else f"buffer:state{i % 2}"
            self.predict(i, state, target, after.alpha - ratio * now.alpha, (state, ratio * scale), inference)
            state, scale = target, 1.0

    def dpmpp_2m(self, levels: list[NoiseLevel], start: float, inference: FullCapacitorInferenceConfig) -> None:
        """As `diffusion.dpmpp_2m`, with the difference of predictions multiplied out."""
        state, scale, previous_h = "input:noise", start, 0.0
        for i in range(len(levels) - 1):
            now, after = levels[i], levels[i + 1]
            h = after.half_logsnr - now.half_logsnr
            weight = -after.alpha * math.expm1(-h)
            extra = 0.5 * h / previous_h if i else 0.0
            x0 = f"buffer:x0_{i % 2}"
            self.predict(i, state, x0, 1.0, None, inference)
            terms = [(state, scale * after.sigma / now.sigma), (x0, weight * (1 + extra))]
            if i:
                terms.append((f"buffer:x0_{(i + 1) % 2}", -weight * extra))
            target = "output:image" if i == len(levels) - 2 else f"buffer:state{i % 2}"
            self.combine(target, terms)
            state, scale, previous_h = target, 1.0, h

    def predict(
        self,
        i: int,
        state: str,
        target: str,
        weight: float,
        add: tuple[str, float] | None,
        inference: FullCapacitorInferenceConfig,
    ) -> None:
        """target = weight * x0(state, time i) + add, guidance included."""
        self.decoder_start(i, state)
        if not inference.pdg:
            self.decoder_end(i, target, weight, add, drop=False)
            return
        # both passes share the start blocks
        strength = inference.pdg_strength
        self.decoder_end(i, "buffer:unguided", weight * (1 - strength), add, drop=True)
        self.decoder_end(i, target, weight * strength, ("buffer:unguided", 1.0), drop=False)

    def decoder_start(self, i: int, state: str) -> None:
        """Token buffer "s": the image and latents through the start blocks."""
        self.patchify(state, f"t{i}.in_w", f"t{i}.in_b", "s", "nchw", latents=True)
        for b in range(self.config.decoder_start_blocks):
            self.block(f"t{i}.blocks.{b}", "s", "s")

    def decoder_end(self, i: int, target: str, weight: float, add: tuple[str, float] | None, drop: bool) -> None:
        """From "s", which stays, to the image; `drop` replaces what the middle blocks make of it."""
        config, t = self.config, f"t{i}"
        first, last = config.decoder_start_blocks, config.decoder_start_blocks + config.decoder_middle_blocks
        if drop:
            self.broadcast(f"{t}.drop_feature", "m")
        for b in range(first, first if drop else last):
            self.block(f"{t}.blocks.{b}", "s" if b == first else "m", "m")
        middle = "m" if drop or last > first else "s"
        self.fuse_skip("s", middle, f"{t}.skip_w", f"{t}.skip_b", "x")
        for b in range(last, config.decoder_depth):
            self.block(f"{t}.blocks.{b}", "x", "x")
        self.unpatchify("x", f"{t}.out_w", f"{t}.out_b", target, weight, add)

    def block(self, weights: str, source: str, target: str) -> None:
        """One FCDM block from token buffer `source` to `target`, which may be the same."""
        dims = {"dim": self.dim, "hidden": self.hidden}
        conv = self.lookup("dwconv", height=self.h, width=self.w, dim=self.dim)
        expand = self.lookup("expand", tokens_per_image=self.per_image, **dims)
        project = self.lookup("project", tokens_per_image=self.per_image, **dims)
        partials = expand_partials_shape(self.request.batch, self.per_image, self.hidden, expand)
        grn = self.lookup("grn", tiles=partials[1], hidden=self.hidden)
        x, out = self.token_buffer(source), self.token_buffer(target)
        y = self.token_buffer("y")
        sumsq = self.buffer("sumsq", dwconv_sumsq_shape(self.tokens, self.dim, conv), torch.float32)
        h = self.buffer("h", (self.tokens, self.hidden), self.request.dtype)
        sums = self.buffer("partials", partials, torch.float32)
        norms = self.buffer("norms", (self.request.batch, self.hidden), torch.float32)
        gain = self.buffer("gain", (self.request.batch, self.hidden), self.request.dtype)

        def w(name: str) -> str:
            return f"weight:{weights}.{name}"

        grid = {"batch": self.request.batch, "height": self.h, "width": self.w}
        rows = {"tokens_per_image": self.per_image}
        product = 2 * self.tokens * self.dim * self.hidden
        size = self.request.dtype.itemsize
        matrix = self.dim * self.hidden * size
        narrow, wide = self.tokens * self.dim * size, self.tokens * self.hidden * size
        stats = 4 * math.prod(partials)
        squares = 4 * math.prod(self.tensors["sumsq"][0])
        self.add(
            "dwconv",
            {"x": x, "w": w("dw_w"), "b": w("dw_b"), "y": y, "sumsq": sumsq},
            {**grid, "config": conv},
            2 * 49 * self.tokens * self.dim,
            2 * narrow + 50 * 4 * self.dim + squares,
        )
        args = {"y": y, "w1": w("w1"), "b1": w("b1"), "sumsq": sumsq, "h": h, "partials": sums}
        self.add("expand", args, {**rows, "config": expand}, product, narrow + matrix + wide + stats + squares)
        args = {"partials": sums, "gamma": w("gamma"), "gain": gain, "norms": norms}
        self.add(
            "grn", args, {"config": grn}, 2 * math.prod(partials), stats + (4 + size) * self.request.batch * self.hidden
        )
        args = {"h": h, "gain": gain, "w2": w("w2"), "b2": w("b2"), "residual": x, "out": out}
        workspace = project_workspace_shape(self.tokens, self.dim, project)
        if workspace is not None:
            args["workspace"] = self.buffer("workspace", workspace, torch.float32)
        extra = 8 * math.prod(workspace) if workspace else 0
        self.add("project", args, {**rows, "config": project}, product, wide + matrix + 2 * narrow + extra)

    # single launches

    def patchify(self, image: str, w: str, b: str, target: str, layout: str, latents: bool = False) -> None:
        pixels = 3 * self.config.patch_size**2
        depth = pixels + (self.z if latents else 0)
        args = {"image": image, "w": f"weight:{w}", "b": f"weight:{b}", "tokens": self.token_buffer(target)}
        if latents:
            args["latents"] = "input:latents"
        config = self.lookup("patchify", tokens_per_image=self.per_image, dim=self.dim, depth=depth)
        size = self.request.dtype.itemsize
        read = self.tokens * (pixels * self.itemsize(image) + (depth - pixels) * self.request.image_dtype.itemsize)
        self.add(
            "patchify",
            args,
            {"patch": self.config.patch_size, "layout": layout, "config": config},
            2 * self.tokens * depth * self.dim,
            read + (depth + self.tokens) * self.dim * size,
        )

    def fuse_skip(self, s: str, m: str, w: str, b: str, target: str) -> None:
        args = {"s": self.token_buffer(s), "m": self.token_buffer(m), "w": f"weight:{w}", "b": f"weight:{b}"}
        config = self.lookup("fuse_skip", tokens_per_image=self.per_image, dim=self.dim, width=self.dim)
        flops = 4 * self.tokens * self.dim**2
        nbytes = (3 * self.tokens * self.dim + 2 * self.dim**2) * self.request.dtype.itemsize
        options = {"tokens_per_image": self.per_image, "config": config}
        self.add("fuse_skip", {**args, "out": self.token_buffer(target)}, options, flops, nbytes)

    def unpatchify(
        self, source: str, w: str, b: str, target: str, weight: float, add: tuple[str, float] | None
    ) -> None:
        pixels = 3 * self.config.patch_size**2
        args = {
            "tokens": self.token_buffer(source),
            "w": f"weight:{w}",
            "b": f"weight:{b}",
            "image": self.image_buffer(target),
        }
        options = {
            "patch": self.config.patch_size,
            "scale_x0": weight,
            "config": self.lookup("unpatchify", tokens_per_image=self.per_image, dim=self.dim, depth=pixels),
        }
        if add is not None:
            args["noise"], options["scale_noise"] = self.image_buffer(add[0]), add[1]
        images = (2 if add else 1) * self.tokens * pixels * 4
        nbytes = (self.tokens + pixels) * self.dim * self.request.dtype.itemsize + images
        self.add("unpatchify", args, options, 2 * self.tokens * pixels * self.dim, nbytes)

    def head(self) -> None:
        r, config = self.request, self.config
        width, norm = config.posterior_channels, config.bottleneck_norm_mode == "channel_wise"
        args = {"x": self.token_buffer("x"), "w": "weight:head_w", "b": "weight:head_b"}
        shape = (r.batch, self.z, self.h, self.w)
        if r.direction == "encode":
            self.outputs["latents"] = (shape, torch.float32)
            args |= {name: f"weight:{name}" for name in ("whiten_mean", "whiten_rstd")}
        else:
            self.outputs["mean"] = (shape, torch.float32)
            if config.bottleneck_posterior_kind == "diagonal_gaussian":
                self.outputs["logsnr"] = (shape, torch.float32)
        args |= {name: f"output:{name}" for name in self.outputs}
        # with the norm a tile holds all channels: the launcher derives that config itself
        rows = None if norm else self.lookup("head", tokens_per_image=self.per_image, dim=self.dim, channels=self.z)
        written = 4 * self.tokens * self.z * len(self.outputs)
        nbytes = (self.tokens + width) * self.dim * r.dtype.itemsize + written
        self.add("head", args, {"norm": norm, "config": rows}, 2 * self.tokens * self.dim * width, nbytes)

    def broadcast(self, w: str, target: str) -> None:
        """Fill a token buffer with one row."""
        args = {"row": f"weight:{w}", "out": self.token_buffer(target)}
        self.add("broadcast", args, {}, 0, self.tokens * self.dim * self.request.dtype.itemsize)

    def combine(self, target: str, terms: list[tuple[str, float]]) -> None:
        """target = sum of coefficient * image."""
        args = {f"x{i}": self.image_buffer(ref) for i, (ref, _) in enumerate(terms)}
        args["out"] = self.image_buffer(target)
        size = 4 * self.tokens * 3 * self.config.patch_size**2
        options = {"coefficients": tuple(c for _, c in terms)}
        self.add("combine", args, options, len(terms) * size // 2, (len(terms) + 1) * size)

    # bookkeeping

    def lookup(self, family: str, **shape: int) -> Any:
        # a family is known once its module is imported
        importlib.import_module(f"capacitor_kernels.ops.{family}")
        return tuning.lookup(family, self.request.cc, shape, self.request.dtype, self.request.use)

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        known = self.tensors.setdefault(name, (shape, dtype))
        if known != (shape, dtype):
            raise ValueError(f"buffer {name} is {known}, and now {(shape, dtype)}")
        return f"buffer:{name}"

    def token_buffer(self, name: str) -> str:
        return self.buffer(name, (self.tokens, self.dim), self.request.dtype)

    def image_buffer(self, ref: str) -> str:
        if ref.startswith("buffer:"):
            shape = (self.request.batch, 3, self.request.height, self.request.width)
            return self.buffer(ref.removeprefix("buffer:"), shape, torch.float32)
        return ref

    def itemsize(self, ref: str) -> int:
        place, name = ref.split(":")
        return (self.inputs if place == "input" else self.tensors)[name][1].itemsize

    def add(self, kernel: str, args: dict[str, str], options: dict[str, Any], flops: int, nbytes: int) -> None:
        self.steps.append(Step(kernel, args, options, flops, nbytes))

    def finish(self, times: tuple[tuple[float, float], ...]) -> LaunchPlan:
        end = len(self.steps) - 1
        buffers = []
        for place, tensors in (("buffer", self.tensors), ("input", self.inputs), ("output", self.outputs)):
            for name, (shape, dtype) in tensors.items():
                first, last = _lifetime(f"{place}:{name}", self.steps)
                first, last = 0 if place == "input" else first, end if place == "output" else last
                buffers.append(Buffer(name, shape, dtype, first, last))
        placed, size = lay_out(buffers)
        return LaunchPlan(self.request, tuple(self.steps), placed, size, self.inputs, self.outputs, times)


def _lifetime(ref: str, steps: list[Step]) -> tuple[int, int]:
    used = [i for i, step in enumerate(steps) if ref in step.args.values()]
    return used[0], used[-1]
