"""Encoding in e4m3 by the launches, under Triton's interpreter or on a GPU, against the emulation; plans, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN
from measures import relative_error
from runtime_cases import DEVICE

from capacitor_kernels.launch import recording
from capacitor_rt import FullCapacitor, InputError, ModelConfig
from capacitor_rt.config import KNOWN_MODELS
from capacitor_rt.fp8_calibration import save
from capacitor_rt.runtime.executor import trace
from capacitor_rt.runtime.fold_fp8 import BlockRange
from capacitor_rt.runtime.fp8 import Fp8Encoder
from capacitor_rt.runtime.options import ServingOptions
from capacitor_rt.runtime.plan import PlanKey, make_plan
from capacitor_rt.runtime.runtime import Runtime

IMAGE = torch.linspace(-1, 1, 3 * 3 * 64 * 32).reshape(3, 3, 64, 32).sin()
PLAN = PlanKey("encode", 4, 256, 256, torch.bfloat16, torch.uint8, "nchw", 90, precision="fp8")


def ranges_of(model: FullCapacitor) -> tuple[BlockRange, ...]:
    found: dict[int, BlockRange] = {}
    Fp8Encoder(model, None, torch.float32).posterior(IMAGE, found.__setitem__)
    return tuple(found[i] for i in range(len(found)))


@pytest.fixture(scope="module")
def loaded():
    model = FullCapacitor.from_pretrained(GOLDEN / "p8", backend="torch", strict_size=False)
    return model, ranges_of(model)


def runtime_of(model: FullCapacitor, ranges, dtype=torch.float32, **options) -> Runtime:
    return Runtime(model, torch.device(DEVICE), dtype, ServingOptions(**options), ranges=ranges)


@pytest.mark.parametrize("low_latency", [False, True])
def test_launches_give_what_the_emulation_gives(loaded, low_latency):
    model, ranges = loaded
    runtime = runtime_of(model, ranges, low_latency=low_latency)
    image = IMAGE[:1] if low_latency else IMAGE
    emulated, exact = Fp8Encoder(model, ranges, torch.float32), Fp8Encoder(model, None, torch.float32)
    got, expected, truth = (encoder.encode(image.to(DEVICE)).cpu() for encoder in (runtime, emulated, exact))
    cost = relative_error(expected, truth)
    # values between two numbers of 8 bits fall to either side by the order of sums
    assert cost > 1e-3 and relative_error(got, expected) < 0.3 * cost
    posterior, theirs = runtime.posterior(image.to(DEVICE)), emulated.posterior(image)
    assert relative_error(posterior.mean.cpu(), theirs.mean) < 0.3 * cost
    assert relative_error(posterior.logsnr.cpu(), theirs.logsnr) < 0.3 * cost


def test_micro_batches_are_as_images_alone(loaded):
    model, ranges = loaded
    image = IMAGE[:2].to(DEVICE)
    runtime = runtime_of(model, ranges)
    # the interpreter's products depend on the place in a tile, so it is images alone that are compared
    alone = torch.cat([runtime.encode(one) for one in image.split(1)])
    assert torch.equal(runtime_of(model, ranges, memory_budget=1).encode(image), alone)


def test_a_loaded_model_takes_the_launches_and_decodes_as_ever(loaded, tmp_path, monkeypatch):
    from capacitor_rt.evaluation.fp8 import _values
    from capacitor_rt.fp8_calibration import Fp8Calibration

    model, ranges = loaded
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    identity = {"id": "p8", "revision": None, "sha256": model.source.sha256}
    save(Fp8Calibration(identity, {}, tuple(map(_values, ranges)), {}, {}), tmp_path / "scales.json")
    options = {"backend": "triton", "device": DEVICE, "strict_size": False}
    eight = FullCapacitor.from_pretrained(
        GOLDEN / "p8", encode_precision="fp8", fp8_calibration=tmp_path / "scales.json", **options
    )
    plain = FullCapacitor.from_pretrained(GOLDEN / "p8", **options)
    image = IMAGE[:1].to(DEVICE)
    eight.warmup([(64, 32, 1)])
    latents = eight.encode(image)
    # warmed up and then found
    assert eight.stats().hits == 1 and eight.stats().folds == 1
    expected = Fp8Encoder(model, ranges, torch.float32)
    cost = relative_error(plain.encode(image).cpu(), latents.cpu())
    assert cost > 1e-3 and relative_error(latents.cpu(), expected.encode(IMAGE[:1])) < 0.3 * cost
    assert torch.equal(copy.deepcopy(eight).encode(image), latents)
    seed = {"seed": 1}
    assert torch.equal(eight.decode(latents, inference_config=seed), plain.decode(latents, inference_config=seed))
    with torch.no_grad():
        eight.encoder.to_bottleneck.weight.mul_(2)
    with pytest.raises(InputError, match="not those that the scales for fp8 were measured on"):
        eight.encode(image)


def test_the_plan_has_bytes_between_its_launches():
    config = KNOWN_MODELS["full_capacitor"]
    plan, half = make_plan(config, PLAN), make_plan(config, replace(PLAN, precision=None))
    kinds = {b.name: b.dtype for b in plan.buffers}
    assert kinds["y"] == kinds["h"] == torch.float8_e4m3fn and kinds["gain"] == torch.float16
    assert kinds["x"] == torch.bfloat16
    # h is most of an arena
    assert plan.arena_bytes < 0.62 * half.arena_bytes and plan.nbytes < half.nbytes
    # but for GRN's additions, of as many partial sums as products leave
    assert plan.flops == pytest.approx(half.flops, rel=1e-4)
    ops = [step.op for step in plan.steps]
    assert ops == [f"{op}_fp8" if op in ("expand", "project") else op for op in (step.op for step in half.steps)]
    assert plan.weights["blocks.0.w1"].dtype == torch.float8_e4m3fn and plan.weights["blocks.0.w1"].shape == (3584, 896)
    names = [launch.kernel.__name__ for _, launches in trace(plan) for launch in launches]
    assert names.count("expand_fp8_kernel") == names.count("project_fp8_kernel") == config.encoder_depth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "decode", "image_dtype": torch.float32}, "decode has no launches in fp8"),
        ({"cc": 80}, "compute capability 8.0 has no fp8"),
        ({"precision": "int4"}, "encode has no launches in int4"),
    ],
)
def test_plans_that_there_are_none_of(change, message):
    with pytest.raises(ValueError, match=message):
        make_plan(KNOWN_MODELS["full_capacitor"], replace(PLAN, **change))


def test_siblings_have_no_plans_in_fp8():
    with pytest.raises(ValueError, match="only full_capacitor's encoder"):
        make_plan(KNOWN_MODELS["irdiffae_v1"], PLAN)


def test_a_gpu_without_fp8_is_refused_with_the_way_out(loaded):
    model, ranges = loaded
    with recording(80), pytest.raises(InputError, match=r"8\.0 has no fp8.*: load the model without encode_precision"):
        runtime_of(model, ranges)
    with pytest.raises(InputError, match="the calibration has 1 blocks and the encoder"):
        runtime_of(model, ranges[:1]).encode(IMAGE.to(DEVICE))
    assert isinstance(model.config, ModelConfig)
