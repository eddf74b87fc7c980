"""Without the extra `cache`: every command and `LatentDataset` end in one line that says what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_cases import GOLDEN

from capacitor_rt.errors import CacheError
from capacitor_rt.extras import MissingExtraError, is_installed, require_extra

PHOTO = Path(__file__).parents[1] / "capacitor_rt" / "sample" / "photos" / "chelsea.png"
P16 = str(GOLDEN / "p16")
HINT = "pip install '.[cache]'"
# as on a machine on which none of them was ever installed
BLOCK = "import sys\nfor name in ('PIL', 'pyarrow', 'xxhash', 'simplejpeg'): sys.modules[name] = None\n"
COMMAND = BLOCK + "from capacitor_rt.cli import main; main()"


def python(code: str, *args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.parametrize(
    "args",
    [
        ("encode", PHOTO, "-o", "out"),
        ("encode", PHOTO, "-o", "out", "--size", 64),
        ("decode", "a.safetensors", "-o", "out"),
        ("cache", PHOTO, "out", "--model", P16, "--size", 64),
        ("cache", PHOTO, "out", "--model", P16, "--area", 64, "--dry-run"),
        ("verify", "."),
        ("psnr", PHOTO),
        ("psnr", PHOTO, "--area", 64),
        ("view", PHOTO, "--out", "out"),
    ],
    ids=lambda args: " ".join(str(a) for a in args if not os.path.isabs(str(a))),
)
def test_a_command_without_the_extra_ends_in_one_line(tmp_path, args):
    (tmp_path / "a.safetensors").touch()
    done = python(COMMAND, *args, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(f"is not installed: {HINT}")
    assert done.stdout == "" and not (tmp_path / "out").exists()


def test_the_demo_without_the_extra_ends_in_one_line(tmp_path):
    code = BLOCK + "import runpy; runpy.run_module('capacitor_rt.cli.demo', run_name='__main__')"
    done = python(code, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == f"error: Pillow is not installed: {HINT}"


@pytest.mark.parametrize(
    "args",
    [
        ("inspect", P16),
        ("plan", "--size", 64),
        ("doctor", "--folder", "absent"),
        ("--version",),
        ("--help",),
    ],
    ids=lambda args: args[0],
)
def test_what_needs_no_extra_works_without(tmp_path, args):
    done = python(COMMAND, *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_names_every_package_of_the_extra(tmp_path):
    lines = python(COMMAND, "doctor", "--folder", "absent", cwd=tmp_path).stdout.splitlines()
    for name in ("pillow", "pyarrow", "xxhash", "simplejpeg"):
        (line,) = (line for line in lines if line.startswith(name))
        assert "missing" in line and line.endswith(HINT)


def test_reading_a_cache_without_the_extra_is_a_typed_error(tmp_path):
    code = BLOCK + (
        "from capacitor_rt import CacheError\n"
        "try:\n    from capacitor_rt import LatentDataset\n    LatentDataset('.')\n"
        "except CacheError as error:\n    print(error)\n"
    )
    done = python(code, cwd=tmp_path)
    assert done.stdout.endswith(f"is not installed: {HINT}\n"), done.stderr


def test_images_without_pillow_are_a_typed_error(tmp_path):
    code = BLOCK + (
        "from capacitor_rt import CapacitorError\n"
        "try:\n    import capacitor_rt.images.decode\nexcept CapacitorError as error:\n    print(error)\n"
    )
    assert python(code, cwd=tmp_path).stdout == f"Pillow is not installed: {HINT}\n"


def test_require_extra_imports_or_says_what_brings_it():
    assert require_extra("PIL.Image").__name__ == "PIL.Image"
    with pytest.raises(
        MissingExtraError, match=r"no_such_package is not installed: pip install '\.\[bench\]'"
    ) as raised:
        require_extra("no_such_package.part", "bench")
    assert isinstance(raised.value, CacheError) and isinstance(raised.value, ImportError)


def test_is_installed_does_not_import_and_never_fails(monkeypatch):
    assert is_installed("PIL") and not is_installed("no_such_package") and not is_installed("no_such_package.part")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert not is_installed("pyarrow")
