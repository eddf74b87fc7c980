"""The adapters as modules: what trainers read, set, move, wrap and differentiate."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from calibrations import document
from golden_cases import GOLDEN
from measures import relative_error
from models import random_model
from runtime_cases import DEVICE, TOLERANCE, tiny
from torch import nn

from capacitor_rt import CheckpointError, FullCapacitor, InputError
from capacitor_rt.adapters import CapacitorFlux2VAE, CapacitorVAE
from capacitor_rt.flux2_space import Flux2Calibration

BOTH = pytest.mark.parametrize("make", [CapacitorVAE, CapacitorFlux2VAE])


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64) * 2 - 1


def latents_of(vae, image):
    return vae.encode(image).latent_dist.mode()


@BOTH
def test_config_reads_as_attributes_and_as_a_mapping(make):
    vae = make(random_model())
    config, flux2 = vae.config, make is CapacitorFlux2VAE
    stride, channels = (8, 2) if flux2 else (16, 8)
    assert 2 ** (len(config.block_out_channels) - 1) == stride == vae.spatial_compression_ratio
    assert config.latent_channels == config["latent_channels"] == channels
    assert config.scaling_factor == 1.0 and config.shift_factor == 0.0 and config.force_upcast is False
    assert isinstance(config.sample_size, int)
    assert config.get("no_such", 7) == 7 and not hasattr(config, "no_such")
    assert {**config} == dict(config) == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert isinstance(copy.deepcopy(config), type(config))
    for change in (
        lambda: setattr(config, "scaling_factor", 2.0),
        lambda: config.update(scaling_factor=2.0),
        lambda: config.__setitem__("scaling_factor", 2.0),
    ):
        with pytest.raises(InputError, match="cannot be changed"):
            change()
    with pytest.raises(AttributeError, match="config has no 'no_such'"):
        _ = config.no_such
    if flux2:
        assert config.patch_size == (2, 2) and config.batch_norm_eps == vae.bn.eps == 1e-4
        assert len(config.latents_mean) == len(config.latents_std) == 2
    else:
        assert config.latents_mean is None and config.latents_std is None


def test_the_unfolded_statistics_are_those_of_the_latents():
    vae = CapacitorFlux2VAE(random_model())
    # latents whose 2x2 patches have just the statistics of the batch norm
    n = torch.randn(4096, 8, dtype=torch.float64)
    n = (n - n.mean(0)) / n.std(0, correction=0)
    raw = (n * (vae.bn.running_var.double() + 1e-4).sqrt() + vae.bn.running_mean.double())[:, :, None, None]
    z = nn.functional.pixel_shuffle(raw, 2)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.tensor(vae.config.latents_mean, dtype=torch.float64))
    std = z.std((0, 2, 3), correction=0)
    torch.testing.assert_close(std, torch.tensor(vae.config.latents_std, dtype=torch.float64))


@BOTH
def test_dtypes_and_formats(make, image):
    vae = make(random_model(options={"backend": "torch"}))
    want = latents_of(vae, image)
    for cast, dtype in ((vae.bfloat16, torch.bfloat16), (vae.half, torch.float16), (vae.float, torch.float32)):
        cast()
        assert vae.dtype == dtype == next(vae.parameters()).dtype
        latents = latents_of(vae, image.to(dtype))
        assert latents.dtype == dtype and relative_error(latents, want) < 0.05
        assert vae.decode(latents).sample.dtype == dtype
        if make is CapacitorFlux2VAE:
            assert vae.bn.running_mean.dtype == torch.float32
    vae = make(random_model(), output_dtype=torch.float32).to(torch.bfloat16, memory_format=torch.channels_last)
    assert vae.model.decoder.fuse_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert latents_of(vae, image.to(memory_format=torch.channels_last)).dtype == torch.float32
    assert vae.device == next(vae.parameters()).device == torch.device("cpu")


@BOTH
def test_modes_and_freezing(make, image):
    vae = make(random_model())
    want = latents_of(vae, image)
    assert vae.train().training and vae.eval() is vae and vae.requires_grad_(False) is vae
    vae.train()
    if make is CapacitorFlux2VAE:
        # a pass in training mode does not move the statistics
        before = vae.bn.running_mean.clone()
        vae.bn(torch.randn(4, 8, 3, 3))
        assert torch.equal(vae.bn.running_mean, before) and not vae.bn.training
    assert torch.equal(latents_of(vae, image), want)
    vae.requires_grad_(True)
    assert all(p.requires_grad for p in vae.parameters())
    assert latents_of(vae, image).requires_grad


@BOTH
def test_attributes_that_trainers_set(make, image):
    vae = make(random_model())
    want = vae(image).sample
    vae._fsdp_wrap = False
    vae.encoder._fsdp_wrap = vae.decoder._fsdp_wrap = vae.post_quant_conv._fsdp_wrap = True
    vae.enable_xformers_memory_efficient_attention()
    vae.disable_xformers_memory_efficient_attention()
    vae.enable_tiling(tile_sample_min_height=64)
    vae.disable_tiling()
    vae.post_quant_conv.to(torch.float32)
    assert torch.equal(vae(image).sample, want)
    calls = []

    class Counted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

        def forward(self, *args):
            calls.append(1)
            return self.inner(*args)

    vae.encoder = Counted(vae.encoder)
    assert vae.encoder is vae.model.encoder and torch.equal(vae(image).sample, want) and calls
    vae.encoder = None
    with pytest.raises(InputError, match="decoder only"):
        vae.encode(image)
    with pytest.raises(InputError, match="decoder cannot be None"):
        vae.decoder = None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = vae.nothing_of_the_kind


@BOTH
def test_slicing_changes_nothing(make, image):
    vae = make(random_model())
    whole = vae.encode(image).latent_dist
    decoded = vae.decode(whole.mode()).sample
    seeded = vae.decode(whole.mode(), generator=torch.Generator().manual_seed(5)).sample
    rows = []
    vae.model.encoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    vae.enable_slicing()
    sliced = vae.encode(image).latent_dist
    assert rows == [1, 1]
    torch.testing.assert_close(sliced.parameters, whole.parameters, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(whole.mode()).sample, decoded, rtol=1e-4, atol=1e-5)
    again = vae.decode(whole.mode(), generator=torch.Generator().manual_seed(5)).sample
    torch.testing.assert_close(again, seeded, rtol=1e-4, atol=1e-5)
    vae.disable_slicing()
    vae.encode(image)
    assert rows == [1, 1, 2]


@BOTH
def test_the_decoder_s_noise(make, image):
    vae = make(random_model())
    z = latents_of(vae, image)
    fixed = vae.decode(z).sample
    assert torch.equal(vae.decode(z).sample, fixed)
    one = vae.decode(z, generator=torch.Generator().manual_seed(3)).sample
    assert torch.equal(vae.decode(z, generator=torch.Generator().manual_seed(3)).sample, one)
    assert not torch.equal(one, fixed)
    each = vae.decode(z, generator=[torch.Generator().manual_seed(s) for s in (3, 4)]).sample
    alone = vae.decode(z[:1], generator=torch.Generator().manual_seed(3)).sample
    torch.testing.assert_close(each[:1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.equal(each[1], one[1])
    anew = make(vae.model, inference_config={"seed": None})
    assert not torch.equal(anew.decode(z).sample, anew.decode(z).sample)
    steps = make(vae.model, inference_config={"seed": 0, "num_steps": 2})
    assert not torch.equal(steps.decode(z).sample, fixed)


@BOTH
def test_gradients_reach_the_inputs(make, image):
    vae = make(random_model())
    image.requires_grad_(True)
    latents = latents_of(vae, image)
    vae.decode(latents).sample.square().mean().backward()
    assert image.grad.abs().sum() > 0
    # as of the model itself
    twin = image.detach().clone().requires_grad_(True)
    vae.model.decode(vae.model.encode(twin), inference_config={"seed": 0}).square().mean().backward()
    torch.testing.assert_close(image.grad, twin.grad, rtol=1e-3, atol=1e-6)
    image.grad = None
    vae.enable_gradient_checkpointing()
    vae.decode(latents_of(vae, image)).sample.square().mean().backward()
    torch.testing.assert_close(image.grad, twin.grad, rtol=1e-3, atol=1e-6)
    vae.disable_gradient_checkpointing()
    vae.encode(image).latent_dist.sample(torch.Generator().manual_seed(0)).sum().backward()


@BOTH
def test_state_copies_and_pickles(make, image, tmp_path):
    vae = make(random_model())
    want = latents_of(vae, image)
    state = vae.state_dict()
    assert not any(name.startswith(("encoder", "decoder")) for name in state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = make(random_model(seed=1))
    assert not torch.equal(latents_of(other, image), want)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(latents_of(other, image), want)
    for copied in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert torch.equal(latents_of(copied, image), want) and copied.model is not vae.model
    vae.save_pretrained(tmp_path / "saved" / "vae")
    loaded = make.from_pretrained(tmp_path / "saved", subfolder="vae", torch_dtype=torch.float32, variant=None)
    assert torch.equal(latents_of(loaded, image), want)
    assert torch.equal(FullCapacitor.from_pretrained(tmp_path / "saved" / "vae").encode(image), vae.model.encode(image))


@pytest.mark.parametrize("change", ["inference_config", "output_dtype", "latent_scale", "bn", "calibration"])
def test_arguments_are_saved_with_the_model(change, image, tmp_path):
    """What a pipeline saves and loads again is the same adapter."""
    model = random_model()
    bn = nn.BatchNorm2d(8, eps=1e-3, affine=False)
    bn.running_var.uniform_(0.5, 2.0)
    statistics = dict(zip(("mean", "std"), (t.tolist() for t in model.statistics()), strict=True))
    values = {
        "inference_config": {"seed": 5, "num_steps": 2},
        "output_dtype": torch.bfloat16,
        "latent_scale": 0.18215,
        "bn": bn,
        "calibration": Flux2Calibration.from_dict(document(8, whitening=statistics)),
    }
    make = CapacitorVAE if change == "latent_scale" else CapacitorFlux2VAE
    vae = make(model, **{change: values[change]})
    vae.save_pretrained(tmp_path)
    again = make.from_pretrained(tmp_path)
    latents = latents_of(vae, image)
    assert torch.equal(latents_of(again, image), latents) and latents.dtype == latents_of(again, image).dtype
    assert torch.equal(again.decode(latents).sample, vae.decode(latents).sample)
    # unlike those of the defaults, unless it is the sampler's or the type that differs
    plain = make(model)
    if change in ("latent_scale", "bn", "calibration"):
        assert not torch.equal(latents_of(plain, image), latents)
    else:
        assert not torch.equal(plain.decode(latents_of(plain, image)).sample, vae.decode(latents).sample)
    # what is given counts, another class has arguments of its own, and damage is told
    assert make.from_pretrained(tmp_path, inference_config={"seed": 9}).inference_config.seed == 9
    other = CapacitorVAE if make is CapacitorFlux2VAE else CapacitorFlux2VAE
    assert other.from_pretrained(tmp_path).inference_config.seed == 0
    (tmp_path / "adapter.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter\.json cannot be read"):
        make.from_pretrained(tmp_path)


@BOTH
def test_loading(make):
    vae = make.from_pretrained(GOLDEN / "p16", torch_dtype="bfloat16", low_cpu_mem_usage=True, use_safetensors=True)
    assert vae.dtype == torch.bfloat16 and not vae.training and not any(p.requires_grad for p in vae.parameters())
    # pipelines make sizes of multiples of 16
    assert vae.encode(torch.rand(1, 3, 80, 48) * 2 - 1).latent_dist.mode().isfinite().all()
    with pytest.raises(CheckpointError, match="nowhere"):
        make.from_pretrained(GOLDEN / "nowhere")
    with pytest.raises(TypeError, match="no_such_option"):
        make.from_pretrained(GOLDEN / "p16", no_such_option=1)


def test_inside_a_compiled_model(image):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = CapacitorFlux2VAE(random_model())
            self.net = nn.Conv2d(self.vae.config.latent_channels, 4, 1)

        def forward(self, x):
            with torch.no_grad():
                z = self.vae.encode(x).latent_dist.mode()
            return self.net(z * self.vae.config.scaling_factor)

    outer = Outer()
    want = outer(image)
    compiled = torch.compile(outer, backend="aot_eager")
    got = compiled(image)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    assert outer.net.weight.grad is not None and [n for n, p in outer.vae.named_parameters() if p.requires_grad] == []


@BOTH
def test_accelerate_prepares_and_offloads(make, image):
    accelerate = pytest.importorskip("accelerate")
    vae = make(random_model())
    want = latents_of(vae, image)
    prepared = accelerate.Accelerator(cpu=True).prepare(vae)
    assert torch.equal(latents_of(prepared, image), want)
    moved = []

    class Hook(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(module)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(vae, Hook())
    vae.decode(latents_of(vae, image))
    assert moved == [vae, vae]


@BOTH
def test_the_triton_backend_behind_the_interface(make):
    """One encode and one decode by the kernels, against the torch backend; off a GPU under the interpreter."""
    fast = tiny("triton")
    vae, plain = make(fast), make(tiny("torch", "cpu"))
    image = torch.rand(2, 3, 16, 8) * 2 - 1
    got = vae.encode(image.to(DEVICE)).latent_dist
    want = plain.encode(image).latent_dist
    assert relative_error(got.parameters.cpu(), want.parameters) < TOLERANCE
    decoded = vae.decode(got.mode()).sample.cpu()
    assert relative_error(decoded, plain.decode(want.mode()).sample) < TOLERANCE
    assert fast.stats().folds == 2, "both halves, once each"
    with pytest.raises(InputError, match="no backward pass"):
        vae.encode(image.to(DEVICE).requires_grad_(True))


@BOTH
def test_autocast_and_inference_mode_change_nothing(make, image):
    vae = make(random_model())
    want = latents_of(vae, image)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        got = latents_of(vae, image)
        decoded = vae.decode(got).sample
    assert torch.equal(got, want) and torch.equal(decoded, vae.decode(want).sample)


def test_without_diffusers():
    """The same calls and attributes, of our own classes."""
    code = """
import sys
sys.modules["diffusers"] = None
import copy, pickle, torch
from capacitor_rt.adapters import CapacitorFlux2VAE, CapacitorVAE
from capacitor_rt.flux2_space import Flux2Calibration
for make in (CapacitorFlux2VAE, CapacitorVAE):
    vae = make.from_pretrained("sample", variant="fp16", torch_dtype=torch.float32)
    encoded = vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1)
    decoded = copy.deepcopy(vae).to("cpu").decode(encoded.latent_dist.sample(torch.Generator().manual_seed(0)))
    assert type(encoded).__module__ == type(decoded).__module__ == "capacitor_rt.adapters.outputs"
    assert decoded.sample.shape == (1, 3, 64, 64) and encoded[0] is encoded.latent_dist
    assert not any("diffusers" in base.__module__ for base in type(vae).__mro__)
    pickle.dumps(vae)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
