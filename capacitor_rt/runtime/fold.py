"""Checkpoint tensors to the packed weights of the launches: every exact simplification, in float64, rounded once.

Matrices are `[K, N]` row-major, as the ops take them. A model on the meta device folds to meta tensors, which is how
plans know the shapes of their weights. What is folded (docs/numbers.md):

- AdaLN's `1 + scale` into the rows of W1, gate or layer scale into the columns of W2 and its bias;
- GRN's beta into the bias of W2: `b2 + beta @ W2`;
- the decoder's patchify, latent_up, fuse_in and dewhitening into one matrix `[3pp + Z, D]`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from capacitor_kernels import pack_patchify_weight

from ..blocks import Block
from ..config import ModelConfig
from ..reference import AnyBlock, Autoencoder
from .arena import TensorSpec

ENCODER, DECODER = "encoder", "decoder"


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
    """`head_w [D,2Z]` with the means first; `patch_w [3pp,D]` with rows in the order (channel, row, column).

    `patch_w_nhwc` has them in the order (row, column, channel), for images whose channels lie innermost.
    """

    patch_w: Tensor
    patch_w_nhwc: Tensor
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


Packed = PackedBlock | PackedEncoder | PackedDecoder
PackedT = TypeVar("PackedT", bound=Packed)


def _home(t: Tensor) -> str:
    """Where folding happens: on the CPU, or nowhere for a model without values."""
    return "meta" if t.is_meta else "cpu"


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(_home(t), torch.float64)


def _bias(conv: torch.nn.Conv2d) -> Tensor:
    if conv.bias is None:
        raise ValueError("a convolution of this model has no bias")
    return _wide(conv.bias)


def _matrix(conv: torch.nn.Conv2d) -> Tensor:
    """Weight of a convolution without overlap as `[K, N]`, float64."""
    w = _wide(conv.weight)
    return w.reshape(w.shape[0], -1).t()


def _fcdm(blocks: list[AnyBlock]) -> list[Block]:
    """The blocks as FCDM's; DiCo's have no launches."""
    for block in blocks:
        if not isinstance(block, Block):
            raise ValueError(f"a {type(block).__name__} has no packed form")
    return cast("list[Block]", blocks)


def fold_block(block: Block, scale: Tensor | None, gate: Tensor) -> PackedBlock:
    """Pack one block in float64; `scale [D]` (None: no modulation) and `gate [D]` are AdaLN's, or the layer scale."""
    w1, w2 = _matrix(block.pwconv1), _matrix(block.pwconv2)
    beta, gamma = (_wide(p).flatten() for p in (block.grn.beta, block.grn.gamma))
    return PackedBlock(
        dw_w=_wide(block.dwconv.weight).flatten(1).t(),
        dw_b=_bias(block.dwconv),
        w1=w1 if scale is None else w1 * (1 + scale)[:, None],
        b1=_bias(block.pwconv1),
        gamma=gamma,
        w2=w2 * gate,
        b2=(_bias(block.pwconv2) + beta @ w2) * gate,
    )


def fold_encoder(model: Autoencoder) -> PackedEncoder:
    """Pack the encoder in float64."""
    encoder = model.encoder
    if encoder is None:
        raise ValueError("a decoder-only model has no encoder to fold")
    mean, std = _statistics(model)
    patch, weight = model.config.patch_size, _wide(encoder.patchify.proj.weight)
    return PackedEncoder(
        patch_w=pack_patchify_weight(weight, patch=patch),
        patch_w_nhwc=pack_patchify_weight(weight, patch=patch, layout="nhwc"),
        patch_b=_bias(encoder.patchify.proj),
        blocks=tuple(fold_block(b, None, _wide(b.layer_scale)) for b in _fcdm(encoder.all_blocks())),
        head_w=_matrix(encoder.to_bottleneck),
        head_b=_bias(encoder.to_bottleneck),
        whiten_mean=mean,
        whiten_rstd=1 / std,
    )


def fold_decoder(model: Autoencoder, t: float, image_scale: float = 1.0) -> PackedDecoder:
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
    in_b = _bias(decoder.fuse_in) + _bias(decoder.patchify.proj) @ fuse_patch
    in_b = in_b + _bias(decoder.latent_up) @ fuse_latent + mean @ latent
    modulations = modulations_at(model, t)
    return PackedDecoder(
        in_w=torch.cat([image_scale * (patch @ fuse_patch), std[:, None] * latent]),
        in_b=in_b,
        blocks=tuple(
            fold_block(b, m[:dim], m[dim:]) for b, m in zip(_fcdm(decoder.all_blocks()), modulations, strict=True)
        ),
        skip_w=_matrix(decoder.fuse_skip),
        skip_b=_bias(decoder.fuse_skip),
        drop_feature=_wide(decoder.path_drop_mask_feature).flatten(),
        out_w=_matrix(decoder.out_proj),
        out_b=_bias(decoder.out_proj),
    )


def modulations_at(model: Autoencoder, t: float) -> list[Tensor]:
    """Packed (scale, gate) `[2D]` of every decoder block at time `t`, float64."""
    decoder = model.decoder
    home = _home(decoder.path_drop_mask_feature)

    # the model's tensors may be on a GPU and in float32; these few are cheap to copy
    def wide(module: torch.nn.Module) -> torch.nn.Module:
        return copy.deepcopy(module).to(home, torch.float64)

    with torch.no_grad():
        time = torch.tensor([t], dtype=torch.float64, device=home)
        a = torch.nn.functional.silu(wide(decoder.time_embed)(time))
        base = wide(decoder.adaln_base)(a)
        return [(base + wide(delta)(a))[0] for delta in decoder.adaln_deltas]


def _statistics(model: Autoencoder) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the whitening, float64 `[Z]`; of the identity where it cannot be folded.

    That is where the model has no statistics, and where its latents are 2x2 patches of the bottleneck: their statistics
    belong to positions within a patch, so whitening is a step of its own.
    """
    home = _home(model.decoder.path_drop_mask_feature)
    statistics = model.statistics(torch.float64) if model.config.latent_patch == 1 else None
    if statistics is None:
        zeros = torch.zeros(model.config.bottleneck_dim, dtype=torch.float64, device=home)
        return zeros, zeros + 1
    mean, std = statistics
    return mean.to(home), std.to(home)


MATRICES = ("patch_w", "patch_w_nhwc", "head_w", "in_w", "skip_w", "out_w", "w1", "w2", "drop_feature")


def pack(folded: PackedT, dtype: torch.dtype, device: torch.device | str) -> PackedT:
    """Round a folded part once and move it: what meets activations to `dtype`, everything else to float32."""

    def convert(name: str, value: Tensor | tuple[PackedBlock, ...]) -> Tensor | tuple[PackedBlock, ...]:
        if isinstance(value, tuple):
            return tuple(pack(v, dtype, device) for v in value)
        return value.to(dtype if name in MATRICES else torch.float32).contiguous().to(device)

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
        else:
            named[prefix + f.name] = value
    return named


@lru_cache(maxsize=32)
def packed_specs(config: ModelConfig, part: str, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """What `named_tensors` of the packed "encoder" or "decoder" of a model of `config` holds, without the values."""
    with torch.device("meta"):
        model = Autoencoder(config)
    packed: Packed = fold_encoder(model) if part == ENCODER else fold_decoder(model, 1.0)
    return {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in named_tensors(pack(packed, dtype, "meta")).items()}
