"""Verdicts: a kernel's error against float64, with eager torch in the same dtype as the yardstick."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capacitor_kernels.launch import recording

from .cases import Case, Specs, Tensors
from .execution import Device
from .parse import PtxError

# an error may be twice eager's, and a few roundings of the dtype more
RATIO = 2.0
_FLOOR = {torch.float32: 1e-6}
_MAX_FLOOR = {torch.float32: 3e-5}
_DEFAULT_FLOOR, _DEFAULT_MAX_FLOOR = 2e-5, 1e-2
# of uint8 images: values may round the other way, by one step each from the kernel's and the yardstick's error
_MOST_STEPS, _BYTES_FLOOR = 2, 1e-3
_FEW_LANES = 1024


@dataclass(frozen=True)
class Verdict:
    """Whether a case passed, its numbers, and its relative rms error over eager's (NaN where there is none)."""

    ok: bool
    text: str
    ratio: float
    seconds: float


def rms(x: Tensor) -> float:
    """Root mean square in float64."""
    return float(x.double().square().mean().sqrt())


def blank(specs: Specs) -> Tensors:
    """Tensors of NaN, or of 0xA5 for bytes."""
    return {
        name: torch.full(shape, 0xA5 if dtype == torch.uint8 else float("nan"), dtype=dtype)
        for name, (shape, dtype) in specs.items()
    }


def execute(device: Device, case: Case, images: Tensors, batch: int) -> Tensors:
    """Results of the case's op on these images, executed."""
    outputs = blank(case.outputs(batch))
    with recording(case.cc) as launches:
        case.call(images, case.weights, outputs, batch)
    device.unwritten(*(t for name, t in outputs.items() if name not in case.filled))
    device.run(launches)
    return case.results(outputs, batch)


def run_case(
    case: Case, bits: bool = False, mutate: Callable[[str], str] | None = None, last_warps_first: bool = True
) -> Verdict:
    """Execute a case and judge it.

    Args:
        bits: also ask whether the order of CTAs, or the images beside one, change its bits.
        mutate: breaks the PTX.
        last_warps_first: which of specialised warps go on until they have to wait.
    """
    start = time.perf_counter()
    device = Device(case.cc, mutate=mutate, last_warps_first=last_warps_first)
    inputs = case.images | case.weights
    before = {name: t.clone() for name, t in inputs.items()}
    try:
        got = execute(device, case, case.images, case.batch)
        changed = [f"input {name} was changed" for name in inputs if _differ(inputs[name], before[name])]
        double = [
            {k: t.double() if t.is_floating_point() else t for k, t in d.items()} for d in (case.images, case.weights)
        ]
        numbers, complaints, ratio = judge(
            case, got, case.reference(*double, case.batch), case.reference(case.images, case.weights, case.batch)
        )
        complaints = changed + complaints + (_bits(case, got) if bits else [])
    except PtxError as error:
        numbers, complaints, ratio = [], [f"{type(error).__name__}: {error}"], float("nan")
    text = "; ".join(numbers + complaints)
    return Verdict(not complaints, text, ratio, time.perf_counter() - start)


def judge(case: Case, got: Tensors, truth: Tensors, eager: Tensors) -> tuple[list[str], list[str], float]:
    """(numbers, complaints, worst ratio of rms errors)."""
    numbers, complaints, ratios = [], [], [0.0]
    for name, want in truth.items():
        if got[name].dtype == torch.uint8:
            off, off_eager = _apart(got[name], want), _apart(eager[name], want)
            steps = int((got[name].int() - want.int()).abs().max())
            numbers.append(f"{name} {off:.2%} of bytes differ (eager {off_eager:.2%}), by at most {steps}")
            if steps > _MOST_STEPS or off > RATIO * off_eager + _BYTES_FLOOR:
                complaints.append(f"{name}: bytes differ")
            continue
        have, wanted, plain = got[name].double(), want.double(), eager[name].double()
        if not have.isfinite().all():
            complaints.append(f"{name}: {int((~have.isfinite()).sum())} values not finite or not written")
            continue
        scale = max(rms(wanted), 1e-30)
        error, error_eager = rms(have - wanted) / scale, rms(plain - wanted) / scale
        top, top_eager = (float((x - wanted).abs().max()) / scale for x in (have, plain))
        numbers.append(f"{name} {error:.2e} (eager {error_eager:.2e})")
        if name in case.relative:
            if error > case.relative[name]:
                complaints.append(f"{name}: relative rms error above {case.relative[name]:.0e}")
            continue
        if error_eager:
            ratios.append(error / error_eager)
        if error > RATIO * error_eager + _FLOOR.get(case.dtype, _DEFAULT_FLOOR):
            complaints.append(f"{name}: rms error too large")
        if top > max(RATIO * top_eager, _MAX_FLOOR.get(case.dtype, _DEFAULT_MAX_FLOOR)):
            complaints.append(f"{name}: largest error {top:.2e}, eager {top_eager:.2e}")
    return numbers, complaints, max(ratios)


def _bits(case: Case, got: Tensors) -> list[str]:
    """Complaints about bits that depend on what they may not depend on."""
    rng = np.random.default_rng(1)
    shuffled = Device(case.cc, max_lanes=_FEW_LANES, order=lambda ids: rng.permutation(ids), last_warps_first=False)
    again = execute(shuffled, case, case.images, case.batch)
    out = [f"bits of {name} depend on the order of CTAs" for name in got if _differ(got[name], again[name])]
    if case.batch > 1 and case.batch_free:
        last = case.batch - 1
        alone = execute(Device(case.cc), case, _image(case.images, case.batch, last), 1)
        mine = _image(got, case.batch, last)
        out += [f"bits of {name} depend on the batch" for name in got if _differ(mine[name], alone[name])]
    return out


def _image(tensors: Tensors, batch: int, index: int) -> Tensors:
    def part(t: Tensor) -> Tensor:
        rows = t.shape[0] // batch
        return t.narrow(0, index * rows, rows).clone()

    return {name: part(t) for name, t in tensors.items()}


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a != b).double().mean())


def _differ(a: Tensor, b: Tensor) -> bool:
    raw: list[Any] = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return not torch.equal(*raw)


def same_bits(first: Case, second: Case) -> tuple[bool, str]:
    """Whether two cases of the same inputs have results of the same bits, and where not."""
    got = [execute(Device(case.cc), case, case.images, case.batch) for case in (first, second)]
    differ = [f"{name} differs" for name in got[0] if _differ(got[0][name], got[1][name])]
    return not differ, ", ".join(differ) or f"{', '.join(got[0])} of the same bits"
