"""The first time that the Triton backend meets a GPU, driver and set of versions: one encode and decode against torch.

What came of it is remembered in the user's cache folder, by all that it depends on, so that it is asked once.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from capacitor_kernels.launch import E4M3_COMPUTE_CAPABILITY, INTERPRETED, compute_capability

from .memory import is_out_of_memory
from .platform import build_failure, describe
from .self_check import CheckRow, check_bits, check_fp8, check_fp8_bits, check_model

SWITCH = "CAPACITOR_SELF_CHECK"
# a result holds as long as all of these are the same, and the dtype
DEPENDS_ON = ("GPU", "compute capability", "driver", "torch", "Triton", "capacitor_rt")
# what is remembered of `few_images`, beside the same of `first_contact`
FEW_IMAGES = ", few images"
# and of `fp8_contact`
IN_FP8 = ", fp8"
_lock = threading.Lock()
_met: dict[str, str | None] = {}


def first_contact(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton backend is not to be trusted with `device` and `dtype`, in one line; None where it may serve.

    Takes about a second, and compilation, when a combination is new to this machine; else it looks it up. Inside a
    capture, and in code that torch traces, nothing is run and None is returned. CAPACITOR_SELF_CHECK=0 turns it off.
    """
    if os.environ.get(SWITCH) == "0" or not _may_run(device):
        return None
    return _answer(combination(device, dtype), device, dtype, check_model)


def fp8_contact(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same for encoding in e4m3; None on a GPU that has no launches of it, which a runtime refuses."""
    if os.environ.get(SWITCH) == "0" or not _may_run(device):
        return None
    if compute_capability(device) < E4M3_COMPUTE_CAPABILITY:
        return None
    return _answer(combination(device, dtype) + IN_FP8, device, dtype, check_fp8)


def few_images(device: torch.device, dtype: torch.dtype, ask: bool = True, fp8: bool = False) -> str | None:
    """Why few images are to be run by the tiles of many, in one line; None where narrower ones leave the same bits.

    Asked and remembered as `first_contact` is; without `ask` nothing is run, and None is returned where nothing is
    known. With `fp8` it is about encoding in e4m3.
    """
    if os.environ.get(SWITCH) == "0" or INTERPRETED or not _may_run(device):
        return None
    if compute_capability(device) < E4M3_COMPUTE_CAPABILITY if fp8 else dtype == torch.float32:
        return None
    key = combination(device, dtype) + (IN_FP8 if fp8 else "") + FEW_IMAGES
    if not ask:
        with _lock:
            return _met.get(key, _read().get(key))
    return _answer(key, device, dtype, check_fp8_bits if fp8 else check_bits)


def _answer(
    key: str,
    device: torch.device,
    dtype: torch.dtype,
    check: Callable[[torch.device, torch.dtype], Iterable[CheckRow]],
) -> str | None:
    """What is remembered under a key, else what a check says, which is then remembered."""
    with _lock:
        if key not in _met:
            known = _read()
            if key in known:
                _met[key] = known[key]
            else:
                _settle(key, device, dtype, check(device, dtype))
        return _met.get(key)


def record(device: torch.device, dtype: torch.dtype, rows: Iterable[CheckRow]) -> None:
    """Take the rows of a longer check for what `first_contact` is to say from now on."""
    with _lock:
        _settle(combination(device, dtype), device, dtype, rows)


def record_bits(device: torch.device, dtype: torch.dtype, rows: Iterable[CheckRow], fp8: bool = False) -> None:
    """The same for `few_images`."""
    with _lock:
        _settle(combination(device, dtype) + (IN_FP8 if fp8 else "") + FEW_IMAGES, device, dtype, rows)


def combination(device: torch.device, dtype: torch.dtype) -> str:
    """What a result depends on, as one line."""
    facts = describe(device)
    named = [f"{name} {facts[name]}" for name in DEPENDS_ON if name in facts]
    return ", ".join([*named, str(dtype).removeprefix("torch.")])


def report_command(device: torch.device, dtype: torch.dtype) -> str:
    """The command whose output is to be reported."""
    short = {torch.float16: " --compute-dtype fp16", torch.float32: " --compute-dtype fp32"}.get(dtype, "")
    return f"capacitor-rt doctor --check --device {device}{short}"


def memory_file() -> Path | None:
    """Where results are remembered; None where the user has no folder for it."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "capacitor_rt" / "self-check.json"


def _settle(key: str, device: torch.device, dtype: torch.dtype, rows: Iterable[CheckRow]) -> None:
    """Decide by a check's rows."""
    bad = next((row for row in rows if not row.ok), None)
    if bad is None:
        _keep(key, None)
    elif bad.raised is not None and (unbuilt := build_failure(bad.raised)) is not None:
        # a compiler may be installed, or a driver updated, before the next process
        _met[key] = unbuilt
    elif bad.raised is not None and is_out_of_memory(bad.raised):
        # says nothing about the launches: the next model tries again
        _met.pop(key, None)
    else:
        what = "few images took other bits" if key.endswith(FEW_IMAGES) else "the Triton backend failed its check"
        found = f"{what} on this GPU ({bad.name}: {bad.problem})"
        _keep(key, f"{found}: please report the output of `{report_command(device, dtype)}`")


def _may_run(device: torch.device) -> bool:
    if torch.compiler.is_compiling():
        return False
    # tensors without values, such as torch.export makes of all new ones
    if type(torch.empty(0, device="cpu")) is not torch.Tensor:
        return False
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()


def _keep(key: str, reason: str | None) -> None:
    _met[key] = reason
    path = memory_file()
    if path is None:
        return
    # what another process writes in between is lost, and asked once more
    text = json.dumps(_read() | {key: reason}, indent=1, sort_keys=True) + "\n"
    new: str | None = None
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(new, path)
        return
    if new is not None:
        with suppress(OSError):
            os.unlink(new)


def _read() -> dict[str, str | None]:
    """What is remembered; nothing where there is no file, or one that is not ours."""
    path = memory_file()
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: reason for key, reason in found.items() if reason is None or isinstance(reason, str)}
