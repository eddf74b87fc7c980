"""`capacitor-rt plan`: ops, memory and times, without a GPU and without weights."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from golden_cases import GOLDEN
from typer.testing import CliRunner

from capacitor_rt import CapacitorError, ModelConfig
from capacitor_rt.cli.plan import plan
from capacitor_rt.runtime.forecast import CEILINGS, Ceilings, forecast
from capacitor_rt.runtime.plan import PlanKey, make_plan

app = typer.Typer()
app.command()(plan)


def run(*args: str) -> str:
    result = CliRunner().invoke(app, args)
    if isinstance(result.exception, CapacitorError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def document(*args: str) -> dict:
    return json.loads(run(*args, "--json"))


def test_the_headline_case_of_the_full_model():
    got = document("--size", "256", "--batch", "128")
    truth = make_plan(ModelConfig(), PlanKey("encode", 128, 256, 256, torch.bfloat16, torch.uint8, "nchw", 90))
    assert got["runs"] == [128] and got["ceilings"]["tflops"] == 790 and "measured" in got["ceilings"]["source"]
    (only,) = got["plans"]
    assert len(only["steps"]) == 34 and only["flops"] == truth.flops and only["arena_bytes"] == truth.arena_bytes
    assert got["milliseconds"] == pytest.approx(
        sum(max(step.flops / 790e9, step.nbytes / 4.3e9) for step in truth.steps)
    )
    assert only["milliseconds"] == pytest.approx(sum(step["milliseconds"] for step in only["steps"]))
    text = run("--size", "256", "--batch", "128")
    assert "1 x 128 images, 34 ops" in text and f"{got['milliseconds']:.3f} ms at best" in text
    assert "790 TFLOP/s or 4300 GB/s (H200, measured" in text
    assert f"arena {truth.arena_bytes / 2**20:.2f} MiB" in text


def test_a_batch_is_micro_batches_and_a_tail():
    got = document("--size", "512", "--batch", "70", "--cc", "80")
    assert got["runs"] == [32, 32, 6] and [p["images"] for p in got["plans"]] == [32, 6]
    times = {p["images"]: p["milliseconds"] for p in got["plans"]}
    assert got["milliseconds"] == pytest.approx(2 * times[32] + times[6])
    assert got["ceilings"]["source"] == CEILINGS[80].source
    assert "2 x 32 + 1 x 6 images, 102 ops" in run("--size", "512", "--batch", "70", "--cc", "80")


def test_decoding_with_guidance_and_steps():
    got = document("--size", "256", "--direction", "decode", "--steps", "2", "--sampler", "dpmpp_2m", "--pdg")
    ops = [step["op"] for step in got["plans"][0]["steps"]]
    assert ops.count("project") == 20 and ops[-1] == "combine" and got["inference"]["num_steps"] == 2


def test_models_by_name_file_and_checkpoint(tmp_path):
    by_name = document("--config", "semdisdiffae_p32_v2", "--size", "256")
    config = ModelConfig(patch_size=32, model_dim=1024, bottleneck_dim=384)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert document("--config", str(tmp_path / "config.json"), "--size", "256") == by_name
    golden = document("--model", str(GOLDEN / "p8"), "--size", "64", "--dtype", "fp16")
    assert golden["plans"][0]["output_bytes"] == 4 * 8 * 8 * 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--size", "250"), "height 250 is not a multiple of 16: use 240 or 256"),
        (("--size", "256", "--width", "8"), "width 8 is not a multiple of 16: use 16"),
        (("--size", "256", "--config", "big"), "'big' is neither a file nor one of full_capacitor"),
        (("--size", "256", "--config", "capacitor_decoder"), "'encode' is none of this model's: use one of decode"),
        (("--size", "256", "--cc", "100"), "no ceilings are known for compute capability 100: state both"),
        (("--size", "256", "--dtype", "fp32"), "no ceilings are known for float32"),
        (("--size", "256", "--model", "sample", "--config", "semdisdiffae"), "give one of them"),
        (("--size", "256", "--direction", "decode", "--sampler", "euler"), "sampler 'euler' is unknown"),
    ],
)
def test_what_cannot_be_planned_is_named(args, message):
    with pytest.raises(CapacitorError, match=message):
        run(*args)


def test_stated_ceilings_bind_each_step():
    key = PlanKey("encode", 2, 64, 64, torch.float32, torch.uint8, "nchw", 100)
    slow_memory = forecast(ModelConfig(), key, Ceilings(1e9, 1.0, "as given"))
    assert {step["bound"] for step in slow_memory.as_dict()["plans"][0]["steps"]} == {"memory"}
    slow_maths = forecast(ModelConfig(), key, Ceilings(1e-3, 1e9, "as given"))
    assert slow_maths.milliseconds == pytest.approx(slow_maths.plans[2].flops / 1e6, rel=1e-3)
    assert document("--size", "64", "--cc", "100", "--tflops", "2000", "--gbps", "8000")["ceilings"]["gbps"] == 8000


def test_an_encoder_in_fp8():
    got = document("--size", "256", "--batch", "128", "--cc", "120", "--encode-precision", "fp8")
    half = document("--size", "256", "--batch", "128", "--cc", "120")
    assert got["precision"] == "fp8" and half["precision"] is None
    steps = {step["op"]: step for step in got["plans"][0]["steps"]}
    # block-scaled products of sm_120 are four times as fast as those in bfloat16
    assert steps["expand_fp8"]["milliseconds"] == pytest.approx(steps["expand_fp8"]["flops"] / 4 / 209.5e9)
    assert got["plans"][0]["flops"] == pytest.approx(half["plans"][0]["flops"], rel=1e-4)
    assert got["milliseconds"] < 0.35 * half["milliseconds"]
    text = run("--size", "256", "--batch", "128", "--cc", "120", "--encode-precision", "fp8")
    assert "bf16 and fp8, sm_120" in text and "e4m3 [32768, 3584]" in text and "4 times that in e4m3" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cc", "80"), r"8\.0 has no fp8.*--cc 89, 90, 100 or 120"),
        (("--direction", "decode"), "decode of this model has no launches in fp8"),
        (("--config", "irdiffae_v1"), "encode of this model has no launches in fp8"),
    ],
)
def test_what_has_no_launches_in_fp8(options, message):
    with pytest.raises(CapacitorError, match=message):
        run("--size", "256", "--encode-precision", "fp8", *options)
    with pytest.raises(CapacitorError, match="encode_precision 'int4' is unknown"):
        run("--size", "256", "--encode-precision", "int4")
