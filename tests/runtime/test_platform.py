"""Why kernels cannot run on a machine, and which errors mean that Triton could not build them."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime import build
from triton.runtime.errors import InterpreterError, OutOfResources, PTXASError

from capacitor_rt.runtime import platform
from capacitor_rt.runtime.platform import build_failure, why_not_triton

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """One that lacks nothing: an NVIDIA GPU, a compiler, Python's headers; an empty cache of Triton's."""
    monkeypatch.setattr(platform, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    commands, headers = tmp_path / "bin", tmp_path / "include"
    for folder, name in ((commands, "gcc"), (headers, "Python.h")):
        folder.mkdir()
        (folder / name).write_text("")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_, **__: {"include": str(headers)})
    why_not_triton.cache_clear()
    yield tmp_path
    why_not_triton.cache_clear()


def test_a_machine_that_lacks_nothing(machine):
    assert why_not_triton(GPU) is None


def test_triton_is_missing(machine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    assert why_not_triton(GPU) == "Triton is not installed: pip install 'triton>=3.6,<3.10' (Linux only)"


def test_triton_is_too_old(machine, monkeypatch):
    monkeypatch.setattr(platform, "version_of", lambda name: "3.5.1")
    assert why_not_triton(GPU) == "Triton 3.5.1 is too old: pip install 'triton>=3.6,<3.10'"


def test_torch_is_not_for_nvidia(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a CPU build: install one for CUDA" in why_not_triton(GPU)
    why_not_triton.cache_clear()
    # an AMD GPU calls itself cuda
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert why_not_triton(GPU) == "this torch is built for ROCm 6.4, and the kernels are made for NVIDIA GPUs"


def test_the_gpu_is_too_old(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert why_not_triton(GPU).startswith("some GPU has compute capability 7.5, and the kernels need 8.0 or later")


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu:1"])
def test_there_is_no_gpu(machine, device):
    found = why_not_triton(torch.device(device))
    assert found.startswith(f"the kernels need an NVIDIA GPU, and this is {device}: move the model with .to('cuda')")


def test_the_interpreter_takes_the_cpu(machine, monkeypatch):
    monkeypatch.setattr(platform, "interpreted", lambda: True)
    monkeypatch.setenv("PATH", "")
    assert why_not_triton(torch.device("cpu")) is None


def test_there_is_no_compiler(machine, monkeypatch):
    (machine / "bin" / "gcc").unlink()
    # Triton looks for gcc and clang only
    (machine / "bin" / "cc").touch(mode=0o755)
    assert why_not_triton(GPU).startswith("Triton finds no C compiler for its launcher: apt-get install gcc")
    # what is right now is asked again by the next process
    (machine / "bin" / "clang").touch(mode=0o755)
    assert why_not_triton(GPU) is not None
    why_not_triton.cache_clear()
    assert why_not_triton(GPU) is None
    monkeypatch.setenv("CC", "icx")
    why_not_triton.cache_clear()
    assert why_not_triton(GPU).startswith("CC is 'icx', which is no command")


def test_there_are_no_headers(machine, monkeypatch):
    (machine / "include" / "Python.h").unlink()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert why_not_triton(GPU) == (
        f"{machine}/include/Python.h is missing, which Triton's launcher includes: apt-get install python{version}-dev"
    )
    (machine / "elsewhere").mkdir()
    (machine / "elsewhere" / "Python.h").touch()
    monkeypatch.setenv("CPATH", f"/nowhere:{machine}/elsewhere")
    why_not_triton.cache_clear()
    assert why_not_triton(GPU) is None


def test_a_launcher_that_was_built_before_needs_no_compiler(machine):
    (machine / "bin" / "gcc").unlink()
    (machine / "triton" / "KEY").mkdir(parents=True)
    (machine / "triton" / "KEY" / "cuda_utils.cpython-311-x86_64-linux-gnu.so").touch()
    assert why_not_triton(GPU) is None


def test_a_builder_of_ones_own_needs_no_compiler(machine, monkeypatch):
    (machine / "bin" / "gcc").unlink()
    monkeypatch.setattr(knobs.build, "impl", lambda *_: "")
    assert why_not_triton(GPU) is None


def built_with(monkeypatch, folder: Path, impl=None) -> BaseException:
    """What Triton itself raises when it builds a launcher."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(knobs.build, "impl", impl)
    # Triton 3.8 remembers the first compiler that it finds
    if find := getattr(build, "_find_compiler", None):
        monkeypatch.setattr(build, "_find_compiler", inspect.unwrap(find))
    with pytest.raises(Exception) as caught:
        build.compile_module_from_src(src="int main;", name="cuda_utils")
    return caught.value


