"""The untrained sample model: an exact linear PCA, with blocks that add nothing yet."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..blocks import Block
from ..config import ModelConfig
from ..errors import InputError
from ..reference import Autoencoder
from .pca import PatchPCA

START_LOGSNR = 11.0


@torch.no_grad()
def from_pca(config: ModelConfig, pca: PatchPCA, whitening: float = 0.5) -> Autoencoder:
    """A model whose one-step reconstruction is that of `pca` with `bottleneck_dim` components (posterior noise apart).

    The residual stream carries the first `model_dim` components, more than the bottleneck does: `out_proj` is linear,
    so a decoder of width Z could never leave the span of Z components, and PCA is the best such span.

    Args:
        whitening: component i is divided by `std_i ** whitening` in the stream: RMSNorm shall see more than the
            mean colour.

    Raises:
        InputError: a `config` without an encoder.
    """
    model = Autoencoder(config)
    d, z = config.model_dim, config.bottleneck_dim
    std = np.sqrt(pca.variances[:d])
    scale = std**-whitening
    stream_std = std[:z] * scale[:z]
    basis = torch.from_numpy(pca.components[:d])
    rows = torch.from_numpy(scale)[:, None] * basis
    mean = torch.from_numpy(pca.mean)

    encoder, decoder = model.encoder, model.decoder
    if encoder is None:
        raise InputError("a PCA needs an encoder to start from: encoder_depth is 0")
    patch_shape = encoder.patchify.proj.weight.shape
    encoder.patchify.proj.weight.copy_(rows.reshape(patch_shape))
    _bias(encoder.patchify.proj).copy_(-(rows @ mean))
    # the latent of unit variance is mean * alpha, and alpha is nearly 1
    _diagonal(encoder.to_bottleneck, 1.0 / stream_std)
    _bias(encoder.to_bottleneck)[z:] = START_LOGSNR
    _diagonal(decoder.latent_up, stream_std)
    nn.init.normal_(decoder.patchify.proj.weight, std=1e-4)
    nn.init.zeros_(_bias(decoder.patchify.proj))
    identity = torch.eye(d)[:, :, None, None]
    decoder.fuse_in.weight.copy_(torch.cat([torch.zeros_like(identity), identity], 1))
    decoder.fuse_skip.weight.copy_(torch.cat([0.5 * identity, 0.5 * identity], 1))
    for layer in (decoder.fuse_in, decoder.fuse_skip):
        nn.init.zeros_(_bias(layer))
    # pixel_shuffle orders (c, y, x), as the patches are
    decoder.out_proj.weight.copy_((basis / torch.from_numpy(scale)[:, None]).T[:, :, None, None])
    _bias(decoder.out_proj).copy_(mean)
    _neutral_blocks(model)
    return model


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None, "every layer that is set here has a bias"
    return layer.bias


def _diagonal(layer: nn.Conv2d, values: np.ndarray) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(_bias(layer))
    n = len(values)
    layer.weight[range(n), range(n), 0, 0] = torch.from_numpy(values).to(layer.weight)


def _neutral_blocks(model: Autoencoder) -> None:
    for block in blocks(model):
        nn.init.normal_(block.dwconv.weight, std=0.05)
        centre = block.dwconv.kernel_size[0] // 2
        block.dwconv.weight[:, :, centre, centre] += 1.0
        nn.init.zeros_(_bias(block.dwconv))
        nn.init.zeros_(block.pwconv2.weight)
        nn.init.zeros_(_bias(block.pwconv2))
    for block in blocks(model):
        if "layer_scale" in block._parameters:
            nn.init.ones_(block.layer_scale)
    decoder, d = model.decoder, model.config.model_dim
    nn.init.normal_(decoder.adaln_base.proj.weight, std=1e-3)
    _bias(decoder.adaln_base.proj).copy_(torch.cat([torch.zeros(d), torch.ones(d)]))
    for delta in decoder.adaln_deltas:
        nn.init.zeros_(delta.get_parameter("up.weight"))


def blocks(model: Autoencoder) -> list[Block]:
    """Every FCDM block of `model`: the encoder's, then the decoder's."""
    every = [*(model.encoder.all_blocks() if model.encoder else []), *model.decoder.all_blocks()]
    return [block for block in every if isinstance(block, Block)]
