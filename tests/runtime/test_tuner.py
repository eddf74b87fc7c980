"""The tuner, tried out on the CPU under the interpreter: its candidates, what it passes over, its time, its rows."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch

from capacitor_kernels import config_rows, tuning, user_rows
from capacitor_kernels.gemm import GemmConfig, gemm_smem
from capacitor_kernels.gpu_limits import limits
from capacitor_kernels.launch import E4M3, INTERPRETED
from capacitor_kernels.ops.grn import GrnConfig
from capacitor_rt import InputError, ModelConfig
from capacitor_rt.config import KNOWN_MODELS, FullCapacitorInferenceConfig
from capacitor_rt.runtime import launch_cases, tuner
from capacitor_rt.runtime.launch_cases import TINY
from capacitor_rt.runtime.plan import PlanKey, make_plan
from capacitor_rt.runtime.timing import Timing
from capacitor_rt.runtime.tuner import Choice, Tuner, TuningError, candidates, row_of

CPU = torch.device("cpu")
MODEL = TINY.config
SIDE = 4 * MODEL.patch_size
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels run on the CPU under the interpreter alone")


def key(direction: str = "encode", dtype: torch.dtype = torch.float32, cc: int = 90) -> PlanKey:
    inference = FullCapacitorInferenceConfig() if direction == "decode" else None
    image, layout = (torch.float32, "nchw") if direction == "decode" else (torch.uint8, "nhwc")
    return PlanKey(direction, 2, SIDE, SIDE, dtype, image, layout, cc, "throughput", inference)


def of(op: str, seconds: float = 60.0) -> Tuner:
    return Tuner(MODEL, [key()], CPU, seconds, [op])


@pytest.fixture
def told(monkeypatch):
    """Times by config instead of the clock: what a test writes into the returned dict, else 10 us."""
    times: dict[object, float] = {}

    def ready(self, case):
        return case.step.options["config"]

    def time_ready(named, device, replays, warm_seconds):
        us = {name: times.get(config, 10.0) for name, config in named.items()}
        return {name: Timing(value, value, value, 1) for name, value in us.items()}

    monkeypatch.setattr(Tuner, "_ready", ready)
    monkeypatch.setattr(tuner, "time_ready", time_ready)
    return times


def test_subjects_are_the_ops_of_the_calls_each_shape_once():
    both = Tuner(MODEL, [key(), key("decode")], CPU, 1.0)
    ops = [subject.op for subject in both.subjects]
    # patchify takes latents too in decoding; blocks are the same both ways
    every = ["dwconv", "expand", "fuse_skip", "grn", "head", "patchify", "patchify", "project", "unpatchify"]
    assert sorted(ops) == every
    assert sum(subject.share for subject in both.subjects) == pytest.approx(1.0)
    assert [s.share for s in both.subjects] == sorted((s.share for s in both.subjects), reverse=True)
    for subject in both.subjects:
        found = tuning.lookup(subject.op, 90, subject.shape, torch.float32)
        assert found == subject.present
        plan = make_plan(MODEL, subject.key)
        assert subject.count == sum(step.op == subject.op for step in plan.steps) > 0


def test_every_shape_of_an_op_is_a_subject():
    model = KNOWN_MODELS["irdiffae_v1"]
    call = dataclasses.replace(key(dtype=torch.bfloat16), height=256, width=256)
    found = Tuner(model, [call], CPU, 1.0, ["expand", "project"])
    # a block has a first 1x1 of D to D, and the two of its MLP
    sizes = {(s.op, s.shape["dim"], s.shape["hidden"]): s for s in found.subjects}
    assert set(sizes) == {(op, 896, hidden) for op in ("expand", "project") for hidden in (896, 3584)}
    steps = make_plan(model, found.subjects[0].key).steps
    for (op, _, hidden), subject in sizes.items():
        assert subject.count == model.encoder_depth and subject.present == tuning.lookup(
            op, 90, subject.shape, torch.bfloat16
        )
        case = found._case(subject, subject.present)
        weight = case.specs["w1" if op == "expand" else "w2"].shape
        assert hidden in weight and case.step in steps


def test_an_encoder_in_fp8_has_ops_and_rows_of_its_own():
    call = dataclasses.replace(key(), precision="fp8")
    asked = Tuner(MODEL, [call], CPU, 60.0)
    dtypes = {subject.op: subject.dtype for subject in asked.subjects}
    assert {op for op, dtype in dtypes.items() if dtype == E4M3} == {"expand_fp8", "project_fp8"}
    assert dtypes["dwconv"] == dtypes["grn"] == torch.float32 and not {"expand", "project"} & set(dtypes)
    asked = Tuner(MODEL, [call], CPU, 60.0, ["expand_fp8"])
    trials = list(itertools.islice(asked.run(), 4))
    assert any(not trial.problem for trial in trials) and {trial.subject.op for trial in trials} == {"expand_fp8"}
    (subject,) = asked.subjects
    line = row_of(Choice(subject, trials[0].config, 1.0, 2.0, 1, 0), CPU, "capacitor-rt tune")
    assert line["dtype"] == "e4m3" and line["shape"] == subject.shape


@pytest.mark.parametrize("cc", [89, 90, 100, 120])
@pytest.mark.parametrize("op", ["expand_fp8", "project_fp8"])
def test_what_may_be_chosen_in_fp8_may_be_read_again(op, cc):
    call = dataclasses.replace(key(dtype=torch.bfloat16, cc=cc), height=256, width=256, precision="fp8")
    (subject,) = Tuner(ModelConfig(), [call], CPU, 1.0, [op]).subjects
    found = candidates(subject)
    assert len(found) > 40 and any(config.block_k == 128 for config in found)
    # one that fits, counted in bytes of e4m3
    fits = [c for c in found if gemm_smem(c, 2 if op == "project_fp8" else 1) <= limits(cc).smem_per_cta]
    assert len(fits) > 30
    for config in fits:
        line = row_of(Choice(subject, config, 1.0, 2.0, 1, 0), CPU, "capacitor-rt tune")
        assert config_rows.parse_user_rows("a file", cc, {op: [line]})


def test_batches_are_those_that_run_together():
    large = dataclasses.replace(key(dtype=torch.bfloat16), batch=1 << 14, height=256, width=256)
    model = ModelConfig()
    subject = Tuner(model, [large], CPU, 1.0, ["expand"]).subjects[0]
    assert subject.key.batch == 128


def test_candidates_are_distinct_and_leave_out_the_present_one():
    model = ModelConfig()
    for cc in (80, 90):
        call = dataclasses.replace(key(dtype=torch.bfloat16, cc=cc), height=256, width=256)
        subject = Tuner(model, [call], CPU, 1.0, ["expand"]).subjects[0]
        found = candidates(subject)
        assert len(found) == len(set(found)) > 40 and subject.present not in found
        assert any(config.tma for config in found) == (cc >= 90)
        assert all(isinstance(config, GemmConfig) and config.split_k == 1 for config in found)


@pytest.mark.parametrize("op", ["expand", "project"])
def test_every_form_of_an_op_is_a_candidate(op):
    # sm_120 ships neither form, and no row of its own is near them
    call = dataclasses.replace(key(dtype=torch.bfloat16, cc=120), height=256, width=256)
    found = candidates(Tuner(ModelConfig(), [call], CPU, 1.0, [op]).subjects[0])
    forms = config_rows.get_family(op).forms
    assert forms and set(forms) <= set(found)


@pytest.mark.parametrize("op", ["expand", "project", "dwconv", "grn", "patchify", "head"])
def test_what_may_be_chosen_may_be_read_again(op):
    call = dataclasses.replace(key(dtype=torch.bfloat16), height=256, width=256)
    subject = Tuner(ModelConfig(), [call], CPU, 1.0, [op]).subjects[0]
    found = candidates(subject)
    assert len(found) >= 8
    for config in found:
        line = row_of(Choice(subject, config, 1.0, 2.0, 1, 0), CPU, "capacitor-rt tune")
        user_rows.checked({"compute_capability": 90, "families": {op: [line]}}, 90)


def test_an_op_is_measured_and_what_wins_is_a_row():
    asked = of("grn")
    trials = list(asked.run())
    (choice,) = asked.choices
    assert 4 <= len(trials) == choice.tried <= asked.total
    right = [trial for trial in trials if not trial.problem]
    assert right and all(trial.us > 0 and trial.ratio > 0 for trial in right)
    best = min(right, key=lambda trial: trial.ratio)
    assert choice.config == (best.config if best.ratio < tuner.WORTHWHILE else choice.subject.present)
    line = row_of(choice, CPU, "capacitor-rt tune --size 32")
    assert line["shape"] == choice.subject.shape and line["dtype"] == "fp32" and line["use"] == "throughput"
    assert line["evidence"]["command"] == "capacitor-rt tune --size 32" and line["evidence"]["kind"] == "measured"
    assert {"gpu", "driver", "torch", "triton", "date", "images", "us", "before_us"} <= set(line["evidence"])
    families = user_rows.merge({}, "grn", line)
    user_rows.checked({"compute_capability": 90, "families": families}, 90)


def test_the_fastest_worthwhile_candidate_wins(told):
    fast, faster = GrnConfig(True, 64, 4), GrnConfig(True, 128, 4)
    present = of("grn").subjects[0].present
    assert present not in (fast, faster)
    told |= {fast: 8.0, faster: 5.0}
    asked = of("grn")
    list(asked.run())
    (choice,) = asked.choices
    assert choice.config == faster and choice.is_new and (choice.us, choice.before_us) == (5.0, 10.0)


def test_what_is_hardly_faster_does_not_take_a_place(told):
    told[GrnConfig(True, 64, 4)] = 9.95
    asked = of("grn")
    list(asked.run())
    (choice,) = asked.choices
    assert not choice.is_new and choice.config == choice.subject.present


def test_a_wrong_candidate_is_passed_over_however_fast(told, monkeypatch):
    wrong = candidates(of("grn").subjects[0])[0]
    told[wrong] = 0.1
    real = launch_cases.LaunchCase.run

    def run(self, device, draw):
        results = real(self, device, draw)
        if self.step.options["config"] == wrong:
            results = [(got * 1.1, truth, eager) for got, truth, eager in results]
        return results

    monkeypatch.setattr(launch_cases.LaunchCase, "run", run)
    asked = of("grn")
    trials = list(asked.run())
    problems = [trial.problem for trial in trials if trial.config == wrong]
    assert len(problems) == 1 and "times its bound" in problems[0]
    assert asked.choices[0].config != wrong and asked.choices[0].passed_over >= 1


def test_a_candidate_that_cannot_be_compiled_is_passed_over(told, monkeypatch):
    broken = candidates(of("grn").subjects[0])[0]
    told[broken] = 0.1
    real = launch_cases.LaunchCase.run

    def run(self, device, draw):
        if self.step.options["config"] == broken:
            raise ValueError("out of resource: shared memory, Required: 300000")
        return real(self, device, draw)

    monkeypatch.setattr(launch_cases.LaunchCase, "run", run)
    asked = of("grn")
    trials = list(asked.run())
    assert [t.problem for t in trials if t.config == broken] == [
        "ValueError: out of resource: shared memory, Required: 300000"
    ]
    assert asked.choices[0].config != broken
    # where the device is gone with it, nothing that follows would be right
    monkeypatch.setattr(tuner, "device_works", lambda device: False)
    with pytest.raises(TuningError, match=r"cpu was lost while grn ran by GrnConfig\(split="):
        list(of("grn").run())


def test_nothing_new_is_begun_after_the_time(told, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Tuner, "_try", lambda self, subject, config, present: tuner.Trial(subject, config, 10.0, 1.0))
    asked = Tuner(MODEL, [key()], CPU, 100.0)
    measured: dict[str, int] = {}
    for trial in asked.run():
        clock[0] += 1.0
        measured[trial.subject.op] = measured.get(trial.subject.op, 0) + 1
    assert clock[0] <= 100.0 + len(asked.subjects) < asked.total
    shares = {subject.op: subject.share for subject in asked.subjects}
    longest = asked.subjects[0].op
    assert measured[longest] >= min(100 * shares[longest] - 1, len(candidates(asked.subjects[0])) - 1)
    assert len(asked.choices) == len(asked.subjects)


def test_an_unknown_op_is_refused():
    with pytest.raises(InputError, match=r"op sort is none of these calls': choose from dwconv expand grn head"):
        of("sort")


def test_memory_that_the_present_config_lacks_is_said(monkeypatch):
    def refuse(self, case):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Tuner, "_ready", refuse)
    with pytest.raises(InputError, match=r"grn of 2 images of 32x32 does not fit on cpu .*smaller --batch"):
        list(of("grn").run())


def test_a_choice_that_stays_is_not_new():
    subject = of("grn").subjects[0]
    assert not Choice(subject, subject.present, 1.0, 1.0, 3, 0).is_new


def test_configs_that_launch_the_same_are_measured_once(told):
    # `transposed` and `split_k` are of project alone
    asked = Tuner(MODEL, [key()], CPU, 60.0, ["expand"])
    same = [c for c in candidates(asked.subjects[0]) if c.transposed or c == asked.subjects[0].present]
    assert same
    tried = [trial.config for trial in asked.run()]
    assert len(set(tried)) == len(tried) < asked.total
    assert dataclasses.replace(asked.subjects[0].present, transposed=True) not in tried
