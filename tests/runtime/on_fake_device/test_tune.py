"""`capacitor-rt tune` on the fake GPU: what it writes, who uses it, and whom a device that computes nothing convinces.

The fake GPU computes no kernel, so the check is told that results are right where a test is about what follows. Its
time is the work that a stream was given: of two launches one is saved by a config that needs one.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from capacitor_kernels import tuning, user_rows
from capacitor_kernels.launch import E4M3
from capacitor_rt import ConfigError, FullCapacitor, InputError
from capacitor_rt.cli import doctor
from capacitor_rt.cli.app import app
from capacitor_rt.config import ModelConfig
from capacitor_rt.runtime import launch_cases, timing, tuner
from capacitor_rt.runtime.configs import configs_digest, configs_in_force, keep_configs
from capacitor_rt.runtime.self_check import CheckRow

GPU = torch.device("cuda", 0)
MODEL = launch_cases.TINY.config
SIDE = 4 * MODEL.patch_size
IMAGE = torch.linspace(-1, 1, 2 * 3 * SIDE * SIDE).reshape(2, 3, SIDE, SIDE)
GRN = {"tiles": 1, "hidden": MODEL.hidden_dim}
CALL = ["--size", str(SIDE), "--batch", "2", "--minutes", "1", "--direction", "encode"]
OPTIONS = [*CALL, "--op", "grn"]
PROJECT = {"tokens_per_image": 16, "hidden": MODEL.hidden_dim, "dim": MODEL.model_dim}
IN_FP8 = [*CALL, "--op", "project_fp8", "--encode-precision", "fp8"]


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch):
    """Folder of the user's rows; a config file of the small model; quick measurements."""
    monkeypatch.setenv(user_rows.VARIABLE, str(tmp_path / "rows"))
    monkeypatch.setattr(timing, "GRAPH_MILLISECONDS", 0.2)
    monkeypatch.setattr(tuner, "REPLAYS", 3)
    monkeypatch.setattr(tuner, "WARM_SECONDS", 0.001)
    monkeypatch.setattr("capacitor_rt.cli.tune.read_architecture", lambda *_: MODEL)
    tuning.reload()
    yield tmp_path / "rows"
    monkeypatch.undo()
    tuning.reload()


@pytest.fixture
def trusted(monkeypatch):
    """A check that finds every launch right."""
    monkeypatch.setattr(tuner, "compare", lambda name, results, dtype: CheckRow(name, 1e-3, 1e-2))


def tune(*options: str):
    return CliRunner().invoke(app, ["tune", *OPTIONS, *options], catch_exceptions=False)


def served() -> FullCapacitor:
    model = FullCapacitor(MODEL, backend="triton", strict_size=False).requires_grad_(False)
    return model.to(GPU, torch.bfloat16)


def present():
    return tuning.lookup("grn", 90, GRN, torch.bfloat16)


def two_launches(folder) -> None:
    """Let the present config be one that needs two launches."""
    config = {"split": True, "block_f": 64, "num_warps": 4}
    line = {"shape": GRN, "dtype": "bf16", "use": "throughput", "config": config, "evidence": {"gpu": "another"}}
    user_rows.write(folder / "sm_90.json", 90, {"grn": [line]})
    tuning.reload()


def test_a_device_that_computes_nothing_convinces_nobody(rows):
    before = present()
    done = tune()
    assert done.exit_code == 0, done.output
    assert "the present configs stay" in done.output and not rows.exists()
    tried, passed_over = re.search(r"(\d+) tried, (\d+) passed over", done.output).groups()
    assert int(tried) == int(passed_over) > 3 and present() == before


def test_what_wins_is_written_with_its_provenance_and_used(rows, trusted, gpu):
    two_launches(rows)
    before = present()
    assert before.split
    done = tune()
    assert done.exit_code == 0, done.output
    assert f"1 row written to {rows / 'sm_90.json'}" in done.output and "split=False" in done.output
    (line,) = json.loads((rows / "sm_90.json").read_text())["families"]["grn"]
    assert line["config"]["split"] is False and line["shape"] == GRN
    evidence = line["evidence"]
    assert evidence["kind"] == "measured" and evidence["us"] == pytest.approx(evidence["before_us"] / 2, rel=0.2)
    assert evidence["gpu"].startswith("fake GPU") and evidence["command"].startswith("capacitor-rt ")
    assert evidence["torch"] == torch.__version__ and evidence["date"].endswith("Z") and evidence["images"] == "2x32x32"
    # the next plan of this process uses it
    assert not present().split and present() != before
    # what is the best already stays
    again = tune()
    assert "the present configs stay" in again.output
    assert gpu.counts["launch"] > 0


