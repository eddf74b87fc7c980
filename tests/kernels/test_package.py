"""The package's surface: light to import, every launch in the module of its name."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

import capacitor_kernels


def test_import_is_light():
    program = "import sys, capacitor_kernels; print([m for m in ('torch', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", capacitor_kernels.LAUNCHES)
def test_every_launch_lives_in_the_module_of_its_name(name):
    # before and after an import of the submodule, the attribute is the module
    assert isinstance(getattr(capacitor_kernels, name), ModuleType)
    module = importlib.import_module(f"capacitor_kernels.{name}")
    assert getattr(capacitor_kernels, name) is module
    assert callable(getattr(module, name)) and getattr(module, name).__module__ == module.__name__


def test_public_names_resolve():
    for name in capacitor_kernels.__all__:
        assert getattr(capacitor_kernels, name) is not None
    assert set(capacitor_kernels.__all__) <= set(dir(capacitor_kernels))


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match=r"'capacitor_kernels' has no attribute 'sort'"):
        _ = capacitor_kernels.sort
