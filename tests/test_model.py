"""FullCapacitor as its users call it: inputs it takes, inputs it refuses, and what an nn.Module must do."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from measures import relative_error
from models import SMALL, random_model

from capacitor_rt import ConfigError, FullCapacitor, FullCapacitorInferenceConfig, InputError
from capacitor_rt.checks import check_inference_config

SEEDED = FullCapacitorInferenceConfig(seed=0)


@pytest.fixture
def model() -> FullCapacitor:
    return random_model()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)


def test_uint8_and_float_images_agree(model, image):
    as_float = image.float() / 127.5 - 1
    truth = model.encode(as_float)
    assert truth.shape == (2, 8, 4, 6) and truth.dtype == torch.float32
    assert torch.equal(model.encode(image), truth)
    for dtype in (torch.bfloat16, torch.float16):
        assert relative_error(model.encode(as_float.to(dtype)), truth) < 2e-2


def test_layouts_agree(model, image):
    truth = model.encode(image)
    nhwc = image.permute(0, 2, 3, 1)
    for same in (nhwc, nhwc.contiguous(), image.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(model.encode(same), truth, rtol=1e-4, atol=1e-5)
    # a view into a larger picture
    padded = torch.nn.functional.pad(image, (16, 16, 32, 0))
    torch.testing.assert_close(model.encode(padded[:, :, 32:, 16:-16]), truth, rtol=1e-4, atol=1e-5)


def test_empty_batch(model):
    latents = model.encode(torch.zeros(0, 3, 64, 32))
    assert latents.shape == (0, 8, 4, 2)
    assert model.decode(latents).shape == (0, 3, 64, 32)


def test_decode_and_reconstruct(model, image):
    latents = model.encode(image)
    out = model.decode(latents, height=64, width=96, inference_config=SEEDED)
    assert out.shape == (2, 3, 64, 96) and out.dtype == torch.float32
    assert torch.equal(out, model.reconstruct(image, SEEDED))
    assert not torch.equal(model.decode(latents), model.decode(latents))


def test_whiten_is_the_inverse_of_dewhiten(model):
    z = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(model.dewhiten(model.whiten(z)), z, rtol=1e-5, atol=1e-5)
    assert model.whiten(z.bfloat16()).dtype == torch.float32


def test_latents_are_the_whitened_mode_of_the_posterior(model, image):
    mean, logsnr = model.encode_posterior(image)
    mode = torch.sqrt(torch.sigmoid(logsnr)) * mean
    std = torch.sqrt(model.latent_norm_running_var + 1e-4)
    expected = (mode - model.latent_norm_running_mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    torch.testing.assert_close(model.encode(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 500, 64), "height 500 is not a multiple of 32: use 480 or 512"),
        (torch.zeros(1, 3, 64, 48), r"width 48 is not a multiple of 32: use 32 or 64, or strict_size=False"),
        (torch.zeros(1, 3, 7, 64), "height 7 is not a multiple of 32: use 32$"),
        (torch.zeros(1, 3, 0, 64), "height 0"),
        (torch.zeros(3, 64, 64), r"rank 3 .* add the batch dimension"),
        (torch.zeros(1, 4, 64, 64), r"shape \[1, 4, 64, 64\]: expected \[B,3,H,W\] or \[B,H,W,3\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "dtype torch.int64: convert it to one of float32"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float64), "dtype torch.float64"),
        (torch.zeros(1, 3, 64, 64, device="meta"), "image is on meta and the model on cpu"),
        ([[1.0]], "image is a list"),
    ],
)
def test_bad_images_are_named(model, image, message):
    with pytest.raises(InputError, match=message):
        model.encode(image)


@pytest.mark.parametrize(
    ("latents", "size", "message"),
    [
        (
            torch.zeros(1, 8, 4, 4),
            (64, 100),
            "width 100 does not fit latents of 4x4, which decode to 64x64: pass width=64",
        ),
        (torch.zeros(1, 8, 4, 4), (128, None), "height 128 does not fit"),
        (torch.zeros(1, 9, 4, 4), (None, None), r"expected \[B,8,h,w\]"),
        (torch.zeros(8, 4, 4), (None, None), "rank 3"),
        (torch.zeros(1, 8, 0, 4), (None, None), "at least 1"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.uint8), (None, None), "dtype torch.uint8"),
    ],
)
def test_bad_latents_are_named(model, latents, size, message):
    with pytest.raises(InputError, match=message):
        model.decode(latents, *size)


def test_strict_size_off_admits_multiples_of_the_stride():
    model = random_model(options={"strict_size": False})
    assert model.encode(torch.zeros(1, 3, 48, 16)).shape == (1, 8, 3, 1)
    with pytest.raises(InputError, match=r"height 40 is not a multiple of 16: use 32 or 48$"):
        model.encode(torch.zeros(1, 3, 40, 32))


def test_unknown_backend_is_refused():
    with pytest.raises(InputError, match="'cuda-magic' is unknown: use one of 'auto', 'torch'"):
        FullCapacitor(SMALL, backend="cuda-magic")


def test_half_precision_keeps_sensitive_tensors_in_float32(model, image):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.encoder.blocks[0].dwconv.weight.dtype == torch.bfloat16
    kept = {k for k, v in half.state_dict().items() if v.dtype == torch.float32}
    sensitive = ("latent_norm", "decoder.time_embed", "decoder.adaln")
    assert kept == {k for k in before if k.startswith(sensitive)}
    for k in kept:
        assert torch.equal(half.state_dict()[k], before[k])
    latents = half.encode(image)
    assert latents.dtype == torch.float32
    assert relative_error(latents, model.encode(image)) < 3e-2


def test_autocast_and_grad_mode_change_nothing(model, image):
    truth = model.encode(image)
    out = model.decode(truth, inference_config=SEEDED)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert torch.equal(model.encode(image), truth)
        assert torch.equal(model.decode(truth, inference_config=SEEDED), out)
        assert not model.encode(image).requires_grad


def test_module_life(model, image):
    truth = model.encode(image)
    assert torch.equal(copy.deepcopy(model).encode(image), truth)
    assert torch.equal(pickle.loads(pickle.dumps(model)).encode(image), truth)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = FullCapacitor(SMALL)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.eval().encode(image), truth)
    assert torch.equal(model.float().cpu()(image), truth)


def test_latent_patch_gives_stride_32():
    """Running statistics of 4Z channels: the mode is 2x2-patchified (order c*4 + i*2 + j) before whitening."""

    model = random_model(latent_patch=2)
    image = torch.randn(1, 3, 64, 96)
    latents = model.encode(image)
    assert latents.shape == (1, 32, 2, 3) and model.latent_stride == 32
    mean, logsnr = model.encode_posterior(image)
    mode = torch.sqrt(torch.sigmoid(logsnr)) * mean
    raw = model.dewhiten(latents)
    for c, i, j in [(0, 0, 0), (3, 0, 1), (5, 1, 0), (7, 1, 1)]:
        torch.testing.assert_close(raw[:, c * 4 + i * 2 + j], mode[:, c, i::2, j::2], rtol=1e-4, atol=1e-5)
    assert model.decode(latents).shape == image.shape


def test_multi_step_decode_is_deterministic_by_seed(model, image):
    latents = model.encode(image)
    inference = FullCapacitorInferenceConfig(num_steps=3, sampler="dpmpp_2m", pdg=True, seed=4)
    assert torch.equal(
        model.decode(latents, inference_config=inference), model.decode(latents, inference_config=inference)
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 3, 32, 32), 0.5), r"values from 0.5 to 0.5, .*multiply \[0, 1\] by 2 and subtract 1"),
        (torch.full((1, 3, 32, 32), 200.0), "values from 200 to 200, .*divide bytes by 127.5"),
        (torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32).bfloat16(), "values from -2 to 2, .*scale it"),
        (torch.full((1, 3, 32, 32), torch.nan), "image holds NaN"),
    ],
)
def test_images_of_another_range_are_told_once(model, image, message):
    with pytest.warns(UserWarning, match=message):
        model.encode(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(image)


def test_images_as_they_should_be_are_no_matter(model, image):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(image)
        model.encode(image.float() / 127.5 - 1)
        model.encode(torch.full((1, 3, 32, 32), 0.5))


def test_explicit_noise_is_that_of_its_seed(model):
    from capacitor_rt.diffusion import unit_noise

    latents = torch.randn(2, 8, 4, 6)
    noise = unit_noise((2, 3, 64, 96), 0, torch.device("cpu"))
    assert torch.equal(model.decode(latents, noise=noise), model.decode(latents, inference_config=SEEDED))
    device = FullCapacitorInferenceConfig(seed=0, noise="device")
    # on the CPU both sources are one
    assert torch.equal(model.decode(latents, inference_config=device), model.decode(latents, noise=noise))
    with pytest.raises(InputError, match=r"noise has shape \[2, 3, 64, 64\]: expected \[2, 3, 64, 96\]"):
        model.decode(latents, noise=noise[..., :64])
    with pytest.raises(ConfigError, match="noise 'gpu' is unknown: use one of 'cpu', 'device'"):
        FullCapacitorInferenceConfig(noise="gpu")


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", "bf16", torch.bfloat16])
def test_a_dtype_may_be_given_by_its_name(tmp_path, name):
    random_model().save_pretrained(tmp_path)
    for keyword in ("dtype", "torch_dtype"):
        assert FullCapacitor.from_pretrained(tmp_path, **{keyword: name}).dtype == torch.bfloat16
    both = FullCapacitor.from_pretrained(tmp_path, dtype=torch.bfloat16, torch_dtype=name)
    assert both.dtype == torch.bfloat16
    with pytest.raises(InputError, match="differ: pass one of them"):
        FullCapacitor.from_pretrained(tmp_path, dtype=torch.float16, torch_dtype=name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "int8", "half", "", 16, [torch.float32]])
def test_dtypes_that_no_model_computes_in_are_refused(tmp_path, dtype):
    random_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no type that the model computes in: use one of torch.float32") as raised:
        FullCapacitor.from_pretrained(tmp_path, dtype=dtype)
    assert repr(dtype) in str(raised.value)


@pytest.mark.parametrize("device", ["mps", "xpu:3", torch.device("hpu"), "warp", 1.5])
def test_devices_that_are_not_there_are_refused(tmp_path, device):
    if torch.accelerator.is_available() and str(device).startswith(torch.accelerator.current_accelerator().type):
        pytest.skip("this machine has such a device")
    random_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="device") as raised:
        FullCapacitor.from_pretrained(tmp_path, device=device)
    assert repr(device) in str(raised.value) and "use e.g. 'cpu'" in str(raised.value)


def test_inference_settings_may_be_a_dict(model):
    z = torch.randn(1, model.latent_channels, 4, 4)
    assert torch.equal(model.decode(z, inference_config={"seed": 0}), model.decode(z, inference_config=SEEDED))
    assert check_inference_config(None) == FullCapacitorInferenceConfig()
    assert check_inference_config(SEEDED) is SEEDED
    found = check_inference_config({"num_steps": 3, "seed": 0})
    assert found == FullCapacitorInferenceConfig(num_steps=3, seed=0)
    with pytest.raises(ConfigError, match="has no 'steps': its fields are num_steps, sampler"):
        check_inference_config({"steps": 3})
    with pytest.raises(ConfigError, match="num_steps 0"):
        check_inference_config({"num_steps": 0})
    with pytest.raises(InputError, match="inference_config is 3: pass a FullCapacitorInferenceConfig, or a dict"):
        check_inference_config(3)