def test_an_encoder_in_fp8_is_tuned(rows, trusted, monkeypatch):
    monkeypatch.setattr(tuner, "TILES", ((64, 64),))
    config = {"block_m": 16, "block_n": 32, "block_k": 64, "group_m": 8, "num_warps": 4, "num_stages": 3, "split_k": 2}
    line = {"shape": PROJECT, "dtype": "e4m3", "use": "throughput", "config": config, "evidence": {"gpu": "another"}}
    user_rows.write(rows / "sm_90.json", 90, {"project_fp8": [line]})
    tuning.reload()
    assert tuning.lookup("project_fp8", 90, PROJECT, E4M3).split_k == 2
    done = CliRunner().invoke(app, ["tune", *IN_FP8], catch_exceptions=False)
    assert done.exit_code == 0 and f"1 row written to {rows / 'sm_90.json'}" in done.output, done.output
    (line,) = json.loads((rows / "sm_90.json").read_text())["families"]["project_fp8"]
    # slices of K take a second launch
    assert line["dtype"] == "e4m3" and line["shape"] == PROJECT and line["config"]["split_k"] == 1
    assert line["evidence"]["kind"] == "measured"
    assert line["evidence"]["us"] < line["evidence"]["before_us"]
    assert tuning.lookup("project_fp8", 90, PROJECT, E4M3).split_k == 1
    # a cache in fp8 would record it, one in bfloat16 not
    sizes = [(SIDE, SIDE)]
    assert set(configs_in_force(MODEL, sizes, torch.bfloat16, 90, precision="fp8")) == {"project_fp8"}
    assert configs_in_force(MODEL, sizes, torch.bfloat16, 90) == {}


def test_nobody_is_convinced_in_fp8_by_a_device_that_computes_nothing(rows):
    done = CliRunner().invoke(app, ["tune", *IN_FP8, "--op", "expand_fp8"], catch_exceptions=False)
    assert done.exit_code == 0 and "the present configs stay" in done.output and not rows.exists()
    found = re.findall(r"(\w+_fp8) .*; (\d+) tried, (\d+) passed over", done.output)
    assert sorted(op for op, *_ in found) == ["expand_fp8", "project_fp8"]
    assert all(int(tried) == int(passed_over) > 3 for _, tried, passed_over in found)


@pytest.mark.parametrize("gpu", [80], indirect=True)
def test_a_gpu_without_e4m3_has_no_fp8_to_tune(rows, gpu):
    with pytest.raises(InputError, match=r"compute capability 8\.0 has no fp8: it needs 8\.9 or later"):
        CliRunner().invoke(app, ["tune", *IN_FP8], catch_exceptions=False)


def test_a_dry_run_and_shipped_rows_alone_write_nothing(rows, trusted, monkeypatch):
    two_launches(rows)
    text = (rows / "sm_90.json").read_text()
    done = tune("--dry-run")
    assert done.exit_code == 0 and "1 row would go to" in done.output
    assert (rows / "sm_90.json").read_text() == text
    monkeypatch.setenv(user_rows.VARIABLE, "shipped")
    with pytest.raises(Exception, match=r"no place for rows of yours: let CAPACITOR_CONFIGS name a folder"):
        tune()


def test_an_interruption_keeps_what_was_measured(rows, trusted, monkeypatch):
    two_launches(rows)
    real = tuner.Tuner._tune
    seen = []

    def stop(self, subject, waiting, deadline):
        if seen:
            raise KeyboardInterrupt
        seen.append(subject)
        yield from real(self, subject, waiting, deadline)

    monkeypatch.setattr(tuner.Tuner, "_tune", stop)
    subjects = tuner._subjects

    def grn_first(*args):
        return sorted(subjects(*args), key=lambda subject: subject.op != "grn")

    monkeypatch.setattr(tuner, "_subjects", grn_first)
    done = CliRunner().invoke(app, ["tune", *OPTIONS, "--op", "head"])
    assert done.exit_code != 0 and "1 row written" in done.output
    assert not present().split


