"""What an installed package must hold: a checkout that works says nothing of the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools.dist import Distribution

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


def test_a_package_that_is_built_has_the_version_of_the_code(monkeypatch):
    monkeypatch.chdir(ROOT)
    built = Distribution()
    built.parse_config_files([str(ROOT / "pyproject.toml")])
    assert built.get_version() == capacitor_rt.__version__


def test_the_changelog_has_the_version():
    first = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert re.fullmatch(r"(\S+) - \d{4}-\d\d-\d\d|Unreleased: \S+", first)
    assert first.startswith((f"{capacitor_rt.__version__} - ", "Unreleased: "))


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


def _listed(name: str) -> dict[str, str]:
    """Versions by package, as they hold for Python 3.11 on Linux."""
    lines = (line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#"))
    found = (Requirement(line) for line in lines)
    here = {"python_version": "3.11", "python_full_version": "3.11.7", "platform_system": "Linux"}
    return {canonicalize_name(r.name): str(r.specifier) for r in found if not r.marker or r.marker.evaluate(here)}


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux", reason="the list is of Python 3.11 on Linux"
)
def test_the_list_of_what_is_installed_is_whole():
    """Nothing is resolved where it is installed, so that it must hold what is asked for, and what that asks for."""
    listed, pinned = _listed("requirements-py311.txt"), _listed("constraints.txt")
    missing, wrong = set(), set()
    # streaming is no part of the extra: it is read past its pins, and its clients of clouds are left out
    waiting = [("capacitor-rt", "test"), *((name, "") for name in ("ruff", "mypy", "pre-commit"))]
    done: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, required):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            key = canonicalize_name(requirement.name)
            if key in ("torch", "triton"):
                continue
            if key not in listed and key != "capacitor-rt":
                missing.add(f"{key} of {name}")
            elif key in listed and not requirement.specifier.contains(listed[key].removeprefix("=="), prereleases=True):
                wrong.add(f"{key}{listed[key]}, and {name} asks for {requirement.specifier}")
            for wanted in ("", *requirement.extras):
                if (key, wanted) not in done:
                    done.add((key, wanted))
                    waiting.append((key, wanted))
    assert not missing | wrong, "run `make lock`"
    assert {name: pinned[name] for name in pinned.keys() & listed.keys()} == {
        name: version for name, version in listed.items() if name in pinned
    }, "run `make lock`"
    assert pinned.keys() - listed.keys() == {"torch", "triton", "ray"}
