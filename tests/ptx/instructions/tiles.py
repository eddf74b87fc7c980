from __future__ import annotations

import numpy as np

def tile(vm: Machine, v: np.ndarray, widths: dict, mode: np.ndarray, first, rows: int, mn_major: int, what: str, note) -> np.ndarray:
    start, lbo, sbo = (v & 0x3FFF) << 4, (v >> 16 & 0x3FFF) << 4, (v >> 32 & 0x3FFF) << 4
    if (v >> 49 & 7).any():
        raise PtxError(f"{vm.where()}: {what} descriptor with a base offset")
    if (mode != mode[0]).any():
        raise PtxError(f"{vm.where()}: {what} swizzle differs")
    w = widths[int(mode[0])]
    sbo, lbo = sbo[:, None, None], lbo[:, None, None]
    if mn_major:
        # chunk c of 8 values along MN, k = 0..15: one 16 byte unit holds 8 MN values of one k
        c, kk = np.arange(rows // 8)[None, :, None], np.arange(16)[None, None, :]
        if w == 1:
            off = c * sbo + kk % 8 * 16 + kk // 8 * lbo
        else:
            off = c % w * 16 + c // w * lbo + kk % 8 * (16 * w) + kk // 8 * sbo
    else:
        r, kk = np.arange(rows)[None, :, None], np.arange(2)[None, None, :]
        off = r % 8 * (16 * w) + r // 8 * sbo + kk * (lbo if w == 1 else 16)
    address = start[:, None, None] + off
    if w > 1:
        address = address ^ ((address >> 7 & (w - 1)) << 4)
    units = np.broadcast_to(address, (len(v), address.shape[1], address.shape[2]))
    lanes = np.broadcast_to(first[:, None, None], units.shape).reshape(-1)
    flat = vm.shared.place(units.reshape(-1).astype(np.int64), 16, lanes, what)
    note(vm, flat, lanes, first)
    data = vm.shared.views[16][flat >> 4].view(np.uint16).reshape(len(v), units.shape[1], units.shape[2], 8)
    if mn_major:
        return np.ascontiguousarray(data.transpose(0, 1, 3, 2)).reshape(len(v), rows, 16)
    return data.reshape(len(v), rows, 16)
