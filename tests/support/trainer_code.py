"""The trainers' own readers, loaded by path from checkouts under CAPACITOR_TRAINERS: nothing of them is kept here."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

VARIABLE = "CAPACITOR_TRAINERS"


def checkout(*names: str) -> Path:
    """The file `names` below the folder of checkouts, or skip with what is missing."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} names no folder with checkouts of the trainers")
    path = Path(folder, *names)
    if not path.exists():
        pytest.skip(f"{path} is not there: clone {names[0]} into {folder}")
    return path


def load(path: Path) -> ModuleType:
    """A file as a module of a name of its own: some packages there are called like others that are installed."""
    name = f"trainer_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def package(name: str, folder: Path) -> None:
    """Let `name` be a package in `folder` whose `__init__` is not run, and so its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        full = ".".join(parts[:depth])
        module = sys.modules.setdefault(full, ModuleType(full))
        if not hasattr(module, "__path__"):
            module.__path__ = []
    sys.modules[name].__path__ = [str(folder)]


def cut(path: Path, *names: str, **namespace: Any) -> dict[str, Any]:
    """Top-level functions and classes of a file that cannot be imported, run in `namespace`."""
    tree = ast.parse(path.read_text())
    found = [node for node in tree.body if getattr(node, "name", None) in names]
    assert len(found) == len(names), f"{path} has no more {names}"
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *found], []), str(path), "exec"), namespace)
    return namespace
