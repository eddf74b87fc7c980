from __future__ import annotations

import numpy as np

_QUALIFIERS = {"relaxed", "volatile", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "gpu", "cta", "sys", "weak"}


def _ld(ins: Instr, program: Program):
    t, space = ins.parts[-1], None
    bits = width_of(t)
    for p in ins.parts[1:-1]:
        base = p.split("__")[0]
        if base in ("param", "global", "shared", "local", "const"):
            space = base
        elif not (p in _QUALIFIERS or p.startswith(("L1__", "L2__", "v"))):
            raise PtxError(f"ld qualifier {p}")
    if space == "param":
        out, name = dst(ins.ops[0], bits), ins.ops[1].value.value
        if ins.ops[1].offset:
            raise PtxError("ld.param with an offset")
        return lambda vm: out(vm, vm.params[name].view(U[bits]))
    outs = [dst(o, bits, signed=TYPES[t][0] == "s") for o in vector(ins.ops[0])]
    width = bits // 8 * len(outs)
    if space == "global":
        at = address_of(ins.ops[1], 64)
        load = lambda vm: vm.memory.load(vm, at(vm), width, vm.lanes())  # noqa: E731
    elif space == "shared":
        at = address_of(ins.ops[1], 32)
        load = lambda vm: vm.shared.load(at(vm), width, vm.lanes())  # noqa: E731
    else:
        raise PtxError(f"ld from {space}")
    if len(outs) == 1:
        return lambda vm: outs[0](vm, load(vm))

    def run(vm):
        x = load(vm).view(U[bits]).reshape(-1, len(outs))
        for i, out in enumerate(outs):
            out(vm, np.ascontiguousarray(x[:, i]))

    return run


def _st(ins: Instr, program: Program):
    t, space = ins.parts[-1], None
    bits = width_of(t)
    for p in ins.parts[1:-1]:
        base = p.split("__")[0]
        if base in ("global", "shared"):
            space = base
        elif not (p in _QUALIFIERS or p.startswith(("L1__", "L2__", "v"))):
            raise PtxError(f"st qualifier {p}")
    values = [src(o, bits) for o in vector(ins.ops[1])]
    width = bits // 8 * len(values)
    wide = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}[width]

    def gather(vm):
        if len(values) == 1:
            return vm.full(values[0](vm))
        x = np.empty((vm.n, len(values)), U[bits])
        for i, v in enumerate(values):
            x[:, i] = v(vm)
        return x.view(wide)[:, 0]

    if space == "global":
        at = address_of(ins.ops[0], 64)
        return lambda vm: vm.memory.store(vm, at(vm), gather(vm), width, vm.lanes())
    if space == "shared":
        at = address_of(ins.ops[0], 32)
        return lambda vm: vm.shared.store(at(vm), gather(vm), width, vm.lanes())
    raise PtxError(f"st to {space}")


def _cp(ins: Instr, program: Program):
    p = ins.parts
    if p[:3] == ("cp", "async", "commit_group"):

        def commit(vm):
            vm.commits = vm.commits.copy()
            vm.commits[vm.lanes()] += 1

        return commit
    if p[:3] in (("cp", "async", "wait_group"), ("cp", "async", "wait_all")):
        keep = ins.ops[0].value if p[2] == "wait_group" else None
        return lambda vm: _cp_wait(vm, keep)
    if p[2] == "bulk":
        return _tensor_copy(ins, program)
    if p[1] != "async" or p[2] not in ("ca", "cg"):
        raise PtxError("copy instruction")
    to, frm, width = address_of(ins.ops[0], 32), address_of(ins.ops[1], 64), ins.ops[2].value
    size = src(ins.ops[3], 32) if len(ins.ops) > 3 else None
    if p[2] == "cg" and width != 16:
        raise PtxError("cp.async.cg of other than 16 bytes")
    wide = {4: np.uint32, 8: np.uint64, 16: np.complex128}[width]

    def copy(vm):
        lanes, address, n = vm.lanes(), frm(vm), None
        flat = vm.shared.place(to(vm), width, lanes, "cp.async")
        if size is not None:
            n = vm.full(size(vm))
            if (n > width).any():
                raise PtxError(f"{vm.where()}: cp.async source size above {width}")
        if n is None or (n == width).all():
            data = vm.memory.load(vm, address, width, lanes, "cp.async")
        else:
            if not ((n == 0) | (n == width)).all():
                raise PtxError(f"{vm.where()}: cp.async of part of its bytes")
            data, some = np.zeros(vm.n, wide), np.flatnonzero(n)
            if len(some):
                data[some] = vm.memory.load(vm, address[some], width, lanes[some], "cp.async")
        vm.shared.note_write(flat, width, lanes, pending=True)
        shift = width.bit_length() - 1
        poison = np.full(1, 0xFF, np.uint8).repeat(width).view(wide)
        vm.shared.views[width][flat >> shift] = poison
        vm.copies.append([lanes, vm.commits[lanes], flat, data, width])

    return copy


def _cp_wait(vm: Machine, keep: int | None) -> None:
    """Land the copies of all groups of the active lanes but the newest `keep`."""
    active = None
    if vm.act is not None:
        active = np.zeros(vm.N, bool)
        active[vm.act] = True
    left = []
    for lanes, group, flat, data, width in vm.copies:
        done = np.ones(len(lanes), bool) if keep is None else group < vm.commits[lanes] - keep
        if active is not None:
            done &= active[lanes]
        if done.any():
            pick = slice(None) if done.all() else done
            vm.shared.views[width][flat[pick] >> (width.bit_length() - 1)] = data[pick]
            vm.shared.finish_write(flat[pick], width, lanes[pick])
        if not done.all():
            left.append([lanes[~done], group[~done], flat[~done], data[~done], width])
    vm.copies = left
