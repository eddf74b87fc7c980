"""Builds plans of FCDM models: collects steps, their weights and buffers. Other models' builders stand on it."""

from __future__ import annotations

import math
from typing import Any

import torch

from capacitor_kernels import dwconv_sumsq_shape, expand_partials_shape, project_workspace_shape, tuning

from ..config import FullCapacitorInferenceConfig, ModelConfig
from ..diffusion import NoiseLevel, noise_levels
from .arena import Buffer, TensorSpec, lay_out
from .fold import DECODER, ENCODER, packed_specs
from .host_ops import work_of
from .launch_plan import LaunchPlan, PlanKey, Step, Tensors


class Builder:
    """Collects steps; a buffer lives from the first to the last step that names it."""

    narrows = True
    """Whether few images may take narrower tiles of the bits of many, which then depend on what `tuning.lookup`
    knows.
    """

    def __init__(self, config: ModelConfig, key: PlanKey):
        self.config, self.key = config, key
        self.h, self.w = key.height // config.patch_size, key.width // config.patch_size
        self.per_image = self.h * self.w
        self.tokens = key.batch * self.per_image
        self.dim, self.hidden, self.z = config.model_dim, config.hidden_dim, config.bottleneck_dim
        self.image_shape = (key.batch, 3, key.height, key.width)
        self.steps: list[Step] = []
        self.weights: Tensors = {}
        self.buffers: Tensors = {}
        self.inputs: Tensors = {}
        self.outputs: Tensors = {}

    # the model's parts

    def encode(self) -> LaunchPlan:
        key = self.key
        shape = self.image_shape if key.layout == "nchw" else (key.batch, key.height, key.width, 3)
        self.inputs["image"] = TensorSpec(shape, key.image_dtype)
        patches = "patch_w" if key.layout == "nchw" else "patch_w_nhwc"
        self.patchify("input:image", patches, "patch_b", "x", key.layout)
        self.encoder_blocks()
        self.head()
        return self.finish(())

    def encoder_blocks(self) -> None:
        """From the patches in "x" to what the head takes, in place."""
        for i in range(self.config.encoder_depth):
            self.block(f"blocks.{i}", "x", "x")

    def decode(self) -> LaunchPlan:
        key = self.key
        self.inputs["noise"] = TensorSpec(self.image_shape, torch.float32)
        self.inputs["latents"] = TensorSpec((key.batch, self.z, self.h, self.w), key.image_dtype)
        self.outputs["image"] = TensorSpec(self.image_shape, torch.float32)
        inference = key.inference or FullCapacitorInferenceConfig()
        if key.direction == "predict":
            if key.time is None:
                raise ValueError("a plan to predict needs a time")
            self.predict(0, "input:noise", "output:image", 1.0, None, inference)
            return self.finish(((key.time, 1.0),))
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
        drop = inference.drop_for(self.config)
        self.decoder_start(i, state)
        if drop is not None:
            strength = inference.pdg_strength
            self.unguided(i, state, "buffer:unguided", weight * (1 - strength), add, drop)
            weight, add = weight * strength, ("buffer:unguided", 1.0)
        self.decoder_end(i, target, weight, add)

    def unguided(
        self, i: int, state: str, target: str, weight: float, add: tuple[str, float] | None, drop: str
    ) -> None:
        """The unconditional pass, which drops the middle blocks' path; it shares the start blocks with the other."""
        self.decoder_end(i, target, weight, add, drop=True)

    def decoder_start(self, i: int, state: str) -> None:
        """Token buffer "s": the image and latents through the start blocks."""
        self.patchify(state, f"t{i}.in_w", f"t{i}.in_b", "s", "nchw", "input:latents")
        for b in range(self.config.decoder_start_blocks):
            self.block(f"t{i}.blocks.{b}", "s", "s")

    def decoder_end(
        self, i: int, target: str, weight: float, add: tuple[str, float] | None, drop: bool = False
    ) -> None:
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
        batch, dtype, dims = self.key.batch, self.key.dtype, {"dim": self.dim, "hidden": self.hidden}
        conv = self.lookup("dwconv", height=self.h, width=self.w, dim=self.dim)
        expand = self.lookup("expand", tokens_per_image=self.per_image, **dims)
        project = self.lookup("project", tokens_per_image=self.per_image, **dims)
        partials = expand_partials_shape(batch, self.per_image, self.hidden, expand)
        grn = self.lookup("grn", tiles=partials[1], hidden=self.hidden)
        x, out, y = (self.token_buffer(name) for name in (source, target, "y"))
        sumsq = self.buffer("sumsq", dwconv_sumsq_shape(self.tokens, self.dim, conv), torch.float32)
        h = self.buffer("h", (self.tokens, self.hidden), dtype)
        sums = self.buffer("partials", partials, torch.float32)
        norms = self.buffer("norms", (batch, self.hidden), torch.float32)
        gain = self.buffer("gain", (batch, self.hidden), dtype)
        dw_w, dw_b, w1, b1, gamma, w2, b2 = (
            self.weight(f"{weights}.{name}") for name in ("dw_w", "dw_b", "w1", "b1", "gamma", "w2", "b2")
        )
        grid = {"batch": batch, "height": self.h, "width": self.w}
        rows = {"tokens_per_image": self.per_image}
        # the fitted GELU is under half an ulp of the half types, and over many of float32's
        gelu = "erf" if dtype == torch.float32 else "fit"
        self.add("dwconv", {"x": x, "w": dw_w, "b": dw_b, "y": y, "sumsq": sumsq}, **grid, config=conv)
        args = {"y": y, "w1": w1, "b1": b1, "sumsq": sumsq, "h": h, "partials": sums}
        self.add("expand", args, **rows, gelu=gelu, config=expand)
        self.add("grn", {"partials": sums, "gamma": gamma, "gain": gain, "norms": norms}, config=grn)
        args = {"h": h, "gain": gain, "w2": w2, "b2": b2, "residual": x, "out": out}
        workspace = project_workspace_shape(self.tokens, self.dim, project)
        if workspace is not None:
            args["workspace"] = self.buffer("workspace", workspace, torch.float32)
        self.add("project", args, **rows, config=project)

    # single steps

    def patchify(self, image: str | None, w: str, b: str, target: str, layout: str, latents: str | None = None) -> None:
        args = {"w": self.weight(w), "b": self.weight(b), "tokens": self.token_buffer(target)}
        absent: dict[str, Any] = {"image": None}
        if image is not None:
            args["image"], absent = image, {}
        if latents is not None:
            args["latents"] = latents
        depth = self.weights[w].shape[0]
        config = self.lookup("patchify", tokens_per_image=self.per_image, dim=self.dim, depth=depth)
        self.add("patchify", args, patch=self.config.patch_size, layout=layout, config=config, **absent)

    def fuse_skip(self, s: str, m: str, w: str, b: str, target: str) -> None:
        args = {"s": self.token_buffer(s), "m": self.token_buffer(m), "w": self.weight(w), "b": self.weight(b)}
        args["out"] = self.token_buffer(target)
        config = self.lookup("fuse_skip", tokens_per_image=self.per_image, dim=self.dim, width=self.dim)
        self.add("fuse_skip", args, tokens_per_image=self.per_image, config=config)

    def unpatchify(
        self, source: str, w: str, b: str, target: str, weight: float, add: tuple[str, float] | None
    ) -> None:
        args = {"tokens": self.token_buffer(source), "w": self.weight(w), "b": self.weight(b)}
        args["image"] = self.image_buffer(target)
        options: dict[str, Any] = {"patch": self.config.patch_size, "scale_x0": weight}
        if add is not None:
            args["noise"], options["scale_noise"] = self.image_buffer(add[0]), add[1]
        depth = 3 * self.config.patch_size**2
        config = self.lookup("unpatchify", tokens_per_image=self.per_image, dim=self.dim, depth=depth)
        self.add("unpatchify", args, **options, config=config)

    def head(self) -> None:
        key, config = self.key, self.config
        args = {"x": self.token_buffer("x"), "w": self.weight("head_w"), "b": self.weight("head_b")}
        written = TensorSpec((key.batch, self.z, self.h, self.w), torch.float32)
        if key.direction == "encode":
            self.outputs["latents"] = written
            args |= {name: self.weight(name) for name in ("whiten_mean", "whiten_rstd")}
        else:
            self.outputs["mean"] = written
            if config.bottleneck_posterior_kind == "diagonal_gaussian":
                self.outputs["logsnr"] = written
        args |= {name: f"output:{name}" for name in self.outputs}
        norm = config.bottleneck_norm_mode == "channel_wise"
        # with the norm a tile holds all channels: the op derives that config itself
        rows = None if norm else self.lookup("head", tokens_per_image=self.per_image, dim=self.dim, channels=self.z)
        self.add("head", args, norm=norm, config=rows)

    def broadcast(self, w: str, target: str) -> None:
        """Fill a token buffer with one row."""
        self.add("broadcast", {"row": self.weight(w), "out": self.token_buffer(target)})

    def combine(self, target: str, terms: list[tuple[str, float]]) -> None:
        """target = sum of coefficient * image."""
        args = {f"x{i}": self.image_buffer(ref) for i, (ref, _) in enumerate(terms)}
        args["out"] = self.image_buffer(target)
        self.add("combine", args, coefficients=tuple(c for _, c in terms))

    # bookkeeping

    def lookup(self, family: str, **shape: int) -> Any:
        return self.config_for(family, shape, self.key.dtype)

    def config_for(self, family: str, shape: dict[str, int], dtype: torch.dtype) -> Any:
        """The config of a step whose rows are of `dtype`."""
        # one image for latency has bits of its own in any case
        narrows = self.narrows or self.key.use == "latency"
        images = self.key.batch if self.key.narrow and narrows else None
        return tuning.lookup(family, self.key.cc, shape, dtype, self.key.use, images)

    def weight(self, name: str) -> str:
        """Reference to a packed tensor; a decoder's name begins with the number of its time."""
        decoding = self.key.direction in ("decode", "predict")
        specs = packed_specs(self.config, DECODER if decoding else ENCODER, self.key.dtype)
        self.weights[name] = specs[name.partition(".")[2] if decoding else name]
        return f"weight:{name}"

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        spec = TensorSpec(shape, dtype)
        known = self.buffers.setdefault(name, spec)
        if known != spec:
            raise ValueError(f"buffer {name} is {known}, and now {spec}")
        return f"buffer:{name}"

    def token_buffer(self, name: str) -> str:
        return self.buffer(name, (self.tokens, self.dim), self.key.dtype)

    def image_buffer(self, ref: str) -> str:
        if ref.startswith("buffer:"):
            return self.buffer(ref.removeprefix("buffer:"), self.image_shape, torch.float32)
        return ref

    def spec(self, ref: str) -> TensorSpec:
        place, name = ref.split(":")
        return {"weight": self.weights, "buffer": self.buffers, "input": self.inputs, "output": self.outputs}[place][
            name
        ]

    def add(self, op: str, args: dict[str, str], **options: Any) -> None:
        specs = {argument: self.spec(ref) for argument, ref in args.items()}
        self.steps.append(Step(op, args, options, work_of(op)(**specs, **options)))

    def finish(self, times: tuple[tuple[float, float], ...]) -> LaunchPlan:
        end = len(self.steps) - 1
        buffers = []
        for place, tensors in (("buffer", self.buffers), ("input", self.inputs), ("output", self.outputs)):
            for name, spec in tensors.items():
                first, last = _lifetime(f"{place}:{name}", self.steps)
                first, last = 0 if place == "input" else first, end if place == "output" else last
                buffers.append(Buffer(name, spec.shape, spec.dtype, first, last))
        placed, size = lay_out(buffers)
        return LaunchPlan(self.key, tuple(self.steps), placed, size, self.weights, self.inputs, self.outputs, times)


def _lifetime(ref: str, steps: list[Step]) -> tuple[int, int]:
    used = [i for i, step in enumerate(steps) if ref in step.args.values()]
    return used[0], used[-1]
