"""A good citizen: threads, processes, several models, and whatever modes the caller is in."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from measures import relative_error
from models import randomise
from runtime_cases import DEVICE, ONE_STEP, TOLERANCE, encode_in_child, tiny


def test_threads_take_turns_on_one_model_and_on_two():
    models, truths = (
        (tiny(), randomise(tiny(), seed=1)),
        (tiny("torch", "cpu"), randomise(tiny("torch", "cpu"), seed=1)),
    )
    shapes = [(1, 3, 8, 8), (2, 3, 8, 8), (1, 3, 16, 8), (1, 3, 8, 8)]
    images = [torch.randn(shape) for shape in shapes]

    def work(i: int) -> list[torch.Tensor]:
        return [models[(i + n) % 2].encode(images[(i + n) % 4].to(DEVICE)).cpu() for n in range(2)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    expected = {(m, k): truths[m].encode(image) for m in range(2) for k, image in enumerate(images)}
    for i, rows in enumerate(results):
        for n, latents in enumerate(rows):
            assert relative_error(latents, expected[(i + n) % 2, (i + n) % 4]) < TOLERANCE
    assert all(model.stats().folds == 1 for model in models)


def test_a_model_is_made_ready_once_by_many_threads():
    model = tiny()
    with ThreadPoolExecutor(4) as pool:
        runtimes = set(pool.map(lambda _: id(model.runtime), range(8)))
    assert len(runtimes) == 1


@pytest.mark.parametrize(
    "first",
    [
        "inference",
        "autocast",
        "default device",
        "default dtype",
        # uninitialised memory is then filled with NaN
        pytest.param("deterministic", marks=pytest.mark.gpu),
    ],
)
def test_the_modes_of_the_first_caller_do_not_stick(first):
    """Static tensors and packed weights are made by the first call; every later one writes to them again."""
    model, twin = tiny(), tiny()
    image = torch.randn(1, 3, 8, 8, device=DEVICE)
    latents, decoded = twin.encode(image), None

    def both():
        encoded = model.encode(image)
        return encoded, model.decode(encoded, inference_config=ONE_STEP)

    if first == "inference":
        with torch.inference_mode():
            got = both()
        assert not got[0].is_inference() and not got[1].is_inference()
    elif first == "autocast":
        with torch.autocast(DEVICE, torch.bfloat16), torch.enable_grad():
            got = both()
        assert not got[0].requires_grad and not got[1].requires_grad
    elif first == "default device":
        with torch.device("meta"):
            model.encode(image)
        got = both()
    elif first == "default dtype":
        torch.set_default_dtype(torch.float64)
        try:
            got = both()
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        torch.use_deterministic_algorithms(True)
        try:
            got = both()
        finally:
            torch.use_deterministic_algorithms(False)
    decoded = twin.decode(latents, inference_config=ONE_STEP)
    for pair in (got, both()):
        assert torch.equal(pair[0], latents) and torch.equal(pair[1], decoded)
        assert pair[0].dtype == pair[1].dtype == torch.float32


def test_latents_enter_autograd_even_from_inference_mode():
    model = tiny()
    with torch.inference_mode():
        latents = model.encode(torch.randn(1, 3, 8, 8, device=DEVICE))
    net = torch.nn.Conv2d(4, 1, 1, device=DEVICE)
    net(latents).sum().backward()
    assert net.weight.grad is not None


def test_spawned_processes_fold_anew():
    model = tiny()
    image = torch.randn(1, 3, 8, 8)
    latents = model.encode(image.to(DEVICE)).cpu()
    model.cpu()
    if DEVICE == "cuda":
        # the child has no GPU of its own to test here: the interpreter is off, so only pickling is
        model.backend = "torch"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there, folds = pool.apply(encode_in_child, (model, image))
    assert relative_error(there, latents) < TOLERANCE
    assert folds == (0 if DEVICE == "cuda" else 1)


def test_two_models_share_nothing():
    a, b = tiny(), randomise(tiny(), seed=1)
    image = torch.randn(1, 3, 8, 8, device=DEVICE)
    before = a.encode(image)
    assert not torch.equal(b.encode(image), before)
    b.half()
    assert torch.equal(a.encode(image), before) and a.stats().hits == 1
