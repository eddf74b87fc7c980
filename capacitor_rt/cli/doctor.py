"""`capacitor-rt doctor`: what this machine has, what will be used, what is missing and how to get it."""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import install_hint, is_installed
from ..printable import counted
from ..runtime.platform import (
    INSTALL_TRITON,
    TORCH_LEAST,
    TRITON_WINDOW,
    shipped_triton,
    triton_version,
    two,
    version_of,
    why_not_triton,
)
from .check_report import check_report
from .options import AsJson, ComputeDtype, Device
from .terminal import echo, echo_json

OK, MISSING, PROBLEM = "ok", "missing", "problem"
NOT_MEASURED = "not measured yet"
BENCH = Path(__file__).parents[2] / "bench"
RESULTS = BENCH / "results"
PROBE_BYTES = 64 << 20
PROBE_SECONDS = 0.3
MIB, GIB = 1 << 20, 1 << 30
# package -> (what it is for, the extra that brings it)
OPTIONAL = {
    "PIL": ("image files", "cache"),
    "simplejpeg": ("faster JPEG decoding", "cache"),
    "pyarrow": ("latent caches", "cache"),
    "xxhash": ("latent caches", "cache"),
    "torchvision": ("cache --decode gpu, by nvJPEG", "gpu-decode"),
    "diffusers": ("FLUX.2 as a baseline", "bench"),
    "matplotlib": ("figures of the results", "bench"),
}
_DISTRIBUTION = {"PIL": "pillow"}


@dataclass(frozen=True)
class Finding:
    """One line: its topic, what was found, and for what is missing or wrong the way out."""

    topic: str
    status: str
    found: str
    hint: str = ""


def examine(folder: Path, results: Path) -> list[Finding]:
    """Every finding; a probe that itself fails is a problem in its own line."""
    probes: tuple[Callable[[], Iterator[Finding]], ...] = (
        _host,
        _torch,
        _triton,
        _gpus,
        _nvjpeg,
        _packages,
        _resizing,
        lambda: _disk(folder),
        _jpeg,
        lambda: _expected(results),
    )
    found: list[Finding] = []
    for probe in probes:
        try:
            found += probe()
        except Exception as error:
            name = getattr(probe, "__name__", "probe").strip("_<>")
            found.append(Finding(name, PROBLEM, f"{type(error).__name__}: {error}", "please report this line"))
    return found


