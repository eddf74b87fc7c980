"""The launches that the runtime queues with a config row or at an image size, on tensors of the meta device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ._compile import signature

if TYPE_CHECKING:
    from capacitor_kernels.config_rows import ConfigRow
    from capacitor_kernels.launch import Launch
    from capacitor_rt import ModelConfig
    from capacitor_rt.runtime.plan import LaunchPlan, Step

# what an encoder in e4m3 does not do in 8 bits, it does in bfloat16
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "uint8": "uint8", "e4m3": "bfloat16"}
THROUGHPUT_BATCH = 32
# where an image's tokens are no multiple of 16, those of an odd batch are none either: another specialisation
ODD_BATCH = 3
# pixels of an image that has 66 x 66 tokens where a token stands for 8 x 8 pixels: no multiple of 16
MASKED_SIDE = 528


class Call(NamedTuple):
    """What the runtime makes a plan for: direction, and dtype and layout of the input."""

    direction: str
    dtype: str
    layout: str = "nchw"

    def __str__(self) -> str:
        what = "latents" if self.direction == "decode" else self.layout
        return f"{self.direction} {self.dtype} {what}"


def calls(dtype: str) -> tuple[Call, ...]:
    """Every call of a model whose weights are in `dtype`."""
    if dtype == "e4m3":
        return tuple(call for call in calls("bf16") if call.direction != "decode")
    return (
        Call("encode", "uint8", "nhwc"),
        Call("encode", "uint8"),
        Call("encode", dtype),
        Call("posterior", "uint8"),
        Call("decode", dtype),
        Call("decode", "fp32"),
    )


def launches_of(row: ConfigRow) -> list[tuple[Launch, str]]:
    """Every different launch that the runtime queues with a row, and which plans queue it.

    Raises:
        ValueError: no plan of a known model looks up the row's shape.
    """
    found: dict[Any, tuple[Launch, list[Call]]] = {}
    users: list[Call] = []
    by_hand = {"whiten": _whiten, "attention": _attention, "resize": _resize}
    for call, launches in by_hand.get(row.family, _by_plans)(row):
        users.append(call)
        for launch in launches:
            _, queued_by = found.setdefault(identity(launch), (launch, []))
            queued_by.append(call)
    if not found:
        raise ValueError(
            f"no plan of a known model looks up {row.family} at {dict(row.shape)}, {row.dtype}, {row.use}: remove this "
            f"row of configs/sm_{row.cc}.json, or add the model to capacitor_rt.config.KNOWN_MODELS"
        )
    return [(launch, _names(queued_by, users)) for launch, queued_by in found.values()]


def launches_at(
    cc: int, dtype: str, grid: tuple[int, int], use: str, families: Sequence[str] = ()
) -> list[tuple[str, dict[str, int], Launch, str]]:
    """Every different launch of the known models at one image size, with the configs that `lookup` returns there.

    Args:
        dtype: of the weights, "bf16" or "fp16", or "e4m3" for encoders in fp8.
        grid: rows and columns of patches of an image.
        use: "throughput" (a batch of 32, an odd one, and one image) or "latency" (one image).
        families: ops to follow; all when empty.

    Returns:
        (op, tokens and batch of the call, launch, the plans that queue it) each.
    """
    import torch

    from capacitor_rt.runtime.executor import trace
    from capacitor_rt.runtime.plan import PlanKey, make_plan

    found: dict[Any, tuple[str, dict[str, int], Launch, list[Call]]] = {}
    users: list[Call] = []
    torch_dtype = getattr(torch, _DTYPES[dtype])
    for model in _models(dtype):
        for call in calls(dtype):
            users.append(call)
            for batch in (1,) if use == "latency" else (THROUGHPUT_BATCH, ODD_BATCH, 1):
                size = batch, grid[0] * model.patch_size, grid[1] * model.patch_size
                image_dtype = getattr(torch, _DTYPES[call.dtype])
                key = PlanKey(call.direction, *size, torch_dtype, image_dtype, call.layout, cc, use)
                plan = make_plan(model, dataclasses.replace(key, precision=_precision(dtype)))
                for step, launches in trace(plan):
                    for launch in launches if not families or step.op in families else ():
                        where = {"rows": grid[0], "columns": grid[1], "batch": batch}
                        *_, queued_by = found.setdefault(identity(launch), (step.op, where, launch, []))
                        queued_by.append(call)
    return [(op, where, launch, _names(queued_by, users)) for op, where, launch, queued_by in found.values()]


def _by_plans(row: ConfigRow) -> Iterator[tuple[Call, list[Launch]]]:
    """What the steps of a row's op queue, for every call in whose plan the row is looked up."""
    import torch

    from capacitor_kernels import tuning
    from capacitor_rt.runtime.executor import trace
    from capacitor_rt.runtime.plan import PlanKey, make_plan

    dtype = getattr(torch, _DTYPES[row.dtype])
    batch = 1 if row.use == "latency" else THROUGHPUT_BATCH
    for model in _models(row.dtype):
        if row.shape.get("dim", model.model_dim) != model.model_dim:
            continue
        for call in calls(row.dtype):
            image_dtype = getattr(torch, _DTYPES[call.dtype])
            for height, width in _grids(row):
                size = batch, height * model.patch_size, width * model.patch_size
                key = PlanKey(call.direction, *size, dtype, image_dtype, call.layout, row.cc, row.use)
                key = dataclasses.replace(key, precision=_precision(row.dtype))
                with tuning.using(row.family, row.config) as seen:
                    plan = make_plan(model, key)
                if dict(row.shape) in seen:
                    for step, launches in trace(plan):
                        if step.op == row.family and _is_of(plan, step, row):
                            yield call, launches


