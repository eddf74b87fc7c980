"""Exact simplifications of the siblings with channel attention, in float64 (docs/numbers.md).

- AdaLN's scales into the rows of the first 1x1 and of the MLP's, gates into the columns of the last one of each path;
- where two norms stand on both sides of the MLP's scale, that scale is kept beside it: the second norm's sums need it;
- without norms at its ends, a decoder's inputs collapse into one matrix as FCDM's do.
"""

from __future__ import annotations

from torch import Tensor

from ..blocks import AffineRMSNorm, DicoBlock
from ..reference import Decoder
from .packed import PackedDicoBlock, bias_of, matrix_of, wide


def fold_dico_block(block: DicoBlock, modulation: Tensor | None) -> PackedDicoBlock:
    """Pack one block in float64; `modulation [4D]` is the decoder's, None for the encoder's own gates."""
    scale1: Tensor | None = None
    scale2: Tensor | None = None
    if modulation is None:
        gate1, gate2 = block.own_gates(wide(block.gate_conv), wide(block.gate_mlp))
    else:
        scale1, gate1, scale2, gate2 = block.split(modulation)
    double = block.reading.mlp_norm == "double"
    return PackedDicoBlock(
        w1=_rows_scaled(matrix_of(block.conv1), scale1),
        b1=bias_of(block.conv1),
        dw_w=wide(block.conv2.weight).flatten(1).t(),
        dw_b=bias_of(block.conv2),
        cca_w=matrix_of(block.cca.proj),
        cca_b=bias_of(block.cca.proj),
        w2=matrix_of(block.conv3) * gate1,
        b2=bias_of(block.conv3) * gate1,
        w3=_rows_scaled(matrix_of(block.mlp.conv_in), scale2),
        b3=bias_of(block.mlp.conv_in),
        w4=matrix_of(block.mlp.conv_out) * gate2,
        b4=bias_of(block.mlp.conv_out) * gate2,
        norm_scale=1 + scale2 if double and scale2 is not None else None,
    )


def _rows_scaled(w: Tensor, scale: Tensor | None) -> Tensor:
    return w if scale is None else w * (1 + scale)[:, None]


def fold_norm(name: str, norm: AffineRMSNorm | None) -> dict[str, Tensor]:
    """Weight and bias of an affine norm, float64, by the names that plans use; nothing where there is none."""
    return {} if norm is None else {f"{name}_w": wide(norm.weight), f"{name}_b": wide(norm.bias)}


def fold_inputs(decoder: Decoder, image_scale: float) -> dict[str, Tensor]:
    """A decoder's inputs behind norms of their own: two matrices, the norms, and the one that fuses them."""
    return {
        "patch_w": image_scale * matrix_of(decoder.patchify.proj),
        "patch_b": bias_of(decoder.patchify.proj),
        "up_w": matrix_of(decoder.latent_up),
        "up_b": bias_of(decoder.latent_up),
        "in_w": matrix_of(decoder.fuse_in),
        "in_b": bias_of(decoder.fuse_in),
        **fold_norm("norm_in", decoder.norm_in),
        **fold_norm("latent_norm", decoder.latent_norm),
        **fold_norm("norm_out", decoder.norm_out),
    }


def fold_latent_mask(decoder: Decoder) -> Tensor:
    """`[1,D]`: what a token that is left out adds to those whose latents are zero."""
    feature = wide(decoder.latent_mask_feature).flatten() - bias_of(decoder.latent_up)
    return (feature @ matrix_of(decoder.fuse_in)[len(feature) :])[None]
