"""Optional dependencies: which are here, and the one line that says how to get the others."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from .errors import CacheError

_OWN = ("capacitor_kernels", "capacitor_rt")


class MissingExtraError(CacheError, ImportError):
    """An optional dependency that is not installed; the message names the extra that brings it."""


def install_hint(extra: str) -> str:
    """The command that installs an extra of this project, from a checkout, as the package is on no index."""
    return f"pip install '.[{extra}]'"


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        # a parent is missing, or something keeps it from being imported
        return False


def what_is_missing(error: ModuleNotFoundError) -> str | None:
    """In one line, the package that an import did not find and how to get it; None for our own parts and Python's."""
    package = (error.name or "").partition(".")[0]
    if not package or package in _OWN or package in sys.stdlib_module_names:
        return None
    return f"{package} is not installed: pip install {package}"


def require_extra(module: str, extra: str = "cache") -> ModuleType:
    """Import an optional dependency.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = {"PIL": "Pillow"}.get(package := module.split(".")[0], package)
        # how its absence was found is of no interest, unlike what is broken inside it
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        raise MissingExtraError(f"{name} is not installed: {install_hint(extra)}") from (None if absent else error)
