"""Hand-written Triton kernels of the full_capacitor encoder and decoder.

Importing the package imports neither torch nor triton: each launcher is loaded when first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

# public name -> module that defines it
_PUBLIC = {
    "expand": "expand",
    "expand_partials_shape": "expand",
    "grn": "grn",
    "project": "project",
    "project_workspace_shape": "project",
    "patchify": "patchify",
    "dwconv": "dwconv",
    "head": "head",
    "fuse_skip": "fuse_skip",
    "unpatchify": "unpatchify",
    "whiten": "whiten",
    "dewhiten": "whiten",
    "GemmConfig": "tuning",
    "lookup": "tuning",
    "compute_capability": "common",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
