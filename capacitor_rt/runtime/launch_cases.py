"""Every op in the forms that plans launch it in, on random values: arguments, and what plain torch makes of them.

A case is a step of a plan of a small model, so its config is the one that serves such a shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capacitor_kernels import dewhiten, reference, tuning, whiten
from capacitor_kernels.launch import E4M3_COMPUTE_CAPABILITY, INTERPRETED, Launch, dtype_name, recording
from capacitor_kernels.pictures import between_bytes

from ..config import DicoConfig, ModelConfig
from .arena import TensorSpec
from .host_ops import host_function, work_of
from .pictures import table, tables
from .plan import PlanKey, Step, make_plan

# y of order one in e4m3
Y_SCALE = 30.0
Grid = tuple[int, int]
Tensors = dict[str, Tensor]
# op -> arguments that it writes
OUTPUTS: dict[str, tuple[str, ...]] = {
    "patchify": ("tokens",),
    "dwconv": ("y", "sumsq", "partials"),
    "expand": ("h", "partials"),
    "expand_fp8": ("h", "partials"),
    "grn": ("gain", "norms"),
    "channel_attention": ("factor", "sums"),
    "project": ("out", "sumsq", "scaled_sumsq", "workspace"),
    "project_fp8": ("out", "workspace"),
    "rmsnorm": ("out", "sumsq"),
    "head": ("latents", "mean", "logsnr"),
    "fuse_skip": ("out",),
    "unpatchify": ("image",),
    "whiten": ("out",),
    "dewhiten": ("out",),
    "attention": ("out",),
    "resize": ("out", "workspace"),
}
# an op leaves sums per tile, plain torch the sum of all
SUMMED: dict[str, Callable[[Tensor], Tensor]] = {
    "sumsq": partial(torch.sum, dim=1, keepdim=True),
    "scaled_sumsq": partial(torch.sum, dim=1, keepdim=True),
    "partials": partial(torch.sum, dim=1),
}


class Sizes(NamedTuple):
    """A model of one block each way, grids of tokens (whole tiles, the last one masked, several to an image), the width
    of an attention, and heights and widths of pictures, the last one being what the others are resized to."""

    config: ModelConfig
    even: Grid
    masked: Grid
    many: Grid
    attention: int
    pictures: tuple[Grid, ...]


_ONE_BLOCK = ModelConfig(encoder_depth=1, decoder_depth=1, decoder_start_blocks=1, decoder_end_blocks=0)
# a hidden layer wide enough to be split
_TINY = replace(_ONE_BLOCK, patch_size=8, model_dim=24, mlp_ratio=24, bottleneck_dim=4, adaln_low_rank_rank=2)
FULL = Sizes(_ONE_BLOCK, (16, 16), (15, 17), (64, 64), 512, ((300, 400), (768, 1024), (37, 35), (256, 256)))
TINY = Sizes(_TINY, (4, 4), (3, 5), (40, 40), 24, ((9, 12), (16, 10), (8, 8)))


def sizes() -> Sizes:
    """Those of full_capacitor's width, whose config rows are checked; tiny ones under Triton's interpreter."""
    return TINY if INTERPRETED else FULL


class Prepared(NamedTuple):
    """A call of an op, the tensors that it reads, and those that it writes, by argument."""

    call: Callable[[], None]
    given: Tensors
    out: Tensors


@dataclass(frozen=True)
class LaunchCase:
    """One op at one shape.

    Attributes:
        name: the op, the sizes in images and tokens, and in what it differs from the op's other cases.
        step: as a plan has it; `specs` are its tensors by argument.
    """

    name: str
    step: Step
    specs: Mapping[str, TensorSpec]

    def launches(self, cc: int) -> list[Launch]:
        """What a call queues, on tensors of the meta device."""
        tensors = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in self.specs.items()}
        with recording(cc) as found:
            self._op(**tensors, **self.step.options)
        return list(found)

    def prepare(self, device: torch.device, draw: torch.Generator | None) -> Prepared:
        """The op on fresh values, ready to be called; without a generator they are drawn on the device itself."""
        written = [argument for argument in OUTPUTS[self.step.op] if argument in self.specs]
        place = device if draw is None else torch.device("cpu")
        given = {a: _values(self.step, a, s, draw, place).to(device) for a, s in self.specs.items() if a not in written}
        if self.step.op == "expand":
            given["sumsq"] = squares(given["y"], self.specs["sumsq"].shape[1])
            if "scaled_sumsq" in given:
                given["scaled_sumsq"] = squares(given["y"] * 1.5, self.specs["scaled_sumsq"].shape[1])
        if self.step.op == "expand_fp8":
            given["sumsq"] = squares(given["y"].float() / Y_SCALE, self.specs["sumsq"].shape[1])
        # what a launch leaves out shows
        out = {a: _blank(self.specs[a], device) for a in written}
        return Prepared(partial(self._op, **given, **out, **self.step.options), given, out)

    @property
    def _op(self) -> Callable[..., None]:
        return {"whiten": whiten, "dewhiten": dewhiten}.get(self.step.op) or host_function(self.step.op)

    def run(self, device: torch.device, draw: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Call the op once on fresh values; `(result, truth in float64, eager torch's)` of every output."""
        call, given, out = self.prepare(device, draw)
        call()
        truth = self.plain({a: t.double() if t.is_floating_point() else t for a, t in given.items()})
        eager = self.plain(given)
        results = []
        for argument, expected in truth.items():
            got = SUMMED[argument](out[argument]) if argument in SUMMED else out[argument]
            results.append((got, expected, eager[argument].to(got.dtype)))
        return results

    def plain(self, t: Mapping[str, Tensor]) -> Tensors:
        """What an op writes, by argument, in plain torch; partial sums are summed."""
        o, specs = self.step.options, self.specs
        match self.step.op:
            case "patchify":
                image = {"image": t.get("image")}
                return {"tokens": reference.patchify(**{**t, **image}, patch=o["patch"], layout=o["layout"])}
            case "dwconv" if "partials" in specs:
                y, sums = reference.dwconv_silu(**t, batch=o["batch"], height=o["height"], width=o["width"])
                return {"y": y, "partials": sums}
            case "dwconv":
                plain = {name: t[name] for name in ("x", "w", "b")}
                y, sumsq = reference.dwconv(**plain, batch=o["batch"], height=o["height"], width=o["width"])
                return {"y": y * t["y_inverse"] if "y_inverse" in t else y, "sumsq": sumsq}
            case "expand_fp8":
                h, partials = reference.expand_fp8(**t, tokens_per_image=o["tokens_per_image"])
                return {"h": h, "partials": partials}
            case "expand":
                # the fit is judged against the exact GELU
                gelu = "none" if o["gelu"] == "none" else "erf"
                h, partials = reference.expand(**t, tokens_per_image=o["tokens_per_image"], gelu=gelu)
                return {"h": h, "partials": partials} if "partials" in specs else {"h": h}
            case "grn":
                sums = t["partials"].sum(1)
                return {"gain": reference.grn(sums, t["gamma"]), "norms": sums.sqrt()}
            case "channel_attention":
                sums = t["partials"].sum(1)
                per_image = o["tokens_per_image"]
                return {"factor": reference.channel_attention(sums, t["w"], t["b"], tokens_per_image=per_image)}
            case "project":
                return self._project(t)
            case "project_fp8":
                return {"out": reference.project_fp8(**t, tokens_per_image=o["tokens_per_image"])}
            case "rmsnorm":
                written = {"out": reference.rmsnorm(t["x"], t["weight"], t["bias"])} if "out" in specs else {}
                sumsq = {"sumsq": reference.row_squares(written.get("out", t["x"]))} if "sumsq" in specs else {}
                return written | sumsq
            case "head":
                _, channels, *grid = next(specs[name] for name in ("latents", "mean") if name in specs).shape
                found = reference.head(**t, grid=(grid[0], grid[1]), channels=channels, norm=o["norm"])
                named = zip(OUTPUTS["head"], found, strict=True)
                return {name: value for name, value in named if value is not None and name in specs}
            case "fuse_skip":
                return {"out": reference.fuse_skip(**t)}
            case "unpatchify":
                rows, columns = (n // o["patch"] for n in specs["image"].shape[2:])
                scales = {name: o[name] for name in ("scale_x0", "scale_noise") if name in o}
                return {"image": reference.unpatchify(**t, patch=o["patch"], grid=(rows, columns), **scales)}
            case "whiten":
                return {"out": reference.whiten(**t)}
            case "attention":
                return {"out": reference.attention(**t, tokens_per_image=o["tokens_per_image"])}
            case "resize":
                return {"out": reference.resize(t["source"], t["weights"], sizes=o["sizes"], shape=specs["out"].shape)}
            case _:
                return {"out": reference.dewhiten(**t)}

    def _project(self, t: Mapping[str, Tensor]) -> Tensors:
        o = self.step.options
        operands = {"gain": None, **{name: t[name] for name in ("h", "gain", "w2", "b2", "residual") if name in t}}
        options = {"tokens_per_image": o["tokens_per_image"], "multiply": o.get("multiply", False)}
        out = reference.project(**operands, **options)
        sums = {"sumsq": reference.row_squares(out)} if "sumsq" in self.specs else {}
        scaled = {"scaled_sumsq": reference.row_squares(out, t["scale"])} if "scaled_sumsq" in self.specs else {}
        return {"out": out, **sums, **scaled}


def cases(at: Sizes, dtype: torch.dtype, cc: int) -> Iterator[LaunchCase]:
    """Between them every kernel in every form that plans have."""
    blocks, ends = ("dwconv", "expand", "grn", "project"), ("patchify", "fuse_skip", "unpatchify")
    encoder = ("patchify", *blocks, "head")
    asked: tuple[tuple[PlanKey, tuple[str, ...]], ...] = (
        (_key("encode", 2, at.config, at.even, dtype, torch.uint8, "nchw", cc), encoder),
        (_key("posterior", 2, at.config, at.masked, dtype, dtype, "nhwc", cc), encoder),
        (_key("decode", 2, at.config, at.even, dtype, torch.float32, "nchw", cc), ends),
        (_key("decode", 2, at.config, at.masked, dtype, dtype, "nchw", cc), ends),
        (_key("encode", 1, at.config, at.even, dtype, torch.uint8, "nchw", cc, "latency"), blocks),
        # sums of many tiles take two launches
        (_key("encode", 1, at.config, at.many, dtype, torch.uint8, "nchw", cc), ("grn",)),
    )
    if cc >= E4M3_COMPUTE_CAPABILITY:
        in_fp8 = ("dwconv", "expand_fp8", "grn", "project_fp8")
        asked += tuple((replace(key, precision="fp8"), in_fp8) for key, ops in asked if "expand" in ops)
    seen = set()
    for key, ops in asked:
        for op in ops:
            case = launch_case(at.config, key, op)
            if case.name not in seen:
                seen.add(case.name)
                yield case
    yield from _siblings(at, dtype, cc)
    yield from _whitening(at, dtype, cc)
    yield from _attention(at, dtype, cc)
    yield from _resize(at, cc)


def _siblings(at: Sizes, dtype: torch.dtype, cc: int) -> Iterator[LaunchCase]:
    """Every form that plans of the models with channel attention have beside those above."""
    # two blocks: the last one of a chain leaves no sums of squares
    config = replace(at.config, encoder_depth=2, dico=DicoConfig("irdiffae_v1"))
    asked = (
        _key("encode", 2, config, at.even, dtype, torch.uint8, "nchw", cc),
        _key("decode", 2, config, at.masked, dtype, torch.float32, "nchw", cc),
        _key("encode", 1, config, at.even, dtype, torch.uint8, "nchw", cc, "latency"),
        _key("encode", 1, config, at.many, dtype, torch.uint8, "nchw", cc),
    )
    ops = ("rmsnorm", "expand", "dwconv", "channel_attention", "project", "patchify")
    seen = set()
    for key in asked:
        for step in make_plan(config, key).steps:
            # many tiles matter to their sums alone
            wanted = ("channel_attention",) if key.height == at.many[0] * config.patch_size else ops
            plain = step.op == "patchify" and "image" in step.args
            case = launch_case(config, key, step.op, step)
            if step.op in wanted and not plain and case.name not in seen:
                seen.add(case.name)
                yield case


def _key(
    direction: str,
    batch: int,
    config: ModelConfig,
    grid: Grid,
    dtype: torch.dtype,
    image_dtype: torch.dtype,
    layout: str,
    cc: int,
    use: str = "throughput",
) -> PlanKey:
    height, width = (n * config.patch_size for n in grid)
    return PlanKey(direction, batch, height, width, dtype, image_dtype, layout, cc, use)


def launch_case(model: ModelConfig, key: PlanKey, op: str, step: Step | None = None) -> LaunchCase:
    """A step of the plan of a key, by default the first one of an op."""
    plan = make_plan(model, key)
    step = step or next(step for step in plan.steps if step.op == op)
    specs = {argument: plan.spec(ref) for argument, ref in step.args.items()}
    config: Any = step.options.get("config")
    form = [op, f"{key.batch}x{key.height // model.patch_size}x{key.width // model.patch_size}"]
    if op == "patchify":
        form += [key.layout, dtype_name(specs["image"].dtype)] if "image" in specs else []
        form += ["latents", dtype_name(specs["latents"].dtype)] if "latents" in specs else []
    if op == "head":
        form.append("latents" if "latents" in specs else "posterior")
    if op in ("grn", "channel_attention"):
        form.append("split" if config.split else "fused")
    if model.dico is not None:
        form += _dico_form(op, step)
    if key.precision is not None and op in ("dwconv", "grn"):
        form.append("for fp8")
    if getattr(config, "split_k", 1) > 1:
        form.append(f"split_k {config.split_k}")
    if getattr(config, "tma", False):
        form.append("tma")
    return LaunchCase(" ".join(form), step, specs)


def _dico_form(op: str, step: Step) -> list[str]:
    """In what a step of a DiCo model differs from others of its op, those of full_capacitor included."""
    sums = [name for name in ("sumsq", "scaled_sumsq") if name in step.args]
    if op == "expand":
        return [*(["no GELU"] if step.options["gelu"] == "none" else ["two norms"]), *sums[1:]]
    if op == "project":
        return ["times" if step.options.get("multiply") else "plain", *sums]
    if op == "rmsnorm":
        return [*(["norm"] if "out" in step.args else []), *sums]
    return ["SiLU"] if op == "dwconv" else []


def _whitening(at: Sizes, dtype: torch.dtype, cc: int) -> Iterator[LaunchCase]:
    """By hand: plans fold whitening into the ops around it."""
    h, w = at.even
    latents = TensorSpec((2, at.config.bottleneck_dim, h, w), dtype)
    statistics = TensorSpec((at.config.bottleneck_dim,), torch.float32)
    options = {"config": tuning.lookup("whiten", cc, {"pixels": h * w}, dtype)}
    for op, deviation in (("whiten", "rstd"), ("dewhiten", "std")):
        args = {"z": "input:z", "mean": "weight:mean", deviation: f"weight:{deviation}", "out": "output:out"}
        specs = {"z": latents, "mean": statistics, deviation: statistics, "out": latents}
        yield LaunchCase(f"{op} 2x{h}x{w}", Step(op, args, options), specs)


def _attention(at: Sizes, dtype: torch.dtype, cc: int) -> Iterator[LaunchCase]:
    """By hand: it serves the FLUX.2 VAE, of whose width it is here."""
    for h, w in (at.even, at.masked):
        key = {"tokens_per_image": h * w, "dim": at.attention}
        options = {"tokens_per_image": h * w, "config": tuning.lookup("attention", cc, key, dtype)}
        args = {"q": "input:q", "k": "input:k", "v": "input:v", "out": "output:out"}
        specs = dict.fromkeys(args, TensorSpec((2 * h * w, at.attention), dtype))
        yield LaunchCase(f"attention 2x{h}x{w}", Step("attention", args, options), specs)


def _resize(at: Sizes, cc: int) -> Iterator[LaunchCase]:
    """By hand: it makes the pixels that a plan begins with."""
    *given, (h, w) = at.pictures
    step, specs = resize_step(given, h, w, cc)
    yield LaunchCase(f"resize {len(given)}x{h}x{w}", step, specs)


def resize_step(pictures: Sequence[Grid], height: int, width: int, cc: int) -> tuple[Step, dict[str, TensorSpec]]:
    """Pictures of these heights and widths to a batch of one size, and the specs of the tensors."""
    sizes, source, weights = table(pictures, height, width)
    specs = {
        "source": TensorSpec((source,), torch.uint8),
        "weights": TensorSpec((weights,), torch.int32),
        "images": TensorSpec(tuple(sizes.shape), torch.int32),
        "workspace": TensorSpec((int(between_bytes(sizes).sum()),), torch.uint8),
        "out": TensorSpec((len(pictures), height, width, 3), torch.uint8),
    }
    config = tuning.lookup("resize", cc, {"pixels": height * width}, torch.uint8)
    args = {name: f"{'output' if name in OUTPUTS['resize'] else 'input'}:{name}" for name in specs}
    work = work_of("resize")(**specs, sizes=sizes)
    return Step("resize", args, {"sizes": sizes, "config": config}, work), specs


def _blank(spec: TensorSpec, device: torch.device) -> Tensor:
    filler = 0xA5 if spec.dtype == torch.uint8 else math.nan
    return torch.full(spec.shape, filler, dtype=spec.dtype, device=device)


def _values(step: Step, name: str, spec: TensorSpec, draw: torch.Generator | None, place: torch.device) -> Tensor:
    """Random values at the scale that the model has them."""
    if step.op == "resize" and (known := tables(step.options["sizes"])).get(name) is not None:
        return known[name].to(place)
    if spec.dtype == torch.uint8:
        return torch.randint(0, 256, spec.shape, generator=draw, dtype=torch.uint8, device=place)
    x = torch.randn(spec.shape, generator=draw, dtype=torch.float32, device=place)
    return as_in_the_model(step, name, x).to(spec.dtype)


def as_in_the_model(step: Step, name: str, x: Tensor) -> Tensor:
    """Normal values x of a step's argument at the scale that the model has them. May write to x."""
    if step.op.endswith("_fp8") or name == "y_inverse":
        return _as_in_fp8(name, x)
    if name in ("rstd", "std", "whiten_rstd"):
        x = x.exp()
    elif name == "gain" and step.options.get("multiply"):
        x = x.sigmoid()
    elif name in ("gamma", "gain"):
        x *= 0.3
    elif name == "h":
        x = torch.nn.functional.gelu(x)
    elif name == "partials" and step.op == "channel_attention":
        # sums whose mean over an image is of the order of one
        x *= step.options["tokens_per_image"] / x.shape[1]
    elif name == "partials":
        x = x.square()
    elif step.args[name].startswith("weight:") and x.dim() == 2:
        x *= x.shape[0] ** -0.5
    return x


def _as_in_fp8(name: str, x: Tensor) -> Tensor:
    """Normal values x of an argument of a launch in e4m3 at the scale that a calibration gives. May write to x."""
    if name == "y_inverse":
        return torch.full_like(x, Y_SCALE)
    if name in ("y", "w1", "h"):
        x = (torch.nn.functional.gelu(x) * 60 if name == "h" else x * (Y_SCALE if name == "y" else 100)).clamp_(
            -448, 448
        )
    elif name == "w2":
        x *= 50
    elif name in ("scale", "w2_scale"):
        # sums of products of order one
        x = (x.abs() + 0.5) / (3000 * x.shape[0] ** 0.5)
    elif name == "h_inverse":
        x = x.abs() * 10 + 10
    elif name == "gain":
        x *= 0.3
    return x


def squares(y: Tensor, tiles: int) -> Tensor:
    """Sums of squares of each row of y, as if in equal parts of so many tiles."""
    return y.float().square().sum(1, keepdim=True).div(tiles).expand(-1, tiles).contiguous()
