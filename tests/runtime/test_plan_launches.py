"""Plans of the published models, bound to tensors without memory: every launcher accepts what it is given."""

from __future__ import annotations

import importlib

import pytest
import torch

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig
from capacitor_rt.runtime import executor, fold
from capacitor_rt.runtime.family import FAMILY
from capacitor_rt.runtime.plan import LaunchPlan, PlanKey, make_plan

MODULES = ("patchify", "dwconv", "expand", "grn", "project", "head", "fuse_skip", "unpatchify")


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Launchers check their arguments and build their launches, on the meta device, and then stop."""
    launch = importlib.import_module("capacitor_kernels.launch")
    monkeypatch.setattr(launch, "_check_device", lambda *_: None)
    queued = []
    for name in MODULES:
        module = importlib.import_module(f"capacitor_kernels.ops.{name}")

        def count(launches, device, name=name):
            queued.extend(name for _ in launches)

        monkeypatch.setattr(module, "run_launches", count)
    return queued


def packed(model: FullCapacitor, plan: LaunchPlan, monkeypatch) -> dict[str, torch.Tensor]:
    """The plan's weights on the meta device."""
    with monkeypatch.context() as patch:
        patch.setattr(fold, "_wide", lambda t: t.detach().double())
        dims = 2 * model.config.model_dim
        patch.setattr(fold, "modulations_at", lambda *_: torch.empty(model.config.decoder_depth, dims, device="meta"))
        if not plan.times:
            named = fold.named_tensors(fold.pack(fold.fold_encoder(model), plan.request.dtype, "meta"))
            return named | {"patch_w_nhwc": fold.rows_nhwc(named["patch_w"], model.config.patch_size)}
        weights = {}
        for i, key in enumerate(plan.times):
            folded = fold.pack(fold.fold_decoder(model, *key), plan.request.dtype, "meta")
            weights |= {f"t{i}.{name}": t for name, t in fold.named_tensors(folded).items()}
        return weights


CASES = [
    (name, direction, cc)
    for name, config in FAMILY.items()
    for direction in ("encode", "posterior", "decode")
    if direction == "decode" or config.encoder_depth
    for cc in (80, 89, 90, 100, 120)
]


@pytest.mark.parametrize(("name", "direction", "cc"), CASES)
def test_every_launcher_takes_its_arguments(name, direction, cc, launches, monkeypatch):
    config = FAMILY[name]
    with torch.device("meta"):
        model = FullCapacitor(config)
        if model.latent_norm_running_mean is not None:
            model.latent_norm_running_mean = torch.zeros(config.latent_channels)
    monkeypatch.setattr(fold, "_statistics", lambda m: (torch.empty(m.config.bottleneck_dim, device="meta"),) * 2)
    inference = FullCapacitorInferenceConfig(num_steps=2, sampler="dpmpp_2m", pdg=True) if cc == 90 else None
    image_dtype = torch.bfloat16 if direction == "decode" else torch.uint8
    for batch, height, width in ((128, 256, 256), (1, 1024, 1536), (3, 288, 352)):
        layout = "nhwc" if direction == "encode" and batch == 3 else "nchw"
        for use in ("throughput", "latency")[: 2 if batch == 1 else 1]:
            r = PlanKey(direction, batch, height, width, torch.bfloat16, image_dtype, layout, cc, use, inference)
            plan = make_plan(config, r)
            weights = packed(model, plan, monkeypatch)
            arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device="meta")
            launches.clear()
            executor.Executor(plan, weights, arena).run()
            assert len(launches) >= sum(s.kernel in MODULES for s in plan.steps)
