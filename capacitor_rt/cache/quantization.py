"""Latents in 8 bits: an integer per element, a scale and an offset per row and channel.

    value = scale * q + offset,  q in -128 ... 127,  scale = (max - min) / 255,  offset = min + 128 * scale

with the smallest and the largest value of the channel in that row. So the largest error is half a scale, and a row says
by itself what it holds: it can be copied to another file, and no pass over a file comes before its first row. Each
operation is one of IEEE's float32, rounded once, so that the bits are the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .parts import INT8, OFFSET, SCALE

# smaller ones are no normal numbers, and what a device does with those is its own
_LEAST_SPREAD = 255 * 2.0**-100


def quantize(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values `[N,C,h,w]` as int8 of that shape, scale and offset, float32 `[N,C]` each.

    A channel of one value has scale 1 and that value as its offset. Of a channel that is not finite scale or offset is
    not finite either.
    """
    values = values.float()
    low, high = values.amin((2, 3)), values.amax((2, 3))
    spread = high - low
    scale = torch.where(spread < _LEAST_SPREAD, torch.ones_like(spread), spread / 255)
    offset = torch.where(spread < _LEAST_SPREAD, low, low + 128 * scale)
    steps = (values - offset[:, :, None, None]) / scale[:, :, None, None]
    return steps.round().clamp(-128, 127).nan_to_num(0.0).to(torch.int8), scale, offset


def dequantize(q: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Values, float32 `[...,C,h,w]`, of int8 `[...,C,h,w]`, scale and offset `[...,C]`, on the device of `q`."""
    return q.float() * scale[..., None, None] + offset[..., None, None]


def values_of(stored: Mapping[str, Tensor], kinds: Iterable[str]) -> dict[str, Tensor]:
    """The values of each kind: as they are stored, or dequantised.

    Args:
        stored: every part by its name, a row or rows.
    """
    return {
        kind: dequantize(stored[kind], stored[kind + SCALE], stored[kind + OFFSET])
        if stored[kind].dtype == torch.int8
        else stored[kind]
        for kind in kinds
    }


def stored_as(values: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Every part, contiguous, of values `[N,C,h,w]` by their kinds, to be stored as `dtype`."""
    if dtype != INT8:
        return {kind: t.to(getattr(torch, dtype)).contiguous() for kind, t in values.items()}
    stored: dict[str, Tensor] = {}
    for kind, t in values.items():
        q, scale, offset = quantize(t)
        stored |= {kind: q.contiguous(), kind + SCALE: scale.contiguous(), kind + OFFSET: offset.contiguous()}
    return stored


def bad_numbers(stored: Mapping[str, Tensor]) -> str | None:
    """What scales and offsets cannot be, of stored rows `[N,C]` by the names of their parts; None if they can."""
    for name, t in stored.items():
        if name.endswith(SCALE) and not bool(((t > 0) & t.isfinite()).all()):
            return f"{name} holds {_worst(t, (t > 0) & t.isfinite())}: a scale is finite and above 0"
        if name.endswith(OFFSET) and not bool(t.isfinite().all()):
            return f"{name} holds {_worst(t, t.isfinite())}: an offset is finite"
    return None


def _worst(t: Tensor, good: Tensor) -> float:
    return float(t[~good].flatten()[0])
