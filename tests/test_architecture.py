"""The arrows between modules, those of type checking included, are the contracts of pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"


def lint(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LINT, config], cwd=ROOT, capture_output=True, text=True)


def test_contracts_are_kept():
    done = lint(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "contract",
    [
        'type = "layers"\ncontainers = ["capacitor_rt"]\nlayers = ["reference", "model"]',
        'type = "forbidden"\nsource_modules = ["capacitor_rt"]\nforbidden_modules = ["capacitor_kernels"]',
    ],
    ids=["upside down", "kernels forbidden"],
)
def test_a_broken_contract_is_seen(tmp_path, contract):
    config = tmp_path / "contracts.toml"
    packages = 'root_packages = ["capacitor_rt", "capacitor_kernels"]'
    config.write_text(f'[tool.importlinter]\n{packages}\n\n[[tool.importlinter.contracts]]\nname = "x"\n{contract}\n')
    done = lint(config)
    assert done.returncode == 1 and "1 broken" in done.stdout


def test_no_two_files_of_tests_have_one_name():
    """Folders of tests are no packages: pytest refuses the second of two such modules."""
    # those on the fake device are collected by a process of their own
    paths = [p for p in (ROOT / "tests").rglob("test_*.py") if p.parent.name != "on_fake_device"]
    names = [p.name for p in paths]
    assert {p.relative_to(ROOT) for p in paths if names.count(p.name) > 1} == set()