def doctor(
    check: Annotated[
        bool, typer.Option("--check", help="Run every launch, and one encode and decode, against plain torch instead.")
    ] = False,
    device: Device = "auto",
    compute_dtype: ComputeDtype = None,
    folder: Annotated[
        Path, typer.Option(help="Folder whose disk is measured; 64 MB are written to it and removed.")
    ] = Path(),
    results: Annotated[Path, typer.Option(help="Folder of measured results to read.", show_default=False)] = RESULTS,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, which configs will be used, what is missing and how fast it can be expected to be.

    Ends with 1 if something is wrong; it is not wrong to have no GPU. With --check (which takes half a minute, most of
    it to compile) the output is a report of every error beside its bound, fit for an issue.
    """
    if check:
        if not check_report(device, compute_dtype, as_json):
            raise typer.Exit(1)
        return
    found = examine(folder, results)
    if as_json:
        echo_json([asdict(finding) for finding in found])
    else:
        width = max(len(finding.topic) for finding in found)
        for finding in found:
            mark = "" if finding.status == OK else f"{finding.status}: "
            hint = f" -> {finding.hint}" if finding.hint else ""
            echo(f"{finding.topic:<{width}}  {mark}{finding.found}{hint}")
    if any(finding.status == PROBLEM for finding in found):
        raise typer.Exit(1)


def _host() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("system", OK, f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    yield Finding("CPU", OK, f"{cores} cores for this process")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        small = free < GIB
        hint = "loaders with worker processes need more: docker run --shm-size 8g" if small else ""
        yield Finding("shared memory", MISSING if small else OK, f"{free / GIB:.1f} GiB free in {shared}", hint)


def _torch() -> Iterator[Finding]:
    import torch

    hip = getattr(torch.version, "hip", None)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {hip}" if hip else "no CUDA"
    old = two(torch.__version__) < TORCH_LEAST
    hint = f"pip install 'torch>={'.'.join(map(str, TORCH_LEAST))}'" if old else ""
    yield Finding("torch", PROBLEM if old else OK, f"{torch.__version__} ({build})", hint)
    driver = _nvidia_smi("driver_version")
    if driver:
        yield Finding("driver", OK, driver[0])
    if driver and not torch.cuda.is_available():
        hint = "install a CUDA build of torch that the driver supports: https://pytorch.org/get-started/locally"
        yield Finding("CUDA", PROBLEM, "the driver sees a GPU and torch does not", hint)


def _triton() -> Iterator[Finding]:
    version = triton_version()
    if version is None:
        yield Finding("triton", MISSING, "not installed, so the torch backend runs", INSTALL_TRITON)
        return
    low, high = TRITON_WINDOW
    tested = low <= two(version) < high
    window = f"the kernels are tested on {low[0]}.{low[1]} to before {high[0]}.{high[1]}"
    hint = "" if tested else INSTALL_TRITON
    yield Finding("triton", OK if tested else PROBLEM, version if tested else f"{version}; {window}", hint)
    yield from _pair(version)


def _pair(triton: str) -> Iterator[Finding]:
    """Whether the installed torch and Triton are a pair that ships together."""
    import torch

    asked = shipped_triton(torch.__version__)
    pair = f"torch {torch.__version__} with Triton {triton}"
    if asked is None:
        yield Finding("pair", OK, f"{pair}: which Triton this torch ships with is not known here")
    elif two(asked) == two(triton):
        yield Finding("pair", OK, f"{pair}: they ship together")
    else:
        yield Finding("pair", OK, f"{pair}: this torch ships with {asked}", "torch.compile may need that one")


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        hint = "an NVIDIA GPU of compute capability 8.0 or later (A100, RTX 30 series and newer) runs the kernels"
        yield Finding("GPU", MISSING, "no NVIDIA GPU, so the torch backend runs on the CPU in float32", hint)
        return
    busy = _nvidia_smi("utilization.gpu")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        cc = properties.major * 10 + properties.minor
        use = f", {busy[index]} % busy" if index < len(busy) else ""
        yield Finding(
            f"GPU {index}",
            OK,
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.L2_cache_size / MIB:.0f} MiB L2, "
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{use}",
        )
        reason = why_not_triton(torch.device("cuda", index))
        if reason is None:
            yield from _configs(index, cc)
        else:
            # where the kernels would run, something is amiss
            status = PROBLEM if cc >= 80 else MISSING
            yield Finding(f"kernels {index}", status, f"the torch backend runs on this GPU: {reason}")


def _configs(index: int, cc: int) -> Iterator[Finding]:
    """Which config file serves a GPU that the kernels run on."""
    from capacitor_kernels import config_rows, gpu_limits

    served = gpu_limits.base_cc(cc)
    families = config_rows.config_families(served)
    relative = "" if served == cc else f", the nearest to sm_{cc}"
    smem = gpu_limits.limits(cc).smem_per_cta
    found = f"sm_{served}.json{relative}: rows for {', '.join(sorted(families))}; {smem / 1024:.0f} KiB per CTA"
    yield Finding(f"configs {index}", OK, f"the Triton backend runs in bfloat16 and float16 with {found}")
    yield _tuned(index, cc)


def _tuned(index: int, cc: int) -> Finding:
    """Which rows of the user come before those of the file."""
    import torch

    from capacitor_kernels import tuning, user_rows

    topic = f"tuned {index}"
    path = user_rows.path_of(cc)
    if path is None:
        reason = os.environ.get(user_rows.VARIABLE)
        return Finding(topic, OK, f"{user_rows.VARIABLE}={reason}: rows of yours are left out")
    try:
        rows = tuning.in_force(cc)
    except user_rows.UserRowsError as error:
        return Finding(topic, PROBLEM, str(error))
    if not rows:
        return Finding(topic, OK, f"no rows of yours in {path}", "capacitor-rt tune lets this GPU choose")
    ops = ", ".join(f"{name} {n}" for name, n in Counter(row.family for row in rows).items())
    newest = max(str(row.evidence.get("date", ""))[:10] for row in rows)
    gpus = sorted({str(row.evidence.get("gpu")) for row in rows})
    other = [gpu for gpu in gpus if gpu != torch.cuda.get_device_name(index)]
    hint = "tuned on another GPU: capacitor-rt tune lets this one choose" if other else ""
    found = f"{counted(len(rows), 'row')} of yours in force ({ops}), measured on {', '.join(gpus)}, {newest}: {path}"
    return Finding(topic, OK, found, hint)


def _nvjpeg() -> Iterator[Finding]:
    # torchvision's wheel has one of its own, those of NVIDIA are for whoever builds with it
    folders = ("torchvision.libs/libnvjpeg.*", "nvidia/*/lib/libnvjpeg.so*")
    wheels = [path for folder in folders for base in sys.path for path in glob.glob(f"{base}/{folder}")]
    system = glob.glob("/usr/local/cuda*/lib64/libnvjpeg.so*") + glob.glob("/usr/lib/*/libnvjpeg.so*")
    libraries = wheels or system
    where = f"found ({Path(libraries[0]).name})" if libraries else "not found"
    # files are decoded by libjpeg-turbo, whose bytes are the same on every machine
    yield Finding("nvJPEG", OK, f"{where}; only `cache --decode gpu` uses it")


def _packages() -> Iterator[Finding]:
    for module, (purpose, extra) in OPTIONAL.items():
        version = version_of(_DISTRIBUTION.get(module, module)) if is_installed(module) else None
        name = _DISTRIBUTION.get(module, module)
        if version:
            yield Finding(name, OK, version)
        else:
            yield Finding(name, MISSING, f"not installed ({purpose})", install_hint(extra))


def _disk(folder: Path) -> Iterator[Finding]:
    """Sequential speed of one file, past the page cache where the system allows it."""
    if not os.access(folder, os.W_OK):
        yield Finding("disk", MISSING, f"{folder.absolute()} cannot be written to", "give --folder")
        return
    if shutil.disk_usage(folder).free < 4 * PROBE_BYTES:
        found = f"less than {4 * PROBE_BYTES // MIB} MiB free in {folder.absolute()}"
        yield Finding("disk", PROBLEM, found, "free some, or give --folder")
        return
    block = os.urandom(4 * MIB)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".capacitor-doctor-") as file:
        begin = time.perf_counter()
        for _ in range(PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        wrote = PROBE_BYTES / (time.perf_counter() - begin)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        with open(file.name, "rb") as again:
            while again.read(len(block)):
                pass
        read = PROBE_BYTES / (time.perf_counter() - begin)
    yield Finding("disk", OK, f"writes {wrote / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s in {folder.absolute()}")


def _resizing() -> Iterator[Finding]:
    """Who resizes by the filter that is the default."""
    if not is_installed("PIL"):
        return
    from ..images.resample import torch_agrees

    if torch_agrees("lanczos"):
        yield Finding("resizing", OK, "by torch")
    else:
        # bytes are the same
        hint = "pip install 'torch>=2.12', or on a GPU cache --resize gpu"
        yield Finding("resizing", OK, "by matrix products, ten times as long: this torch has no Lanczos", hint)


def _jpeg() -> Iterator[Finding]:
    """Decoding speed of one core on a photograph that ships with the package."""
    if not is_installed("PIL"):
        return
    from ..images.decode import decode_image

    data = (Path(__file__).parents[1] / "sample" / "photos" / "china.jpg").read_bytes()
    image = decode_image(data)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < PROBE_SECONDS:
        decode_image(data)
        count += 1
    rate = count / (time.perf_counter() - begin)
    size = f"{image.header.width}x{image.header.height}"
    yield Finding("JPEG decoding", OK, f"{rate:.0f} images/s of {size} on one core, measured now")


def _expected(results: Path) -> Iterator[Finding]:
    """Images per second on this GPU, from measured files only."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("images/s", OK, f"{NOT_MEASURED} on this CPU", f"on a GPU: {how_to_measure(BENCH)}")
        return
    gpu = torch.cuda.get_device_name()
    rates = measured_rates(results, gpu)
    if not rates:
        yield Finding("images/s", OK, f"{NOT_MEASURED} on {gpu}", how_to_measure(BENCH))
    for what, rate in rates.items():
        yield Finding("images/s", OK, f"{rate:.0f}: {what}, measured on {gpu}")


def how_to_measure(bench: Path) -> str:
    """What measures this machine: the bench of a checkout, or what an installed package has."""
    if (bench / "gpu.py").is_file():
        return "python -m bench gpu --out bench/results/NAME"
    return (
        "capacitor-rt cache IMAGES OUT --model MODEL --size 256 prints the images/s of caching; "
        "the bench of every call is part of a checkout and not of the installed package"
    )


def measured_rates(results: Path, gpu: str) -> dict[str, float]:
    """Images per second of this runtime on a GPU of this name, newest figures of `*.jsonl`; what -> rate."""
    lines: list[dict[str, Any]] = []
    for path in sorted(results.rglob("*.jsonl")) if results.is_dir() else ():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                # the report names what is wrong with a file; here it only yields no figures
                continue
    rates: dict[str, float] = {}
    for line in sorted(lines, key=lambda line: line.get("date", "")):
        if line.get("gpu") != gpu or "images_per_s" not in line:
            continue
        if line["bench"] == "cache":
            rates[f"caching JPEG files at {line['size']}x{line['size']}"] = line["images_per_s"]
        elif line.get("variant") == "ours" and line.get("row"):
            rates[f"{line['direction']} {line['size']}x{line['size']}, batch {line['batch']}"] = line["images_per_s"]
    return rates


def _nvidia_smi(field: str) -> list[str]:
    """One value per GPU; empty where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []
