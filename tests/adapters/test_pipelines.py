"""diffusers' own pipelines with the adapters as their `vae`, from the constructor to the pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cache_cases import pixels
from models import random_model
from PIL import Image

from capacitor_rt.adapters import CapacitorFlux2VAE, CapacitorVAE

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TRANSFORMER = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 4, 4, 4),
    "timestep_guidance_channels": 16,
}


def flux2_pipeline(kind="Flux2Pipeline"):
    transformer = diffusers.Flux2Transformer2DModel(**TRANSFORMER).eval()
    vae = CapacitorFlux2VAE(random_model(options={"strict_size": False}))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = getattr(diffusers, kind)(
        scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return flux2_pipeline()


def test_the_constructor_reads_the_adapter(pipe):
    assert isinstance(pipe.vae, CapacitorFlux2VAE) and pipe.vae_scale_factor == 8
    assert pipe.image_processor.config.vae_scale_factor == 16
    assert set(pipe.components) >= {"vae", "transformer"}
    pipe.to(torch.bfloat16)
    assert pipe.vae.dtype == torch.bfloat16 and pipe.vae.bn.running_mean.dtype == torch.float32
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    if hasattr(pipe, "enable_vae_slicing"):
        pipe.enable_vae_slicing()


def test_the_static_methods_are_the_adapter_s_layout(pipe):
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    mode = pipe.vae.encode(image).latent_dist.mode()
    patched = type(pipe)._patchify_latents(mode)
    assert torch.equal(patched, F.pixel_unshuffle(mode, 2))
    assert torch.equal(type(pipe)._unpatchify_latents(patched), mode)
    # [128, h/16] and [32, h/8] are the same tokens
    assert torch.equal(type(pipe)._pack_latents(patched), patched.flatten(2).mT)
    ids = type(pipe)._prepare_latent_ids(patched)
    assert torch.equal(type(pipe)._unpack_latents_with_ids(type(pipe)._pack_latents(patched), ids), patched)


@pytest.mark.parametrize("kind", ["Flux2Pipeline", "Flux2KleinPipeline"])
def test_its_image_latents_are_the_model_s_whitened_ones(kind):
    pipe = flux2_pipeline(kind)
    image = torch.rand(1, 3, 80, 112) * 2 - 1
    want = pipe.vae.model.encode(image)
    got = pipe._encode_vae_image(image, generator=None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    packed, ids = pipe.prepare_image_latents([image, image], 1, None, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(packed[0, 35:].T.reshape(1, 8, 5, 7), want, rtol=1e-5, atol=1e-5)
    assert ids.shape == (1, 70, 4)


@pytest.mark.parametrize("kind", ["Flux2Pipeline", "Flux2KleinPipeline"])
def test_it_makes_pictures_from_text_and_image(kind):
    pipe = flux2_pipeline(kind)
    # the second takes none from its users
    guidance = {"guidance_scale": 1.0} if "Klein" in kind else {}
    prompt = torch.randn(1, 5, 12)

    def run(seed: int, output_type: str):
        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 96, "num_inference_steps": 2}
        picture = Image.fromarray(pixels(80, 112, seed=seed))
        settings = {"prompt_embeds": prompt, "generator": generator, "output_type": output_type}
        return pipe(image=picture, **size, **settings, **guidance).images

    latents, (image,) = run(0, "latent"), run(0, "pil")
    assert image.size == (96, 64)
    # the picture is what the model decodes from the transformer's latents
    tokens = latents.dim() == 3
    whitened = latents.mT.reshape(1, 8, 4, 6) if tokens else pipe.vae.bn(pipe._patchify_latents(latents))
    decoded = pipe.vae.model.decode(whitened, inference_config={"seed": 0})
    want = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(image, np.float32) - want).max() <= 1
    # the condition image went through the encoder
    assert not torch.equal(run(1, "latent"), latents)


def test_half_precision_end_to_end(pipe):
    pipe.to(torch.bfloat16)
    image = pipe(
        prompt_embeds=torch.randn(1, 5, 12, dtype=torch.bfloat16),
        image=Image.fromarray(pixels(64, 64)),
        height=64,
        width=64,
        num_inference_steps=1,
    ).images[0]
    assert image.size == (64, 64)


def test_a_class_conditional_pipeline_takes_the_whitened_adapter():
    vae = CapacitorVAE(random_model())
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=8,
        out_channels=16,
        num_layers=1,
        sample_size=4,
        patch_size=1,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    ).eval()
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    seen = []
    vae.model.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    images = pipe(class_labels=[3, 5], num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
    assert images.shape == (2, 64, 64, 3) and seen[0].shape == (2, 8, 4, 4)


def test_image_processors_agree_on_sizes():
    """`VaeImageProcessor` rounds to the stride that pipelines compute from the adapters' config."""
    for vae, multiple in ((CapacitorVAE(random_model()), 16), (CapacitorFlux2VAE(random_model()), 8)):
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=factor)
        assert processor.get_default_height_width(Image.new("RGB", (100, 70))) == (
            70 // multiple * multiple,
            100 // multiple * multiple,
        )


def test_from_pretrained_takes_the_adapter(tmp_path, caplog):
    """As `Flux2Pipeline.from_pretrained("black-forest-labs/FLUX.2-dev", vae=vae)`: only models of diffusers pass."""
    pipe = flux2_pipeline()
    theirs = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 2}
    pipe.vae = diffusers.AutoencoderKLFlux2(**theirs)
    pipe.save_pretrained(tmp_path / "theirs")
    vae = CapacitorFlux2VAE(random_model(options={"strict_size": False}))
    ours = diffusers.Flux2Pipeline.from_pretrained(
        tmp_path / "theirs", vae=vae, text_encoder=None, tokenizer=None, torch_dtype=torch.float32
    )
    assert ours.vae is vae and ours.vae_scale_factor == 8
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    want = vae.model.encode(image)
    torch.testing.assert_close(ours._encode_vae_image(image, generator=None), want, rtol=1e-5, atol=1e-5)
    # and a pipeline that holds the adapter is saved with it, and loaded again
    ours.save_pretrained(tmp_path / "ours")
    assert {p.name for p in (tmp_path / "ours" / "vae").iterdir()} == {
        "config.json",
        "model.safetensors",
        "adapter.json",
    }
    again = diffusers.Flux2Pipeline.from_pretrained(tmp_path / "ours", text_encoder=None, tokenizer=None)
    assert type(again.vae) is CapacitorFlux2VAE
    torch.testing.assert_close(again._encode_vae_image(image, generator=None), want, rtol=1e-5, atol=1e-5)


def test_a_decoder_that_is_compiled_whole():
    """`pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True)`, as diffusers' pages have it."""
    pipe = flux2_pipeline()
    z = torch.randn(1, 2, 8, 8)
    want = pipe.vae.decode(z, return_dict=False)[0]
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(pipe.vae.decode(z, return_dict=False)[0], want, rtol=1e-4, atol=1e-5)
