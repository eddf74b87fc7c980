"""What this machine can run: why Triton's kernels cannot, what an error of Triton's means, which versions are here."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TORCH_LEAST = (2, 10)
TRITON_WINDOW = ((3, 6), (3, 10))
"""From the first to before the second: what the kernels are tested on."""
INSTALL_TRITON = "pip install 'triton>=3.6,<3.10'"
MIN_COMPUTE_CAPABILITY = (8, 0)
DISTRIBUTION = "capacitor-rt"
# torch -> the Triton that its Linux GPU builds ask for
SHIPPED_PAIRS = {(2, 10): (3, 6), (2, 11): (3, 6), (2, 12): (3, 7), (2, 14): (3, 8)}
# after these the whole process has lost its GPU, whatever caused them
_LOST = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "timed out",
)
_OLD_DRIVER = ("device kernel image is invalid", "no kernel image", "unsupported toolchain", "forward compatibility")
_ERROR_LENGTH = 300


@functools.cache
def why_not_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, in one line with the way out; None where they can.

    It is asked once per process: what is installed meanwhile counts after a restart.
    """
    import torch

    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: {INSTALL_TRITON} (Linux only)"
    version = triton_version()
    if version is not None and two(version) < TRITON_WINDOW[0]:
        return f"Triton {version} is too old: {INSTALL_TRITON}"
    simulated = interpreted()
    if device.type == "cpu" and simulated:
        return None
    if device.type != "cuda":
        return (
            f"the kernels need an NVIDIA GPU, and this is {device}: move the model with .to('cuda') "
            "(TRITON_INTERPRET=1 runs the launches on the CPU, for tests)"
        )
    if getattr(torch.version, "hip", None) is not None:
        return f"this torch is built for ROCm {torch.version.hip}, and the kernels are made for NVIDIA GPUs"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a CPU build: install one for CUDA, https://pytorch.org/get-started/locally"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_COMPUTE_CAPABILITY:
        found = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
        return f"{found}, and the kernels need 8.0 or later (A100, RTX 30 series and newer)"
    return None if simulated else _why_no_launcher()


def build_failure(error: BaseException) -> str | None:
    """Why Triton could not build or load a kernel, in one line with the way out; None for any other error.

    Other errors are memory that ran out, a GPU that was lost to an earlier fault, and what launches themselves raise.
    """
    from .memory import is_out_of_memory

    links = list(_chain(error))
    if any(is_out_of_memory(link) or any(word in str(link) for word in _LOST) for link in links):
        return None
    found = [link for link in links if _is_tritons(link) or _raised_in_building(link)]
    if not found:
        return None
    cause = one_line(found[0])
    if any(word in cause for word in _OLD_DRIVER):
        hint = f"the driver ({driver_version()}) is too old for Triton {triton_version()}: update it"
    elif "libcuda" in cause or "ldconfig" in cause:
        hint = "set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1"
    elif isinstance(found[0], PermissionError):
        hint = "set TRITON_CACHE_DIR to a folder that can be written to"
    else:
        hint = _why_no_launcher() or "please report the output of `capacitor-rt doctor --check`"
    return f"Triton could not build a kernel ({cause}): {hint}"


def one_line(error: BaseException) -> str:
    """Type and message of an error on one line, shortened."""
    # the compiler's errors put an excerpt of the source before what is wrong with it
    message = getattr(error, "error_message", None) or str(error)
    text = f"{type(error).__name__}: {' '.join(str(message).split())}"
    return text if len(text) <= _ERROR_LENGTH else f"{text[: _ERROR_LENGTH - 3]}..."


def describe(device: torch.device) -> dict[str, str]:
    """What a result on `device` depends on, by name, for reports."""
    import torch

    facts = {"GPU": "none (Triton's interpreter)" if interpreted() else "none"}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts = {"GPU": torch.cuda.get_device_name(device), "compute capability": f"{major}.{minor}"}
        facts["driver"] = driver_version()
    facts |= {
        "CUDA": torch.version.cuda or "none",
        "torch": str(torch.__version__),
        "Triton": triton_version() or "none",
        "capacitor_rt": version_of(DISTRIBUTION) or "unknown",
    }
    return facts | {"Python": platform.python_version(), "OS": platform.platform()}


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def triton_version() -> str | None:
    """The installed version of Triton, whose nightly builds have another name; None where there is none."""
    return version_of("triton") or version_of("pytorch-triton")


