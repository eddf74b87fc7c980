"""Shared memory, registers and threads of the GPUs that rows are shipped for, and which of them serves another."""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE_CAPABILITIES = (80, 89, 90, 100, 120)
REGISTERS_PER_SM = 65536
SMEM_RESERVED_PER_CTA = 1024
# the nearest relative with at least as much shared memory
_RELATIVE = {86: 89, 87: 80, 101: 100, 103: 100, 110: 100, 121: 120}


@dataclass(frozen=True)
class Limits:
    """Shared memory of one compute capability, in bytes."""

    cc: int
    smem_per_cta: int
    smem_per_sm: int
    threads_per_sm: int


LIMITS: dict[int, Limits] = {
    80: Limits(80, 166912, 167936, 2048),
    89: Limits(89, 101376, 102400, 1536),
    90: Limits(90, 232448, 233472, 2048),
    100: Limits(100, 232448, 233472, 2048),
    120: Limits(120, 101376, 102400, 1536),
}


def base_cc(cc: int) -> int:
    """The compute capability whose rows and limits serve `cc`: itself, a relative, or the highest below."""
    if cc in LIMITS:
        return cc
    if cc in _RELATIVE:
        return _RELATIVE[cc]
    below = [known for known in LIMITS if known <= cc]
    if not below:
        raise ValueError(f"compute capability {cc} is below {min(LIMITS)}, the lowest supported one")
    return max(below)


def limits(cc: int) -> Limits:
    """Limits of `cc`, or of the relative that serves it."""
    return LIMITS[base_cc(cc)]
