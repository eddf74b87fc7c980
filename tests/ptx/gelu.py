"""GELU as compiled, at every finite bfloat16 number, against the exact one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from capacitor_kernels import jit
from capacitor_kernels.launch import Launch, compiler_options

from .execution import Device

_BLOCK = 1024
# what `jit.gelu_fit` states, and what float32 leaves of erf below |x| = 14
_BOUNDS = {"fit": 2.54e-5, "erf": 1e-6}
# of the magnitude of x where that is what is stored, beyond which both are x or 0
_LARGE, _RELATIVE = 14.0, 2e-7


@triton.jit
def _gelu_kernel(x_ptr, wide_ptr, stored_ptr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = jit.gelu(tl.load(x_ptr + at).to(tl.float32), KIND)
    tl.store(wide_ptr + at, y)
    tl.store(stored_ptr + at, y.to(tl.bfloat16))


def finite_bfloat16() -> torch.Tensor:
    """Every finite bfloat16 number, `[65280]`; both zeros are there."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    return x[x.isfinite()]


def check_gelu(cc: int, kind: str) -> tuple[bool, str]:
    """(whether it is right everywhere, its largest errors) for GELU `kind` on a GPU of compute capability `cc`."""
    x = finite_bfloat16()
    x = torch.cat([x, x.new_zeros(-len(x) % _BLOCK)])
    wide = torch.full(x.shape, float("nan"))
    stored = torch.full(x.shape, float("nan"), dtype=torch.bfloat16)
    args = {"x_ptr": x, "wide_ptr": wide, "stored_ptr": stored, "KIND": kind, "BLOCK": _BLOCK}
    device = Device(cc)
    device.unwritten(wide, stored)
    device.run([Launch(_gelu_kernel, (len(x) // _BLOCK,), args, compiler_options(4, 1, None))])
    exact = torch.nn.functional.gelu(x.double())
    error = (wide.double() - exact).abs()
    near = x.abs() <= _LARGE
    worst = float(error[near].max())
    far = float((error[~near] / x[~near].double().abs()).max())
    # half a step of bfloat16 is what rounding the exact value costs; steps of tiny results are below the fit's error
    steps = (stored.double() - exact).abs() / _step(exact)
    visible = exact.abs() >= _BOUNDS[kind] * 2**8
    most = float(steps[visible].max())
    ok = bool(wide.isfinite().all()) and worst <= _BOUNDS[kind] and far <= _RELATIVE and most <= 1.0
    at = float(x[near][error[near].argmax()])
    text = (
        f"GELU {kind} at {len(finite_bfloat16())} bfloat16 numbers: error at most {worst:.3g} (at {at:g}), "
        f"{far:.1e} of |x| beyond {_LARGE:g}, {most:.3f} steps of bfloat16 once stored"
    )
    return ok, text


def _step(x: torch.Tensor) -> torch.Tensor:
    """Distance of neighbouring bfloat16 numbers at x, float64."""
    return torch.exp2(x.abs().clamp_min(2.0**-126).log2().floor() - 7)
