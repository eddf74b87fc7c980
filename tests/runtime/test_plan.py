"""Plans: buffers that never clash, names that exist, and the arithmetic of docs/numbers.md."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capacitor_rt import FullCapacitorInferenceConfig, ModelConfig
from capacitor_rt.config import KNOWN_MODELS, READINGS, SIBLINGS, DicoConfig
from capacitor_rt.reference import Autoencoder
from capacitor_rt.runtime import fold
from capacitor_rt.runtime.arena import ALIGNMENT, Buffer, lay_out
from capacitor_rt.runtime.batching import ARENA_BUDGET, micro_batch, parts
from capacitor_rt.runtime.forecast import Ceilings, forecast
from capacitor_rt.runtime.plan import LaunchPlan, PlanKey, make_plan

FULL = ModelConfig()
GIGA, MEGA = 1e9, 1e6
CCS = (80, 86, 89, 90, 100, 120)
# op -> the arguments that it writes
WRITES = {
    "patchify": ("tokens",),
    "dwconv": ("y", "sumsq", "partials"),
    "expand": ("h", "partials"),
    "grn": ("gain", "norms"),
    "channel_attention": ("factor", "sums"),
    "project": ("out", "sumsq", "scaled_sumsq", "workspace"),
    "rmsnorm": ("out", "sumsq"),
    "head": ("latents", "mean", "logsnr"),
    "fuse_skip": ("out",),
    "unpatchify": ("image",),
    "broadcast": ("out",),
    "combine": ("out",),
    "drop_latents": ("out",),
    "drop_tokens": ("out",),
}


def key_of(
    direction: str = "encode", batch: int = 1, height: int = 256, width: int | None = None, **changes
) -> PlanKey:
    values = {
        "dtype": torch.bfloat16,
        "image_dtype": torch.bfloat16 if direction in ("decode", "predict") else torch.uint8,
        "layout": "nchw",
        "cc": 90,
        "time": 0.5 if direction == "predict" else None,
    }
    return PlanKey(direction, batch, height, width or height, **(values | changes))


inferences = st.builds(
    FullCapacitorInferenceConfig,
    num_steps=st.integers(1, 5),
    sampler=st.sampled_from(["ddim", "dpmpp_2m"]),
    schedule=st.sampled_from(["linear", "cosine"]),
    pdg=st.booleans(),
    pdg_strength=st.sampled_from([1.5, 2.0]),
)


@st.composite
def dico_configs(draw) -> DicoConfig:
    reading = {name: draw(st.sampled_from(choices)) for name, choices in READINGS.items()}
    return DicoConfig(draw(st.sampled_from(SIBLINGS)), **reading)


@st.composite
def configs(draw) -> ModelConfig:
    start, middle, end = (draw(st.integers(0, 2)) for _ in range(3))
    dico = draw(st.none() | dico_configs())
    if dico is not None and dico.is_flat:
        start = end = 0
    return ModelConfig(
        patch_size=draw(st.sampled_from([8, 16])),
        model_dim=draw(st.sampled_from([16, 24, 56])),
        encoder_depth=draw(st.integers(1, 2)),
        decoder_depth=max(1, start + middle + end),
        decoder_start_blocks=start,
        decoder_end_blocks=end,
        bottleneck_dim=draw(st.sampled_from([4, 8])),
        adaln_low_rank_rank=2,
        bottleneck_posterior_kind=draw(st.sampled_from(["diagonal_gaussian", "deterministic"])),
        bottleneck_norm_mode=draw(st.sampled_from(["disabled", "channel_wise"])),
        dico=dico,
    )


@st.composite
def plans(draw) -> tuple[ModelConfig, LaunchPlan]:
    config = draw(st.one_of(configs(), st.sampled_from(list(KNOWN_MODELS.values()))))
    directions = ["encode", "posterior", "decode", "predict"] if config.encoder_depth else ["decode", "predict"]
    direction = draw(st.sampled_from(directions))
    sides = st.integers(1, 12).map(lambda n: n * config.patch_size)
    changes = {
        "dtype": draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        "cc": draw(st.sampled_from(CCS)),
        "use": draw(st.sampled_from(["throughput", "latency"])),
    }
    if direction in ("decode", "predict"):
        changes["inference"] = dataclasses.replace(
            draw(inferences), pdg_drop=draw(st.sampled_from([None, *config.drops]))
        )
    else:
        changes["layout"] = draw(st.sampled_from(["nchw", "nhwc"]))
    return config, make_plan(config, key_of(direction, draw(st.integers(1, 6)), draw(sides), draw(sides), **changes))


def reads_and_writes(plan: LaunchPlan):
    """(read, written) names of what lies in the arena, of every step."""
    for step in plan.steps:
        names = {a: r.split(":")[1] for a, r in step.args.items() if not r.startswith("weight:")}
        yield (
            {n for a, n in names.items() if a not in WRITES[step.op]},
            {n for a, n in names.items() if a in WRITES[step.op]},
        )


@settings(max_examples=60, deadline=None)
@given(plans())
def test_no_two_live_buffers_share_a_byte(case):
    plan = case[1]
    for a, b in combinations(plan.buffers, 2):
        assert not a.alive_with(b) or a.end <= b.offset or b.end <= a.offset, (a, b)
    for buffer in plan.buffers:
        assert buffer.offset % ALIGNMENT == 0 and buffer.end <= plan.arena_bytes
        assert buffer.nbytes >= torch.empty(buffer.shape, dtype=buffer.dtype, device="meta").nbytes


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_byte_read_is_the_last_one_written_there(case):
    """Lifetimes aside: a write spoils whatever else lies there, and nothing spoiled is ever read."""
    plan = case[1]
    places = {b.name: b for b in plan.buffers}

    def clash(a: str, b: str) -> bool:
        return a != b and places[a].offset < places[b].end and places[b].offset < places[a].end

    valid = set(plan.inputs)
    assert not any(clash(a, b) for a in valid for b in valid)
    for read, written in reads_and_writes(plan):
        assert read <= valid, read - valid
        assert not any(clash(a, b) for a in read | written for b in written)
        valid = {name for name in valid if not any(clash(name, w) for w in written)} | written
    assert set(plan.outputs) <= valid


@settings(max_examples=30, deadline=None)
@given(plans().filter(lambda case: case[0].model_dim < 100))
def test_every_name_exists_and_every_weight_is_as_planned(case):
    config, plan = case
    with torch.random.fork_rng():
        model = Autoencoder(config)
    if plan.times:
        folded = {f"t{i}.": fold.fold_decoder(model, *time) for i, time in enumerate(plan.times)}
    else:
        folded = {"": fold.fold_encoder(model)}
    packed = {}
    for prefix, part in folded.items():
        packed |= fold.named_tensors(fold.pack(part, plan.key.dtype, "cpu"), prefix)
    for name, spec in plan.weights.items():
        assert (tuple(packed[name].shape), packed[name].dtype) == spec, name
    places = {
        "buffer": {b.name for b in plan.buffers} - set(plan.inputs) - set(plan.outputs),
        "input": set(plan.inputs),
        "output": set(plan.outputs),
        "weight": set(plan.weights),
    }
    used = {ref for step in plan.steps for ref in step.args.values()}
    assert used == {f"{place}:{name}" for place, names in places.items() for name in names}
    # every decoder that is folded for this plan is used by it
    assert {name.split(".")[0] for name in plan.weights if plan.times} == {f"t{i}" for i in range(len(plan.times))}


@pytest.mark.parametrize(
    ("direction", "size", "gflop"), [("encode", 256, 26.956), ("encode", 512, 107.825), ("decode", 256, 28.07)]
)
def test_flops_are_those_of_the_model(direction, size, gflop):
    # docs/numbers.md; in decoding with patchify, latent projection and fuse_in collapsed into one product
    plan = make_plan(FULL, key_of(direction, 3, size))
    assert plan.flops / 3 / GIGA == pytest.approx(gflop, rel=5e-4)


def test_a_block_moves_785_megabytes():
    # docs/numbers.md: 128 images of 256x256, 32 768 tokens
    plan = make_plan(FULL, key_of(batch=128))
    block = plan.steps[1:5]
    assert [s.op for s in block] == ["dwconv", "expand", "grn", "project"]
    assert sum(s.nbytes for s in block) / MEGA == pytest.approx(785, rel=0.02)


@pytest.mark.parametrize("cc", CCS)
def test_steps_of_the_full_model(cc):
    encode = make_plan(FULL, key_of(batch=128, cc=cc))
    assert len(encode.steps) == 34
    decode = make_plan(FULL, key_of("decode", 16, 512, cc=cc))
    assert [s.op for s in decode.steps if s.op not in ("dwconv", "expand", "grn", "project")] == [
        "patchify",
        "fuse_skip",
        "unpatchify",
    ]
    assert len(decode.steps) == 3 + 8 * 4


def test_time_and_memory_of_the_full_model():
    plan = make_plan(FULL, key_of(batch=128))
    # the wide hidden layer is the only large buffer: 32 768 tokens x 3584 in bfloat16
    largest, second = sorted((b.nbytes for b in plan.buffers), reverse=True)[:2]
    assert largest == 32768 * 3584 * 2 and second == largest // 4
    assert plan.arena_bytes / MEGA == pytest.approx(360, rel=0.01)
    # at least the arithmetic at the measured ceiling, and little more: the products are bound by it
    assert 4.37 < forecast(FULL, plan.key, Ceilings(790.0, 4300.0, "measured")).milliseconds < 5.2


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("pdg", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_of_every_sampler(sampler, pdg, steps):
    inference = FullCapacitorInferenceConfig(num_steps=steps, sampler=sampler, pdg=pdg)
    plan = make_plan(FULL, key_of("decode", 2, inference=inference))
    ops = [s.op for s in plan.steps]
    assert len(plan.times) == steps and ops.count("patchify") == steps
    # with guidance the start blocks run once, the end blocks twice
    assert ops.count("project") == steps * (10 if pdg else 8)
    assert ops.count("unpatchify") == steps * (2 if pdg else 1)
    assert ops.count("broadcast") == (steps if pdg else 0)
    assert ops.count("combine") == (steps if sampler == "dpmpp_2m" else 0)
    assert plan.steps[-1].args["out" if sampler == "dpmpp_2m" else "image"] == "output:image"
    start = 0.558 * plan_sigma(FULL)
    assert plan.times[0] == (1.0, pytest.approx(start)) and all(scale == 1.0 for _, scale in plan.times[1:])


def plan_sigma(config: ModelConfig) -> float:
    from capacitor_rt.diffusion import noise_level

    return noise_level(1.0, config.logsnr_min, config.logsnr_max).sigma


@pytest.mark.parametrize(("size", "images"), [(256, 128), (512, 32), (1024, 8), (4096, 1)])
def test_micro_batches_of_the_full_model(size, images):
    assert micro_batch(FULL, key_of(height=size), ARENA_BUDGET) == images


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(0, 1 << 26))
def test_a_micro_batch_is_the_largest_within_its_budget(case, budget):
    config, plan = case
    size = micro_batch(config, plan.key, budget)

    def arena(batch: int) -> int:
        return make_plan(config, dataclasses.replace(plan.key, batch=batch)).arena_bytes

    assert size & (size - 1) == 0
    assert size == 1 or arena(size) <= budget
    assert arena(4 * size) > budget


@given(st.integers(1, 500), st.integers(1, 200))
def test_parts_make_up_the_batch(batch, size):
    runs = parts(batch, size)
    assert sum(runs) == batch and runs[:-1] == [size] * (len(runs) - 1) and 0 < runs[-1] <= size


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 20), st.integers(0, 20)), max_size=12))
def test_layouts_never_overlap_and_waste_nothing_when_all_live(sizes):
    buffers = [
        Buffer(f"b{i}", (n,), torch.uint8, min(first, last), max(first, last))
        for i, (n, first, last) in enumerate(sizes)
    ]
    placed, total = lay_out(buffers)
    assert [b.name for b in placed] == [b.name for b in buffers]
    for a, b in combinations(placed, 2):
        assert not a.alive_with(b) or a.end <= b.offset or b.end <= a.offset
    # no less than what is alive at once, no more than everything
    busiest = max((sum(b.nbytes for b in buffers if b.first <= t <= b.last) for t in range(21)), default=0)
    assert busiest <= total <= sum(b.nbytes for b in buffers)
    together = [dataclasses.replace(b, first=0, last=1) for b in buffers]
    assert lay_out(together)[1] == sum(b.nbytes for b in buffers)


def test_plans_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="direction 'sideways' is unknown"):
        make_plan(FULL, key_of("sideways"))
    with pytest.raises(ValueError, match="1 images of 250x256 are not whole patches of 16 pixels"):
        make_plan(FULL, key_of(height=250, width=256))
