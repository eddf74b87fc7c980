"""Hand-written Triton kernels of the full_capacitor encoder and decoder: `from capacitor_kernels import expand`.

Every op is exported here by its name; its module, with its kernels and configs, is `capacitor_kernels.ops.<name>`.
Importing the package imports neither torch nor triton: names are loaded when first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

OPS = (
    "patchify",
    "dwconv",
    "expand",
    "expand_fp8",
    "grn",
    "channel_attention",
    "project",
    "project_fp8",
    "rmsnorm",
    "head",
    "fuse_skip",
    "unpatchify",
    "whiten",
    "attention",
    "resize",
)
_MODULES = ("config_rows", "gemm", "gpu_limits", "jit", "launch", "ops", "pictures", "reference", "tuning", "user_rows")
_NAMES = {
    **{name: f"ops.{name}" for name in OPS},
    "GemmConfig": "gemm",
    "channel_attention_sums_shape": "ops.channel_attention",
    "compute_capability": "launch",
    "dewhiten": "ops.whiten",
    "dwconv_partials_shape": "ops.dwconv",
    "dwconv_sumsq_shape": "ops.dwconv",
    "expand_fp8_partials_shape": "ops.expand_fp8",
    "expand_partials_shape": "ops.expand",
    "lookup": "tuning",
    "pack_patchify_weight": "ops.patchify",
    "project_sumsq_shape": "ops.project",
    "project_workspace_shape": "ops.project",
}
__all__ = ["OPS", *sorted(_NAMES), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
