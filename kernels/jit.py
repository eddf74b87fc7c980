"""What kernels share: the order of tiles, masked loads, activations, arithmetic that every dtype survives."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import INTERPRETED

# inline assembly does not run in the interpreter
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Before anything that another launch wrote is read, and before anything is written: the launch before is done.

    With PDL a launch starts while the one before is at its end; every launch of a chain waits, also for what lies
    further back, since the one before has waited too.
    """
    if PDL:
        gdc_wait()


@triton.jit
def release_next(PDL: tl.constexpr):
    """The next launch may start once every program has come here; it waits for this one's writes by itself."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def load_tile(pointers, mask, EVEN: tl.constexpr):
    """Load a tile: EVEN says that it lies inside the tensor, otherwise what `mask` leaves out is zero."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def exp2_approx(x):
    """2**x of a float32 tile by ex2.approx.ftz: within 2 ulp; below 2**-126 it is zero."""
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal_approx(x):
    """1/x of a float32 tile by rcp.approx.ftz: within 1 ulp; below 2**-126 it is zero."""
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def gelu_fit(x):
    """x * sigmoid(odd polynomial): within 2.54e-5 of the exact GELU everywhere, under half an ulp of bfloat16.

    The clamp keeps the polynomial from turning over beyond |x| = 11; -log2(e) is in its coefficients. What
    `tl.sigmoid` compiles to guards against denormals, which cannot matter here: 1 + 2**p is at least one.
    """
    x2 = tl.minimum(x * x, 60.0)
    p = x * (x2 * (0.0010142632 * x2 - 0.10677573) - 2.3011214)
    return x * reciprocal_approx(1.0 + exp2_approx(p))


@triton.jit
def gelu_erf(x):
    """0.5 * x * (1 + erf(x / sqrt(2))), the exact GELU."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def gelu(x, KIND: tl.constexpr):
    """GELU of a float32 tile; KIND is "fit" or "erf", or "none" for the tile as it is."""
    if KIND == "none":
        return x
    else:
        return gelu_erf(x) if KIND == "erf" else gelu_fit(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of a float32 tile, within 4 ulp; zero below -88."""
    return reciprocal_approx(1.0 + exp2_approx(x * -1.4426950408889634))


@triton.jit
def silu(x):
    """x * sigmoid(x) of a float32 tile."""
    return x * sigmoid(x)


@triton.jit
def add_scaled(a, g):
    """a + a*g in the tile's own dtype with one rounding: one HFMA2 for two bfloat16 elements."""
    return tl.fma(a, g, a)


@triton.jit
def scaled(a, g, KIND: tl.constexpr):
    """A tile times what meets it on its way to the tensor cores: KIND "add" is a + a*g, "multiply" a*g."""
    return add_scaled(a, g) if KIND == "add" else a * g


@triton.jit
def to_e4m3(x):
    """A tile of float32 or float16 in e4m3: to the nearest even, cut off at 448, in one conversion of two elements."""
    if _INTERPRETED:
        # the interpreter truncates: round first. Adding c leaves no bit below an eighth of the power of two in x
        x = tl.minimum(tl.maximum(x.to(tl.float32), -448.0), 448.0)
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        c = tl.maximum(power, 0.015625) * 1572864.0
        x = (x + c) - c
    elif x.dtype == tl.float32:
        # by itself Triton goes through float16 on sm_89, cut off toward zero, which moves one value in 256
        bytes4 = tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f",
            [x],
            tl.uint8,
            is_pure=True,
            pack=4,
        )
        return bytes4.to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def add_scaled_e4m3(a, g):
    """a + a*g of float16 tiles in e4m3; the sum is rounded to float16 once."""
    if _INTERPRETED:
        # the interpreter's fma rounds the product too
        wide = a.to(tl.float32)
        return to_e4m3((wide + wide * g.to(tl.float32)).to(tl.float16))
    return to_e4m3(add_scaled(a, g))


@triton.jit
def dot_e4m3(a, b, acc, PRODUCTS: tl.constexpr):
    """acc + a @ b of e4m3 tiles, summed in float32.

    PRODUCTS is "plain", or "scaled": the block-scaled instruction of sm_120 with all scales one, which has the same
    bits at twice the rate. Tensor cores of sm_89 and sm_90 keep some 14 bits of their sums: kernels/NOTES.md.
    """
    if PRODUCTS == "scaled":
        a_scale = tl.full((a.shape[0], a.shape[1] // 32), 127, tl.uint8)
        b_scale = tl.full((b.shape[1], b.shape[0] // 32), 127, tl.uint8)
        return tl.dot_scaled(a, a_scale, "e4m3", b, b_scale, "e4m3", acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def group_sums(x, ROWS: tl.constexpr, IN_WARPS: tl.constexpr):
    """Sums `[M / ROWS, N]` of each ROWS rows of an accumulator `[M, N]`, in an order that hangs on no tile.

    IN_WARPS: 16 rows lie in one warp, as `mma` and `wgmma` leave them, and are added within it whatever the layout of
    warps; then 64 rows are (0 + 2) + (1 + 3) of those sums, the order that Triton adds four warps of a wgmma in.
    """
    if IN_WARPS and ROWS > 16:
        sums = tl.sum(tl.reshape(x, (x.shape[0] // 16, 16, x.shape[1])), axis=1)
        if ROWS == 64:
            # [groups, halves, quarters of the half, N]
            quarters = tl.reshape(sums, (x.shape[0] // 64, 2, 2, x.shape[1]))
            lower, upper = tl.split(tl.permute(quarters, (0, 2, 3, 1)))
            sums = tl.permute(lower + upper, (0, 2, 1))
        else:
            sums = tl.permute(tl.reshape(sums, (x.shape[0] // 32, 2, x.shape[1])), (0, 2, 1))
        even, odd = tl.split(sums)
        return even + odd
    else:
        return tl.sum(tl.reshape(x, (x.shape[0] // ROWS, ROWS, x.shape[1])), axis=1)


@triton.jit
def ordered_sum(partials_ptr, image, tiles, offs_f, HIDDEN: tl.constexpr, UNROLL: tl.constexpr):
    """Sum of an image's partials `[B, tiles, HIDDEN]` in tile order; UNROLL loads are in flight at a time."""
    acc = tl.zeros(offs_f.shape, dtype=tl.float32)
    ptrs = partials_ptr + image.to(tl.int64) * tiles * HIDDEN + offs_f
    tile = tl.full((), 0, tl.int32)
    # not range(): the interpreter of Triton 3.6 cannot take its bounds from an argument under numpy 2.4
    while tile < tiles:
        for ahead in tl.static_range(UNROLL):
            # one comparison of a block: Triton 3.9's interpreter gets `block & scalar` wrong
            last = tl.where(tile + ahead < tiles, HIDDEN, 0)
            acc += tl.load(ptrs, mask=offs_f < last, other=0.0)
            ptrs += HIDDEN
        tile += UNROLL
    return acc


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
