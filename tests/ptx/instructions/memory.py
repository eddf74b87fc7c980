"""Loads, stores and cp.async."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..memory import UNSIGNED
from ..operands import TYPES, U, address_of, dst, src, vector, width_of
from ..parse import Instr, PtxError

if TYPE_CHECKING:
    from ..machine import Machine
    from ..operands import Action

_QUALIFIERS = {"relaxed", "volatile", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "gpu", "cta", "sys", "weak"}


def _space(ins: Instr, spaces: set[str]) -> str:
    """The state space of an access; hints about caches change nothing here."""
    found = ""
    for part in ins.parts[1:-1]:
        base = part.split("__")[0]
        if base in spaces:
            found = base
        elif part not in _QUALIFIERS and not part.startswith(("L1__", "L2__", "v")):
            raise PtxError(f"qualifier {part}")
    if not found:
        raise PtxError("generic address")
    return found


def ld(ins: Instr) -> Action:
    """Load from parameters, global or shared memory; of several elements, one access."""
    type_name = ins.parts[-1]
    bits, space = width_of(type_name), _space(ins, {"param", "global", "shared"})
    if space == "param":
        out, name = dst(ins.ops[0], bits), ins.ops[1].value.value
        if ins.ops[1].offset:
            raise PtxError("ld.param with an offset")
        return lambda vm: out(vm, vm.params[name].view(U[bits]))
    outs = [dst(op, bits, signed=TYPES[type_name][0] == "s") for op in vector(ins.ops[0])]
    width, at = bits // 8 * len(outs), address_of(ins.ops[1], 64 if space == "global" else 32)

    def run(vm: Machine) -> None:
        memory: Any = vm.shared if space == "shared" else None
        x = memory.load(at(vm), width, vm.lanes()) if memory else vm.memory.load(vm, at(vm), width, vm.lanes())
        if len(outs) == 1:
            outs[0](vm, x)
            return
        x = x.view(U[bits]).reshape(-1, len(outs))
        for i, out in enumerate(outs):
            out(vm, np.ascontiguousarray(x[:, i]))

    return run


def st(ins: Instr) -> Action:
    """Store to global or shared memory; of several elements, one access."""
    bits, space = width_of(ins.parts[-1]), _space(ins, {"global", "shared"})
    values = [src(op, bits) for op in vector(ins.ops[1])]
    width, at = bits // 8 * len(values), address_of(ins.ops[0], 64 if space == "global" else 32)

    def run(vm: Machine) -> None:
        x = np.empty((vm.n, len(values)), U[bits])
        for i, read in enumerate(values):
            x[:, i] = read(vm)
        whole = x.view(UNSIGNED[width])[:, 0]
        if space == "shared":
            vm.shared.store(at(vm), whole, width, vm.lanes())
        else:
            vm.memory.store(vm, at(vm), whole, width, vm.lanes())

    return run


def griddepcontrol(ins: Instr) -> Action:
    """Programmatic dependent launch: a thread waits for the launch before, or lets the next one start."""
    if ins.parts[1:] == ("launch_dependents",):
        return lambda vm: None
    if ins.parts[1:] != ("wait",):
        raise PtxError("form of griddepcontrol")

    def wait(vm: Machine) -> None:
        vm.waited[vm.lanes()] = True

    return wait


def cp(ins: Instr) -> Action:
    """cp.async: the copies of a group land when the group is waited for."""
    parts = ins.parts
    if parts[1:] == ("async", "commit_group"):

        def commit(vm: Machine) -> None:
            vm.commits = vm.commits.copy()
            vm.commits[vm.lanes()] += 1

        return commit
    if parts[1:] == ("async", "wait_group"):
        keep = ins.ops[0].value
        return lambda vm: _land(vm, keep)
    if parts[1:] == ("async", "wait_all"):
        return lambda vm: _land(vm, None)
    if parts[1] != "async" or parts[2] not in ("ca", "cg"):
        raise PtxError("copy instruction")
    return _copy(ins)


def _copy(ins: Instr) -> Action:
    to, frm, width = address_of(ins.ops[0], 32), address_of(ins.ops[1], 64), ins.ops[2].value
    size = src(ins.ops[3], 32) if len(ins.ops) > 3 else None
    if ins.parts[2] == "cg" and width != 16:
        raise PtxError("cp.async.cg of other than 16 bytes")
    # what is read before the copy has landed
    poison = np.full(width, 0xFF, np.uint8).view(UNSIGNED[width])
    shift = width.bit_length() - 1

    def run(vm: Machine) -> None:
        lanes, address = vm.lanes(), frm(vm)
        flat = vm.shared.place(to(vm), width, lanes, "cp.async")
        some = np.ones(vm.n, bool)
        if size is not None:
            count = vm.full(size(vm))
            some = count == width
            if not (some | (count == 0)).all():
                raise PtxError(f"{vm.where()}: cp.async of part of its bytes, or of more than {width}")
        if some.all():
            data = vm.memory.load(vm, address, width, lanes, "cp.async")
        else:
            # what a mask leaves out arrives as zeros, whatever its address
            data = np.zeros(vm.n, UNSIGNED[width])
            if some.any():
                data[some] = vm.memory.load(vm, address[some], width, lanes[some], "cp.async")
        vm.shared.note_write(flat, width, lanes, pending=True)
        vm.shared.views[width][flat >> shift] = poison
        vm.copies.append([lanes, vm.commits[lanes], flat, data, width])

    return run


def _land(vm: Machine, keep: int | None) -> None:
    """Finish the copies of all groups of the active lanes but the newest `keep`; None: of those not committed, too."""
    active = np.zeros(vm.lane_count, bool)
    active[vm.lanes()] = True
    left = []
    for lanes, group, flat, data, width in vm.copies:
        done = active[lanes]
        if keep is not None:
            done = done & (group < vm.commits[lanes] - keep)
        if done.any():
            vm.shared.views[width][flat[done] >> (width.bit_length() - 1)] = data[done]
            vm.shared.finish_write(flat[done], width, lanes[done])
        if not done.all():
            left.append([lanes[~done], group[~done], flat[~done], data[~done], width])
    vm.copies = left
