"""Tensors of more than 2^31 elements: only the last image holds data, and only its CTAs run.

The tensors are virtual memory, a few gigabytes each, of which a few megabytes are touched. An address that is computed
in 32 bits falls outside the tensor or misses the last image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capacitor_kernels.launch import recording

from . import cases
from .cases import Case, Form, Tensors
from .compare import blank, rms
from .execution import Device
from .parse import PtxError

_LIMIT = 2**31
# bfloat16 rounds by 2^-9 at most, and a product's inputs are exact
_MOST_ERROR = 6e-3
_LANES = 2048


@dataclass(frozen=True)
class Large:
    """A case of one image, how many of them the op is called with, and how many CTAs run: the last ones.

    `by_image`: the first axis of the grid is the image, and its CTAs are the ones to run.
    """

    case: Case
    images: int
    ctas: int
    by_image: bool = False


def large_cases(cc: int) -> Iterator[Large]:
    """Every op whose tensors grow with the batch."""
    form, grid = Form(cc), (16, 16)
    yield Large(cases.expand(form, 1, 256, 896, 3584), 2400, 16)
    yield Large(cases.project(form, 1, 256, 3584, 896), 2400, 4)
    yield Large(cases.dwconv(form, 1, *grid, 896), 9600, 7)
    yield Large(cases.fuse_skip(form, 1, 256, 896, 896), 9600, 4)
    yield Large(cases.patchify(form, 1, grid, 16, 896, "bf16"), 11000, 4)
    yield Large(cases.unpatchify(form, 1, grid, 16, 896, "bf16", "fp32"), 11000, 8)
    yield Large(cases.head(form, 1, grid, 896, 128), 9600, 4)
    yield Large(cases.whiten(form, 1, grid, 128), 66000, 16)
    yield Large(cases.grn(form, 1, 128, 3584), 4700, 0, by_image=True)


def run_large(large: Large) -> tuple[bool, str]:
    """(verdict, numbers): what the CTAs that ran wrote of the last image is right, and they wrote something."""
    case, count = large.case, large.images
    images = {name: _grown(t, count) for name, t in case.images.items()}
    one = blank(case.outputs(1))
    outputs = {name: _grown(t, count) for name, t in one.items()}
    biggest = max(t.numel() for t in (images | outputs).values())

    def order(ids: np.ndarray) -> np.ndarray:
        return ids[ids % count == count - 1] if large.by_image else ids[-large.ctas :]

    device = Device(case.cc, max_lanes=_LANES, watched_ctas=0, order=order)
    with recording(case.cc) as launches:
        case.call(images, case.weights, outputs, count)
    try:
        device.run(launches)
    except PtxError as error:
        return False, f"{type(error).__name__}: {error}"
    last = {name: t[-one[name].shape[0] :] for name, t in outputs.items()}
    truth = case.reference(_double(case.images), _double(case.weights), 1)
    ok, texts = biggest > _LIMIT, []
    for name, want in truth.items():
        # sums are over CTAs of which some did not run
        if name not in last:
            continue
        have = last[name].double()
        written = have.isfinite()
        off = rms((have - want)[written]) / rms(want) if written.any() else float("nan")
        ok &= off < _MOST_ERROR
        texts.append(f"{name} {off:.2e} of {int(written.sum())} values")
    ran = sum(launch.ctas for launch in device.launches)
    return ok, f"{'; '.join(texts)} | {biggest / _LIMIT:.2f} x 2^31 elements, {ran} CTAs"


def _grown(t: Tensor, images: int) -> Tensor:
    """As many images, of which only the last holds values."""
    rows = t.shape[0]
    out = torch.empty(images * rows, *t.shape[1:], dtype=t.dtype)
    out[-rows:] = t
    return out


def _double(tensors: Tensors) -> Tensors:
    return {name: t.double() for name, t in tensors.items()}
