"""The encoder in e4m3, emulated in plain torch: exactly the arithmetic that launches in fp8 are to have.

Both products of a block take 8-bit operands; sums, epilogues and the residual stream are as in 16 bits. Scales are
static, so nothing waits for a maximum; a calibration on images gives them:

    y8 = e4m3(y * (1 / y_scale))        one scale for a block; y is what the depthwise convolution leaves
    w1_8[:, f] = e4m3(w1[:, f] / c1[f])
    h  = gelu(rstd * y_scale * c1 * (y8 @ w1_8) + b1)
    h8 = e4m3(h * (1 / h_scale))        one scale per hidden channel, folded into the rows of w2
    w  = 16 bits of (h_scale * w2) / c2         per output channel, so that w * (1 + gain) stays in range
    out = c2 * (h8 @ e4m3(w * (1 + gain))) + b2 + residual

RMSNorm's rstd and GRN's sums come from values in float32, before they are rounded. e4m3 has 3 bits of mantissa, rounds
to the nearest even, and is cut off at 448. Reciprocals of scales are rounded to float32, since a launch multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from capacitor_kernels import reference

from ..errors import InputError
from ..reference import Autoencoder, Posterior
from .fold import fold_encoder
from .packed import PackedBlock, PackedEncoder, pack

E4M3_LARGEST = 448.0
HEADROOM = 2.0
"""By how much images may exceed those of a calibration. Of a float only the smallest values lose precision by it."""
_LEAST = 1e-12


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


@dataclass(frozen=True)
class Fp8Block:
    """Weights of one block: `w1` e4m3 `[D,F]`, `w2` `[F,D]` in 16 bits, their scales `[F]` and `[D]`, and the rest."""

    packed: PackedBlock
    y_scale: float
    w1: Tensor
    w1_scale: Tensor
    hidden_scale: Tensor
    w2: Tensor
    w2_scale: Tensor


def e4m3(x: Tensor) -> Tensor:
    """`x` rounded to e4m3, the nearest even, and cut off at its largest magnitude, as the hardware converts."""
    return x.float().clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)


def fp8_block(packed: PackedBlock, seen: BlockRange, dtype: torch.dtype) -> Fp8Block:
    """Weights of a block folded in float64, in 8 bits for what a calibration has seen."""
    device = packed.w1.device
    y, hidden, gain = (HEADROOM * t.to(device, torch.float64).clamp_min(_LEAST) for t in _tensors(seen))
    w1_scale = (packed.w1.abs().amax(0).clamp_min(_LEAST) / E4M3_LARGEST).float()
    hidden_scale = (hidden / E4M3_LARGEST).float()
    w2 = packed.w2.double() * hidden_scale.double()[:, None]
    w2_scale = ((w2.abs() * gain[:, None]).amax(0).clamp_min(_LEAST) / E4M3_LARGEST).float()
    return Fp8Block(
        packed,
        float(y) / E4M3_LARGEST,
        e4m3(packed.w1 / w1_scale),
        w1_scale,
        hidden_scale,
        (w2 / w2_scale).to(dtype),
        w2_scale,
    )


def expand(y: Tensor, sumsq: Tensor, block: Fp8Block, *, tokens_per_image: int) -> tuple[Tensor, Tensor]:
    """(h8 e4m3 `[T,F]`, sums of h^2 over each image, float32 `[B,F]`) of y float32 `[T,D]`."""
    rstd = torch.rsqrt(sumsq / y.shape[1] + 1e-6)
    product = e4m3(y * (1.0 / block.y_scale)).float() @ block.w1.float()
    h = reference.gelu_fit(product * (rstd * block.y_scale) * block.w1_scale + block.packed.b1)
    sums = h.square().view(-1, tokens_per_image, h.shape[1]).sum(1)
    return e4m3(h * (1.0 / block.hidden_scale)), sums


def project(h8: Tensor, gain: Tensor, residual: Tensor, block: Fp8Block, *, tokens_per_image: int) -> Tensor:
    """float32 `[T,D]`: the product of h8 and each image's weights, plus bias and residual."""
    images = []
    for rows, row in zip(h8.float().split(tokens_per_image), gain, strict=True):
        weights = e4m3(block.w2.float() * (1.0 + row)[:, None]).float()
        images.append(rows @ weights)
    return torch.cat(images) * block.w2_scale + block.packed.b2 + residual


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
        self.packed: PackedEncoder = pack(folded, torch.float32, self.device)
        if dtype != torch.float32:
            self.packed = pack(pack(folded, dtype, self.device), torch.float32, self.device)
        self.blocks: tuple[Fp8Block, ...] | None = None
        if ranges is not None:
            check_ranges(ranges, len(folded.blocks), model.config.hidden_dim)
            exact = (pack(block, torch.float32, self.device) for block in cast("list[PackedBlock]", folded.blocks))
            self.blocks = tuple(fp8_block(b, seen, dtype) for b, seen in zip(exact, ranges, strict=True))

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
        packed, per_image = cast("PackedBlock", self.packed.blocks[i]), math.prod(grid)
        y, sumsq = reference.dwconv(x, packed.dw_w, packed.dw_b, batch=batch, height=grid[0], width=grid[1])
        if self.blocks is None:
            options = {"tokens_per_image": per_image, "gelu": "fit"}
            h, sums = reference.expand(y, packed.w1, packed.b1, sumsq, **options)
            gain = reference.grn(sums, packed.gamma)
            if observe is not None:
                observe(i, BlockRange(y.abs().amax(), h.abs().amax(0), (1 + gain).abs().amax(0)))
            out = reference.project(h, gain, packed.w2, packed.b2, x, tokens_per_image=per_image)
        else:
            block = self.blocks[i]
            h8, sums = expand(y, sumsq, block, tokens_per_image=per_image)
            gain = self._rounded(reference.grn(sums, packed.gamma))
            out = project(h8, gain, x, block, tokens_per_image=per_image)
        return self._rounded(out)

    def _rounded(self, x: Tensor) -> Tensor:
        """As it is stored between launches."""
        return x.to(self.dtype).float()


def check_ranges(ranges: Ranges, depth: int, hidden: int) -> None:
    """Refuse ranges that are not those of an encoder of `depth` blocks with `hidden` channels each."""
    if len(ranges) != depth:
        raise InputError(f"the calibration has {len(ranges)} blocks and the encoder {depth}: calibrate these weights")
    for i, seen in enumerate(ranges):
        for name, t, shape in zip(("y", "hidden", "gain"), _tensors(seen), ((), (hidden,), (hidden,)), strict=True):
            if tuple(t.shape) != shape or not t.is_floating_point() or not bool((t.isfinite() & (t >= 0)).all()):
                raise InputError(
                    f"{name} of block {i} of the calibration is no finite {list(shape)}: calibrate these weights again"
                )


def _tensors(seen: BlockRange) -> tuple[Tensor, Tensor, Tensor]:
    return seen.y, seen.hidden, seen.gain
