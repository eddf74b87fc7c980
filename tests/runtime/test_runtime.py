"""The golden models through the launches: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from functools import cache

import pytest
import torch
from golden_cases import GOLDEN, NAMES, golden_io, inference_of, relative_error

from capacitor_rt import FullCapacitor, InputError, ModelConfig
from capacitor_rt.diffusion import unit_noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-4
# every sampler, schedule and guidance once; under the interpreter the rest takes minutes
QUICK = {
    ("p16", "decode_ddim1_linear_seed7"),
    ("p8", "decode_ddim3_cosine_seed3"),
    ("p8", "decode_dpmpp4_cosine_pdg1.5_seed1"),
}
DECODES = [
    pytest.param(name, key, marks=() if (name, key) in QUICK else pytest.mark.slow)
    for name in NAMES
    for key in sorted(golden_io(name))
    if key.startswith("decode_")
]


@pytest.fixture(autouse=True, scope="module")
def _tall_tiles():
    """The interpreter pays for every operation of every program: fewer, taller ones. Their bits are the same."""
    if DEVICE == "cuda":
        yield
        return
    from capacitor_kernels import tuning

    lookup = tuning.lookup

    def tall(family, *args):
        config = lookup(family, *args)
        return dataclasses.replace(config, strips_y=16, num_warps=8) if family == "dwconv" else config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "lookup", tall)
        yield


@cache
def load(name: str, **options) -> FullCapacitor:
    return FullCapacitor.from_pretrained(GOLDEN / name, device=DEVICE, backend="triton", strict_size=False, **options)


def inputs(name: str, key: str) -> torch.Tensor:
    return golden_io(name)[key].to(DEVICE)


@pytest.mark.parametrize("name", NAMES)
def test_encode_and_posterior_match_golden(name):
    io, model = golden_io(name), load(name)
    assert model.runtime is not None
    assert relative_error(model.encode(inputs(name, "image")).cpu(), io["latents"]) < TOLERANCE
    mean, logsnr = model.encode_posterior(inputs(name, "image"))
    assert relative_error(mean.cpu(), io["posterior_mean"]) < TOLERANCE
    assert relative_error(logsnr.cpu(), io["posterior_logsnr"]) < TOLERANCE


@pytest.mark.parametrize(("name", "key"), DECODES)
def test_decode_matches_golden(name, key):
    image = load(name).decode(inputs(name, "latents"), inference_config=inference_of(key))
    assert relative_error(image.cpu(), golden_io(name)[key]) < TOLERANCE


def test_layouts_and_uint8_agree_with_the_reference():
    model, truth = load("p8"), FullCapacitor.from_pretrained(GOLDEN / "p8", strict_size=False)
    image = torch.randint(0, 256, (1, 3, 16, 24), dtype=torch.uint8)
    expected = truth.encode(image)
    nhwc = image.permute(0, 2, 3, 1).contiguous()
    strided = torch.nn.functional.pad(image, (1, 2, 3, 0))[:, :, 3:, 1:-2]
    for same in (image, nhwc, nhwc.permute(0, 3, 1, 2), strided):
        assert relative_error(model.encode(same.to(DEVICE)).cpu(), expected) < TOLERANCE


def test_micro_batches_and_tail_give_the_same_bits(monkeypatch):
    from capacitor_rt.runtime import runtime

    image = torch.randn(3, 3, 16, 16, device=DEVICE)
    model = FullCapacitor.from_pretrained(GOLDEN / "p8", device=DEVICE, backend="triton", strict_size=False)
    whole = model.encode(image)
    model.runtime.clear()
    monkeypatch.setattr(runtime, "ARENA_BUDGET", 1)
    model.runtime._limits.clear()
    assert torch.equal(model.encode(image), whole)
    assert model.runtime.stats.replays + model.runtime.stats.eager >= 4
    # a row alone, and in another place
    assert torch.equal(model.encode(image[1:2]), whole[1:2])
    assert torch.equal(model.encode(image.flip(0)), whole.flip(0))


def test_outputs_are_fresh_and_plans_are_kept():
    model = load("p8")
    image = torch.randn(1, 3, 16, 16, device=DEVICE)
    first = model.encode(image)
    kept, hits = first.clone(), model.runtime.stats.hits
    model.encode(torch.randn(1, 3, 16, 16, device=DEVICE))
    assert torch.equal(first, kept)
    assert model.runtime.stats.hits == hits + 1


def test_many_steps_fold_as_they_go(monkeypatch):
    from capacitor_rt.runtime import runtime

    monkeypatch.setattr(runtime, "MAX_TIMES", 2)
    inference = inference_of("decode_ddim3_cosine_seed3")
    model = FullCapacitor.from_pretrained(GOLDEN / "p8", device=DEVICE, backend="triton", strict_size=False)
    truth = FullCapacitor.from_pretrained(GOLDEN / "p8", strict_size=False)
    latents = torch.randn(1, 8, 1, 2)
    image = model.decode(latents.to(DEVICE), inference_config=inference)
    assert relative_error(image.cpu(), truth.decode(latents, inference_config=inference)) < TOLERANCE
    assert len(model.runtime._decoders) == 2


def test_evicted_weights_take_their_plans_along(monkeypatch):
    from capacitor_rt.runtime import runtime

    monkeypatch.setattr(runtime, "MAX_TIMES", 1)
    model = FullCapacitor.from_pretrained(GOLDEN / "p8", device=DEVICE, backend="triton", strict_size=False)
    latents = torch.randn(1, 8, 1, 1, device=DEVICE)
    one = inference_of("decode_ddim1_linear_seed7")
    before = model.decode(latents, inference_config=one)
    model.runtime._decoder(0.5, 1.0)
    assert model.runtime.stats.evictions == 1
    assert torch.equal(model.decode(latents, inference_config=one), before)


def test_copies_and_casts_drop_what_belongs_to_the_runtime():
    model = FullCapacitor.from_pretrained(GOLDEN / "p8", device=DEVICE, backend="triton", strict_size=False)
    image = torch.randn(1, 3, 8, 8, device=DEVICE)
    latents = model.encode(image)
    assert model.runtime.stats.weight_nbytes > 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._runtime is None and torch.equal(twin.encode(image), latents)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["encoder.to_bottleneck.bias"] += 1.0
    model.load_state_dict(state)
    assert not torch.equal(model.encode(image), latents)
    runtime = model.runtime
    model.cpu()
    assert model._runtime is None and runtime.stats.weight_nbytes == 0


def test_latent_patches_and_decoder_only():
    config = ModelConfig(patch_size=8, model_dim=24, encoder_depth=1, decoder_depth=1, decoder_start_blocks=1,
                         decoder_end_blocks=0, bottleneck_dim=4, adaln_low_rank_rank=2)  # fmt: skip
    for changes in ({"latent_patch": 2}, {"encoder_depth": 0}, {"bottleneck_posterior_kind": "deterministic"}):
        torch.manual_seed(0)
        changed = dataclasses.replace(config, **changes)
        truth = FullCapacitor(changed, strict_size=False, backend="torch").requires_grad_(False)
        if truth.latent_norm_running_mean is not None:
            truth.latent_norm_running_mean.normal_()
        fast = FullCapacitor(changed, strict_size=False, backend="triton").requires_grad_(False)
        fast.load_state_dict(truth.state_dict())
        fast.to(DEVICE)
        if truth.encoder is not None:
            image = torch.randn(1, 3, 16, 32)
            assert relative_error(fast.encode(image.to(DEVICE)).cpu(), truth.encode(image)) < TOLERANCE
        latents = torch.randn(1, truth.latent_channels, 2, 1)
        inference = inference_of("decode_ddim1_linear_seed7")
        got = fast.decode(latents.to(DEVICE), inference_config=inference).cpu()
        assert relative_error(got, truth.decode(latents, inference_config=inference)) < TOLERANCE


def test_models_that_the_launches_do_not_fit_are_refused():
    model = FullCapacitor(ModelConfig(model_dim=16, encoder_depth=1, depthwise_kernel_size=5), backend="triton")
    with pytest.raises(InputError, match="7x7 convolutions, this model has 3 and 5: use backend='torch'"):
        model.to(DEVICE).encode(torch.zeros(1, 3, 32, 32, device=DEVICE))


def test_empty_batch_and_bad_input_as_ever():
    model = load("p8")
    assert model.encode(torch.zeros(0, 3, 16, 16, device=DEVICE)).shape == (0, 8, 2, 2)
    with pytest.raises(InputError, match="height 20"):
        model.encode(torch.zeros(1, 3, 20, 16, device=DEVICE))
    with pytest.raises(InputError, match="requires grad"):
        model.encode(torch.zeros(1, 3, 16, 16, device=DEVICE, requires_grad=True))


def test_compile_and_export_keep_the_call_whole():
    model = load("p8")
    image = torch.randn(1, 3, 16, 16, device=DEVICE)
    truth = model.encode(image)

    @torch.compile(fullgraph=True, backend="eager")
    def half(x):
        return model.encode(x) * 0.5

    assert torch.equal(half(image), truth * 0.5)

    class Wrapper(torch.nn.Module):
        def forward(self, x):
            return model.encode(x) + 1

    exported = torch.export.export(Wrapper(), (image,))
    assert torch.equal(exported.module()(image), truth + 1)


def test_operators_are_what_they_say():
    model = load("p8")
    model.runtime  # noqa: B018  (registers the model)
    image = torch.randn(1, 3, 8, 16, device=DEVICE)
    torch.library.opcheck(torch.ops.capacitor_rt.encode.default, (image, model._number))
    torch.library.opcheck(torch.ops.capacitor_rt.posterior.default, (image, model._number))
    latents = torch.randn(1, 8, 1, 2, device=DEVICE)
    noise = unit_noise((1, 3, 8, 16), 0, torch.device(DEVICE))
    args = (latents, noise, model._number, 1, "ddim", "linear", False, 2.0)
    torch.library.opcheck(torch.ops.capacitor_rt.decode.default, args)
