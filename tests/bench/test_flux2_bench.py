"""The FLUX.2 VAE beside this model: what is timed, and its absence in one clear line."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from bench import _contenders as contenders
from bench import _endtoend as endtoend
from bench import flux2, model
from bench._contenders import FLUX2, FLUX2_EAGER, FLUX2_FORMS, TINY, TINY_FLUX2, Setting, Shape
from bench._timing import Ceilings
from capacitor_rt.evaluation.flux2 import CONFIG, missing

needs_diffusers = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def test_absence_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    assert flux2.main(["--device", "cpu"]) == 0
    line = "diffusers is not installed: pip install '.[bench]'"
    assert capsys.readouterr().out == f"FLUX.2 not measured: {line}\n"


@needs_diffusers
def test_flops_are_those_of_the_published_architecture():
    # 273.3 and 622.5 GFLOP at 256x256, as counted from the published configuration
    flops = [contenders._flux2_flops(CONFIG, Shape(direction, 1, 256)) / 1e9 for direction in ("encode", "decode")]
    assert flops == pytest.approx([273.26, 622.45], rel=1e-3)


@needs_diffusers
def test_flux2_is_timed_beside_this_model(tmp_path):
    setting = Setting(torch.device("cpu"), torch.float32, TINY, TINY_FLUX2)
    ceilings = Ceilings(100.0, 1000.0, "for the tests")
    with endtoend.Bench(setting, ceilings, {}, tmp_path / "f.jsonl", "flux2", rounds=1) as bench:
        theirs, ours = bench.measure(Shape("decode", 1, 32), [FLUX2_EAGER, contenders.EAGER])
    assert theirs["model"] == FLUX2 and theirs["flops"] == setting.flops(FLUX2, Shape("decode", 1, 32)) > ours["flops"]
    assert ours["speedup_over"]["flux2/eager"] == pytest.approx(theirs["ms"] / ours["ms"])


@needs_diffusers
def test_flux2_command(tmp_path):
    out = tmp_path / "flux2.jsonl"
    options = ["--device", "cpu", "--shape", "encode:1x32", "--compile", "none", "--out", str(out)]
    assert flux2.main(options) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()][1:]
    variants = [(line["model"], line["variant"]) for line in lines]
    assert variants[:2] == [("full_capacitor", "ours"), (FLUX2, "eager")]
    assert (FLUX2, "eager, our attention") in variants
    assert all("diffusers" in line and line["ms"] > 0 for line in lines)


def test_rows_are_those_of_the_model_benchmark():
    assert FLUX2_FORMS == ("eager", "eager, channels_last", "eager, our attention", "torch.compile")
    jobs = model.plan_jobs(contenders.FLUX2S, [Shape("encode", 2, 32)], [Shape("encode", 4, 32)], "named")
    # ours and every form of FLUX.2 that needs no compiler in one comparison, the compiled one beside ours and eager
    (_, quick), (_, compiled), (_, sweep) = jobs
    assert {c.key for c in quick} == {
        "full_capacitor/ours",
        "full_capacitor/eager",
        "flux2/eager",
        "flux2/eager, channels_last",
        "flux2/eager, our attention",
    }
    assert [c.key for c in compiled] == ["full_capacitor/ours", "flux2/eager", "flux2/torch.compile"]
    # what the sweep compares is this runtime and FLUX.2, by torch's attention and by the kernel
    assert [c.key for c in sweep] == ["full_capacitor/ours", "flux2/eager", "flux2/eager, our attention"]
