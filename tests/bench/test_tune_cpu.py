"""Tuning, tried out on the CPU: which candidates are measured, which are refused, what is written."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench import _cases as cases
from bench import kernels, tune
from bench._contenders import TINY
from capacitor_kernels import OPS, tuning
from capacitor_kernels.ops.grn import GrnConfig
from capacitor_kernels.tuning import GemmConfig

CPU = torch.device("cpu")
IMAGES = cases.TINY_IMAGES[0]


def case_of(op: str) -> cases.Case:
    return cases.make_case(op, IMAGES, TINY, torch.float32, 90)


@pytest.mark.parametrize("op", OPS)
def test_the_shape_is_the_one_the_plan_asks_for(op):
    case = case_of(op)
    shape = case.row_shape()
    assert set(shape) == {*tuning.get_family(op).exact, *tuning.get_family(op).near}
    assert tuning.lookup(op, 90, shape, torch.float32) == case.step.options["config"]


def test_another_config_changes_what_depends_on_it():
    case = case_of("expand")
    present = case.step.options["config"]
    other = case.with_config(dataclasses.replace(present, block_m=present.block_m // 2))
    assert other.step.options["config"] != present
    tiles, more = case.specs["partials"].shape[1], other.specs["partials"].shape[1]
    assert more >= tiles and kernels.difference(other, CPU) <= kernels.AGREEMENT["float32"]
    assert [launch.args["BLOCK_M"] for launch in other.launches()] == [present.block_m // 2]


def test_candidates_are_distinct_and_leave_out_the_present_one():
    present = tuning.lookup("expand", 90, {"tokens_per_image": 256, "dim": 896, "hidden": 3584}, torch.bfloat16)
    found = tune.candidates(tuning.get_family("expand"), present, 90)
    assert len(found) == len(set(found)) > 20 and present not in found
    assert any(config.tma for config in found)
    assert not any(config.tma for config in tune.candidates(tuning.get_family("expand"), present, 80))


def test_trials_are_measured_and_sorted():
    shape, present, trials = tune.tune(case_of("grn"), CPU, replays=2, compile_first=False)
    assert shape == {"tiles": 1, "hidden": TINY.hidden_dim} and isinstance(present, GrnConfig)
    assert len(trials) >= 2 and all(trial.us > 0 for trial in trials)
    assert [t.ratio for t in trials] == sorted(t.ratio for t in trials)


def test_a_wrong_candidate_is_passed_over(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "difference", lambda case, device: 0.5)
    case = case_of("grn")
    assert tune._trial(case, case.with_config(GrnConfig(True, 64, 4)), CPU, 1) is None
    assert "differs from plain torch by 5.0e-01" in capsys.readouterr().out


def _row(block_m: int, tokens: int = 256) -> dict:
    return {
        "shape": {"tokens_per_image": tokens, "dim": 896, "hidden": 3584},
        "dtype": "bf16",
        "use": "throughput",
        "config": {"block_m": block_m, "block_n": 64, "block_k": 64, "group_m": 8, "num_warps": 4, "num_stages": 3},
        "evidence": {"kind": "measured", "us": 1.0},
    }


def test_a_row_is_replaced_or_added_and_can_be_read_back(tmp_path):
    tune.write_row(tmp_path, 90, "expand", _row(64))
    tune.write_row(tmp_path, 90, "expand", _row(32, tokens=64))
    tune.write_row(tmp_path, 90, "project", _row(16))
    tune.write_row(tmp_path, 90, "expand", _row(128))
    families = json.loads((tmp_path / "sm_90.json").read_text())["families"]
    assert families["project"] == [_row(16)]
    assert families["expand"] == [_row(128), _row(32, tokens=64)]
    parsed = tuning._parse_row(tuning.get_family("expand"), 90, 0, families["expand"][0])
    assert parsed.config == GemmConfig(128, 64, 64, 8, 4, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["sm_90.json"]


@pytest.mark.parametrize(("ratio", "written"), [(0.5, True), (0.995, False), (1.2, False)])
def test_only_a_worthwhile_winner_is_written(tmp_path, monkeypatch, ratio, written):
    winner = GrnConfig(split=True, block_f=64, num_warps=4)
    result = ({"tiles": 1, "hidden": 64}, None, [tune.Trial(winner, 2.0, ratio)])
    monkeypatch.setattr(tune, "tune", lambda *args, **options: result)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tune.main(["--device", "cpu", "--op", "grn", "--write", "--configs", str(tmp_path)]) == 0
    path = tmp_path / "sm_90.json"
    assert path.exists() == written
    if written:
        (row,) = json.loads(path.read_text())["families"]["grn"]
        assert row["config"] == {"split": True, "block_f": 64, "num_warps": 4}
        assert row["evidence"]["kind"] == "measured" and row["evidence"]["us"] == 2.0 and row["evidence"]["date"]


def test_interpreter_times_are_not_written_into_the_package(capsys):
    assert tune.main(["--device", "cpu", "--write"]) == 2
    assert "would ship interpreter times" in capsys.readouterr().err
