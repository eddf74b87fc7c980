"""Start noise on a GPU: drawn once per seed and shape, with the family's bits, and nothing waits for it."""

from __future__ import annotations

import threading

import pytest
import torch
from runtime_cases import tiny

from capacitor_rt import FullCapacitorInferenceConfig
from capacitor_rt.diffusion import unit_noise
from capacitor_rt.runtime import start_noise

SEEDED = FullCapacitorInferenceConfig(seed=3)


@pytest.fixture
def drawn(monkeypatch) -> list[tuple]:
    """Arguments of every draw."""
    seen: list[tuple] = []

    def counting(*args):
        seen.append(args)
        return unit_noise(*args)

    monkeypatch.setattr(start_noise, "unit_noise", counting)
    return seen


def latents(batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, 4, 2, 1, device="cuda")


def test_a_seed_is_drawn_once_per_shape_and_stream(drawn):
    model = tiny("triton", "cuda", torch.bfloat16)
    for _ in range(3):
        model.decode(latents(), inference_config=SEEDED)
    assert [args[:2] for args in drawn] == [((1, 3, 16, 8), 3)]
    model.decode(latents(2), inference_config=SEEDED)
    with torch.cuda.stream(torch.cuda.Stream()):
        model.decode(latents(), inference_config=SEEDED)
    assert len(drawn) == 3
    model.release()
    model.decode(latents(), inference_config=SEEDED)
    assert len(drawn) == 4
    # without a seed there is nothing to keep
    model.decode(latents())
    model.decode(latents())
    assert len(drawn) == 6


def test_it_has_the_bits_of_the_cpu_and_is_not_waited_for(gpu, monkeypatch):
    model = tiny("triton", "cuda", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("a call waited for the device"))
    noise = model._noise((1, 3, 16, 8), SEEDED, latents())
    assert noise.is_cuda and torch.equal(noise.cpu(), unit_noise((1, 3, 16, 8), 3, torch.device("cpu")))


def test_threads_with_seeds_of_their_own(drawn):
    model = tiny("triton", "cuda", torch.bfloat16)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(6):
                model.decode(latents(), inference_config=FullCapacitorInferenceConfig(seed=seed + n % 2))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(drawn) == 8


def test_what_is_kept_is_bounded(monkeypatch):
    model = tiny("triton", "cuda", torch.bfloat16)
    monkeypatch.setattr(start_noise, "NOISE_BYTES", 3 * 4 * 3 * 16 * 8)
    for seed in range(5):
        model.decode(latents(), inference_config=FullCapacitorInferenceConfig(seed=seed))
    assert len(model._start_noise._drawn) == 3
