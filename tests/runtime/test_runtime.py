"""The golden models through the launches: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import pytest
import torch
from golden_cases import DECODES, GOLDEN, NAMES, golden_io, inference_of
from measures import relative_error
from runtime_cases import DEVICE, ONE_STEP, TOLERANCE, tiny

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig, InputError, ModelConfig


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


def test_micro_batches_and_tail_give_the_same_bits():
    image = torch.randn(3, 3, 16, 8, device=DEVICE)
    model = tiny()
    whole, decoded = model.encode(image), model.decode(torch.ones(3, 4, 1, 1, device=DEVICE), None, None, ONE_STEP)
    # one image at a time is all that so small a budget admits
    model = tiny(memory_budget=1)
    assert torch.equal(model.encode(image), whole)
    # noise is drawn for the whole batch, so a seed means the same whatever the micro-batch
    assert torch.equal(model.decode(torch.ones(3, 4, 1, 1, device=DEVICE), None, None, ONE_STEP), decoded)
    stats = model.stats()
    assert stats.replays + stats.eager == 6 and stats.hits == 4
    # a row alone, and in another place
    assert torch.equal(model.encode(image[1:2]), whole[1:2])
    assert torch.equal(model.encode(image.flip(0)), whole.flip(0))


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_halves_side_by_side_give_the_same_bits(batch):
    image, latents = torch.randn(batch, 3, 16, 8, device=DEVICE), torch.randn(batch, 4, 2, 1, device=DEVICE)
    noise = torch.randn_like(image)
    plain, overlapping = tiny(), tiny(overlap=True)
    inference = FullCapacitorInferenceConfig(num_steps=2)
    # the interpreter's products depend on the place in a tile, so it is the halves that are compared
    half = batch // 2 if batch % 2 == 0 else batch

    def halves(call, *given):
        return torch.cat([call(*(x[i : i + half] for x in given)) for i in range(0, batch, half)])

    assert torch.equal(overlapping.encode(image), halves(plain.encode, image))
    expected = halves(lambda x: torch.stack(plain.encode_posterior(x), 1), image)
    assert torch.equal(torch.stack(overlapping.encode_posterior(image), 1), expected)
    expected = halves(lambda z, n: plain.decode(z, None, None, inference, noise=n), latents, noise)
    assert torch.equal(overlapping.decode(latents, None, None, inference, noise=noise), expected)
    out = torch.full((batch, 4, 2, 1), float("nan"), device=DEVICE)
    assert overlapping.encode(image, out=out) is out and torch.equal(out, halves(plain.encode, image))


def test_outputs_are_fresh_and_plans_are_kept():
    model = tiny()
    image = torch.randn(1, 3, 8, 8, device=DEVICE)
    first = model.encode(image)
    kept, hits = first.clone(), model.stats().hits
    model.encode(torch.randn(1, 3, 8, 8, device=DEVICE))
    assert torch.equal(first, kept)
    assert model.stats().hits == hits + 1


def test_many_steps_fold_as_they_go(monkeypatch):
    from capacitor_rt.runtime import weights

    monkeypatch.setattr(weights, "MAX_TIMES", 2)
    inference = FullCapacitorInferenceConfig(num_steps=3, pdg=True, seed=3)
    model, truth = tiny(), tiny("torch", "cpu")
    latents = torch.randn(1, 4, 1, 1)
    expected = truth.decode(latents, inference_config=inference)
    out = torch.empty_like(expected, device=DEVICE)
    assert model.decode(latents.to(DEVICE), inference_config=inference, out=out) is out
    assert relative_error(out.cpu(), expected) < TOLERANCE
    assert len(model.runtime._weights._decoders) == 2


def test_evicted_weights_take_their_plans_along(monkeypatch):
    from capacitor_rt.runtime import weights

    monkeypatch.setattr(weights, "MAX_TIMES", 1)
    model = tiny()
    latents = torch.randn(1, 4, 1, 1, device=DEVICE)
    before = model.decode(latents, inference_config=ONE_STEP)
    model.runtime._weights._decode((0.5, 1.0))
    assert model.stats().evictions == 1
    assert torch.equal(model.decode(latents, inference_config=ONE_STEP), before)


def test_copies_and_casts_drop_what_belongs_to_the_runtime():
    model = tiny()
    image = torch.randn(1, 3, 8, 8, device=DEVICE)
    latents = model.encode(image)
    assert model.stats().weight_nbytes > 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._runtime is None and twin._number != model._number
        assert torch.equal(twin.encode(image), latents)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["encoder.to_bottleneck.bias"] += 1.0
    model.load_state_dict(state)
    assert not torch.equal(model.encode(image), latents)
    runtime = model.runtime
    model.half()
    assert model._runtime is None and runtime.stats.weight_nbytes == 0 == runtime.stats.nbytes


def test_latent_patches_and_decoder_only():
    for changes in ({"latent_patch": 2}, {"encoder_depth": 0}, {"bottleneck_posterior_kind": "deterministic"}):
        truth, fast = tiny("torch", "cpu", **changes), tiny(**changes)
        if truth.encoder is not None:
            image = torch.randn(1, 3, 16, 32)
            assert relative_error(fast.encode(image.to(DEVICE)).cpu(), truth.encode(image)) < TOLERANCE
        latents = torch.randn(1, truth.latent_channels, 2, 1)
        got = fast.decode(latents.to(DEVICE), inference_config=ONE_STEP).cpu()
        assert relative_error(got, truth.decode(latents, inference_config=ONE_STEP)) < TOLERANCE


def test_models_that_the_launches_do_not_fit_are_refused():
    model = FullCapacitor(ModelConfig(model_dim=16, encoder_depth=1, depthwise_kernel_size=5), backend="triton")
    with pytest.raises(InputError, match="7x7 convolutions, this model has 3 and 5: use backend='torch'"):
        model.to(DEVICE).encode(torch.zeros(1, 3, 32, 32, device=DEVICE))


def test_empty_batch_and_bad_input_as_ever():
    model = tiny()
    assert model.encode(torch.zeros(0, 3, 16, 16, device=DEVICE)).shape == (0, 4, 2, 2)
    assert [t.shape for t in model.encode_posterior(torch.zeros(0, 3, 16, 16, device=DEVICE))] == [(0, 4, 2, 2)] * 2
    assert model.decode(torch.zeros(0, 4, 2, 1, device=DEVICE)).shape == (0, 3, 16, 8)
    assert model.stats().folds == 0
    with pytest.raises(InputError, match="height 20"):
        model.encode(torch.zeros(1, 3, 20, 16, device=DEVICE))
    with pytest.raises(InputError, match="requires grad"):
        model.encode(torch.zeros(1, 3, 16, 16, device=DEVICE, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_out_is_written_rounded_once_and_returned(dtype):
    model = tiny()
    image = torch.randn(2, 3, 8, 8, device=DEVICE)
    latents = model.encode(image)
    out = torch.empty(2, 4, 1, 1, dtype=dtype, device=DEVICE)
    assert model.encode(image, out=out) is out and torch.equal(out, latents.to(dtype))
    truth = model.decode(latents, inference_config=ONE_STEP)
    # of any strides
    out = torch.empty(2, 8, 8, 3, dtype=dtype, device=DEVICE).permute(0, 3, 1, 2)
    assert model.decode(latents, inference_config=ONE_STEP, out=out) is out and torch.equal(out, truth.to(dtype))


def test_warmup_leaves_nothing_to_plan():
    model = tiny()
    model.warmup([(8, 8, 2), (16, 8, 1)], image_dtype=torch.uint8, layout="nhwc")
    model.warmup([(8, 8, 2)], direction="decode", image_dtype=torch.bfloat16, inference_config=ONE_STEP)
    before = model.stats()
    assert before.folds == 2 and before.hits == 0 and before.nbytes > 0
    model.encode(torch.zeros(2, 8, 8, 3, dtype=torch.uint8, device=DEVICE))
    model.encode(torch.zeros(1, 16, 8, 3, dtype=torch.uint8, device=DEVICE))
    model.decode(torch.zeros(2, 4, 1, 1, dtype=torch.bfloat16, device=DEVICE))
    after = model.stats()
    assert after.hits == 3 and after.folds == 2 and after.captures == before.captures
    assert after.nbytes == before.nbytes and after.capture_seconds == before.capture_seconds
