"""Launches with their real arguments through the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .compiling import Compiled, compile_launch, is_descriptor
from .instructions import compile_program
from .machine import Machine
from .memory import Shadow
from .parse import Program, PtxError, parse
from .tensor_map import TensorMap

if TYPE_CHECKING:
    from capacitor_kernels.launch import Launch

    from .operands import Action

# a token in place of the address of a tensor map; compilers take it as 32 bits of parameter space
_TOKEN = 0x7E50_0000
# pointers to scratch memory that the compiler adds and these kernels must not touch
_MOST_EXTRA_PARAMETERS = 2
_SCALARS: dict[str, Any] = {"fp32": np.float32, "i32": np.int32, "i64": np.int64}


@lru_cache(maxsize=64)
def _decode(text: str) -> tuple[Program, list[list[Action]], int]:
    program = parse(text)
    return program, *compile_program(program)


@dataclass(frozen=True)
class Ran:
    """One launch that was executed: CTAs that ran, seconds in the machine."""

    kernel: str
    target: str
    ctas: int
    seconds: float
    opcodes: dict[str, int]


@dataclass
class Device:
    """An imaginary GPU of one compute capability.

    Attributes:
        max_lanes: threads that run at a time; no result may depend on it.
        watched_ctas: CTAs of a batch whose shared memory is checked for races.
        order: from all CTA ids to the ones to run, in order.
        mutate: from PTX to PTX, to break kernels on purpose.
        last_warps_first: which of specialised warps go on until they have to wait: the last ones, or the first.
        launches: what ran.
    """

    cc: int
    max_lanes: int = 8192
    watched_ctas: int = 1
    order: Callable[[np.ndarray], np.ndarray] | None = None
    mutate: Callable[[str], str] | None = None
    last_warps_first: bool = True
    launches: list[Ran] = field(default_factory=list)
    _shadows: list[Shadow] = field(default_factory=list)

    def unwritten(self, *tensors: torch.Tensor | None) -> None:
        """Refuse reads of these tensors where no launch has written them."""
        self._shadows += [Shadow(t.data_ptr(), t.nbytes) for t in tensors if t is not None and t.nbytes]

    def written(self, *tensors: torch.Tensor) -> None:
        """Allow reads of these parts of tensors that are `unwritten`."""
        for t in tensors:
            shadow = self._shadow(t)
            if shadow is not None:
                shadow.fill(t.data_ptr(), t.nbytes)

    def run(self, launches: Iterable[Launch]) -> None:
        """Compile and execute launches in order; their tensors are on the CPU.

        Raises:
            PtxError: an instruction that is not known, or something that a GPU forbids; MemoryFault for an access.
        """
        for launch in launches:
            self._run(launch)

    def _run(self, launch: Launch) -> None:
        compiled = compile_launch(launch, self.cc)
        text = self.mutate(compiled.ptx) if self.mutate else compiled.ptx
        program, actions, granule = _decode(text)
        if program.threads != 32 * compiled.num_warps:
            raise PtxError(
                f"{program.name}: {program.threads} threads in the PTX, {compiled.num_warps} warps asked for"
            )
        machine = Machine(
            program,
            actions,
            compiled.shared,
            granule,
            max_lanes=self.max_lanes,
            watched_ctas=self.watched_ctas,
            last_warps_first=self.last_warps_first,
        )
        if bool(launch.options.get("launch_pdl")) != machine.starts_early:
            raise PtxError(f"{program.name}: it is launched early and never waits, or waits and is not launched early")
        params = self._bind(machine, compiled, launch)
        grid = (*launch.grid, 1, 1)[:3]
        ctas = np.arange(grid[0] * grid[1] * grid[2])
        if self.order is not None:
            ctas = self.order(ctas)
        start = time.perf_counter()
        machine.launch(grid, params, ctas)
        seconds = time.perf_counter() - start
        self.launches.append(Ran(program.name, program.target, len(ctas), seconds, dict(program.opcodes)))

    def _bind(self, machine: Machine, compiled: Compiled, launch: Launch) -> dict[str, np.ndarray]:
        """Values of the PTX parameters; the tensors become the machine's memory."""
        values: list[np.ndarray] = []
        for name, kind in compiled.types.items():
            if kind == "constexpr":
                continue
            value = launch.args[name]
            if isinstance(value, torch.Tensor):
                self._add(machine, name, value)
                values.append(np.array([value.data_ptr()], np.uint64))
            elif is_descriptor(value):
                self._add(machine, name, value.base)
                token = _TOKEN + len(machine.descriptors)
                if len(machine.descriptors) >= len(compiled.descriptors):
                    raise PtxError(f"{machine.program.name}: {name} was not compiled to a tensor map")
                machine.descriptors[token] = _tensor_map(value, compiled.descriptors[len(machine.descriptors)])
                values.append(np.array([token], np.uint64))
                values += [np.array([size], np.int32) for size in value.shape]
                values += [np.array([stride], np.int64) for stride in value.strides]
            else:
                values.append(np.array([value], _SCALARS[kind]))
        declared = machine.program.params
        extra = len(declared) - len(values)
        if not 0 <= extra <= _MOST_EXTRA_PARAMETERS:
            raise PtxError(f"{machine.program.name}: {len(declared)} parameters for {len(values)} arguments")
        for (name, kind), value in zip(declared, values, strict=False):
            if kind != "b8" and value.itemsize * 8 != int(kind[1:]):
                raise PtxError(f"{machine.program.name}: {name} is {kind}, the argument has {value.itemsize} bytes")
        values += [np.zeros(1, np.uint64)] * extra
        names = [name for name, _ in declared]
        return {name: value.view(f"u{value.itemsize}") for name, value in zip(names, values, strict=True)}

    def _add(self, machine: Machine, name: str, t: torch.Tensor) -> None:
        """The tensor's own extent: slices of one buffer are buffers of their own."""
        machine.memory.add(name, t.data_ptr(), t.nbytes, t.element_size(), self._shadow(t))

    def _shadow(self, t: torch.Tensor) -> Shadow | None:
        return next((s for s in self._shadows if s.covers(t.data_ptr(), t.nbytes)), None)


def _tensor_map(descriptor: Any, made: Any) -> TensorMap:
    if made["fp4_padded"] or getattr(descriptor, "padding", "zero") == "nan":
        raise PtxError("tensor descriptors with padding")
    return TensorMap(
        descriptor.base.data_ptr(),
        made["swizzle"],
        made["elem_size"],
        made["block_size"],
        descriptor.shape,
        descriptor.strides,
    )