def two(version: str) -> tuple[int, int]:
    """The first two parts of a version."""
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(re.match(r"\d*", minor)[0] or 0)  # type: ignore[index]


def shipped_triton(torch_version: str) -> str | None:
    """The Triton that a torch comes with: what the installed one asks for, else what is known; None for neither."""
    for requirement in _requirements("torch"):
        if pinned := re.match(r"triton\s*\(?==\s*([\d.]+)", requirement):
            return pinned[1]
    known = SHIPPED_PAIRS.get(two(torch_version))
    return None if known is None else f"{known[0]}.{known[1]}"


@functools.cache
def driver_version() -> str:
    """Version of the NVIDIA driver, "unknown" where it cannot be found out."""
    proc = Path("/proc/driver/nvidia/version")
    if proc.is_file() and (found := re.search(r"Module\s.*?(\d+\.\d+(?:\.\d+)?)", proc.read_text())):
        return found[1]
    try:
        # Windows' subsystem for Linux has the library and no such file
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, 96) == 0:
            return text.value.decode()
    except (OSError, AttributeError):
        pass
    return "unknown"


def commit() -> str | None:
    """The commit that this package is of, where it is a checkout or was installed from one."""
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
    try:
        origin = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or ""
    except importlib.metadata.PackageNotFoundError:
        return None
    found = re.search(r'"commit_id":\s*"(\w+)"', origin)
    return found[1] if found else None


def interpreted() -> bool:
    """Whether launches run under Triton's interpreter, as TRITON_INTERPRET=1 asks for."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _requirements(distribution: str) -> list[str]:
    try:
        return importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _why_no_launcher() -> str | None:
    """Triton builds its launcher by a C compiler, as `triton/runtime/build.py` finds it, when it first runs."""
    from triton import knobs

    if knobs.build.impl is not None:
        return None
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        missing = f"CC is {named!r}, which is no command: let it name a C compiler, or unset it"
    elif named is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        missing = "Triton finds no C compiler for its launcher: apt-get install gcc, or let CC name one"
    elif (headers := _missing_headers()) is not None:
        missing = headers
    else:
        return None
    return None if _launcher_is_cached() else missing


def _missing_headers() -> str | None:
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    further = [os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH")]
    folders = [include, *(folder for paths in further for folder in paths.split(os.pathsep) if folder)]
    if any(Path(folder, "Python.h").is_file() for folder in folders):
        return None
    package = f"python{platform.python_version().rpartition('.')[0]}-dev"
    return f"{include}/Python.h is missing, which Triton's launcher includes: apt-get install {package}"


def _launcher_is_cached() -> bool:
    """Whether some launcher was built on this machine: then those of the kernels may be there too."""
    from triton import knobs

    return next(Path(knobs.cache.dir).glob("*/cuda_utils*.so"), None) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from or while handling."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _is_tritons(error: BaseException) -> bool:
    kind = type(error)
    return kind.__module__.partition(".")[0] == "triton" and kind.__name__ != "InterpreterError"


def _raised_in_building(error: BaseException) -> bool:
    """Whether the error came through Triton's compiler, its build of the launcher, or its loading of a module."""
    spec = importlib.util.find_spec("triton")
    root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    trace = error.__traceback__
    while trace is not None and root is not None:
        code = trace.tb_frame.f_code
        if Path(code.co_filename).is_relative_to(root):
            part = Path(code.co_filename).relative_to(root)
            build = part.parts[0] == "compiler" or part.parts[:2] in {("runtime", "build.py"), ("runtime", "cache.py")}
            # `__call__` of a backend's driver is the launch itself
            if build or (part.parts[0] == "backends" and code.co_name != "__call__"):
                return True
        trace = trace.tb_next
    return False
