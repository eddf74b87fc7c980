"""Bits of the footer of a Parquet file, for tests of what damage there does."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable


def footer_bits(data: bytes, step: int) -> range:
    """Numbers of bits of the footer, every so many of them."""
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return range(8 * begin, 8 * (len(data) - 8), step)


def flipped(data: bytes, bit: int) -> bytes:
    """The file with one bit changed."""
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def end_of_process(data: bytes, step: int, read: Callable[[bytes], object]) -> str:
    """How a process ended that read a file with each of these bits changed, one after the other; "" if well.

    Args:
        read: raises nothing.
    """
    at = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for bit in footer_bits(data, step):
                at[:] = bit.to_bytes(8, "little")
                read(flipped(data, bit))
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"bit {int.from_bytes(at[:], 'little')} of {8 * len(data)}: ended with {code}" if code else ""
