"""What a plan is: the key that it answers, its steps in order, its buffers. Pure data.

An argument of a step is a string `place:name`; places are `weight` (packed tensors), `buffer`, `input` and `output`.
The last three lie in the arena: an input from the first step until its last use, an output from its first use on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from capacitor_kernels.launch import Work

from ..config import FullCapacitorInferenceConfig
from .arena import Buffer, TensorSpec

DIRECTIONS = ("encode", "posterior", "decode", "predict")
Tensors = dict[str, TensorSpec]


@dataclass(frozen=True)
class PlanKey:
    """What a plan is for; the key under which its CUDA graph is kept.

    Attributes:
        direction: "encode" (image to whitened latents), "posterior" (image to raw mean and logsnr), "decode" (noise and
            latents to image, all passes of the sampler) or "predict" (x_t and latents to x0, one pass at `time`).
        batch, height, width: images, in pixels.
        dtype: of the weights and activations.
        image_dtype, layout: of the input image, "nchw" or "nhwc"; in decoding, dtype of the latents and "nchw".
        cc: compute capability, e.g. 90.
        use: "throughput" (a row's bits depend on neither the batch nor its place) or "latency" (one image at a time).
        narrow: whether few images are launched by narrower tiles of the same bit class.
        inference: sampler settings of "decode", guidance of "predict"; the seed plays no part.
        dependent: whether each launch starts while the one before is at its end.
        precision: "fp8" for an encoder whose blocks are in e4m3, else None.
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
    precision: str | None = None
    narrow: bool = True
    dependent: bool = False


@dataclass(frozen=True)
class Step:
    """One call of an op.

    Attributes:
        op: name of the host function.
        args: its tensor arguments, argument -> "place:name".
        options: its further keyword arguments, the config of its launches among them.
        work: FLOPs, and bytes if every operand is read or written once.
    """

    op: str
    args: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    work: Work = Work(0, 0)  # noqa: RUF009

    @property
    def flops(self) -> int:
        return self.work.flops

    @property
    def nbytes(self) -> int:
        return self.work.nbytes


@dataclass(frozen=True)
class LaunchPlan:
    """Steps and memory of one key.

    `weights` are the packed tensors that the steps name. `times` are the decoder's `(t, image_scale)`, whose weights
    are called `t{i}.*` in this order.
    """

    key: PlanKey
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    weights: Tensors
    inputs: Tensors
    outputs: Tensors
    times: tuple[tuple[float, float], ...] = ()

    @property
    def flops(self) -> int:
        return sum(s.flops for s in self.steps)

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.steps)

    def spec(self, ref: str) -> TensorSpec:
        """Shape and dtype of what a `place:name` of a step stands for."""
        place, name = ref.split(":")
        if place == "weight":
            return self.weights[name]
        return next(b.spec for b in self.buffers if b.name == name)
