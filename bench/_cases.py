"""The launches that the benchmarks time: inputs at the model's sizes, the kernel's call, the same maths in plain torch.

Bytes count each operand once, as if nothing but the launch's own inputs and outputs moved; FLOPs count a multiply-add
as two. Both formulas stand in each kernel's docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

# modules that register launches
MODULES = ("_cases_block", "_cases_ends")


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
_OPS: dict[str, Builder] = {}
# the batches of the model card, one image at a time, and one large image
GPU_SIZES = (Size(128, 16, 16), Size(32, 32, 32), Size(1, 16, 16, use="latency"), Size(1, 128, 128))
TINY_SIZES = (Size(2, 4, 4, dim=32, hidden=64), Size(1, 3, 5, dim=32, hidden=64, use="latency"))


def case(builder: Builder) -> Builder:
    """Register a builder under its function's name."""
    _OPS[builder.__name__.removesuffix("_case")] = builder
    return builder


def builders() -> dict[str, Builder]:
    """Every launch that can be timed, by name."""
    for name in MODULES:
        import_module(f".{name}", __package__)
    return dict(_OPS)


def cases(ops: Sequence[str], sizes: Sequence[Size], dtype: torch.dtype) -> Iterator[Case]:
    """Every requested launch (all when empty) at every size."""
    known = builders()
    for op in ops or known:
        for size in sizes:
            yield known[op](size, dtype)


def rand(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal values; never zeros, on which GPUs run faster."""
    return (torch.randn(shape, device=device) * scale).to(dtype)
