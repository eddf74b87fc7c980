"""Checkpoint tensors to the packed weights of the launches: every exact simplification, in float64, rounded once.

Matrices are `[K, N]` row-major, as the launches take them. What is folded (MODEL.md, "Numerics"):

- AdaLN's `1 + scale` into the rows of W1, gate or layer scale into the columns of W2 and its bias;
- GRN's beta into the bias of W2: `b2 + beta @ W2`;
- the decoder's patchify, latent_up, fuse_in and dewhitening into one matrix `[3pp + Z, D]`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference

if TYPE_CHECKING:
    from ..model import FullCapacitor


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
class PackedEncoder:
    """`patch_w [3pp,D]` with rows in the order (channel, row, column); `head_w [D,2Z]` with the means first."""

    patch_w: Tensor
    patch_b: Tensor
    blocks: tuple[PackedBlock, ...]
    head_w: Tensor
    head_b: Tensor
    whiten_mean: Tensor
    whiten_rstd: Tensor


@dataclass(frozen=True)
class PackedDecoder:
    """The decoder at one time t. `in_w [3pp+Z,D]`: rows of the image patch, then of the whitened latents.

    `skip_w [2D,D]`: rows of the start blocks' output, then of the middle blocks', which `drop_feature [D]` replaces in
    the unconditional pass of guidance. `out_w [D,3pp]`: columns in the order (channel, row, column).
    """

    in_w: Tensor
    in_b: Tensor
    blocks: tuple[PackedBlock, ...]
    skip_w: Tensor
    skip_b: Tensor
    drop_feature: Tensor
    out_w: Tensor
    out_b: Tensor


def _wide(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)


def _matrix(conv: torch.nn.Conv2d) -> Tensor:
    """Weight of a convolution without overlap as `[K, N]`, float64."""
    w = _wide(conv.weight)
    return w.reshape(w.shape[0], -1).t()


def fold_block(block: reference.Block, scale: Tensor | None, gate: Tensor) -> PackedBlock:
    """Pack one block in float64; `scale [D]` (None: no modulation) and `gate [D]` are AdaLN's, or the layer scale."""
    w1, w2 = _matrix(block.pwconv1), _matrix(block.pwconv2)
    beta, gamma = (_wide(p).flatten() for p in (block.grn.beta, block.grn.gamma))
    return PackedBlock(
        dw_w=_wide(block.dwconv.weight).flatten(1).t(),
        dw_b=_wide(block.dwconv.bias),
        w1=w1 if scale is None else w1 * (1 + scale)[:, None],
        b1=_wide(block.pwconv1.bias),
        gamma=gamma,
        w2=w2 * gate,
        b2=(_wide(block.pwconv2.bias) + beta @ w2) * gate,
    )


def fold_encoder(model: FullCapacitor) -> PackedEncoder:
    """Pack the encoder in float64."""
    encoder = model.encoder
    mean, std = _statistics(model)
    return PackedEncoder(
        patch_w=_matrix(encoder.patchify.proj),
        patch_b=_wide(encoder.patchify.proj.bias),
        blocks=tuple(fold_block(b, None, _wide(b.layer_scale)) for b in encoder.blocks),
        head_w=_matrix(encoder.to_bottleneck),
        head_b=_wide(encoder.to_bottleneck.bias),
        whiten_mean=mean,
        whiten_rstd=1 / std,
    )


def fold_decoder(model: FullCapacitor, t: float, image_scale: float = 1.0) -> PackedDecoder:
    """Pack the decoder at time `t` in float64.

    Args:
        image_scale: folded into the rows of the image patch: in one step the start state is a multiple of unit
            noise, which then need not be scaled.
    """
    decoder = model.decoder
    dim = model.config.model_dim
    mean, std = _statistics(model)
    fuse, up, patch = (_matrix(c) for c in (decoder.fuse_in, decoder.latent_up, decoder.patchify.proj))
    fuse_patch, fuse_latent = fuse[:dim], fuse[dim:]
    latent = up @ fuse_latent
    in_b = _wide(decoder.fuse_in.bias) + _wide(decoder.patchify.proj.bias) @ fuse_patch
    in_b = in_b + _wide(decoder.latent_up.bias) @ fuse_latent + mean @ latent
    modulations = modulations_at(model, t)
    blocks = [*decoder.start_blocks, *decoder.middle_blocks, *decoder.end_blocks]
    return PackedDecoder(
        in_w=torch.cat([image_scale * (patch @ fuse_patch), std[:, None] * latent]),
        in_b=in_b,
        blocks=tuple(fold_block(b, m[:dim], m[dim:]) for b, m in zip(blocks, modulations, strict=True)),
        skip_w=_matrix(decoder.fuse_skip),
        skip_b=_wide(decoder.fuse_skip.bias),
        drop_feature=_wide(decoder.path_drop_mask_feature).flatten(),
        out_w=_matrix(decoder.out_proj),
        out_b=_wide(decoder.out_proj.bias),
    )


def modulations_at(model: FullCapacitor, t: float) -> list[Tensor]:
    """Packed (scale, gate) `[2D]` of every decoder block at time `t`, float64."""
    decoder = model.decoder
    # the model's tensors may be on a GPU and in float32; these few are cheap to copy
    embed, base = (copy.deepcopy(m).to("cpu", torch.float64) for m in (decoder.time_embed, decoder.adaln_base))
    with torch.no_grad():
        a = torch.nn.functional.silu(embed(torch.tensor([t], dtype=torch.float64, device="cpu")))
        return [(base(a) + copy.deepcopy(d).to("cpu", torch.float64)(a))[0] for d in decoder.adaln_deltas]


def _statistics(model: FullCapacitor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the whitening, float64 `[Z]`; of the identity where it cannot be folded.

    That is where the model has no statistics, and where its latents are 2x2 patches of the bottleneck: their statistics
    belong to positions within a patch, so whitening is a step of its own.
    """
    config = model.config
    if model.latent_norm_running_mean is None or config.latent_patch != 1:
        zeros = torch.zeros(config.bottleneck_dim, dtype=torch.float64, device="cpu")
        return zeros, zeros + 1
    var = _wide(model.latent_norm_running_var) + config.latent_running_stats_eps
    return _wide(model.latent_norm_running_mean), var.sqrt()


MATRICES = ("patch_w", "head_w", "in_w", "skip_w", "out_w", "w1", "w2", "drop_feature")


def pack(folded, dtype: torch.dtype, device: torch.device | str):
    """Round a folded part once and move it: what meets activations to `dtype`, everything else to float32."""

    def convert(name: str, value):
        if isinstance(value, tuple):
            return tuple(pack(v, dtype, device) for v in value)
        return value.to(dtype if name in MATRICES else torch.float32).contiguous().to(device)

    return type(folded)(**{f.name: convert(f.name, getattr(folded, f.name)) for f in fields(folded)})


def named_tensors(packed, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a packed part by the name that plans use, e.g. `blocks.0.w1`."""
    named: dict[str, Tensor] = {}
    for f in fields(packed):
        value = getattr(packed, f.name)
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                named |= named_tensors(item, f"{prefix}{f.name}.{i}.")
        else:
            named[prefix + f.name] = value
    return named


def rows_nhwc(w: Tensor, patch: int) -> Tensor:
    """`patch_w` with its rows in the order (row, column, channel), for images whose channels lie innermost."""
    return w.reshape(3, patch, patch, -1).permute(1, 2, 0, 3).reshape(w.shape).contiguous()
