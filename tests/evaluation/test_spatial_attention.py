"""The kernel in the attention layer of the FLUX.2 VAE: the result is torch's, and so is what it does not serve."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from capacitor_kernels.launch import INTERPRETED, recording
from capacitor_rt import InputError
from capacitor_rt.evaluation.flux2 import CONFIG, Flux2, missing
from capacitor_rt.evaluation.spatial_attention import SpatialAttention, use_attention

TINY = CONFIG | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
needs_diffusers = pytest.mark.skipif(missing() is not None, reason=str(missing()))
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="the kernels run on the CPU under the interpreter alone")


class PlainProcessor:
    """What a layer does, by torch alone; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, attn, x, *args, **kwargs):
        self.calls += 1
        tokens = attn.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (project(tokens)[:, None] for project in (attn.to_q, attn.to_k, attn.to_v))
        out = attn.to_out[1](attn.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0]))
        return (out.transpose(1, 2).reshape(x.shape) + x) / attn.rescale_output_factor


class Layer(nn.Module):
    """The interface of diffusers' `Attention`, as its VAEs make one."""

    def __init__(self, channels: int = 24):
        super().__init__()
        self.heads, self.residual_connection, self.rescale_output_factor = 1, True, 2.0
        self.spatial_norm = self.norm_q = self.norm_k = self.norm_cross = None
        self.group_norm = nn.GroupNorm(4, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in "qkv")
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        self.set_processor(PlainProcessor())
        self.requires_grad_(False)

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, *args, **kwargs):
        return self.processor(self, *args, **kwargs)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = Layer()
    assert use_attention(made, "triton") == 1
    return made


@needs_interpreter
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layer_computes_what_it_did(layer, layout):
    x = torch.randn(2, 24, 5, 7).contiguous(memory_format=layout)
    plain = layer.processor.before
    truth = plain(copy.deepcopy(layer).double(), x.double())
    assert plain.calls == 1
    out = layer(x)
    assert plain.calls == 1 and out.shape == x.shape
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    # without its attention the layer is another
    assert not torch.allclose(out, x / 2, atol=1e-2)


def test_torch_serves_what_the_kernel_does_not(layer):
    x, plain = torch.randn(1, 24, 4, 4), layer.processor.before
    calls = [
        ((x,), {"attention_mask": torch.zeros(1, 16)}),
        ((x,), {"encoder_hidden_states": x.flatten(2).transpose(1, 2)}),
        ((x.clone().requires_grad_(),), {}),
    ]
    for args, kwargs in calls:
        before = plain.calls
        layer(*args, **kwargs)
        assert plain.calls == before + 1
    layer.heads = 2
    layer(x)
    assert plain.calls == len(calls) + 1


def test_auto_takes_torch_on_the_cpu_and_triton_says_why_it_cannot(layer, monkeypatch):
    x, plain = torch.randn(1, 24, 4, 4), layer.processor.before
    use_attention(layer, "auto")
    layer(x)
    assert plain.calls == 1
    use_attention(layer, "torch")
    assert layer.processor is plain
    use_attention(layer, "triton")
    why = "the kernels need an NVIDIA GPU"
    monkeypatch.setattr("capacitor_rt.evaluation.spatial_attention.why_not_triton", lambda device: why)
    with pytest.raises(InputError, match=f'attention="triton": {why}'):
        layer(x)
    with pytest.raises(InputError, match="attention 'flash' is unknown: use one of auto, triton, torch"):
        use_attention(layer, "flash")


def test_a_kernel_that_cannot_be_built_leaves_it_to_torch(layer, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler")

    module = "capacitor_rt.evaluation.spatial_attention"
    monkeypatch.setattr(f"{module}._attend", fail)
    monkeypatch.setattr(f"{module}.build_failure", lambda error: f"Triton could not build a kernel ({error})")
    monkeypatch.setattr(SpatialAttention, "_suits", lambda self, *_: self.wanted != "torch")
    x, plain = torch.randn(1, 24, 4, 4), layer.processor.before
    with pytest.raises(RuntimeError, match="no compiler"):
        layer(x)
    use_attention(layer, "auto")
    with pytest.warns(UserWarning, match=r"torch's attention runs in the FLUX.2 VAE: Triton could not .*no compiler"):
        layer(x)
    layer(x)
    assert plain.calls == 2


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return result


@pytest.mark.parametrize("side", [1024, 2048])
def test_no_tensor_of_a_large_image_is_larger_than_its_activations(side, monkeypatch):
    monkeypatch.setattr("capacitor_rt.evaluation.spatial_attention.why_not_triton", lambda device: None)
    with torch.device("meta"):
        layer = Layer(512).bfloat16()
        x = torch.empty(1, 512, side // 8, side // 8, dtype=torch.bfloat16)
    use_attention(layer, "triton")
    with recording(90) as launches, Largest() as largest:
        layer(x)
    assert len(launches) == 1 and largest.numel == x.numel()
    # the matrix of scores would have this many times as many elements
    assert (side // 8) ** 4 == side**2 // 64 // 512 * x.numel() >= 32 * x.numel()


@needs_diffusers
@needs_interpreter
def test_the_vae_of_diffusers_is_served():
    torch.manual_seed(0)
    model = Flux2.random(TINY, attention="triton")
    processors = model.vae.attn_processors
    assert len(processors) == 2 and all(isinstance(p, SpatialAttention) for p in processors.values())
    image = torch.rand(2, 3, 48, 32) * 2 - 1
    served = model.reconstruct(image)
    for processor in processors.values():
        processor.before = None
    torch.testing.assert_close(model.reconstruct(image), served, rtol=0, atol=0)
    plain = Flux2.random(TINY, attention="torch").reconstruct(image)
    torch.testing.assert_close(served, plain, rtol=1e-4, atol=1e-5)