def test_a_compiler_that_fails_is_a_failed_build(monkeypatch, tmp_path):
    false = shutil.which("false")
    monkeypatch.setenv("CC", false)
    error = built_with(monkeypatch, tmp_path)
    assert isinstance(error, subprocess.CalledProcessError)
    assert build_failure(error).startswith("Triton could not build a kernel (CalledProcessError: Command '[")


def test_no_compiler_is_a_failed_build(machine, monkeypatch, tmp_path):
    (machine / "bin" / "gcc").unlink()
    error = built_with(monkeypatch, tmp_path / "t")
    assert "Failed to find C compiler" in str(error)
    assert build_failure(error).endswith(
        ": Triton finds no C compiler for its launcher: apt-get install gcc, or let CC name one"
    )
    monkeypatch.setenv("CC", "icx")
    error = built_with(monkeypatch, tmp_path / "t")
    assert isinstance(error, FileNotFoundError) and "CC is 'icx'" in build_failure(error)


def test_a_cache_that_cannot_be_written_is_a_failed_build(machine, monkeypatch, as_nobody, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o755)
    with as_nobody(folder):
        error = built_with(monkeypatch, folder / "cache", lambda *_: str(machine / "bin" / "gcc"))
    assert isinstance(error, PermissionError)
    assert build_failure(error).endswith(": set TRITON_CACHE_DIR to a folder that can be written to")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PTXASError("`ptxas` failed with error code 255"), "PTXASError: `ptxas` failed"),
        (OutOfResources(300000, 101376, "shared memory"), "out of resource: shared memory, Required: 300000"),
        (CompilationError("def f():\n    pass", None, "no such thing"), "(CompilationError: no such thing)"),
    ],
)
def test_errors_of_the_compiler_are_failed_builds(error, says):
    assert says in build_failure(error)
    # also where the runtime says more about it
    outer = RuntimeError("replay failed")
    outer.__cause__ = error
    assert says in build_failure(outer)


def test_an_old_driver_is_told_to_be_updated(monkeypatch, tmp_path):
    def load(*_):
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

    assert "too old for Triton" in build_failure(built_with(monkeypatch, tmp_path, load))


@pytest.mark.parametrize(
    "message", ["Triton Error [CUDA]: out of memory", "CUDA error: an illegal memory access was encountered"]
)
def test_memory_and_lost_devices_are_no_failed_builds(monkeypatch, tmp_path, message):
    def fail(*_):
        raise RuntimeError(message)

    assert build_failure(built_with(monkeypatch, tmp_path, fail)) is None


@pytest.mark.parametrize(
    "error", [ValueError("w has shape"), RuntimeError("Triton Error [CUDA]: invalid argument"), InterpreterError("x")]
)
def test_other_errors_are_no_failed_builds(error):
    assert build_failure(error) is None
    try:
        raise error
    except Exception as raised:
        assert build_failure(raised) is None


def test_the_facts_of_a_report(machine, monkeypatch):
    monkeypatch.setattr(platform, "driver_version", lambda: "580.65.06")
    facts = platform.describe(GPU)
    assert list(facts)[:3] == ["GPU", "compute capability", "driver"]
    assert facts["GPU"] == "some GPU" and facts["compute capability"] == "9.0" and facts["driver"] == "580.65.06"
    assert facts["torch"] == torch.__version__ and facts["CUDA"] == "13.0"
    assert {"Triton", "capacitor_rt", "Python", "OS"} <= facts.keys()
