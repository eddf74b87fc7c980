"""The package's surface: light to import, every op exported by its name."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import capacitor_kernels


def test_import_is_light():
    program = "import sys, capacitor_kernels; print([m for m in ('torch', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", capacitor_kernels.OPS)
def test_every_op_is_exported_and_lives_in_the_module_of_its_name(name):
    op = getattr(capacitor_kernels, name)
    module = importlib.import_module(f"capacitor_kernels.ops.{name}")
    # an import of the module must not put the module in the op's place
    assert getattr(capacitor_kernels, name) is op is getattr(module, name)
    assert callable(op) and op.__module__ == module.__name__


def test_public_names_resolve():
    for name in capacitor_kernels.__all__:
        assert getattr(capacitor_kernels, name) is not None
    assert set(capacitor_kernels.__all__) <= set(dir(capacitor_kernels))


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match=r"'capacitor_kernels' has no attribute 'sort'"):
        _ = capacitor_kernels.sort