def test_the_doctor_shows_what_is_in_force(rows, trusted):
    (finding,) = [f for f in doctor._configs(0, 90) if f.topic == "tuned 0"]
    assert finding.status == "ok" and finding.found == f"no rows of yours in {rows / 'sm_90.json'}"
    two_launches(rows)
    (finding,) = [f for f in doctor._configs(0, 90) if f.topic == "tuned 0"]
    assert "1 row of yours in force (grn 1), measured on another" in finding.found and "another GPU" in finding.hint
    tune()
    (finding,) = [f for f in doctor._configs(0, 90) if f.topic == "tuned 0"]
    assert "measured on fake GPU of compute capability 9.0, 2" in finding.found and finding.hint == ""
    (rows / "sm_90.json").write_text("{}")
    tuning.reload()
    (finding,) = [f for f in doctor._configs(0, 90) if f.topic == "tuned 0"]
    assert finding.status == "problem" and str(rows) in finding.found and "CAPACITOR_CONFIGS=shipped" in finding.found


def test_rows_are_exported_in_the_form_of_the_shipped_ones(rows, trusted, tmp_path):
    out = tmp_path / "sm_90.json"
    with pytest.raises(Exception, match="no row of yours is in force for sm_90"):
        CliRunner().invoke(app, ["tune", "--export", str(out)], catch_exceptions=False)
    two_launches(rows)
    assert tune("--export", str(out)).exit_code == 0
    exported, mine = (user_rows.read(path, 90) for path in (out, rows / "sm_90.json"))
    assert exported == mine and exported["grn"][0]["evidence"]["kind"] == "measured"
    with pytest.raises(Exception, match="exists: give another --export"):
        tune("--export", str(out))


def test_a_damaged_file_ends_a_call_in_words_and_tune_before_it_measures(rows, gpu):
    rows.mkdir()
    (rows / "sm_90.json").write_text('{"compute_capability": 90, "families": {"grn": [0]}}')
    tuning.reload()
    for call in (lambda: served().encode(IMAGE.to(GPU)), tune):
        launches = gpu.counts["launch"]
        with pytest.raises(ConfigError, match=r"sm_90.json: grn, row 0: .* or set CAPACITOR_CONFIGS=shipped"):
            call()
        assert gpu.counts["launch"] == launches


def test_a_first_call_tunes_nothing(rows, gpu):
    served().encode(IMAGE.to(GPU))
    assert not rows.exists()


def test_a_plan_keeps_the_configs_that_it_began_with(rows):
    sizes, dtype = [(SIDE, SIDE)], torch.bfloat16
    none = configs_in_force(MODEL, sizes, dtype, 90)
    assert none == {} and configs_digest(none) is None
    two_launches(rows)
    found = configs_in_force(MODEL, sizes, dtype, 90)
    assert [(name, line["config"]["split"]) for name, lines in found.items() for line in lines] == [("grn", True)]
    assert "evidence" not in found["grn"][0] and configs_digest(found) == configs_digest(json.loads(json.dumps(found)))
    # of other calls, or for another GPU, the row is none
    assert configs_in_force(MODEL, sizes, torch.float16, 90) == configs_in_force(MODEL, sizes, dtype, 100) == {}
    assert configs_in_force(ModelConfig(), [(256, 256)], dtype, 90) == {}
    begun = present()
    (rows / "sm_90.json").unlink()
    tuning.reload()
    other = present()
    assert other != begun
    with keep_configs(found, 90):
        assert present() == begun
        assert configs_in_force(MODEL, sizes, dtype, 90) == found
    assert present() == other
    two_launches(rows)
    with keep_configs({}, 90):
        assert present() == other and configs_in_force(MODEL, sizes, dtype, 90) == {}
    changed = json.loads(json.dumps(found))
    changed["grn"][0]["config"]["block_f"] = 128
    assert configs_digest(changed) != configs_digest(found)
    changed["grn"][0]["config"]["block_f"] = 1 << 20
    with pytest.raises(ConfigError, match="a plan: grn, row 0: block_f of the config is 1048576"):
        keep_configs(changed, 90).__enter__()