def _is_of(plan: LaunchPlan, step: Step, row: ConfigRow) -> bool:
    """Whether a step is of the row's own shape, which the row's config was forced on every step of its op for."""
    weight = {"expand": ("w1", "dim", "hidden"), "project": ("w2", "hidden", "dim"), "patchify": ("w", "depth", "dim")}
    weight |= {"expand_fp8": ("w1", "hidden", "dim"), "project_fp8": ("w2", "dim", "hidden")}
    if row.family not in weight:
        return True
    argument, *sizes = weight[row.family]
    return plan.spec(step.args[argument]).shape == tuple(row.shape[size] for size in sizes)


def _models(dtype: str) -> list[ModelConfig]:
    """The known models that have launches in `dtype`, shallow, each once."""
    from capacitor_rt.config import KNOWN_MODELS

    known = (c for c in KNOWN_MODELS.values() if dtype != "e4m3" or (c.encoder_depth and c.dico is None))
    return list(dict.fromkeys(map(_shallow, known)))


def _precision(dtype: str) -> str | None:
    """Of a plan whose rows are in `dtype`."""
    return "fp8" if dtype == "e4m3" else None


def _shallow(config: ModelConfig) -> ModelConfig:
    """One block of each kind: more of them queue the same launches again."""
    if config.dico is not None and config.dico.is_flat:
        return dataclasses.replace(config, encoder_depth=min(config.encoder_depth, 2), decoder_depth=2)
    # of DiCo blocks the last one of a chain leaves no sums behind
    deep = 1 if config.dico is None else 2
    start = end = deep
    return dataclasses.replace(
        config,
        encoder_depth=deep,
        decoder_depth=start + 1 + end,
        decoder_start_blocks=start,
        decoder_end_blocks=end,
    )


def _grids(row: ConfigRow) -> list[tuple[int, int]]:
    """Tokens of an image in each direction, for which a row may be looked up."""
    if "height" in row.shape:
        return [(row.shape["height"], row.shape["width"])]
    if "tokens_per_image" in row.shape:
        tokens = row.shape["tokens_per_image"]
        height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
        return [(height, tokens // height)]
    # tiles follow from what expand or dwconv makes of an image
    return [(8, 8), (16, 16), (32, 32), (64, 64)]


def _whiten(row: ConfigRow) -> Iterator[tuple[Call, list[Launch]]]:
    """Whitening of latents in the row's dtype."""
    side = 16 * math.isqrt(row.shape["pixels"])
    yield Call("by hand", row.dtype), _by_hand(row, side)


def _attention(row: ConfigRow) -> Iterator[tuple[Call, list[Launch]]]:
    """Square images of the row's tokens, and others whose last tile is masked, as the FLUX.2 VAE has them."""
    from ._cases import FLUX2_STRIDE

    for side in (FLUX2_STRIDE * math.isqrt(row.shape["tokens_per_image"]), MASKED_SIDE):
        yield Call(f"FLUX.2 {side}x{side}", row.dtype), _by_hand(row, side)


def _resize(row: ConfigRow) -> Iterator[tuple[Call, list[Launch]]]:
    """Square images of the row's pixels."""
    side = math.isqrt(row.shape["pixels"])
    yield Call(f"the cache {side}x{side}", row.dtype), _by_hand(row, side)


def _by_hand(row: ConfigRow, side: int) -> list[Launch]:
    """The launches of an op that is no step of a plan, for square images."""
    import torch

    from capacitor_rt import ModelConfig

    from ._cases import Images, make_case

    images, dtype = Images(THROUGHPUT_BATCH, side, side), getattr(torch, _DTYPES[row.dtype])
    return make_case(row.family, images, ModelConfig(), dtype, row.cc).with_config(row.config).launches()


def identity(launch: Launch) -> Any:
    """What two launches of the same machine code share."""
    types, constants, hints = signature(launch)
    return launch.kernel, *(tuple(sorted(map(repr, d.items()))) for d in (types, constants, hints, launch.options))


def _names(queued_by: Sequence[Call], users: Sequence[Call]) -> str:
    """Calls in words; those of a direction only where another of its calls queues something else."""
    names = []
    for call in queued_by:
        whole = {c for c in users if c.direction == call.direction} <= set(queued_by)
        names.append(call.direction if whole else str(call))
    return ", ".join(dict.fromkeys(names))
