"""Plans of the published models, traced: every op accepts what the plan gives it, and queues what it should."""

from __future__ import annotations

import pytest
import torch

from capacitor_kernels import OPS
from capacitor_rt import FullCapacitorInferenceConfig
from capacitor_rt.config import KNOWN_MODELS
from capacitor_rt.runtime.executor import trace
from capacitor_rt.runtime.plan import PlanKey, make_plan

CASES = [
    (name, direction, cc)
    for name, config in KNOWN_MODELS.items()
    for direction in ("encode", "posterior", "decode")
    if direction == "decode" or config.encoder_depth
    for cc in (80, 89, 90, 100, 120)
]


@pytest.mark.parametrize(("name", "direction", "cc"), CASES)
def test_every_op_takes_its_arguments(name, direction, cc):
    inference = FullCapacitorInferenceConfig(num_steps=2, sampler="dpmpp_2m", pdg=True) if cc == 90 else None
    image_dtype = torch.bfloat16 if direction == "decode" else torch.uint8
    for batch, height, width in ((128, 256, 256), (1, 1024, 1536), (3, 288, 352)):
        layout = "nhwc" if direction == "encode" and batch == 3 else "nchw"
        for use in ("throughput", "latency")[: 2 if batch == 1 else 1]:
            key = PlanKey(direction, batch, height, width, torch.bfloat16, image_dtype, layout, cc, use, inference)
            plan = make_plan(KNOWN_MODELS[name], key)
            traced = trace(plan)
            assert [step for step, _ in traced] == list(plan.steps)
            for step, launches in traced:
                # the two ops in plain torch queue no launches of ours
                assert bool(launches) == (step.op in OPS), step
                assert all(launch.kernel.__name__.startswith(step.op) for launch in launches), step


def test_float32_takes_the_exact_gelu():
    for dtype, gelu in ((torch.float32, "erf"), (torch.bfloat16, "fit"), (torch.float16, "fit")):
        plan = make_plan(KNOWN_MODELS["full_capacitor"], PlanKey("encode", 1, 64, 64, dtype, dtype, "nchw", 90))
        found = [launch.args["GELU"] for step, launches in trace(plan) if step.op == "expand" for launch in launches]
        assert found == [gelu] * 8
