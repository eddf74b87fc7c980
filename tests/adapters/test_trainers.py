"""What training scripts call on a VAE, in their order, with the adapters in its place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measures import relative_error
from models import random_model
from torch import nn

from capacitor_rt.adapters import CapacitorFlux2VAE, CapacitorVAE


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64) * 2 - 1


def step(net: nn.Module, latents: torch.Tensor) -> float:
    """One step of flow matching."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    noise, t = torch.randn_like(latents), torch.rand(len(latents), 1, 1, 1)
    loss = (net((1 - t) * latents + t * noise) - (noise - latents)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_a_loop_with_its_own_scale(image):
    """SiT, DiT, and many after them: sample, times a constant in the script; pictures by the same constant."""
    vae = CapacitorVAE(random_model(), latent_scale=0.18215).to(torch.device("cpu"))
    with torch.no_grad():
        x = vae.encode(image).latent_dist.sample().mul_(0.18215)
    assert x.is_contiguous() and not x.requires_grad
    loss = step(nn.Conv2d(8, 8, 1), x)
    assert loss > 0
    # the loop sees whitened latents, plus the posterior's noise
    assert relative_error(x, vae.model.encode(image)) < 2
    pictures = vae.decode(x / 0.18215).sample
    torch.testing.assert_close(pictures, vae.model.decode(x, inference_config={"seed": 0}), rtol=1e-4, atol=1e-5)


def test_moments_on_disk(image):
    """REPA and MAR store moments and draw from them later."""
    dist = CapacitorVAE(random_model()).encode(image).latent_dist
    moments = torch.cat([dist.mean, dist.std], 1)
    mean, std = moments.chunk(2, 1)
    torch.manual_seed(0)
    drawn = torch.stack([mean + std * torch.randn_like(std) for _ in range(64)])
    assert abs(((drawn - mean) / std).std().item() - 1) < 0.02
    log = torch.cat([dist.mean, dist.logvar], 1)
    torch.testing.assert_close((0.5 * log.chunk(2, 1)[1]).exp(), std)


def test_scaling_and_shift_from_the_config(image):
    """SD3's and FLUX's scripts, and SDXL's statistics."""
    for make in (CapacitorVAE, CapacitorFlux2VAE):
        vae = make(random_model())
        z = vae.encode(image.to(vae.dtype)).latent_dist.mode()
        assert torch.equal((z - vae.config.shift_factor) * vae.config.scaling_factor, z)
        has = getattr(vae.config, "latents_mean", None) is not None
        if has:
            mean, std = (torch.tensor(vae.config[k])[None, :, None, None] for k in ("latents_mean", "latents_std"))
            z = (z - mean) * vae.config.scaling_factor / std
        assert has == (make is CapacitorFlux2VAE) and z.isfinite().all()
        if vae.config.force_upcast:
            raise AssertionError("no adapter asks for it")
        assert 2 ** (len(vae.config.block_out_channels) - 1) == 64 // z.shape[-1]


def test_flux2_lora_training(image):
    """Mode, patches, batch norm, positions, tokens, a step, and back to the picture, by the pipeline's own methods."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    pipeline = diffusers.Flux2Pipeline
    vae = CapacitorFlux2VAE(random_model())
    vae.requires_grad_(False)
    vae.to("cpu", dtype=torch.float32)
    bn_mean = vae.bn.running_mean.view(1, -1, 1, 1).to("cpu")
    bn_std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to("cpu")
    with torch.no_grad():
        z = vae.encode(image.to(dtype=vae.dtype)).latent_dist.mode()
    z = (pipeline._patchify_latents(z) - bn_mean) / bn_std
    torch.testing.assert_close(z, vae.model.encode(image), rtol=1e-5, atol=1e-5)
    ids = pipeline._prepare_latent_ids(z)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=16,
    )
    noise, sigma = torch.randn_like(z), torch.tensor([0.3, 0.7]).view(-1, 1, 1, 1)
    prompt = torch.randn(2, 5, 12)
    out = transformer(
        hidden_states=pipeline._pack_latents((1 - sigma) * z + sigma * noise),
        timestep=sigma.flatten(),
        guidance=torch.ones(2),
        encoder_hidden_states=prompt,
        txt_ids=pipeline._prepare_text_ids(prompt),
        img_ids=ids,
        return_dict=False,
    )[0]
    predicted = pipeline._unpack_latents_with_ids(out, ids)
    loss = F.mse_loss(predicted, noise - z)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in transformer.parameters())
    assert all(p.grad is None for p in vae.parameters())
    picture = vae.decode(pipeline._unpatchify_latents(z * bn_std + bn_mean), return_dict=False)[0]
    want = vae.model.decode(vae.model.encode(image), inference_config={"seed": 0})
    torch.testing.assert_close(picture, want, rtol=1e-4, atol=1e-4)


def test_pixel_losses_through_the_decoder(image):
    """A loss on pixels reaches the network through `decode`; the adapter stays frozen."""
    vae = CapacitorVAE(random_model()).requires_grad_(False)
    net = nn.Conv2d(8, 8, 1)
    z = vae.encode(image).latent_dist.mode()
    F.l1_loss(vae.decode(net(z)).sample, image).backward()
    assert net.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in vae.parameters())
