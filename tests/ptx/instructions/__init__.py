from __future__ import annotations

import numpy as np

def compile_program(program: Program, count: bool = False) -> tuple[list, int]:
    """(closures by block, granule of shared memory in bytes)."""
    out, granule = [], 16
    for block in program.blocks:
        ops = []
        for ins in block.code:
            try:
                run = compile_instr(ins, program)
            except (PtxError, KeyError, IndexError, TypeError) as error:
                raise PtxError(f"line {ins.line}: {ins.text[:140]}: {type(error).__name__} {error}") from error
            if run is None:
                continue
            if ins.parts[0] in ("ld", "st", "atom", "red") and "shared" in "".join(ins.parts[:3]):
                granule = min(granule, width_of(ins.parts[-1]) // 8)
            if ins.parts[0] == "tcgen05" and ins.parts[1] == "alloc":
                granule = min(granule, 4)
            if ins.parts[0] == "cp" and ins.parts[2] in ("ca", "cg"):
                granule = min(granule, ins.ops[2].value)
            ops.append(_guarded(ins, run, count))
        out.append(ops)
    return out, granule


def _guarded(ins: Instr, run, count: bool):
    line, name, guard = ins.line, ".".join(ins.parts), ins.pred

    def plain(vm: Machine) -> None:
        vm.line = line
        if vm.executed is not None:
            vm.executed[name] += 1
        run(vm)

    if guard is None:
        return plain

    def predicated(vm: Machine) -> None:
        vm.line = line
        p = vm.get_pred(guard)
        if p.all():
            plain(vm)
        elif p.any():
            before = vm.act
            vm.set_active(vm.lanes()[np.broadcast_to(p, (vm.n,))])
            plain(vm)
            vm.set_active(before)

    return predicated


def compile_instr(ins: Instr, program: Program):
    name, parts, ops = ins.parts[0], ins.parts, ins.ops
    if name in _SPECIAL:
        return _SPECIAL[name](ins, program)
    t = parts[-1]
    if name in _INT_OR_FLOAT and TYPES[t][0] in ("f", "bf", "bf2", "f2", "ff"):
        return _float_op(ins)
    if name in _FLOAT_ONLY:
        return _float_op(ins)
    return _int_op(ins)


_SPECIAL = {
    "mov": _mov, "cvt": _cvt, "setp": _setp, "selp": _selp, "prmt": _prmt, "lop3": _lop3, "ld": _ld,
    "st": _st, "cp": _cp, "shfl": _shfl, "ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "mma": _mma, "wgmma": _wgmma,
    "cvta": _cvta, "elect": _elect, "mbarrier": _mbarrier, "tcgen05": _tcgen05,
    "fence": _nothing, "membar": _nothing, "bar": _nothing, "atom": _refuse, "red": _refuse, "griddepcontrol": _refuse,
}  # fmt: skip
