"""Without the extra `cache`: every command and `LatentDataset` end in one line that says what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_cases import GOLDEN

from capacitor_rt.errors import CacheError
from capacitor_rt.extras import MissingExtraError, is_installed, require_extra, what_is_missing

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


@pytest.mark.parametrize(
    ("package", "args"),
    [("typer", ("doctor",)), ("safetensors", ("inspect", P16)), ("huggingface_hub", ("inspect", "a/b"))],
)
def test_a_command_without_what_it_depends_on_ends_in_one_line(tmp_path, package, args):
    """As installed by `pip install --no-deps`."""
    code = f"import sys\nsys.modules[{package!r}] = None\nfrom capacitor_rt.cli import main; main()"
    done = python(code, *args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {package} is not installed: pip install {package}\n"


def test_a_model_without_a_checkpoint_needs_torch_alone(tmp_path):
    code = f"""
import sys
for name in ("safetensors", "huggingface_hub", "typer", "tqdm", "PIL", "pyarrow"): sys.modules[name] = None
sys.path.insert(0, {str(Path(__file__).parent / "support")!r})
import torch
from models import TINY
from capacitor_rt import FullCapacitor
model = FullCapacitor(TINY, backend="torch").eval().requires_grad_(False)
print([*model.encode(torch.zeros(1, 3, 32, 32)).shape])
"""
    done = python(code, cwd=tmp_path)
    assert done.stdout == "[1, 4, 4, 4]\n", done.stderr


def test_is_installed_does_not_import_and_never_fails(monkeypatch):
    assert is_installed("PIL") and not is_installed("no_such_package") and not is_installed("no_such_package.part")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert not is_installed("pyarrow")


def test_a_part_of_python_is_not_said_to_be_a_package():
    assert what_is_missing(ModuleNotFoundError(name="zoneinfo._tzpath")) is None
    assert what_is_missing(ModuleNotFoundError(name="typer")) == "typer is not installed: pip install typer"
