"""Checkpoint tensors to the packed weights of the launches: every exact simplification, in float64, rounded once.

A model on the meta device folds to meta tensors, which is how plans know the shapes of their weights. What is folded
(docs/numbers.md):

- AdaLN's `1 + scale` into the rows of W1, gate or layer scale into the columns of W2 and its bias;
- GRN's beta into the bias of W2: `b2 + beta @ W2`;
- the decoder's patchify, latent_up, fuse_in and dewhitening into one matrix `[3pp + Z, D]`.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from torch import Tensor

from capacitor_kernels import pack_patchify_weight

from ..blocks import Block
from ..config import ModelConfig
from ..reference import AnyBlock, Autoencoder
from .arena import TensorSpec
from .fold_dico import fold_dico_block, fold_inputs, fold_latent_mask, fold_norm
from .fold_fp8 import fold_fp8, ranges_of_shapes
from .packed import (
    Packed,
    PackedBlock,
    PackedDecoder,
    PackedDicoBlock,
    PackedEncoder,
    bias_of,
    home_of,
    matrix_of,
    named_tensors,
    pack,
    wide,
)
from .shapes_alone import ShapesAlone

ENCODER, DECODER = "encoder", "decoder"


def fold_block(block: Block, scale: Tensor | None, gate: Tensor) -> PackedBlock:
    """Pack an FCDM block in float64; `scale [D]` (None: no modulation) and `gate [D]` are AdaLN's, or layer scale."""
    w1, w2 = matrix_of(block.pwconv1), matrix_of(block.pwconv2)
    beta, gamma = (wide(p).flatten() for p in (block.grn.beta, block.grn.gamma))
    return PackedBlock(
        dw_w=wide(block.dwconv.weight).flatten(1).t(),
        dw_b=bias_of(block.dwconv),
        w1=w1 if scale is None else w1 * (1 + scale)[:, None],
        b1=bias_of(block.pwconv1),
        gamma=gamma,
        w2=w2 * gate,
        b2=(bias_of(block.pwconv2) + beta @ w2) * gate,
    )


def _fold_any(block: AnyBlock, modulation: Tensor | None) -> PackedBlock | PackedDicoBlock:
    """Pack one block; `modulation` is AdaLN's packed vector, None for an encoder's block."""
    if not isinstance(block, Block):
        return fold_dico_block(block, modulation)
    if modulation is None:
        return fold_block(block, None, wide(block.layer_scale))
    scale, gate = modulation.chunk(2)
    return fold_block(block, scale, gate)


def fold_encoder(model: Autoencoder) -> PackedEncoder:
    """Pack the encoder in float64."""
    encoder = model.encoder
    if encoder is None:
        raise ValueError("a decoder-only model has no encoder to fold")
    mean, std = _statistics(model)
    patch, weight = model.config.patch_size, wide(encoder.patchify.proj.weight)
    return PackedEncoder(
        patch_w=pack_patchify_weight(weight, patch=patch),
        patch_w_nhwc=pack_patchify_weight(weight, patch=patch, layout="nhwc"),
        patch_b=bias_of(encoder.patchify.proj),
        blocks=tuple(_fold_any(block, None) for block in encoder.all_blocks()),
        head_w=matrix_of(encoder.to_bottleneck),
        head_b=bias_of(encoder.to_bottleneck),
        whiten_mean=mean,
        whiten_rstd=1 / std,
        **fold_norm("norm_in", encoder.norm_in),
    )


