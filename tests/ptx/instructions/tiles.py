"""Operands of wgmma and tcgen05.mma that lie in shared memory behind a descriptor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..parse import PtxError

if TYPE_CHECKING:
    from ..machine import Machine

K = 16
# (machine, bytes in the memory of all CTAs, lanes, first lane of each reader)
Note = Callable[["Machine", np.ndarray, np.ndarray, np.ndarray], None]


def tile(
    vm: Machine,
    descriptors: np.ndarray,
    width: int,
    lanes: np.ndarray,
    rows: int,
    mn_major: bool,
    what: str,
    note: Note,
) -> np.ndarray:
    """uint16 `[descriptors, rows, 16]`: the operand, K along the last axis.

    Canonical layouts in units of 16 bytes, the swizzle applied to the address (CUTLASS mma_sm90_desc.hpp):
    K major ((8, m), 2) : ((w, SBO), 1), MN major ((w, m), (8, k)) : ((1, LBO), (w, SBO)), with w = 8, 4 or 2 for
    128, 64 or 32 byte swizzles; without swizzle ((8, m), 2) : ((1, SBO), LBO) and
    ((1, m), (8, k)) : ((1, SBO), (1, LBO)).

    Args:
        descriptors: int64; address, LBO and SBO are in the same place on sm_90 and sm_100.
        width: w, or 1 without swizzle.
        lanes: the lane that each descriptor belongs to.
        note: called with what is read.
    """
    if (descriptors >> 49 & 7).any():
        raise PtxError(f"{vm.where()}: {what} descriptor with a base offset")
    start, lbo, sbo = (((descriptors >> at & 0x3FFF) << 4)[:, None, None] for at in (0, 16, 32))
    if mn_major:
        # chunk c of 8 values along MN, k = 0..15: one unit holds 8 MN values of one k
        c, k = np.arange(rows // 8)[None, :, None], np.arange(K)[None, None, :]
        if width == 1:
            offset = c * sbo + k % 8 * 16 + k // 8 * lbo
        else:
            offset = c % width * 16 + c // width * lbo + k % 8 * (16 * width) + k // 8 * sbo
    else:
        row, half = np.arange(rows)[None, :, None], np.arange(2)[None, None, :]
        offset = row % 8 * (16 * width) + row // 8 * sbo + half * (lbo if width == 1 else 16)
    address = start + offset
    if width > 1:
        address = address ^ ((address >> 7 & (width - 1)) << 4)
    owners = np.broadcast_to(lanes[:, None, None], address.shape).reshape(-1)
    flat = vm.shared.place(address.reshape(-1), 16, owners, what)
    note(vm, flat, owners, lanes)
    data = vm.shared.views[16][flat >> 4].view(np.uint16).reshape(*address.shape, 8)
    if mn_major:
        data = np.ascontiguousarray(data.transpose(0, 1, 3, 2))
    return data.reshape(len(descriptors), rows, K)


def swizzle_width(vm: Machine, modes: np.ndarray, widths: dict[int, int], what: str) -> int:
    """w of descriptors that must agree on it."""
    if (modes != modes[0]).any() or int(modes[0]) not in widths:
        raise PtxError(f"{vm.where()}: {what} swizzle {sorted(set(modes.tolist()))}")
    return widths[int(modes[0])]
