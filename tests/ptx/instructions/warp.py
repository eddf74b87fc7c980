from __future__ import annotations

import numpy as np

def _shfl(ins: Instr, program: Program):
    _, sync, mode, _ = ins.parts
    d = ins.ops[0]
    targets = d.value if d.kind == "vec" else (d, Op("sink"))
    out, out_p = dst(targets[0], 32), dst(targets[1], 1)
    a, b, c = src(ins.ops[1], 32), src(ins.ops[2], 32), src(ins.ops[3], 32)
    lane = np.arange(32, dtype=np.int64)

    def run(vm):
        x = whole_warps(vm, vm.full(a(vm)))
        by, clamp = b(vm).astype(np.int64), c(vm).astype(np.int64)
        by = by.reshape(-1, 1) if len(by) == 1 else by.reshape(-1, 32)
        clamp = clamp.reshape(-1, 1) if len(clamp) == 1 else clamp.reshape(-1, 32)
        bound, seg = clamp & 31, clamp >> 8 & 31
        top = (lane & seg) | (bound & ~seg)
        if mode == "bfly":
            j = lane ^ (by & 31)
            ok = j <= top
        elif mode == "idx":
            j = (lane & seg) | (by & 31 & ~seg)
            ok = j <= top
        elif mode == "up":
            j = lane - (by & 31)
            ok = j >= top
        else:
            j = lane + (by & 31)
            ok = j <= top
        j = np.broadcast_to(np.where(ok, j, lane), x.shape)
        out(vm, np.ascontiguousarray(np.take_along_axis(x, j, 1)).reshape(-1))
        out_p(vm, np.broadcast_to(ok, x.shape).reshape(-1))

    return run


def _elect(ins: Instr, program: Program):
    d, p = ins.ops[0].value
    out, out_p = dst(d, 32), dst(p, 1)

    def run(vm):
        lanes = whole_warps(vm, vm.lanes())
        out(vm, np.zeros(1, np.uint32))
        out_p(vm, (lanes == lanes[:, :1]).reshape(-1))

    return run


def _ldmatrix(ins: Instr, program: Program):
    p = ins.parts
    if "m8n8" not in p or p[-1] != "b16":
        raise PtxError("ldmatrix shape")
    outs, trans = [dst(o, 32) for o in vector(ins.ops[0])], "trans" in p
    at, n = address_of(ins.ops[1], 32), len(vector(ins.ops[0]))

    def run(vm):
        address, lanes = at(vm), vm.lanes()
        whole_warps(vm, address)
        if n < 4:
            address = np.ascontiguousarray(address.reshape(-1, 32)[:, : 8 * n]).reshape(-1)
            lanes = np.ascontiguousarray(lanes.reshape(-1, 32)[:, : 8 * n]).reshape(-1)
        rows = vm.shared.load(address, 16, lanes, "ldmatrix").view(np.uint16).reshape(-1, n, 8, 8)
        for i, out in enumerate(outs):
            m = rows[:, i].transpose(0, 2, 1) if trans else rows[:, i]
            out(vm, np.ascontiguousarray(m).view(np.uint32).reshape(-1))

    return run


def _stmatrix(ins: Instr, program: Program):
    p = ins.parts
    if "m8n8" not in p or p[-1] != "b16":
        raise PtxError("stmatrix shape")
    values, trans = [src(o, 32) for o in vector(ins.ops[1])], "trans" in p
    at, n = address_of(ins.ops[0], 32), len(vector(ins.ops[1]))

    def run(vm):
        address, lanes = at(vm), vm.lanes()
        whole_warps(vm, address)
        if n < 4:
            address = np.ascontiguousarray(address.reshape(-1, 32)[:, : 8 * n]).reshape(-1)
            lanes = np.ascontiguousarray(lanes.reshape(-1, 32)[:, : 8 * n]).reshape(-1)
        rows = np.empty((vm.n // 32, n, 8, 8), np.uint16)
        for i, v in enumerate(values):
            m = np.ascontiguousarray(vm.full(v(vm))).view(np.uint16).reshape(-1, 8, 8)
            rows[:, i] = m.transpose(0, 2, 1) if trans else m
        vm.shared.store(address, rows.reshape(-1, 8).view(np.complex128)[:, 0], 16, lanes, "stmatrix")

    return run
