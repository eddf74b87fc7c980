"""One launch through Triton's compiler and ptxas for any compute capability, without a GPU."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capacitor_kernels.launch import Launch

_POINTERS = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "uint8": "*u8",
    "float8_e4m3fn": "*fp8e4nv",
    "int32": "*i32",
    "int64": "*i64",
}
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "tma": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.cg|cp\.async\.ca",
}


def signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """(types by name, constexpr values by position, divisibility hints by position) of a launch.

    Follows what Triton's just-in-time path specialises on: pointers and integers divisible by 16, integers equal to 1,
    but for those that the kernel says vary with the batch.
    """
    import torch

    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list] = {}
    aligned = [["tt.divisibility", 16]]
    for at, parameter in enumerate(launch.kernel.params):
        # a default is a switch that is off
        name, value = parameter.name, launch.args.get(parameter.name, parameter.default)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            types[name], constants[at,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = _POINTERS[str(value.dtype).removeprefix("torch.")]
            hints[at,] = aligned
        elif hasattr(value, "block_shape"):
            inner = _POINTERS[str(value.base.dtype).removeprefix("torch.")][1:]
            # Gluon's descriptors say how their tiles lie in shared memory
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            types[name] = f"tensordesc<{inner}{list(value.block_shape)}{layout}>"
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                hints[at,] = aligned
    return types, constants, hints


def fingerprint(launch: Launch, cc: int) -> str:
    """32 hex digits of all that the compiler is given: the kernel and what it calls, types, constants, options, GPU."""
    import triton

    given = (_source(launch).hash(), cc, sorted(launch.options.items()), triton.__version__)
    return hashlib.sha256(repr(given).encode()).hexdigest()[:32]


def compile_launch(launch: Launch, cc: int) -> tuple[Any, int, int]:
    """(compiled kernel, registers per thread, stack bytes per thread) of a launch for a compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = triton.compile(_source(launch), target=GPUTarget("cuda", cc, 32), options=dict(launch.options))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no register usage: {usage!r}")
    return kernel, int(found[1]), int(found[2])


def _source(launch: Launch) -> Any:
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return (GluonASTSource if launch.kernel.is_gluon() else ASTSource)(launch.kernel, *signature(launch))


def ctas_per_sm(cc: int, registers: int, smem: int, warps: int) -> int:
    """CTAs that fit on one SM; registers are given out to a warp in units of 256."""
    from capacitor_kernels.gpu_limits import REGISTERS_PER_SM, SMEM_RESERVED_PER_CTA, limits

    limit = limits(cc)
    by_registers = REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256 * warps)
    by_smem = limit.smem_per_sm // (smem + SMEM_RESERVED_PER_CTA)
    return min(by_registers, by_smem, limit.threads_per_sm // (32 * warps), 32)