def fold_decoder(model: Autoencoder, t: float, image_scale: float = 1.0) -> PackedDecoder:
    """Pack the decoder at time `t` in float64.

    Args:
        image_scale: folded into the rows of the image patch: in one step the start state is a multiple of unit
            noise, which then need not be scaled.
    """
    decoder = model.decoder
    ends = _collapsed_inputs(model, image_scale) if decoder.norm_in is None else fold_inputs(decoder, image_scale)
    if decoder.drop_feature is not None:
        ends["drop_feature"] = wide(decoder.drop_feature).flatten()
    if decoder.is_flat:
        ends["mask_feature"] = wide(decoder.mask_feature).flatten()
    elif "latent_mask_feature" in decoder._parameters:
        ends["masked_in_w"] = torch.cat([ends["in_w"], fold_latent_mask(decoder)])
    if not decoder.is_flat:
        ends |= {"skip_w": matrix_of(decoder.fuse_skip), "skip_b": bias_of(decoder.fuse_skip)}
    blocks = zip(decoder.all_blocks(), modulations_at(model, t), strict=True)
    return PackedDecoder(
        blocks=tuple(_fold_any(block, modulation) for block, modulation in blocks),
        out_w=matrix_of(decoder.out_proj),
        out_b=bias_of(decoder.out_proj),
        **ends,
    )


def _collapsed_inputs(model: Autoencoder, image_scale: float) -> dict[str, Tensor]:
    """Patchify, latent_up, fuse_in and dewhitening as one matrix and its bias."""
    decoder, dim = model.decoder, model.config.model_dim
    mean, std = _statistics(model)
    fuse, up, patch = (matrix_of(c) for c in (decoder.fuse_in, decoder.latent_up, decoder.patchify.proj))
    fuse_patch, fuse_latent = fuse[:dim], fuse[dim:]
    latent = up @ fuse_latent
    in_b = bias_of(decoder.fuse_in) + bias_of(decoder.patchify.proj) @ fuse_patch
    in_b = in_b + bias_of(decoder.latent_up) @ fuse_latent + mean @ latent
    return {"in_w": torch.cat([image_scale * (patch @ fuse_patch), std[:, None] * latent]), "in_b": in_b}


def modulations_at(model: Autoencoder, t: float) -> list[Tensor]:
    """AdaLN's packed vector, `[2D]` or `[4D]`, of every decoder block at time `t`, float64."""
    decoder = model.decoder
    home = home_of(decoder.out_proj.weight)

    # the model's tensors may be on a GPU and in float32; these few are cheap to copy
    def in_float64(module: torch.nn.Module) -> torch.nn.Module:
        return copy.deepcopy(module).to(home, torch.float64)

    with torch.no_grad():
        time = torch.tensor([t], dtype=torch.float64, device=home)
        a = torch.nn.functional.silu(in_float64(decoder.time_embed)(time))
        base = in_float64(decoder.adaln_base)(a)
        return [(base + in_float64(delta)(a))[0] for delta in decoder.adaln_deltas]


def _statistics(model: Autoencoder) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the whitening, float64 `[Z]`; of the identity where it cannot be folded.

    That is where the model has no statistics, and where its latents are 2x2 patches of the bottleneck: their statistics
    belong to positions within a patch, so whitening is a step of its own.
    """
    home = home_of(model.decoder.out_proj.weight)
    statistics = model.statistics(torch.float64) if model.config.latent_patch == 1 else None
    if statistics is None:
        zeros = torch.zeros(model.config.bottleneck_dim, dtype=torch.float64, device=home)
        return zeros, zeros + 1
    mean, std = statistics
    return mean.to(home), std.to(home)


@lru_cache(maxsize=32)
def packed_specs(
    config: ModelConfig, part: str, dtype: torch.dtype, precision: str | None = None
) -> dict[str, TensorSpec]:
    """What `named_tensors` of the packed "encoder" or "decoder" of a model of `config` holds, without the values.

    `precision` "fp8" is of an encoder whose blocks are in e4m3.
    """
    with ShapesAlone():
        with torch.device("meta"):
            model = Autoencoder(config)
        packed: Packed = fold_encoder(model) if part == ENCODER else fold_decoder(model, 1.0)
        if precision == "fp8" and isinstance(packed, PackedEncoder):
            packed = fold_fp8(packed, ranges_of_shapes(packed))
    return {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in named_tensors(pack(packed, dtype, "meta")).items()}
