from __future__ import annotations

import numpy as np

def _wgmma(ins: Instr, program: Program):
    p = ins.parts
    if p[1] == "fence":
        return lambda vm: None
    if p[1] == "commit_group":

        def commit(vm):
            vm.wg_commits = vm.wg_commits.copy()
            vm.wg_commits[vm.lanes()] += 1

        return commit
    if p[1] == "wait_group":
        return lambda vm: _wgmma_wait(vm, ins.ops[0].value)
    if p[1] != "mma_async":
        raise PtxError("wgmma form")
    shape = next(x for x in p if x.startswith("m64n"))
    n, k = int(shape[4 : shape.index("k")]), int(shape[shape.index("k") + 1 :])
    at = p[-2]
    if k != 16 or at not in WIDEN or p[-1] != at or p[-3] != "f32":
        raise PtxError(f"wgmma {shape} {at}")
    conv = WIDEN[at]
    d, a, b, scale_d = ins.ops[:4]
    regs = vector(d)
    if len(regs) != n // 2:
        raise PtxError("wgmma accumulators")
    in_registers = a.kind == "vec"
    flags = [o.value for o in ins.ops[4:]]
    if flags[:2] != [1, 1]:
        raise PtxError("wgmma with negated operands")
    trans_a, trans_b = (0, flags[2]) if in_registers else (flags[2], flags[3])
    outs, accs = [dst(o, 32) for o in regs], [src(o, 32) for o in regs]
    ra = [src(o, 32) for o in a.value] if in_registers else src(a, 64)
    rb, keep = src(b, 64), pred(scale_d)

    def run(vm):
        lanes = vm.lanes()
        if vm.n % 128 or (lanes.reshape(-1, 128)[:, 0] % 128).any() or (np.diff(lanes.reshape(-1, 128)) != 1).any():
            raise PtxError(f"{vm.where()}: wgmma with part of a warpgroup")
        first = lanes.reshape(-1, 128)[:, 0]
        if in_registers:
            x = np.stack([vm.full(r(vm)) for r in ra])
            m = conv(x.view(np.uint16)).reshape(2, 2, -1, 4, 8, 4, 2)  # k half, m half, group, warp, row, t, pair
            am = np.ascontiguousarray(m.transpose(2, 3, 1, 4, 0, 5, 6)).reshape(-1, 64, 16)
        else:
            am = conv(_descriptor_tile(vm, vm.full(ra(vm)), first, 64, trans_a, "wgmma A"))
        bm = conv(_descriptor_tile(vm, vm.full(rb(vm)), first, n, trans_b, "wgmma B"))  # [groups, n, 16]
        y = np.matmul(am, bm.transpose(0, 2, 1)).reshape(-1, 4, 2, 8, n // 8, 4, 2)  # group, warp, m half, row, j, t, pair
        add = keep(vm)
        if len(set(add.tolist())) != 1:
            raise PtxError(f"{vm.where()}: scale-d differs between threads")
        for i, out in enumerate(outs):
            part = np.ascontiguousarray(y[:, :, i // 2 % 2, :, i // 4, :, i % 2]).reshape(-1)
            out(vm, accs[i](vm).view(F32) + part if add[0] else part)

    return run


def _descriptor_tile(vm: Machine, desc: np.ndarray, first: np.ndarray, rows: int, mn_major: int, what: str) -> np.ndarray:
    """uint16 [groups, rows, 16]: the operand behind a shared memory descriptor, K along the last axis.

    Canonical layouts in units of 16 bytes, the swizzle applied to the address (CUTLASS mma_sm90_desc.hpp):
    K major  ((8, m), 2) : ((w, SBO), 1), MN major ((w, m), (8, k)) : ((1, LBO), (w, SBO)), with w = 8, 4 or 2 for
    128, 64 or 32 byte swizzles; without swizzle ((8, m), 2) : ((1, SBO), LBO) and ((1, m), (8, k)) : ((1, SBO), (1, LBO)).
    """
    per = desc.reshape(-1, 128)
    if (per != per[:, :1]).any():
        raise PtxError(f"{vm.where()}: {what} descriptor differs inside a warpgroup")
    v = per[:, 0].astype(np.int64)
    return tile(vm, v, {0: 1, 1: 8, 2: 4, 3: 2}, v >> 62 & 3, first, rows, mn_major, what, _wgmma_note)


def _wgmma_note(vm: Machine, flat: np.ndarray, lanes: np.ndarray, first: np.ndarray) -> None:
    """The reads last until the group is waited for: a write before that is a race."""
    shared = vm.shared
    found = shared.granules(flat, 16, lanes)
    if found is None:
        return
    shared.note_read(flat, 16, lanes)
    g, warp, _ = found
    n = len(g)
    for w in range(4):
        shared.read_epoch[(warp + w)[:, None], g] = PENDING
    vm.wg_reads.append([lanes[:n], vm.wg_commits[lanes[:n]], g, warp])


def _wgmma_wait(vm: Machine, keep: int) -> None:
    left, marks = [], []
    active = np.zeros(vm.N, bool)
    active[vm.lanes()] = True
    for lanes, group, g, warp in vm.wg_reads:
        done = (group < vm.wg_commits[lanes] - keep) & active[lanes]
        if done.any():
            epoch = vm.shared.epoch[vm.cta_slot[lanes[done]]]
            for w in range(4):
                vm.shared.read_epoch[(warp[done] + w)[:, None], g[done]] = epoch[:, None]
        if not done.all():
            left.append([lanes[~done], group[~done], g[~done], warp[~done]])
    vm.wg_reads = left
    for _, _, g, warp in left:
        for w in range(4):
            vm.shared.read_epoch[(warp + w)[:, None], g] = PENDING
