"""The launches that the benchmarks time: inputs at the model's sizes, the kernel's call, the same maths in plain torch.

Bytes count each operand once, as if nothing but the launch's own inputs and outputs moved; FLOPs count a multiply-add
as two. Both formulas stand in each kernel's docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from capacitor_kernels import reference
from capacitor_kernels.common import cdiv, compute_capability
from capacitor_kernels.expand import expand, expand_partials_shape
from capacitor_kernels.grn import grn
from capacitor_kernels.project import project, project_workspace_shape
from capacitor_kernels.tuning import lookup

CHANNEL_TILE = 128


@dataclass(frozen=True)
class Size:
    """Images of one batch and the model's widths; `use` picks throughput or latency configs."""

    batch: int
    height: int
    width: int
    dim: int = 896
    hidden: int = 3584
    use: str = "throughput"

    @property
    def tokens_per_image(self) -> int:
        """Tokens of one image, 16 pixels a side each."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.batch * self.tokens_per_image

    def __str__(self) -> str:
        return f"{self.batch}x{16 * self.height}x{16 * self.width}"


@dataclass(frozen=True)
class Prepared:
    """One set of inputs: the launch, what it leaves behind, and the arguments of the plain torch function."""

    launch: Callable[[], None]
    outputs: Callable[[], Sequence[torch.Tensor]]
    plain_args: tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One launch at one size; `plain` is the same maths in plain torch, one function for every set of inputs."""

    op: str
    size: Size
    dtype: torch.dtype
    flops: float
    nbytes: int
    plain: Callable[..., Any]
    prepare: Callable[[torch.device], Prepared]


Builder = Callable[[Size, torch.dtype], Case]
OPS: dict[str, Builder] = {}
# the batches of the model card, one image at a time, and one large image
GPU_SIZES = (Size(128, 16, 16), Size(32, 32, 32), Size(1, 16, 16, use="latency"), Size(1, 128, 128))
TINY_SIZES = (Size(2, 4, 4, dim=32, hidden=64), Size(1, 3, 5, dim=32, hidden=64, use="latency"))


def case(builder: Builder) -> Builder:
    """Register a builder under its function's name."""
    OPS[builder.__name__.removesuffix("_case")] = builder
    return builder


def cases(ops: Sequence[str], sizes: Sequence[Size], dtype: torch.dtype) -> Iterator[Case]:
    """Every requested launch (all when empty) at every size."""
    for op in ops or OPS:
        for size in sizes:
            yield OPS[op](size, dtype)


def rand(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal values; never zeros, on which GPUs run faster."""
    return (torch.randn(shape, device=device) * scale).to(dtype)


@case
def expand_case(size: Size, dtype: torch.dtype) -> Case:
    """GEMM D -> F with RMSNorm, GELU and column sums."""
    tokens, dim, hidden, tiles = size.tokens, size.dim, size.hidden, cdiv(size.dim, CHANNEL_TILE)

    def prepare(device: torch.device) -> Prepared:
        shape = {"tokens_per_image": size.tokens_per_image, "dim": dim, "hidden": hidden}
        config = lookup("expand", compute_capability(device), shape, dtype, size.use)
        y = rand(tokens, dim, device=device, dtype=dtype)
        w1 = rand(dim, hidden, device=device, dtype=dtype, scale=dim**-0.5)
        b1 = rand(hidden, device=device, dtype=torch.float32)
        sumsq = y.float().square().sum(1, keepdim=True).div(tiles).expand(-1, tiles).contiguous()
        h = torch.empty(tokens, hidden, device=device, dtype=dtype)
        shape = expand_partials_shape(size.batch, size.tokens_per_image, hidden, config)
        partials = torch.empty(shape, device=device)

        def launch() -> None:
            expand(y, w1, b1, sumsq, h, partials, tokens_per_image=size.tokens_per_image, config=config)

        return Prepared(launch, lambda: (h, partials.sum(1)), (y, w1, b1, sumsq))

    nbytes = dtype.itemsize * (tokens * dim + dim * hidden + tokens * hidden) + 4 * tokens * tiles
    plain = partial(reference.expand, tokens_per_image=size.tokens_per_image)
    return Case("expand", size, dtype, 2.0 * tokens * dim * hidden, nbytes, plain, prepare)


@case
def grn_case(size: Size, dtype: torch.dtype) -> Case:
    """Gain per image and hidden channel from tile sums."""
    hidden = size.hidden
    tiles = cdiv(size.tokens_per_image, 128)

    def prepare(device: torch.device) -> Prepared:
        partials = rand(size.batch, tiles, hidden, device=device, dtype=torch.float32).square()
        gamma = rand(hidden, device=device, dtype=torch.float32)
        gain = torch.empty(size.batch, hidden, device=device, dtype=dtype)
        norms = torch.empty(size.batch, hidden, device=device)

        return Prepared(lambda: grn(partials, gamma, gain, norms=norms), lambda: (gain,), (partials, gamma))

    nbytes = size.batch * hidden * (4 * tiles + 4 + dtype.itemsize) + 4 * hidden

    def plain(sums: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return reference.grn(sums.sum(1), gamma).to(dtype)

    return Case("grn", size, dtype, 2.0 * size.batch * tiles * hidden, nbytes, plain, prepare)


@case
def project_case(size: Size, dtype: torch.dtype) -> Case:
    """GEMM F -> D with GRN's gain on A, bias and residual."""
    tokens, dim, hidden = size.tokens, size.dim, size.hidden

    def prepare(device: torch.device) -> Prepared:
        shape = {"tokens_per_image": size.tokens_per_image, "dim": dim, "hidden": hidden}
        config = lookup("project", compute_capability(device), shape, dtype, size.use)
        h = torch.nn.functional.gelu(rand(tokens, hidden, device=device, dtype=dtype))
        gain = rand(size.batch, hidden, device=device, dtype=dtype)
        w2 = rand(hidden, dim, device=device, dtype=dtype, scale=hidden**-0.5)
        b2 = rand(dim, device=device, dtype=torch.float32)
        residual = rand(tokens, dim, device=device, dtype=dtype)
        out = torch.empty_like(residual)
        needed = project_workspace_shape(tokens, dim, config)
        workspace = None if needed is None else torch.empty(needed, device=device)
        options = {"tokens_per_image": size.tokens_per_image, "workspace": workspace, "config": config}

        def launch() -> None:
            project(h, gain, w2, b2, residual, out, **options)

        return Prepared(launch, lambda: (out,), (h, gain, w2, b2, residual))

    nbytes = dtype.itemsize * (tokens * hidden + hidden * dim + 2 * tokens * dim + size.batch * hidden)
    plain = partial(reference.project, tokens_per_image=size.tokens_per_image)
    return Case("project", size, dtype, 2.0 * tokens * dim * hidden, nbytes, plain, prepare)
