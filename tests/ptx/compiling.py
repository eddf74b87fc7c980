"""A launch to PTX for any compute capability, specialised as Triton's just-in-time path does, without a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from .parse import PtxError

if TYPE_CHECKING:
    from capacitor_kernels.launch import Launch

_ALIGNMENT = 16
_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code as text.

    Attributes:
        shared: dynamic shared memory of a CTA, in bytes.
        types: Triton type of every argument by name; "constexpr" for those that the code does not take.
        descriptors: what the compiler made of each tensor descriptor, in the order of the arguments.
    """

    ptx: str
    shared: int
    num_warps: int
    types: dict[str, str]
    descriptors: list[Any]


def is_descriptor(value: Any) -> bool:
    """Whether an argument is a tensor descriptor, Triton's or Gluon's."""
    return hasattr(value, "block_shape")


def signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[Any]]]:
    """(types by name, constants by position, divisibility hints by position) of a launch.

    Pointers and integers that are multiples of 16 are told to the compiler, integers that equal 1 and None are compiled
    in, and so are constexprs.
    """
    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list[Any]] = {}
    for at, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args.get(parameter.name, parameter.default)
        aligned, special = False, not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            types[name], constants[at,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + _DTYPES[value.dtype]
            aligned = value.data_ptr() % _ALIGNMENT == 0
        elif is_descriptor(value):
            # Gluon's say how their tiles lie in shared memory
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            types[name] = f"tensordesc<{_DTYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
        elif isinstance(value, float):
            types[name] = "fp32"
        elif isinstance(value, int) and not isinstance(value, bool):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = special and value % _ALIGNMENT == 0
        else:
            raise PtxError(f"{launch.kernel.__name__}: argument {name} is {value!r}")
        if aligned:
            hints[at,] = [["tt.divisibility", _ALIGNMENT]]
    return types, constants, hints


def compile_launch(launch: Launch, cc: int) -> Compiled:
    """Compile a launch for a compute capability; Triton keeps the result in TRITON_CACHE_DIR.

    Raises:
        RuntimeError: the kernels were imported under Triton's interpreter.
    """
    if knobs.runtime.interpret or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled then, unset it")
    types, constants, hints = signature(launch)
    source = (GluonASTSource if launch.kernel.is_gluon() else ASTSource)(launch.kernel, types, constants, hints)
    kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=dict(launch.options))
    metadata = kernel.metadata
    if getattr(metadata, "num_ctas", 1) != 1:
        raise PtxError("clusters are not supported")
    if getattr(metadata, "global_scratch_size", 0):
        raise PtxError("global scratch memory is not supported")
    return Compiled(
        ptx=kernel.asm["ptx"],
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        types=types,
        descriptors=list(getattr(metadata, "tensordesc_meta", None) or ()),
    )
