"""Blocks in e4m3: ranges of a calibration, and the weights that they give, folded in float64 and rounded once.

Both products of a block take 8-bit operands. Scales are static, so nothing waits for a maximum:

    y8 = e4m3(y * y_inverse)                         one scale for a block; y is what the depthwise convolution leaves
    w1_8[f] = e4m3(w1[:, f] / c1[f])
    h  = gelu(rstd * scale * (y8 @ w1_8^T) + b1)     scale = c1 / y_inverse
    h8 = e4m3(h * h_inverse)                         one scale per hidden channel, folded into the rows of w2
    w  = float16 of w2 / (h_inverse * w2_scale)      per output channel, so that w * (1 + gain) stays in range
    out = w2_scale * (h8 @ e4m3(w * (1 + gain))^T) + b2 + residual

e4m3 has 3 bits of mantissa, rounds to the nearest even, and is cut off at 448. Reciprocals of scales are rounded to
float32, since launches multiply. The gain and w are float16 whatever the dtype of the rest: their product has its 11
bits, and is converted to e4m3 by one instruction for two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from capacitor_kernels.reference import e4m3

from ..errors import InputError
from .packed import PackedBlock, PackedEncoder, PackedFp8Block

E4M3_LARGEST = 448.0
HEADROOM = 2.0
"""By how much images may exceed those of a calibration. Of a float only the smallest values lose precision by it."""
_LEAST = 1e-12
# keeps w in float16's range where images hardly use a channel
_LEAST_GAIN = 2.0**-6


@dataclass(frozen=True)
class BlockRange:
    """Largest magnitudes in one block over the images of a calibration.

    Attributes:
        y: of the depthwise convolution's output, float32 scalar tensor.
        hidden: of each hidden channel after GELU, `[F]`.
        gain: of `1 + gain` of each hidden channel, `[F]`.
    """

    y: Tensor
    hidden: Tensor
    gain: Tensor

    def with_more(self, other: BlockRange) -> BlockRange:
        """The larger of each."""
        pairs = ((self.y, other.y), (self.hidden, other.hidden), (self.gain, other.gain))
        return BlockRange(*(torch.maximum(a, b) for a, b in pairs))


Ranges = tuple[BlockRange, ...]


def fold_fp8_block(folded: PackedBlock, seen: BlockRange) -> PackedFp8Block:
    """A folded block, float64, in 8 bits for what a calibration has seen."""
    device = folded.w1.device
    y, hidden, gain = (HEADROOM * t.to(device, torch.float64).clamp_min(_LEAST) for t in _tensors(seen))
    w1, w2 = folded.w1.double().t(), folded.w2.double().t()
    y_inverse, h_inverse = ((E4M3_LARGEST / most).float() for most in (y, hidden))
    w1_scale = w1.abs().amax(1).clamp_min(_LEAST) / E4M3_LARGEST
    w2 = w2 / h_inverse.double()
    w2_scale = ((w2.abs() * gain.clamp_min(_LEAST_GAIN)).amax(1).clamp_min(_LEAST) / E4M3_LARGEST).float()
    return PackedFp8Block(
        dw_w=folded.dw_w,
        dw_b=folded.dw_b,
        y_inverse=y_inverse.reshape(1),
        w1=e4m3(w1 / w1_scale[:, None]),
        scale=(w1_scale / y_inverse.double()).float(),
        b1=folded.b1,
        h_inverse=h_inverse,
        gamma=folded.gamma,
        w2=(w2 / w2_scale.double()[:, None]).to(torch.float16),
        w2_scale=w2_scale,
        b2=folded.b2,
    )


def fold_fp8(folded: PackedEncoder, ranges: Ranges) -> PackedEncoder:
    """A folded encoder, float64, with its blocks in 8 bits for the ranges of a calibration.

    Raises:
        InputError: ranges of another encoder.
    """
    blocks = cast("tuple[PackedBlock, ...]", folded.blocks)
    check_ranges(ranges, len(blocks), blocks[0].gamma.shape[0] if blocks else 0)
    return replace(folded, blocks=tuple(fold_fp8_block(b, seen) for b, seen in zip(blocks, ranges, strict=True)))


def ranges_of_shapes(folded: PackedEncoder) -> Ranges:
    """Ranges on the meta device, where only shapes are asked for."""
    blocks = cast("tuple[PackedBlock, ...]", folded.blocks)
    return tuple(BlockRange(torch.empty((), device="meta"), block.gamma, block.gamma) for block in blocks)


def check_ranges(ranges: Ranges, depth: int, hidden: int) -> None:
    """Refuse ranges that are not those of an encoder of `depth` blocks with `hidden` channels each."""
    if len(ranges) != depth:
        raise InputError(f"the calibration has {len(ranges)} blocks and the encoder {depth}: calibrate these weights")
    for i, seen in enumerate(ranges):
        for name, t, shape in zip(("y", "hidden", "gain"), _tensors(seen), ((), (hidden,), (hidden,)), strict=True):
            sound = tuple(t.shape) == shape and t.is_floating_point()
            if not sound or (not t.is_meta and not bool((t.isfinite() & (t >= 0)).all())):
                raise InputError(
                    f"{name} of block {i} of the calibration is no finite {list(shape)}: calibrate these weights again"
                )


def _tensors(seen: BlockRange) -> tuple[Tensor, Tensor, Tensor]:
    return seen.y, seen.hidden, seen.gain
