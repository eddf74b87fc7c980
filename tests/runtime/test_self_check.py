"""The check of every launch: it covers every kernel, passes here, and names what is wrong where something is."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
from runtime_cases import DEVICE

from capacitor_kernels import OPS, dewhiten, whiten
from capacitor_kernels.launch import INTERPRETED, recording, run_launches
from capacitor_rt.runtime import launch_cases, self_check
from capacitor_rt.runtime.host_ops import host_function
from capacitor_rt.runtime.self_check import CheckRow, check_launches, compare

PLACE = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16


def op_module(op: str):
    return importlib.import_module(f"capacitor_kernels.ops.{op}")


def wrong(rows: list[CheckRow]) -> set[str]:
    return {row.name.split()[0] for row in rows if not row.ok}


def test_all_is_well_here():
    rows = check_launches(PLACE, DTYPE)
    assert [row for row in rows if not row.ok] == []
    # whole numbers are exact
    assert all((row.error > 0) == (not row.name.startswith("resize")) and row.error <= row.bound for row in rows)
    assert {row.name.split()[0] for row in rows} == {*OPS, "dewhiten", "encode", "decode"}
    assert len({row.name for row in rows}) == len(rows)
    text = "\n".join(row.name for row in rows)
    assert all(form in text for form in ("uint8", "nhwc", "split_k", "grn 2x", " split", "fused", "posterior"))


@pytest.mark.skipif(not INTERPRETED, reason="for bfloat16, which the interpreter computes wrongly")
def test_half_types_too():
    assert wrong(check_launches(PLACE, torch.float16)) == set()


@pytest.mark.parametrize("cc", [80, 90, 100, 120])
@pytest.mark.parametrize("sizes", [launch_cases.FULL, launch_cases.TINY], ids=["full", "tiny"])
def test_every_kernel_is_among_the_launches(cc, sizes):
    kernels, tma = set(), set()
    for case in launch_cases.cases(sizes, torch.bfloat16, cc):
        tensors = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in case.specs.items()}
        op = {"whiten": whiten, "dewhiten": dewhiten}.get(case.step.op) or host_function(case.step.op)
        with recording(cc) as launches:
            op(**tensors, **case.step.options)
        kernels |= {launch.kernel.fn.__name__ for launch in launches}
        tma |= {case.step.op for launch in launches if launch.args.get("TMA", False)}
    every = {name for op in OPS for name in vars(op_module(op)) if name.endswith("_kernel")}
    assert kernels == {name for name in every if cc >= 89 or not name.endswith("_fp8_kernel")}
    # of tiny sizes only the hidden layer has rows of whole 16 bytes
    assert bool(tma - {"project_fp8"}) == (sizes is launch_cases.FULL and cc in (90, 100))


def test_a_wrong_factor_is_named(monkeypatch):
    module = op_module("unpatchify")
    real = module.unpatchify
    monkeypatch.setattr(
        module, "unpatchify", lambda *args, **o: real(*args, **o | {"scale_x0": 1.05 * o.get("scale_x0", 1.0)})
    )
    rows = check_launches(PLACE, DTYPE)
    assert wrong(rows) == {"unpatchify", "decode"}
    for row in rows:
        assert row.ok or (row.error > row.bound and "times its bound" in row.problem)


def test_a_wrong_config_is_named(monkeypatch):
    module = op_module("expand")

    def halved(launches, device):
        # tiles of half as many columns, and as many programs as before: half of h stays as it was
        run_launches([replace(x, args=x.args | {"BLOCK_N": x.args["BLOCK_N"] // 2}) for x in launches], device)

    monkeypatch.setattr(module, "run_launches", halved)
    rows = check_launches(PLACE, DTYPE)
    # a model's arena has no NaN in it, but not the right values either
    assert wrong(rows) == {"expand", "encode", "decode"}
    assert all("are not finite" in row.problem and row.error is None for row in rows if row.name.startswith("expand "))


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel keeps its helpers")
def test_a_broken_helper_of_a_kernel_is_named(monkeypatch):
    module = op_module("project")
    monkeypatch.setattr(module, "scaled", op_module("expand").load_tile.__class__(_subtract_scaled))
    assert wrong(check_launches(PLACE, DTYPE)) == {"project", "encode", "decode"}


def _subtract_scaled(a, g, KIND):
    return a - a * g


def test_a_launch_that_raises_is_one_line(monkeypatch):
    def refuse(launches, device):
        raise RuntimeError("Triton Error [CUDA]: invalid argument\nin some file\n" + 400 * "x")

    monkeypatch.setattr(op_module("grn"), "run_launches", refuse)
    rows = check_launches(PLACE, DTYPE)
    assert wrong(rows) == {"grn", "encode", "decode"}
    (first, *_) = (row for row in rows if not row.ok)
    assert first.problem.startswith("RuntimeError: Triton Error [CUDA]: invalid argument in some file x")
    assert len(first.problem) == 300 and first.error is first.bound is None
    assert isinstance(first.raised, RuntimeError)


def test_after_a_lost_device_nothing_more_is_tried(monkeypatch):
    def lose(launches, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(op_module("expand"), "run_launches", lose)
    monkeypatch.setattr(self_check, "device_works", lambda _: False)
    *before, last, end = check_launches(PLACE, DTYPE)
    assert all(row.ok for row in before) and last.name.startswith("expand ") and "illegal memory" in last.problem
    assert end.name == "all that follows" and end.problem == self_check.LOST


def test_the_callers_modes_change_nothing():
    truth = self_check.check_model(PLACE, DTYPE)
    assert all(row.ok for row in truth)
    default = torch.get_default_dtype()
    before = torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):
            again = self_check.check_model(PLACE, DTYPE)
    finally:
        torch.set_default_dtype(default)
    assert again == truth
    assert torch.equal(torch.get_rng_state(), before)


def test_one_wrong_element_is_seen_where_the_mean_hides_it():
    truth = torch.randn(1000, 1000, dtype=torch.float64)
    eager = truth.bfloat16()
    good = compare("x", [(eager, truth, eager)], torch.bfloat16)
    assert good.ok and good.error == pytest.approx((good.bound - 2e-5) / 2)
    got = eager.clone()
    got[3, 5] += 0.7
    row = compare("x", [(eager, truth, eager), (got, truth, eager)], torch.bfloat16)
    assert row.error < row.bound
    assert row.problem.startswith("the largest error, at [3, 5], is 0.7")


def test_the_row_is_that_of_the_worst_output():
    truth = torch.ones(64, dtype=torch.float64)
    eager = truth * (1 + 1e-3)
    rows = [(truth + 5e-4, truth, eager), (truth + 1.5e-3, truth, eager), (truth, truth, eager)]
    row = compare("x", rows, torch.float16)
    assert row.ok and row.error == pytest.approx(1.5e-3) and row.bound == pytest.approx(2.02e-3)
    row = compare("x", [*rows, (truth + 4e-3, truth, eager)], torch.float16)
    assert row.error == pytest.approx(4e-3) and row.problem == "the error is 1.98 times its bound"
    row = compare("x", [(truth.where(truth > 2, math.nan), truth, eager)], torch.float16)
    assert row.problem == "64 of 64 values are not finite"


def test_encoding_in_fp8_is_checked_against_its_emulation(monkeypatch):
    (row,) = self_check.check_fp8(PLACE, DTYPE)
    assert row.ok and 0 < row.error < 0.1 and row.name.startswith("encode in fp8 2x")
    module = op_module("project_fp8")
    real = module.project_fp8
    monkeypatch.setattr(module, "project_fp8", lambda **o: real(**o | {"gain": -2 * o["gain"]}))
    (row,) = self_check.check_fp8(PLACE, DTYPE)
    assert not row.ok and "times its bound" in row.problem
