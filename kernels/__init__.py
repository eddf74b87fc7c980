"""Hand-written Triton kernels of the full_capacitor encoder and decoder.

One module a launch, its launcher of the same name inside: `from capacitor_kernels.expand import expand`. Importing the
package imports neither torch nor triton: modules and the names below are loaded when first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

LAUNCHES = ("patchify", "dwconv", "expand", "grn", "project", "head", "fuse_skip", "unpatchify", "whiten")
_MODULES = (*LAUNCHES, "common", "reference", "tuning")
# a launcher cannot be exported from here: importing its module would put the module in its place
_NAMES = {
    "GemmConfig": "tuning",
    "compute_capability": "common",
    "dwconv_sumsq_shape": "dwconv",
    "expand_partials_shape": "expand",
    "lookup": "tuning",
    "project_workspace_shape": "project",
}
__all__ = ["LAUNCHES", *sorted(_NAMES), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
