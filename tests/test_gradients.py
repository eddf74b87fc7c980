"""Gradients: the torch backend is differentiable both ways, and the Triton backend refuses what it cannot do."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from runtime_cases import DEVICE, ONE_STEP, tiny
from torch import nn

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig, InputError
from capacitor_rt.runtime.backend import ServedAutoencoder

TWO_STEPS = FullCapacitorInferenceConfig(num_steps=2, pdg=True, seed=3)


@pytest.fixture
def model() -> FullCapacitor:
    return tiny("torch", "cpu", torch.float64)


def double(model: FullCapacitor) -> FullCapacitor:
    """float64 in the time embedding and the statistics too, for finite differences."""
    return model.double()


def test_encode_and_decode_pass_gradcheck(model):
    model = double(model)
    image = torch.rand(1, 3, 8, 8, dtype=torch.float32) * 2 - 1
    latents = model.encode(image).detach()
    assert latents.dtype == torch.float64

    def encode(x):
        return model.latents_of(model.encode_posterior(x.float()))

    # float32 is the widest type that images and latents may have, so differences are those of float32
    for call, at in ((encode, image), (lambda z: model.decode(z.float(), inference_config=TWO_STEPS), latents.float())):
        x = at.clone().requires_grad_(True)
        out = call(x)
        direction, weight = torch.randn_like(x), torch.randn_like(out)
        (out * weight).sum().backward()
        step = 1e-2
        with torch.no_grad():
            numeric = ((call(at + step * direction) - call(at - step * direction)) * weight).sum() / (2 * step)
        assert (x.grad * direction).sum().item() == pytest.approx(numeric.item(), rel=2e-3)


def test_inner_modules_pass_gradcheck(model):
    model = double(model)
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    z = torch.rand(1, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    times = torch.full((1,), 0.7, dtype=torch.float64)
    torch.autograd.gradcheck(lambda image: model.encoder(image), (x,))
    torch.autograd.gradcheck(lambda image, latents: model.decoder(image, times, latents), (x, z))
    scale = model.encoder.blocks[0].layer_scale.requires_grad_(True)
    torch.autograd.gradcheck(lambda _: model.encoder(x.detach()), (scale,))


def test_gradients_reach_every_parameter():
    model = tiny("torch", "cpu").requires_grad_(True)
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    model.decode(model.encode(image), inference_config=TWO_STEPS).sub(image).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_decoder_is_fine_tuned_on_frozen_latents():
    model = tiny("torch", "cpu")
    model.decoder.requires_grad_(True)
    image = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = model.encode(image)
    assert not latents.requires_grad
    optimizer = torch.optim.Adam(model.decoder.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = (model.decode(latents, inference_config=ONE_STEP) - image).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_perceptual_loss_trains_a_network_before_the_encoder():
    model, net = tiny("torch", "cpu"), nn.Conv2d(3, 3, 3, padding=1)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    target = model.encode(image)
    loss = (model.encode(net(image).tanh()) - target).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_checkpointing_changes_no_gradient():
    plain = tiny("torch", "cpu").requires_grad_(True)
    twin = copy.deepcopy(plain)
    twin.encoder.checkpointing = twin.decoder.checkpointing = True
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    for model in (plain, twin):
        model.decode(model.encode(image), inference_config=TWO_STEPS).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_samples_of_the_posterior_follow_their_generator():
    model = tiny("torch", "cpu")
    posterior = model.encode_posterior(torch.rand(2, 3, 16, 8) * 2 - 1)
    a, b = (model.sample_latents(posterior, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b) and a.dtype == torch.float32
    assert not torch.equal(a, model.sample_latents(posterior, torch.Generator().manual_seed(6)))
    many = torch.stack([model.sample_latents(posterior) for _ in range(2000)])
    _, std = model.statistics()
    sigma = torch.sigmoid(-posterior.logsnr).sqrt() / std[:, None, None]
    torch.testing.assert_close(many.std(0), sigma, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(many.mean(0), model.latents_of(posterior), rtol=0, atol=0.15)


@pytest.mark.skipif(DEVICE == "cuda", reason="says what the interpreter's device does")
def test_the_triton_backend_refuses_gradients_by_name():
    model, image = tiny(), torch.rand(1, 3, 8, 8) * 2 - 1
    with pytest.raises(InputError, match=r"an input requires grad.*no backward pass"):
        model.encode(image.requires_grad_(True))
    with torch.no_grad():
        latents = model.encode(image)
    model.decoder.requires_grad_(True)
    with pytest.raises(InputError, match=r"parameters of the decoder require grad: freeze them by requires_grad_"):
        model.decode(latents)
    with torch.inference_mode():
        model.decode(latents)
    assert torch.equal(model.encode(image.detach()), latents)


@pytest.fixture
def auto(monkeypatch) -> FullCapacitor:
    """A model that "auto" gives to the Triton backend, as on a GPU."""
    monkeypatch.setattr(
        ServedAutoencoder, "_serving", lambda self, *_: "torch" if self.backend == "torch" else "triton"
    )
    return tiny("auto")


def test_auto_takes_torch_where_gradients_are_asked_for(auto):
    truth, image = tiny("torch"), torch.rand(1, 3, 8, 8, device=DEVICE) * 2 - 1
    assert auto.encode(image).shape == (1, 4, 1, 1) and auto.stats().folds == 1
    with pytest.warns(UserWarning, match="torch serves this call: an input requires grad"):
        latents = auto.encode(image.clone().requires_grad_(True))
    assert latents.requires_grad and torch.equal(latents, truth.encode(image))
    auto.encoder.requires_grad_(True)
    with pytest.warns(UserWarning, match="torch serves this call: parameters of the encoder require grad"):
        auto.encode(image).sum().backward()
    assert auto.encoder.to_bottleneck.weight.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto.encode(image)
        # the decoder is frozen still, and without gradients the encoder goes by Triton again
        auto.decode(latents.detach(), inference_config=ONE_STEP)
        with torch.no_grad():
            auto.encode(image)
    assert auto.stats().folds == 2


class Wrapped(nn.Module):
    """What an adapter library puts in place of a convolution."""

    def __init__(self, base: nn.Conv2d):
        super().__init__()
        self.base, self.down = base, nn.Conv2d(base.in_channels, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.down(x)


def test_wrapped_layers_and_hooks_are_not_ignored(auto):
    truth, image = tiny("torch"), torch.rand(1, 3, 8, 8, device=DEVICE) * 2 - 1
    explicit = tiny()
    for model in (auto, truth, explicit):
        torch.manual_seed(0)
        model.encoder.to_bottleneck = Wrapped(model.encoder.to_bottleneck).requires_grad_(False).to(DEVICE)
    with pytest.warns(UserWarning, match=r"encoder.to_bottleneck is a Wrapped, .*merge_and_unload"):
        assert torch.equal(auto.encode(image), truth.encode(image))
    with pytest.raises(InputError, match=r"encoder.to_bottleneck is a Wrapped"):
        explicit.encode(image)
    hooked = tiny()
    seen = []
    handle = hooked.encoder.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(InputError, match=r"encoder.blocks.0 has a forward hook, .*remove it"):
        hooked.encode(image)
    handle.remove()
    hooked.encode(image)
