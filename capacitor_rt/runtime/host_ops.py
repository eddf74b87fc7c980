"""The ops that steps of a plan name: those of `capacitor_kernels`, and a few in plain torch. Each knows its work."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capacitor_kernels.launch import Work

from .arena import TensorSpec


def broadcast(*, row: Tensor, out: Tensor) -> None:
    """Fill the rows of `out [T,D]` with `row [D]`."""
    out.copy_(row.expand_as(out))


def _broadcast_work(*, row: TensorSpec, out: TensorSpec) -> Work:
    return Work(0, row.nbytes + out.nbytes)


def combine(*, out: Tensor, coefficients: tuple[float, ...], **images: Tensor) -> None:
    """`out = sum_i coefficients[i] * x{i}`, elementwise, float32; allocates nothing."""
    torch.mul(images["x0"], coefficients[0], out=out)
    for i in range(1, len(coefficients)):
        out.add_(images[f"x{i}"], alpha=coefficients[i])


def _combine_work(*, out: TensorSpec, coefficients: tuple[float, ...], **images: TensorSpec) -> Work:
    # every pass but the first reads what the one before wrote
    passes = len(images)
    return Work((2 * passes - 1) * out.numel, (3 * passes - 1) * out.nbytes)


def drop_tokens(*, x: Tensor, row: Tensor, dropped: Tensor, out: Tensor) -> None:
    """`out [T,D]` is `x [T,D]`, or `row [D]` where `dropped [B,1,h,w]` is not zero; allocates a mask of T."""
    torch.where(dropped.view(-1, 1) != 0, row, x, out=out)


def _drop_tokens_work(*, x: TensorSpec, row: TensorSpec, dropped: TensorSpec, out: TensorSpec) -> Work:
    return Work(0, x.nbytes + row.nbytes + dropped.nbytes + out.nbytes)


def drop_latents(*, latents: Tensor, dropped: Tensor, out: Tensor) -> None:
    """`out [B,Z+1,h,w]`: latents `[B,Z,h,w]`, zero where `dropped [B,1,h,w]` is one, then `dropped` itself."""
    channels = latents.shape[1]
    kept, mask = out[:, :channels], out[:, channels:]
    mask.copy_(dropped)
    kept.copy_(latents)
    # zero times what is not finite would not be zero
    kept.masked_fill_(mask != 0, 0.0)


def _drop_latents_work(*, latents: TensorSpec, dropped: TensorSpec, out: TensorSpec) -> Work:
    return Work(0, latents.nbytes + dropped.nbytes + 2 * out.nbytes)


_PLAIN: dict[str, tuple[Callable[..., None], Callable[..., Work]]] = {
    "broadcast": (broadcast, _broadcast_work),
    "combine": (combine, _combine_work),
    "drop_latents": (drop_latents, _drop_latents_work),
    "drop_tokens": (drop_tokens, _drop_tokens_work),
}


def host_function(op: str) -> Callable[..., None]:
    """The function that runs an op."""
    return _PLAIN[op][0] if op in _PLAIN else getattr(_module(op), op)


def work_of(op: str) -> Callable[..., Work]:
    """The function that takes an op's arguments, tensors or their specs, and returns its FLOPs and bytes."""
    return _PLAIN[op][1] if op in _PLAIN else _module(op).work


def _module(op: str) -> Any:
    return importlib.import_module(f"capacitor_kernels.ops.{op}")
