"""Launches through Triton's own launcher, into a driver without a GPU: `driver.c`, built by the C compiler.

For one compute capability a process. What the driver is handed is compared with the launch, parameter by parameter.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.nvidia import driver as nvidia

from capacitor_kernels import expand, expand_partials_shape
from capacitor_kernels.gpu_limits import limits
from capacitor_kernels.launch import Launch, recording
from capacitor_kernels.ops.expand import HOPPER
from capacitor_rt.runtime.launch_cases import LaunchCase

SOURCE = Path(__file__).with_name("driver.c")
HEADERS = Path(nvidia.__file__).parent / "include"
MOST_BYTES = 1 << 14
MAP_BYTES = 128
FORMATS = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d"}
# the two pointers that Triton appends to every kernel's own parameters
SCRATCH_BYTES = 16


class WrongLaunch(AssertionError):
    """The driver was handed something else than the launch says."""


def build(folder: Path) -> Path:
    """The driver, as the library that Triton looks for."""
    library = folder / "libcuda.so.1"
    options = ("-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", f"-I{HEADERS}")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(library)], check=True, capture_output=True, text=True)
    return library


class Machine:
    """A GPU of a compute capability, to Triton."""

    def __init__(self, cc: int, folder: Path):
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        # by its name it is found from now on
        self._driver = ctypes.CDLL(str(build(folder)), mode=ctypes.RTLD_GLOBAL)
        for name in ("fake_last_name", "fake_why"):
            getattr(self._driver, name).restype = ctypes.c_char_p
        self.cc = cc
        self._driver.fake_device(cc, 132, limits(cc).smem_per_cta)
        active = nvidia.CudaDriver()
        # torch would be asked for these
        active.get_current_device = lambda: 0
        active.get_current_stream = lambda device: 0
        active.get_device_capability = lambda device: divmod(cc, 10)
        triton.runtime.driver.set_active(active)

    def launch(self, launch: Launch) -> int:
        """Launch it; how many parameters were compared.

        Raises:
            WrongLaunch: by name and place, what is not as it should be.
            RuntimeError: the driver refuses, and says why.
        """
        kernel = launch.kernel[launch.grid](**launch.args, **launch.options)
        name = self._driver.fake_last_name().decode()
        if name != kernel.name:
            raise WrongLaunch(f"{kernel.name} was launched, and the driver was handed {name}")
        buffer, sizes = (ctypes.c_ubyte * MOST_BYTES)(), (ctypes.c_int * 4)()
        found = bytes(buffer[: self._driver.fake_last(buffer, sizes)])
        grid, threads = (*launch.grid, 1, 1)[:3], 32 * kernel.metadata.num_warps
        if (*sizes,) != (*grid, threads):
            raise WrongLaunch(f"{name}: grid and threads are {(*sizes,)}, not {(*grid, threads)}")
        if bool(self._driver.fake_early()) != bool(launch.options.get("launch_pdl")):
            raise WrongLaunch(f"{name}: it starts early, or does not, against its options")
        values = {p.name: launch.args.get(p.name, p.default) for p in launch.kernel.params}
        expected = [*parameters(kernel.src.signature, values)]
        for i, (what, bits) in enumerate(expected):
            at = self._driver.fake_offset(i)
            if found[at : at + len(bits)] != bits:
                raise WrongLaunch(f"{name}: {what} is {found[at : at + len(bits)].hex()}, not {bits.hex()}")
        rest = found[self._driver.fake_offset(len(expected)) :]
        if len(rest) != SCRATCH_BYTES or any(rest):
            raise WrongLaunch(f"{name}: behind its parameters are {rest.hex()}")
        return len(expected)


def parameters(signature: Mapping[str, str], values: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """What a kernel is to be handed, in order: a descriptor is a map, its sizes and its strides."""
    for name, kind in signature.items():
        value = values[name]
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            rows, columns = value.shape
            stride = value.strides[0] * value.base.element_size()
            # as `driver.c` writes a map
            yield f"{name}'s map", struct.pack("<QQQQ", value.base.data_ptr(), columns, rows, stride)
            yield from ((f"a size of {name}", struct.pack("<i", n)) for n in value.shape)
            yield from ((f"a stride of {name}", struct.pack("<q", n)) for n in value.strides)
        elif kind.startswith("*"):
            yield name, struct.pack("<Q", value.data_ptr())
        else:
            yield name, struct.pack(FORMATS[kind], value)


def by_specialised_warps() -> list[Launch]:
    """`expand` in Gluon, which only a config or CAPACITOR_EXPAND asks for."""
    tokens, dim, hidden = 512, 896, 3584
    half, full = partial(torch.empty, dtype=torch.bfloat16), partial(torch.empty, dtype=torch.float32)
    partials = full(expand_partials_shape(2, 256, hidden, HOPPER))
    with recording(90) as found:
        expand(
            half(tokens, dim), half(dim, hidden), full(hidden), full(tokens, 1), half(tokens, hidden), partials,
            tokens_per_image=256, config=HOPPER,
        )  # fmt: skip
    return list(found)


def launches_of(case: LaunchCase, cc: int) -> list[Launch]:
    """What a case launches, on memory that is never touched."""
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in case.specs.items()}
    with recording(cc) as found:
        case._op(**tensors, **case.step.options)
    return list(found)
