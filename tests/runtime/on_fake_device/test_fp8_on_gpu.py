"""Encoding in e4m3 on the fake GPU: graphs and arenas of its launches, GPUs that have none, and what serves instead."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from models import TINY, randomise

from capacitor_rt import FullCapacitor, InputError
from capacitor_rt.evaluation.fp8 import _values
from capacitor_rt.fp8_calibration import Fp8Calibration, save
from capacitor_rt.runtime import first_contact, launch_cases, self_check
from capacitor_rt.runtime.fp8 import Fp8Encoder

GPU = torch.device("cuda", 0)
IMAGE = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights, and scales of them."""
    folder = tmp_path_factory.mktemp("model")
    randomise(FullCapacitor(TINY)).save_pretrained(folder)
    model = FullCapacitor.from_pretrained(folder, backend="torch", strict_size=False)
    found = {}
    Fp8Encoder(model, None, torch.float32).posterior(IMAGE, found.__setitem__)
    ranges = tuple(_values(found[i]) for i in range(len(found)))
    save(Fp8Calibration({"sha256": model.source.sha256}, {}, ranges, {}, {}), folder / "scales.json")
    return folder


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Kernels compute nothing here, so that no check of them may come first."""
    monkeypatch.setenv("CAPACITOR_SELF_CHECK", "0")


def load(folder, precision: str | None = "fp8", **options) -> FullCapacitor:
    options = {"device": GPU, "dtype": torch.bfloat16, "strict_size": False} | options
    scales = None if precision is None else folder / "scales.json"
    return FullCapacitor.from_pretrained(folder, encode_precision=precision, fp8_calibration=scales, **options)


@pytest.fixture
def launched(monkeypatch):
    """Kernels of the blocks' products that were launched."""
    seen = []
    for name in ("expand", "project", "expand_fp8", "project_fp8"):
        module = importlib.import_module(f"capacitor_kernels.ops.{name}")

        def note(launches, device, run=module.run_launches):
            seen.extend(launch.kernel.fn.__name__ for launch in launches)
            run(launches, device)

        monkeypatch.setattr(module, "run_launches", note)
    return seen


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_calls_are_replays_of_a_graph_of_its_launches(folder, launched, backend):
    model = load(folder, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.warmup([(16, 16, 2)], image_dtype=torch.float32)
        assert model.encode(IMAGE.to(GPU)).shape == (2, 4, 2, 2)
        assert model.encode_posterior(IMAGE.to(GPU)).mean.shape == (2, 4, 2, 2)
    stats = model.stats()
    assert stats.captures == 2 and stats.replays == 2 and stats.eager == 0 and stats.folds == 1
    assert set(launched) == {"expand_fp8_kernel", "project_fp8_kernel"}
    # decoding is not in 8 bits
    model.decode(torch.zeros(2, 4, 2, 2, device=GPU), inference_config={"seed": 1})
    assert {"expand_kernel", "project_kernel"} <= set(launched)


def test_weights_of_blocks_take_less_memory(folder):
    eight, half = load(folder, backend="triton"), load(folder, None, backend="triton")
    for model in (eight, half):
        model.encode(IMAGE.to(GPU))
    assert eight.stats().weight_nbytes < half.stats().weight_nbytes


@pytest.mark.parametrize("gpu", [80, 86], indirect=True)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_gpu_without_e4m3_is_refused_with_the_ways_out(folder, gpu, backend):
    model = load(folder, backend=backend)
    with pytest.raises(InputError, match=r"has no fp8: it needs 8\.9 or later .*: load the model without encode"):
        model.encode(IMAGE.to(GPU))
    with pytest.raises(InputError, match="has no fp8"):
        model.warmup([(16, 16, 2)])


@pytest.mark.parametrize("gpu", [80], indirect=True)
def test_torch_emulates_it_on_any_gpu_and_says_so(folder, gpu, launched):
    model = load(folder, backend="torch")
    with pytest.warns(UserWarning, match="encoding in fp8 is emulated in plain torch here"):
        latents = model.encode(IMAGE.to(GPU))
    loaded = FullCapacitor.from_pretrained(folder, backend="torch", strict_size=False)
    expected = Fp8Encoder(loaded, model._fp8.ranges, torch.bfloat16).encode(IMAGE)
    torch.testing.assert_close(latents.cpu(), expected, rtol=1e-2, atol=1e-2)
    assert launched == []


def test_changed_weights_are_refused_by_the_launches_too(folder):
    model = load(folder, backend="triton")
    model.encode(IMAGE.to(GPU))
    with torch.no_grad():
        model.encoder.to_bottleneck.weight.mul_(2)
    with pytest.raises(InputError, match="not those that the scales for fp8 were measured on"):
        model.encode(IMAGE.to(GPU))


@pytest.mark.parametrize("gpu", [89, 100, 120], indirect=True)
def test_every_gpu_with_e4m3_takes_its_launches(folder, gpu, launched):
    model = load(folder, backend="triton", low_latency=True)
    model.encode(IMAGE[:1].to(GPU))
    model.encode(IMAGE.to(GPU))
    assert {"expand_fp8_kernel", "project_fp8_kernel"} <= set(launched)


def test_auto_emulates_where_the_launches_fail_their_check(folder, gpu, monkeypatch, tmp_path):
    # the fake GPU computes nothing: this check finds it out, the one before is left out
    monkeypatch.delenv("CAPACITOR_SELF_CHECK")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(first_contact, "_met", {})
    monkeypatch.setattr(first_contact, "first_contact", lambda device, dtype: None)
    monkeypatch.setattr(self_check, "sizes", lambda: launch_cases.TINY)
    model = load(folder)
    with pytest.warns(UserWarning, match=r"torch serves this model: .*failed its check.*encode in fp8"):
        latents = model.encode(IMAGE.to(GPU))
    assert latents.cpu().isfinite().all() and model.runtime is None
