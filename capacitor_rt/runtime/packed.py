"""Packed weights: what folding makes of a model's tensors, rounded once, by the names that plans use.

Matrices are `[K, N]` row-major, as the ops take them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBlock:
    """One FCDM block. `w1 [D,F]` and `w2 [F,D]` in the compute dtype; the rest float32: `dw_w [49,D]`, vectors."""

    dw_w: Tensor
    dw_b: Tensor
    w1: Tensor
    b1: Tensor
    gamma: Tensor
    w2: Tensor
    b2: Tensor


@dataclass(frozen=True)
class PackedFp8Block:
    """One FCDM block in e4m3: `w1 [F,D]` e4m3 and `w2 [D,F]` float16, K innermost; the rest float32.

    `y_inverse [1]` and `h_inverse [F]` bring activations into e4m3's range; `scale [F]` and `w2_scale [D]` undo the
    scales of the products.
    """

    dw_w: Tensor
    dw_b: Tensor
    y_inverse: Tensor
    w1: Tensor
    scale: Tensor
    b1: Tensor
    h_inverse: Tensor
    gamma: Tensor
    w2: Tensor
    w2_scale: Tensor
    b2: Tensor


@dataclass(frozen=True)
class PackedDicoBlock:
    """One DiCo block: `w1`, `cca_w` and `w2 [D,D]` of the first path, `w3 [D,F]` and `w4 [F,D]` of the MLP.

    `norm_scale [D]` is what w3 has folded in between two norms, where the block has that.
    """

    w1: Tensor
    b1: Tensor
    dw_w: Tensor
    dw_b: Tensor
    cca_w: Tensor
    cca_b: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor
    w4: Tensor
    b4: Tensor
    norm_scale: Tensor | None = None


@dataclass(frozen=True)
class PackedEncoder:
    """`head_w [D,2Z]` with the means first; `patch_w [3pp,D]` with rows in the order (channel, row, column).

    `patch_w_nhwc` has them in the order (row, column, channel), for images whose channels lie innermost. `norm_in` is
    an affine norm of the patches, where the model has one.
    """

    patch_w: Tensor
    patch_w_nhwc: Tensor
    patch_b: Tensor
    blocks: tuple[PackedBlock | PackedFp8Block | PackedDicoBlock, ...]
    head_w: Tensor
    head_b: Tensor
    whiten_mean: Tensor
    whiten_rstd: Tensor
    norm_in_w: Tensor | None = None
    norm_in_b: Tensor | None = None


@dataclass(frozen=True)
class PackedDecoder:
    """The decoder at one time t. `in_w [3pp+Z,D]`: rows of the image patch, then of the whitened latents.

    `skip_w [2D,D]`: rows of the start blocks' output, then of the middle blocks', which `drop_feature [D]` replaces in
    the unconditional pass of guidance; a flat decoder has none of them. `out_w [D,3pp]`: columns in the order (channel,
    row, column).

    With norms at the ends, image and latents have their own `patch_w [3pp,D]` and `up_w [Z,D]`, and `in_w [2D,D]` fuses
    them. For guidance by tokens: `mask_feature [D]` of a flat decoder; else `masked_in_w [3pp+Z+1,D]`, whose last row
    is of a latent that is one where a token is left out.
    """

    in_w: Tensor
    in_b: Tensor
    blocks: tuple[PackedBlock | PackedDicoBlock, ...]
    out_w: Tensor
    out_b: Tensor
    skip_w: Tensor | None = None
    skip_b: Tensor | None = None
    drop_feature: Tensor | None = None
    patch_w: Tensor | None = None
    patch_b: Tensor | None = None
    up_w: Tensor | None = None
    up_b: Tensor | None = None
    norm_in_w: Tensor | None = None
    norm_in_b: Tensor | None = None
    latent_norm_w: Tensor | None = None
    latent_norm_b: Tensor | None = None
    norm_out_w: Tensor | None = None
    norm_out_b: Tensor | None = None
    mask_feature: Tensor | None = None
    masked_in_w: Tensor | None = None


Packed = PackedBlock | PackedFp8Block | PackedDicoBlock | PackedEncoder | PackedDecoder
PackedT = TypeVar("PackedT", bound=Packed)
MATRICES = (
    *("patch_w", "patch_w_nhwc", "head_w", "in_w", "masked_in_w", "skip_w", "out_w", "up_w"),
    *("w1", "w2", "w3", "w4", "cca_w", "drop_feature", "mask_feature"),
)


def pack(folded: PackedT, dtype: torch.dtype, device: torch.device | str) -> PackedT:
    """Round a folded part once and move it: what meets activations to `dtype`, everything else to float32.

    Matrices of blocks in e4m3 have the types that their launches take, whatever the dtype.
    """
    kept = ("w1", "w2") if isinstance(folded, PackedFp8Block) else ()

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(pack(v, dtype, device) for v in value)
        if value is None:
            return None
        kind = value.dtype if name in kept else dtype if name in MATRICES else torch.float32
        return value.to(kind).contiguous().to(device)

    values: dict[str, Any] = {f.name: convert(f.name, getattr(folded, f.name)) for f in fields(folded)}
    return type(folded)(**values)


def named_tensors(packed: Packed, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a packed part by the name that plans use, e.g. `blocks.0.w1`."""
    named: dict[str, Tensor] = {}
    for f in fields(packed):
        value = getattr(packed, f.name)
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                named |= named_tensors(item, f"{prefix}{f.name}.{i}.")
        elif value is not None:
            named[prefix + f.name] = value
    return named


def home_of(t: Tensor) -> str:
    """Where folding happens: on the CPU, or nowhere for a model without values."""
    return "meta" if t.is_meta else "cpu"


def wide(t: Tensor) -> Tensor:
    """A tensor in float64 where folding happens."""
    return t.detach().to(home_of(t), torch.float64)


def bias_of(conv: torch.nn.Conv2d) -> Tensor:
    """Bias of a convolution, float64."""
    if conv.bias is None:
        raise ValueError("a convolution of this model has no bias")
    return wide(conv.bias)


def matrix_of(conv: torch.nn.Conv2d) -> Tensor:
    """Weight of a convolution without overlap as `[K, N]`, float64."""
    w = wide(conv.weight)
    return w.reshape(w.shape[0], -1).t()
