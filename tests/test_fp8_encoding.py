"""Models that encode in fp8: refused without scales of their weights, in a latent space of their own, never mixed."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from cache_cases import write_images
from golden_cases import GOLDEN

from capacitor_rt import CacheError, FullCapacitor, InputError
from capacitor_rt.cache import CacheRequest, LatentDataset, cache_images
from capacitor_rt.cache.model_source import Checkpoint
from capacitor_rt.evaluation.fp8 import calibrate
from capacitor_rt.fp8_calibration import SUFFIX, save
from capacitor_rt.fp8_encoding import ranges_from
from capacitor_rt.images.frames import Framing
from capacitor_rt.runtime.fp8 import Fp8Encoder

IMAGE = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64).sin()
pytestmark = pytest.mark.filterwarnings("ignore:encoding in fp8 is emulated")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model without scales, and images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    shutil.copytree(GOLDEN / "p16", tmp_path / "model")
    write_images(tmp_path / "src", 4, sizes=((64, 64),))
    return tmp_path


@pytest.fixture
def calibrated(folder):
    """The same with scales beside the weights; gives the folder and the calibration."""
    calibration = make(folder)
    save(calibration, folder / "model" / f"model{SUFFIX}")
    return folder, calibration


def make(folder, size: int = 64):
    model = FullCapacitor.from_pretrained(folder / "model", backend="torch")
    return calibrate(sorted((folder / "src").iterdir()), model, Framing(size))[0]


def load(folder, **options) -> FullCapacitor:
    return FullCapacitor.from_pretrained(folder / "model", encode_precision="fp8", **options)


def test_without_scales_it_is_refused_and_says_how_to_make_them(folder):
    with pytest.raises(
        InputError, match=r"needs scales for these weights, .*`capacitor-rt calibrate-fp8 .*model IMAGES`"
    ):
        load(folder)
    with pytest.raises(InputError, match="encode_precision 'int4' is unknown"):
        FullCapacitor.from_pretrained(folder / "model", encode_precision="int4")
    calibration = make(folder)
    save(calibration, folder / "elsewhere.json")
    assert load(folder, fp8_calibration=folder / "elsewhere.json").encode_precision == "fp8"
    # of other weights they are refused
    other = shutil.copytree(GOLDEN / "p8", folder / "other")
    with pytest.raises(InputError, match="is of other weights"):
        FullCapacitor.from_pretrained(other, encode_precision="fp8", fp8_calibration=folder / "elsewhere.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_encodes_by_the_calibrated_encoder_and_decodes_as_ever(calibrated, dtype):
    folder, calibration = calibrated
    plain = FullCapacitor.from_pretrained(folder / "model", dtype=dtype, backend="torch")
    model = load(folder, dtype=dtype, backend="torch")
    assert model.encode_precision == "fp8" and plain.encode_precision is None
    # folded from the weights as loaded, whatever they were cast to since
    exact = FullCapacitor.from_pretrained(folder / "model", backend="torch")
    expected = Fp8Encoder(exact, ranges_from(calibration), dtype)
    latents = model.encode(IMAGE)
    torch.testing.assert_close(latents, expected.encode(IMAGE), rtol=0, atol=0)
    assert torch.equal(model.encode_posterior(IMAGE).mean, expected.posterior(IMAGE).mean)
    assert not torch.equal(latents, plain.encode(IMAGE))
    assert torch.equal(
        model.decode(latents, inference_config={"seed": 1}), plain.decode(latents, inference_config={"seed": 1})
    )
    out = torch.empty_like(latents)
    assert model.encode(IMAGE, out=out) is out and torch.equal(out, latents)
    assert torch.equal(copy.deepcopy(model).encode(IMAGE), latents)
    assert model.encode(IMAGE[:0]).shape[0] == 0
    half = torch.float16
    torch.testing.assert_close(
        model.to(half).encode(IMAGE), Fp8Encoder(exact, ranges_from(calibration), half).encode(IMAGE), rtol=0, atol=0
    )


def test_the_first_call_says_that_it_is_emulated(calibrated):
    model = load(calibrated[0], backend="torch")
    with pytest.warns(UserWarning, match="emulated in plain torch here, .* need a GPU of compute capability 8.9"):
        model.encode(IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(IMAGE)
        FullCapacitor.from_pretrained(calibrated[0] / "model", backend="torch").encode(IMAGE)


def test_changed_weights_and_gradients_are_refused(calibrated):
    model = load(calibrated[0], backend="torch")
    with pytest.raises(InputError, match="has no gradient: load the model without encode_precision"):
        model.encode(IMAGE.clone().requires_grad_())
    with torch.no_grad():
        model.encoder.to_bottleneck.weight.mul_(2)
    with pytest.raises(InputError, match="not those that the scales for fp8 were measured on"):
        model.encode(IMAGE)


def test_its_latents_have_a_space_of_their_own_by_their_scales(calibrated):
    folder, calibration = calibrated
    plain = FullCapacitor.from_pretrained(folder / "model").source.latent_space
    space = load(folder).source.latent_space
    assert space == plain.replace("/whitened@", f"/whitened-fp8-{calibration.sha256[:8]}@") != plain
    save(make(folder, 96), folder / "other.json")
    assert load(folder, fp8_calibration=folder / "other.json").source.latent_space not in (space, plain)


def cache(folder, out: str, precision: str | None):
    source = Checkpoint(str(folder / "model"), backend="torch", encode_precision=precision)
    request = CacheRequest(64, dtype="fp32", batch=2, task_inputs=2)
    cache_images(folder / "src", folder / out, source, request, workers=0, progress=False)
    return json.loads((folder / out / "plan.json").read_text())["model"]


def test_a_cache_says_fp8_and_never_mixes(calibrated):
    folder, calibration = calibrated
    eight, plain = cache(folder, "eight", "fp8"), cache(folder, "plain", None)
    assert eight["encoding"] == f"fp8-{calibration.sha256[:8]}" and "encoding" not in plain
    assert (
        "whitened-fp8-" in eight["latent_space"]
        and LatentDataset(folder / "eight").latent_space == eight["latent_space"]
    )
    # the same weights, and yet another model
    for out, other in (("eight", None), ("plain", "fp8")):
        with pytest.raises(CacheError, match=r"model.encoding (None -> fp8-\w{8}|fp8-\w{8} -> None)"):
            cache(folder, out, other)
    rows, theirs = (LatentDataset(folder / out, verify=True)[0]["latents"] for out in ("eight", "plain"))
    gap = (rows - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
    assert 1e-4 < gap < 0.2
    # a model in memory is the same model
    model = load(folder, backend="torch")
    cache_images(
        folder / "src", folder / "eight", model, CacheRequest(64, dtype="fp32", batch=2, task_inputs=2), workers=0
    )


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import capacitor_rt
from capacitor_rt.cache.model_source import Checkpoint
assert capacitor_rt.FullCapacitor.from_pretrained(sys.argv[1]).encode_precision is None
assert Checkpoint(sys.argv[1]).identity().encoding is None
try:
    capacitor_rt.FullCapacitor.from_pretrained(sys.argv[1], encode_precision="fp8")
except capacitor_rt.InputError as error:
    print(error)
"""


def test_without_triton_only_fp8_is_refused(calibrated):
    command = [sys.executable, "-c", WITHOUT_TRITON, str(calibrated[0] / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fp8 needs Triton, by whose kernels' package weights are folded: pip install")
