"""Triton's driver for `fake_cuda`: compiles nothing, loads modules by name, and takes launches whose arguments fit.

Triton's own code binds and specialises arguments, keeps kernels, and loads them at their first launch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from fake_gpu import gpu
from fake_tensor import CudaTensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

POINTERS = {
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp32": torch.float32,
    "*fp64": torch.float64,
    "*u8": torch.uint8,
    "*fp8e4nv": torch.float8_e4m3fn,
    "*i8": torch.int8,
    "*i32": torch.int32,
    "*i64": torch.int64,
}
INTEGERS = {"i32": 1 << 31, "i64": 1 << 63}
MAX_GRID = (2**31 - 1, 65535, 65535)
_functions = itertools.count(1)
_compiled: set[JITFunction[Any]] = set()


class BadLaunch(TypeError):
    """An argument that the compiled kernel does not take."""


class Launcher:
    """Checks the arguments of each launch against what was compiled, and queues it."""

    def __init__(self, source: Any, metadata: Any):
        self.name, self.names = source.name, [*source.signature]
        self.types = [*source.signature.values()]
        self.constants = {path[0]: value for path, value in source.constants.items()}
        self.attributes = {path[0]: dict(attributes) for path, attributes in source.attrs.items()}
        # a launch that starts early has a kernel that waits, and no other kernel does
        early = bool(getattr(metadata, "launch_pdl", False))
        waits = self.constants.get(self.names.index("PDL"), False) if "PDL" in self.names else False
        if early != waits:
            self.refuse("launch_pdl" if early else "a wait for the launch before, and no launch_pdl")
        self.early = early

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *args: Any) -> None:
        if not isinstance(function, int):
            # PyArg_ParseTuple of the launcher that Triton generates
            raise TypeError(f"argument 5 must be int, not {type(function).__name__}")
        if not all(0 < n <= most for n, most in zip((x, y, z), MAX_GRID, strict=True)):
            self.refuse(f"a grid of {(x, y, z)}")
        # metadata and hooks come before the kernel's own
        memory = [m for i, value in enumerate(args[4:]) for m in self.check(i, value)]
        gpu.count("launch")
        if self.early:
            gpu.count("early launch")
        gpu.work(memory, stream)

    def refuse(self, what: str) -> None:
        gpu.fault(f"{self.name} was launched with {what}")
        raise BadLaunch(f"{self.name}: {what}")

    def check(self, i: int, value: Any) -> Iterator[Any]:
        """The memory of an argument that fits."""
        name, kind = self.names[i], self.types[i]
        if kind == "constexpr":
            if self.constants[i] != value:
                self.refuse(f"{name} = {value!r}, compiled for {self.constants[i]!r}")
            return
        if kind.startswith("tensordesc"):
            dtype, block = re.match(r"tensordesc<(\w+)\[([\d, ]+)\]", kind).groups()
            if not isinstance(value, TensorDescriptor) or value.block_shape != [int(n) for n in block.split(",")]:
                self.refuse(f"{name} = {value!r}, compiled for {kind}")
            value, kind = value.base, f"*{dtype}"
        if kind.startswith("*"):
            if not isinstance(value, CudaTensor) or value.dtype != POINTERS[kind]:
                what = f"{value.dtype} on {value.device}" if isinstance(value, torch.Tensor) else repr(value)
                self.refuse(f"{name} = {what}, compiled for {kind}")
            number = value.data_ptr()
            yield value.block.memory
        elif kind in INTEGERS:
            if not isinstance(value, int) or not -INTEGERS[kind] <= value < INTEGERS[kind]:
                self.refuse(f"{name} = {value!r}, compiled for {kind}")
            number = value
        else:
            if not isinstance(value, (int, float)):
                self.refuse(f"{name} = {value!r}, compiled for {kind}")
            return
        divisor = self.attributes.get(i, {}).get("tt.divisibility", 1)
        if number % divisor:
            self.refuse(f"{name} = {number}, compiled for multiples of {divisor}")


class Utils:
    """What Triton asks of the driver when it loads a kernel."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        gpu.refuse("the load of a module")
        gpu.count("load")
        number = next(_functions)
        return number, number, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448 if gpu.cc in (90, 100) else 101376,
            "multiprocessor_count": 132,
            "warpSize": 32,
        }


class Driver:
    """The active driver."""

    launcher_cls, utils = Launcher, Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", gpu.cc, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return gpu.stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return torch.cuda.get_device_capability()


def compile_nothing(source: Any, target: Any = None, options: Any = None, _env_vars: Any = None) -> CompiledKernel:
    """`triton.compile`: a kernel that Triton has yet to load."""
    if gpu.captures:
        gpu.fault(f"{source.name} is compiled inside a capture")
    gpu.count("compile")
    _compiled.add(source.fn)
    kernel = object.__new__(CompiledKernel)
    settings = {"num_warps": 4, "num_ctas": 1} | dict(options or {})
    metadata = SimpleNamespace(**settings, name=source.name, target=target, shared=0, tmem_size=None)
    kernel.__dict__ |= {"src": source, "metadata": metadata, "packed_metadata": (), "hash": source.name}
    kernel.__dict__ |= {"name": source.name, "kernel": b"", "asm": {}, "metadata_group": {}}
    kernel.__dict__ |= {"module": None, "function": None, "_run": None}
    return kernel


def forget_kernels() -> None:
    """As in a new process, or on another GPU: nothing is compiled, nothing loaded."""
    for function in _compiled:
        function.device_caches.clear()
    _compiled.clear()


def install() -> None:
    """Put the driver and the compiler in the place of Triton's."""
    triton.runtime.driver.set_active(Driver())
    triton.compiler.compile = compile_nothing
