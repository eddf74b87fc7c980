"""What an installed package must hold: a checkout that works says nothing of the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import capacitor_kernels
import capacitor_rt

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    folders = {
        p.parent.relative_to(ROOT) for top in ("capacitor_rt", "kernels") for p in (ROOT / top).rglob("__init__.py")
    }
    expected = {".".join(folder.parts).replace("kernels", "capacitor_kernels") for folder in folders}
    assert set(re.findall(r'"([\w.]+)"', listed)) == expected


def test_versions_agree():
    assert metadata.version("capacitor-rt") == capacitor_rt.__version__


def test_importing_is_light():
    """The packages load their parts on first use: no triton, no pyarrow, no torch."""
    code = (
        "import sys, capacitor_rt, capacitor_kernels; print(sorted({'torch', 'triton', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    for package in (capacitor_rt, capacitor_kernels):
        for name in package.__all__:
            assert getattr(package, name) is not None, name
    assert set(capacitor_rt.__all__) == {"__version__", *capacitor_rt._EXPORTS}


def test_kernels_never_import_the_runtime():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not re.search(r"\b(import|from) capacitor_rt\b", path.read_text()), path
