"""The encoder in e4m3, emulated in plain torch: the arithmetic of the launches, where there is no GPU for them.

What is computed, and by which scales, is in `fold_fp8`. RMSNorm's rstd and GRN's sums come from values in float32,
before they are rounded; sums, epilogues and the residual stream are as in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from capacitor_kernels import reference

from ..errors import InputError
from ..reference import Autoencoder, Posterior
from .fold import fold_encoder
from .fold_fp8 import BlockRange, Ranges, fold_fp8
from .packed import PackedBlock, PackedEncoder, PackedFp8Block, pack


class Fp8Encoder:
    """The encoder of a model in 8 bits, emulated.

    Args:
        model: whose tensors are folded; it stays as it is.
        ranges: of a calibration of these weights; None computes the products in float32, to make one.
        dtype: of what else is 16 bits in launches: pixels' tokens, the residual stream, the head.
        device: of the images; that of the model when None.

    Raises:
        InputError: a model without an encoder of this kind, or ranges of another shape.
    """

    def __init__(
        self,
        model: Autoencoder,
        ranges: Ranges | None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
    ):
        if model.encoder is None or model.config.dico is not None:
            raise InputError("encoding in fp8 is for full_capacitor's encoder, which this model does not have")
        self.model, self.dtype, self.device = model, dtype, device or model.device
        folded = fold_encoder(model)
        if ranges is not None:
            folded = fold_fp8(folded, ranges)
        # float32 of what is rounded to dtype
        self.packed: PackedEncoder = pack(pack(folded, dtype, self.device), torch.float32, self.device)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Whitened latents, float32 `[B,C,H/s,W/s]`, of an image as `Autoencoder.encode` takes it."""
        return self.model.latents_of(self.posterior(image))

    @torch.no_grad()
    def posterior(self, image: Tensor, observe: Callable[[int, BlockRange], None] | None = None) -> Posterior:
        """Raw posterior; `observe` is told the ranges of every block."""
        config, packed = self.model.config, self.packed
        # an enclosing autocast would override the dtypes chosen here
        with torch.autocast(image.device.type, enabled=False):
            pixels = self._rounded(Autoencoder.normalise(self.model, image).float())
            grid = (pixels.shape[2] // config.patch_size, pixels.shape[3] // config.patch_size)
            x = self._rounded(
                reference.patchify(pixels, packed.patch_w, packed.patch_b, patch=config.patch_size, layout="nchw")
            )
            for i in range(len(packed.blocks)):
                x = self._block(i, x, pixels.shape[0], grid, observe)
            gaussian = config.bottleneck_posterior_kind == "diagonal_gaussian"
            _, mean, logsnr = reference.head(
                x,
                packed.head_w,
                packed.head_b,
                grid=grid,
                channels=config.bottleneck_dim,
                norm=config.bottleneck_norm_mode == "channel_wise",
            )
        return Posterior(mean, logsnr if gaussian else None)

    def _block(
        self,
        i: int,
        x: Tensor,
        batch: int,
        grid: tuple[int, int],
        observe: Callable[[int, BlockRange], None] | None,
    ) -> Tensor:
        block, per_image = self.packed.blocks[i], math.prod(grid)
        rows = {"tokens_per_image": per_image}
        y, sumsq = reference.dwconv(x, block.dw_w, block.dw_b, batch=batch, height=grid[0], width=grid[1])
        if isinstance(block, PackedFp8Block):
            y8 = reference.e4m3(y * block.y_inverse)
            h, sums = reference.expand_fp8(y8, block.w1, block.scale, block.b1, sumsq, block.h_inverse, **rows)
            gain = reference.grn(sums, block.gamma).to(torch.float16)
            h8 = reference.e4m3(h)
            out = reference.project_fp8(h8, gain, block.w2, block.w2_scale, block.b2, x, **rows)
        else:
            block = cast("PackedBlock", block)
            h, sums = reference.expand(y, block.w1, block.b1, sumsq, **rows, gelu="fit")
            gain = reference.grn(sums, block.gamma)
            if observe is not None:
                observe(i, BlockRange(y.abs().amax(), h.abs().amax(0), (1 + gain).abs().amax(0)))
            out = reference.project(h, gain, block.w2, block.b2, x, **rows)
        return self._rounded(out)

    def _rounded(self, x: Tensor) -> Tensor:
        """As it is stored between launches."""
        return x.to(self.dtype).float()
