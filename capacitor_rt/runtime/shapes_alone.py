"""Arithmetic on meta tensors without torch's compiler, whose import the first such operation waits for: a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_UNARY = {
    getattr(aten, name).default
    for name in ("abs", "clamp", "clamp_min", "cos", "exp", "reciprocal", "rsqrt", "silu", "sin", "sqrt")
}
_BINARY = {aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.sub.Tensor}
_Shape = tuple[int, ...]


def _result(func: object, args: tuple[Any, ...]) -> tuple[_Shape, torch.dtype] | None:
    """Shape and dtype of what an operation gives; None for one that is left to torch."""
    if func in _UNARY:
        return args[0].shape, args[0].dtype
    if func in _BINARY:
        shapes = [term.shape for term in args[:2] if isinstance(term, Tensor)]
        return np.broadcast_shapes(*shapes), torch.result_type(*args[:2])
    if func is aten.mm.default:
        return (args[0].shape[0], args[1].shape[1]), args[0].dtype
    if func is aten.addmm.default:
        return (args[1].shape[0], args[2].shape[1]), args[0].dtype
    if func is aten.cat.default and len({t.dtype for t in args[0]}) == 1:
        return _joined(*args)
    if func is aten.amax.default:
        return _reduced(*args)
    return None


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> tuple[_Shape, torch.dtype]:
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return tuple(shape), tensors[0].dtype


def _reduced(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> tuple[_Shape, torch.dtype]:
    gone = {dim % x.ndim for dim in dims}
    sizes = ((1 if keepdim else 0) if dim in gone else size for dim, size in enumerate(x.shape))
    return tuple(size for dim, size in enumerate(sizes) if keepdim or dim not in gone), x.dtype


class ShapesAlone(TorchDispatchMode):
    """A context in which arithmetic on floating-point meta tensors gives shape and dtype, contiguous, unchecked.

    For what is known to be right, as folding is: it is done to weights, too. What is not in the tables is torch's.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch imports its compiler to skip it, too
        return False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = args[0] if args and isinstance(args[0], (list, tuple)) else args
        tensors = [term for term in given if isinstance(term, Tensor)]
        if tensors and all(t.is_meta and t.is_floating_point() for t in tensors):
            result = _result(func, args)
            if result is not None:
                return torch.empty(result[0], dtype=result[1], device="meta")
        return func(*args, **(kwargs or {}))
