"""The operators: what torch.compile, torch.export and opcheck make of a model."""

from __future__ import annotations

import gc
import io

import pytest
import torch
from runtime_cases import DEVICE, ONE_STEP, tiny

from capacitor_rt import InputError
from capacitor_rt.diffusion import unit_noise


class Encode(torch.nn.Module):
    """A caller that holds a model as a plain attribute."""

    def __init__(self, model):
        super().__init__()
        self.vae = model

    def forward(self, x):
        return self.vae.encode(x) + 1


@pytest.mark.parametrize("cold", [True, False])
def test_a_caller_compiles_whole(cold):
    torch._dynamo.reset()
    model, twin = tiny(), tiny()
    image = torch.randn(1, 3, 8, 8, device=DEVICE)
    if not cold:
        model.encode(image)

    @torch.compile(fullgraph=True, backend="eager")
    def half(x):
        latents = model.encode(x)
        posterior = model.encode_posterior(x)
        return latents * 0.5, posterior.mean, model.decode(latents, inference_config=ONE_STEP)

    truth = twin.encode(image)
    scaled, mean, decoded = half(image)
    assert torch.equal(scaled, truth * 0.5) and torch.equal(mean, twin.encode_posterior(image).mean)
    assert torch.equal(decoded, twin.decode(truth, inference_config=ONE_STEP))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_caller_compiles_with_symbolic_sizes(backend):
    torch._dynamo.reset()
    model, twin = tiny(backend), tiny(backend)

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def there_and_back(x):
        latents = model.encode(x)
        return latents, model.decode(latents, inference_config=ONE_STEP)

    for shape in ((1, 3, 8, 8), (2, 3, 16, 8), (3, 3, 8, 24)):
        image = torch.rand(shape, device=DEVICE) * 2 - 1
        latents, decoded = there_and_back(image)
        assert torch.equal(latents, twin.encode(image))
        assert torch.equal(decoded, twin.decode(latents, inference_config=ONE_STEP))


def test_a_compiled_caller_follows_a_cast():
    torch._dynamo.reset()
    model = tiny()
    image = torch.randn(1, 3, 8, 8, device=DEVICE)
    call = torch.compile(Encode(model), fullgraph=True, backend="eager")
    before = call(image)
    model.half()
    assert torch.equal(call(image), model.encode(image) + 1) and not torch.equal(call(image), before)


def test_an_exported_caller_runs_while_its_model_lives():
    model = tiny()
    image = torch.randn(1, 3, 8, 8, device=DEVICE)
    truth = model.encode(image) + 1
    exported = torch.export.export(Encode(model), (image,))
    assert torch.equal(exported.module()(image), truth)
    number = model._number
    del model, exported
    # what torch.compile and export remember of callers, this one and those of other tests
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(InputError, match="is not in this process any more: compile or export again"):
        torch.ops.capacitor_rt.encode(image, number)


def test_the_torch_backend_exports_into_a_file_of_its_own():
    model = tiny("torch", "cpu")
    image = torch.randn(1, 3, 8, 8)
    exported = torch.export.export(Encode(model), (image,))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(image), model.encode(image) + 1)


def test_operators_are_what_they_say():
    model = tiny()
    image = torch.randn(1, 3, 8, 8, device=DEVICE)
    # without dynamic shapes, whose tracing takes most of the time
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for layout in (image, image.permute(0, 2, 3, 1), image.contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.capacitor_rt.encode.default, (layout, model._number), test_utils=tests)
    torch.library.opcheck(torch.ops.capacitor_rt.posterior.default, (image, model._number), test_utils=tests)
    latents = torch.randn(1, 4, 1, 1, device=DEVICE)
    noise = unit_noise((1, 3, 8, 8), 0, torch.device(DEVICE))
    args = (latents, noise, model._number, 1, "ddim", "linear", False, 2.0)
    torch.library.opcheck(torch.ops.capacitor_rt.decode.default, args, test_utils=tests)
    torch.library.opcheck(
        torch.ops.capacitor_rt.seeded_noise.default, (latents, [1, 3, 8, 8], 3, "cpu"), test_utils=tests
    )
