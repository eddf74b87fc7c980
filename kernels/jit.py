"""What kernels share: the order of tiles, masked loads, activations, arithmetic that every dtype survives."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointers, mask, EVEN: tl.constexpr):
    """Load a tile: EVEN says that it lies inside the tensor, otherwise what `mask` leaves out is zero."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def gelu_fit(x):
    """x * sigmoid(odd polynomial): within 2.5e-5 of the exact GELU everywhere, under half an ulp of bfloat16.

    The clamp keeps the polynomial from turning over beyond |x| = 11. `tl.sigmoid` is deliberate: written as
    x / (1 + exp2(p)) the same formula takes up to 12 more registers.
    """
    x2 = tl.minimum(x * x, 60.0)
    return x * tl.sigmoid(x * (1.5950158 + x2 * (0.074011293 - 0.00070303368 * x2)))


@triton.jit
def gelu_erf(x):
    """0.5 * x * (1 + erf(x / sqrt(2))), the exact GELU."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def gelu(x, KIND: tl.constexpr):
    """GELU of a float32 tile; KIND is "fit" or "erf"."""
    return gelu_erf(x) if KIND == "erf" else gelu_fit(x)


@triton.jit
def add_scaled(a, g):
    """a + a*g in the tile's own dtype with one rounding: one HFMA2 for two bfloat16 elements."""
    return tl.fma(a, g, a)


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n) of a program id: GROUP_M row tiles walk all columns together, to reuse both in L2."""
    per_group = GROUP_M * tiles_n
    first = pid // per_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    inside = pid % per_group
    return first + inside % rows, inside // rows


@triton.jit
def image_tile(pid_m, tokens_per_image, tiles_per_image, BLOCK_M: tl.constexpr):
    """Map a row tile to (image, first token of the tile as int64, tokens left in the image from there).

    Tiles never mix images: an image owns cdiv(tokens_per_image, BLOCK_M) of them and the last one is masked.
    """
    image = pid_m // tiles_per_image
    local = pid_m % tiles_per_image * BLOCK_M
    first = image.to(tl.int64) * tokens_per_image + local
    return image, first, tokens_per_image - local
