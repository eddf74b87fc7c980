"""One PTX instruction to one closure over numpy arrays. Every opcode that is not here is an error, never a guess.

float32 arithmetic rounds once (fma in float64); the approximate forms (ex2, rsqrt, sqrt, rcp, div.full, lg2) are
computed in float64 and rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..operands import TYPES, width_of
from ..parse import Instr, Program, PtxError
from . import floating, integer, mbarrier, memory, mma, moves, tcgen05, warp, wgmma

if TYPE_CHECKING:
    from ..machine import Machine
    from ..operands import Action


def _nothing(ins: Instr) -> Action:
    """Order of memory and of the asynchronous proxy: everything here happens in order."""
    return lambda vm: None


_SPECIAL = {
    "mov": moves.mov,
    "cvt": moves.cvt,
    "cvta": moves.cvta,
    "setp": moves.setp,
    "selp": moves.selp,
    "prmt": integer.prmt,
    "lop3": integer.lop3,
    "ld": memory.ld,
    "st": memory.st,
    "shfl": warp.shfl,
    "elect": warp.elect,
    "ldmatrix": warp.ldmatrix,
    "stmatrix": warp.stmatrix,
    "mma": mma.mma,
    "wgmma": wgmma.wgmma,
    "mbarrier": mbarrier.mbarrier,
    "tcgen05": tcgen05.tcgen05,
    "fence": _nothing,
    "membar": _nothing,
    "griddepcontrol": memory.griddepcontrol,
    # of one warp; the CTA's barriers end blocks
    "bar": _nothing,
    # how many registers a warpgroup has changes no value in them
    "setmaxnreg": _nothing,
}
_INT_OR_FLOAT = {"add", "sub", "mul", "mad", "min", "max", "neg", "abs", "div"}
_FLOAT_ONLY = {"fma", "ex2", "lg2", "rcp", "rsqrt", "sqrt"}


def compile_program(program: Program) -> tuple[list[list[Action]], int]:
    """(closures by block, granule of shared memory in bytes).

    Raises:
        PtxError: an instruction or a form of it that is not implemented; the message names it.
    """
    granule = min((_granule(ins) for block in program.blocks for ins in block.code), default=16)
    return [[_guarded(ins, _compile(ins)) for ins in block.code] for block in program.blocks], granule


def _compile(ins: Instr) -> Action:
    name, type_name = ins.parts[0], ins.parts[-1]
    try:
        if name == "cp":
            bulk = ins.parts[2:3] == ("bulk",)
            return mbarrier.tensor_copy(ins) if bulk else memory.cp(ins)
        if name in _SPECIAL:
            return _SPECIAL[name](ins)
        if name in _FLOAT_ONLY or (name in _INT_OR_FLOAT and TYPES[type_name][0] in ("f", "bf", "bf2", "f2", "ff")):
            return floating.arithmetic(ins)
        return integer.arithmetic(ins)
    except (PtxError, KeyError, IndexError, TypeError, ValueError) as error:
        raise PtxError(f"line {ins.line}: `{ins.text[:140]}` is not implemented: {error}") from error


def _granule(ins: Instr) -> int:
    """Bytes of the narrowest access to shared memory of an instruction."""
    parts = ins.parts
    if parts[0] in ("ld", "st") and any(part.startswith("shared") for part in parts[1:3]):
        return width_of(parts[-1]) // 8
    if parts[:2] == ("tcgen05", "alloc"):
        return 4
    if parts[0] == "cp" and parts[2] in ("ca", "cg"):
        return int(ins.ops[2].value)
    return 16


def _guarded(ins: Instr, run: Action) -> Action:
    guard = ins.pred

    def plain(vm: Machine) -> None:
        vm.at = ins
        run(vm)

    if guard is None:
        return plain

    def predicated(vm: Machine) -> None:
        vm.at = ins
        p = vm.get_pred(guard)
        if p.all():
            run(vm)
        elif p.any():
            before = vm.act
            vm.set_active(vm.lanes()[np.broadcast_to(p, (vm.n,))])
            run(vm)
            vm.set_active(before)

    return predicated
