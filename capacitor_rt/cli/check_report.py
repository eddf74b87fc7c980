"""`capacitor-rt doctor --check`: every launch against plain torch, as a report that can be pasted into an issue."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..printable import counted
from ..runtime import platform
from .options import Dtype, resolve_device
from .terminal import echo, echo_json, note

if TYPE_CHECKING:
    import torch

    from ..runtime.self_check import CheckRow


def check_report(device: str, dtype: Dtype | None, as_json: bool) -> bool:
    """Check the kernels on a device and print the report; whether nothing disagreed.

    Where the kernels cannot run there is nothing to check, which one line says.

    Raises:
        InputError: the device is not there, or its dtype cannot be checked.
    """
    target = _target(device)
    reason = platform.why_not_triton(target)
    if reason is not None:
        if as_json:
            echo_json({"ok": True, "nothing_to_check": reason})
        else:
            echo(f"nothing to check: {reason}")
        return True
    import torch

    compute = dtype.torch() if dtype else torch.bfloat16 if target.type == "cuda" else torch.float32
    if target.type == "cpu" and compute == torch.bfloat16:
        raise InputError("Triton's interpreter computes bfloat16 wrongly: pass --compute-dtype fp16 or fp32")
    facts = platform.describe(target) | {"commit": platform.commit() or "unknown"}
    facts["checked in"] = str(compute).removeprefix("torch.")
    return _as_json(target, compute, facts) if as_json else _as_text(target, compute, facts)


def _target(name: str) -> torch.device:
    import torch

    from ..checks import check_device

    if name == "auto":
        # under the interpreter kernels run on the CPU, whatever else there is
        name = "cpu" if platform.interpreted() else resolve_device(name)
    target = check_device(name)
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    return target


def _as_json(device: torch.device, dtype: torch.dtype, facts: dict[str, str]) -> bool:
    from ..runtime import self_check

    rows = self_check.check_launches(device, dtype)
    _record(device, dtype, rows)
    ok = all(row.ok for row in rows)
    bits = _bits(device, dtype) if ok else []
    rows = [*rows, *bits]
    ok = all(row.ok for row in rows)
    shown: list[dict[str, Any]] = [
        {"name": row.name, "error": row.error, "bound": row.bound, "ok": row.ok, "problem": row.problem} for row in rows
    ]
    echo_json({"ok": ok, "machine": facts, "rows": shown})
    return ok


def _as_text(device: torch.device, dtype: torch.dtype, facts: dict[str, str]) -> bool:
    from ..runtime import self_check

    note("checking every launch against plain torch: up to half a minute, most of it to compile")
    echo("```")
    for name, value in facts.items():
        echo(f"{name + ':':<20}{value}")
    echo()
    echo(f"{'launch':<46}{'error':>9}  {'bound':>9}")
    begin, rows = time.perf_counter(), []
    for row in self_check.checks(device, dtype):
        # at once: where a launch hangs, the one before it is the last that is seen
        echo(_line(row))
        rows.append(row)
    _record(device, dtype, rows)
    if all(row.ok for row in rows):
        bits = _bits(device, dtype)
        echo("\n".join(map(_line, bits)))
        rows += bits
    seconds = time.perf_counter() - begin
    wrong = sum(not row.ok for row in rows)
    verdict = "all within their bounds" if not wrong else f"{wrong} of them wrong"
    echo()
    echo(f"{counted(len(rows), 'check')} in {seconds:.1f} s, {verdict}")
    echo("```")
    if wrong:
        note("please report all of the above")
    return not wrong


def _record(device: torch.device, dtype: torch.dtype, rows: list[CheckRow]) -> None:
    """Let backend "auto", which only serves GPUs, know from now on."""
    if device.type == "cuda":
        from ..runtime import first_contact

        first_contact.record(device, dtype, rows)


def _bits(device: torch.device, dtype: torch.dtype) -> list[CheckRow]:
    """Whether narrower tiles leave the same bits; only GPUs take them, and in float32 those of e4m3 alone."""
    import torch

    if device.type != "cuda":
        return []
    from capacitor_kernels.launch import E4M3_COMPUTE_CAPABILITY, compute_capability

    from ..runtime import first_contact, self_check

    rows = []
    if dtype != torch.float32:
        rows = self_check.check_bits(device, dtype)
        first_contact.record_bits(device, dtype, rows)
    if compute_capability(device) >= E4M3_COMPUTE_CAPABILITY:
        in_fp8 = self_check.check_fp8_bits(device, dtype)
        first_contact.record_bits(device, dtype, in_fp8, fp8=True)
        rows += in_fp8
    return rows


def _line(row: CheckRow) -> str:
    error, bound = ("-" if figure is None else f"{figure:.2e}" for figure in (row.error, row.bound))
    return f"{row.name:<46}{error:>9}  {bound:>9}  {'ok' if row.ok else f'WRONG: {row.problem}'}"
