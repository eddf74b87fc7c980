"""Importing packages that import a torchvision whose compiled operators do not fit this torch."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import torch

_defined: list[torch.library.Library] = []


def import_beside_torchvision(name: str) -> ModuleType:
    """Import `name`, with the operators that torchvision's wheels lack here defined by name, without any kernel."""
    while True:
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor x) -> Tensor")
            _defined.append(library)
            package = name.partition(".")[0]
            for module in [m for m in sys.modules if m.partition(".")[0] in ("torchvision", package)]:
                del sys.modules[module]
