"""A launch that is only its arguments, for what reads grids and constants of one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from capacitor_kernels.launch import Launch


def gemm_launch(name: str, *, num_warps: int = 4, num_stages: int = 3, **args: Any) -> Launch:
    """A launch of one program of a kernel of this name."""
    return Launch(SimpleNamespace(__name__=name), (1,), args, {"num_warps": num_warps, "num_stages": num_stages})
