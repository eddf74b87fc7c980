"""What .to(), parents, optimizers, checkpoints and wrappers of parallel training make of a model that is served."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from models import TINY, randomise
from runtime_cases import DEVICE, ONE_STEP, tiny
from torch import nn

from capacitor_rt import FullCapacitor, InputError

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Trainer(nn.Module):
    """A parent that trains `net` on the latents of a frozen autoencoder, as LightningModules do."""

    def __init__(self, vae: FullCapacitor):
        super().__init__()
        self.vae = vae
        self.net = nn.Conv2d(4, 4, 1)

    def forward(self, image):
        return self.net(self.vae.encode(image)).square().mean()


def image() -> torch.Tensor:
    return IMAGE.to(DEVICE)


def test_parameters_are_those_of_any_module():
    model, plain = tiny(dtype=torch.bfloat16), tiny("torch", "cpu", torch.bfloat16)
    model.encode(image())
    parent = Trainer(model)
    assert [name for name, _ in parent.named_parameters()] == [
        *(f"vae.{name}" for name, _ in plain.named_parameters()), "net.weight", "net.bias"
    ]  # fmt: skip
    weight = next(parent.vae.parameters())
    assert weight.dtype == torch.bfloat16 and weight.device.type == DEVICE
    assert set(model.children()) == {model.encoder, model.decoder}
    for k, v in plain.state_dict().items():
        assert torch.equal(model.state_dict()[k].cpu(), v), k


def test_a_cast_is_the_same_by_any_road():
    """bfloat16 and float16 are packed from the parameters as they are after the cast, once or in steps."""
    at_once = tiny().to(DEVICE, torch.float16)
    in_steps = tiny("triton", "cpu").to(torch.float16).to(DEVICE)
    assert torch.equal(at_once.encode(image()), in_steps.encode(image()))
    for name in ("latent_norm_running_mean", "latent_norm_running_var"):
        assert getattr(at_once, name).dtype == torch.float32 and getattr(at_once, name).device == at_once.device


def packed_w1(model: FullCapacitor) -> torch.Tensor:
    """The first expand weight as the launches read it."""
    model.encode(torch.zeros(1, 3, 8, 8, device=DEVICE))
    return model.runtime._weights._encoder["blocks.0.w1"].cpu()


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny("torch", "cpu").save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, dtype: torch.dtype = torch.float32) -> FullCapacitor:
    options = {"device": DEVICE, "dtype": dtype, "backend": "triton", "strict_size": False}
    return FullCapacitor.from_pretrained(folder, **options)


def test_a_checkpoint_is_rounded_once_whatever_the_parameters_are_cast_to(saved):
    """The first convolution's rows times the layer scale: rounding before and after differs from rounding once."""
    once = load(saved)
    with torch.no_grad():
        scaled = once.encoder.blocks[0].pwconv2.weight[:, :, 0, 0].T.double() * once.encoder.blocks[0].layer_scale
    for road in (load(saved, torch.float16), load(saved).half(), copy.deepcopy(load(saved)).to(torch.float16)):
        road.encode(image())
        assert torch.equal(road.runtime._weights._encoder["blocks.0.w2"].cpu(), scaled.half().cpu())
        assert next(road.parameters()).dtype == torch.float16
    # over another type and back: the parameters are rounded, what is packed is not
    back = load(saved).half().float()
    assert not torch.equal(back.encoder.blocks[0].pwconv1.weight, once.encoder.blocks[0].pwconv1.weight)
    assert torch.equal(packed_w1(back), packed_w1(once))


def test_edited_parameters_are_packed_as_they_are(saved):
    model = load(saved, torch.float16)
    before = model.encode(image())
    with torch.no_grad():
        model.encoder.to_bottleneck.bias.add_(1.0)
    assert not torch.equal(model.encode(image()), before)
    expected = model.encoder.blocks[0].pwconv1.weight[:, :, 0, 0].T.cpu()
    assert torch.equal(packed_w1(model), expected)
    # for good: what was edited once is no checkpoint's any more
    assert torch.equal(packed_w1(model.float()).half(), expected)
    replaced = load(saved)
    replaced.encoder.blocks[0].pwconv1.weight = nn.Parameter(
        torch.zeros_like(replaced.encoder.blocks[0].pwconv1.weight), requires_grad=False
    )
    assert not packed_w1(replaced).any()
    other = load(saved)
    other.load_state_dict({k: torch.zeros_like(v) for k, v in other.state_dict().items()})
    assert not packed_w1(other).any()


def test_a_pickled_copy_folds_its_own_parameters(saved):
    model = load(saved, torch.float16)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(packed_w1(twin), twin.encoder.blocks[0].pwconv1.weight[:, :, 0, 0].T.cpu())


def test_moves_that_change_nothing_keep_graphs_and_weights():
    model = tiny()
    model.encode(image())
    runtime = model.runtime
    for same in (model.to(DEVICE), model.to(torch.float32), model.float(), Trainer(model).to(DEVICE).vae):
        assert same is model and model.runtime is runtime
    model.encode(image())
    assert model.stats().folds == 1


def test_a_parents_moves_and_loads_reach_the_model():
    model = tiny()
    parent = Trainer(model)
    before = model.encode(image())
    parent.half()
    assert model.dtype == torch.float16 and model.stats().weight_nbytes == 0
    parent.float()
    other = randomise(tiny("torch", "cpu"), seed=1)
    parent.load_state_dict(Trainer(other).state_dict())
    after = model.encode(image())
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.cpu(), other.encode(IMAGE), rtol=1e-4, atol=1e-4)
    wrong = {k: v for k, v in model.state_dict().items() if k != "decoder.out_proj.bias"} | {"encoder.extra": before}
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*decoder.out_proj.bias.*Unexpected.*encoder.extra"):
        model.load_state_dict(wrong)
    keys = model.load_state_dict(wrong, strict=False)
    assert keys.missing_keys == ["decoder.out_proj.bias"] and keys.unexpected_keys == ["encoder.extra"]


def test_a_part_moved_by_itself_is_noticed():
    model = tiny("triton", "cpu") if DEVICE == "cpu" else tiny()
    before = model.encode(image())
    model.encoder.half()
    rounded = model.encode(image())
    assert not torch.equal(rounded, before)
    model.encoder.float()
    assert torch.equal(model.encode(image()), rounded)


def test_another_backend_takes_the_same_parameters():
    model, truth = tiny(dtype=torch.float16), tiny("torch", "cpu", torch.float16)
    model.encode(image())
    model.cpu()
    model.backend = "torch"
    assert model.runtime is None and torch.equal(model.encode(IMAGE), truth.encode(IMAGE))
    with pytest.raises(InputError, match="backend 'fast' is unknown"):
        model.backend = "fast"


def test_meta_and_to_empty():
    model = tiny()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    latents = model.encode(image())
    model.to("meta")
    assert model.device.type == "meta" and all(t.is_meta for t in model.state_dict().values())
    with pytest.raises(NotImplementedError, match="meta tensor"):
        model.to(DEVICE)
    model.to_empty(device=DEVICE)
    model.load_state_dict(state)
    assert torch.equal(model.encode(image()), latents)


def test_a_model_built_on_meta_takes_tensors_by_assignment():
    truth = tiny()
    with torch.device("meta"):
        model = FullCapacitor(TINY, backend="triton", strict_size=False)
    model.load_state_dict(truth.state_dict(), assign=True)
    model.to(DEVICE).requires_grad_(False)
    assert torch.equal(model.encode(image()), truth.encode(image()))


def test_edits_in_place_are_noticed():
    model = tiny()
    before, decoded = model.encode(image()), model.decode(torch.ones(1, 4, 1, 1, device=DEVICE), None, None, ONE_STEP)
    with torch.no_grad():
        model.encoder.blocks[0].pwconv2.bias.add_(1.0)
    assert not torch.equal(model.encode(image()), before)
    with torch.no_grad():
        model.encoder.blocks[0].pwconv2.bias.sub_(1.0)
        model.latent_norm_running_mean.add_(1.0)
    shifted = model.encode(image())
    assert not torch.allclose(shifted, before)
    model.decoder.load_state_dict({k: v * 1.5 for k, v in model.decoder.state_dict().items()})
    assert not torch.equal(model.decode(torch.ones(1, 4, 1, 1, device=DEVICE), None, None, ONE_STEP), decoded)
    model.encoder = copy.deepcopy(model.encoder)
    with torch.no_grad():
        model.latent_norm_running_mean.sub_(1.0)
    torch.testing.assert_close(model.encode(image()), before)


def test_a_deleted_model_leaves_nothing_behind():
    import gc
    import weakref

    model = tiny()
    model.encode(image())
    gone = [
        weakref.ref(model),
        weakref.ref(model.runtime),
        weakref.ref(next(iter(model.runtime._weights._encoder.values()))),
    ]
    gc.disable()
    try:
        del model
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


def test_a_round_trip_over_the_cpu_keeps_the_bits(saved):
    """Trainers park the autoencoder on the CPU between phases."""
    model = load(saved, torch.float16)
    latents = model.encode(image())
    model.cpu()
    # on the CPU, the interpreter's device, nothing has moved
    assert model.stats().weight_nbytes == 0 or DEVICE == "cpu"
    assert torch.equal(model.to(DEVICE).encode(image()), latents)


def test_every_attribute_of_a_model_survives_a_copy():
    model = tiny(dtype=torch.float16)
    model.low_latency = True
    twin = copy.deepcopy(model)
    assert (twin.device, twin.dtype, twin.backend, twin.low_latency) == (model.device, torch.float16, "triton", True)
    assert twin.encoder is not model.encoder
    assert torch.equal(twin.encode(image()), model.encode(image()))


def test_an_offload_hook_brings_the_model_along():
    """accelerate's CpuOffload hook sits on `forward`; diffusers models call it from encode and decode, and so do we."""
    model = tiny()
    moves = []

    class Hook:
        def pre_forward(self, module, *args, **kwargs):
            moves.append(module.to(DEVICE))
            return args, kwargs

    model._hf_hook = Hook()
    latents = model.encode(image())
    model.decode(latents, inference_config=ONE_STEP)
    model.encode_posterior(image())
    assert moves == [model] * 3 and model.stats().folds == 2


def test_accelerate_offloads_it():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    model, truth = tiny(), tiny()
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device=DEVICE)
    assert torch.equal(model(image()), truth.encode(image()))
    assert torch.equal(model.encode(image()), truth.encode(image()))
    hook.offload()
    assert model.device.type == "cpu"


def test_lightning_holds_it():
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")

    class Module(lightning.LightningModule):
        def __init__(self, vae):
            super().__init__()
            self.vae, self.net = vae, nn.Conv2d(4, 4, 1)

        def training_step(self, batch):
            return self.net(self.vae.encode(batch)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    # without the interpreter the launches need a GPU
    module = Module(tiny("torch" if DEVICE == "cuda" else "triton", "cpu"))
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, torch.utils.data.DataLoader(IMAGE, batch_size=1))


def train_step(parent: nn.Module) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD([p for p in parent.parameters() if p.requires_grad], 0.1)
    parent(image()).backward()
    optimizer.step()
    return {k: v.detach().cpu() for k, v in parent.state_dict().items()}


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_ddp_and_fsdp_wrap_a_parent(process_group, backend):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    parent = Trainer(tiny(backend))
    parent.net.to(DEVICE)
    twins = [copy.deepcopy(parent) for _ in range(2)]
    expected = train_step(parent)

    wrapped = nn.parallel.DistributedDataParallel(twins[0])
    got = {k.removeprefix("module."): v for k, v in train_step(wrapped).items()}
    assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in expected)

    mesh = init_device_mesh(DEVICE, (1,))
    sharded = fully_shard(twins[1], mesh=mesh, ignored_params=set(twins[1].vae.parameters()))
    train_step(sharded)
    for name, p in sharded.net.named_parameters():
        assert torch.equal(p.full_tensor().cpu(), expected[f"net.{name}"])


def test_sharded_weights_are_refused_by_name(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = randomise(FullCapacitor(dataclasses.replace(TINY), backend="triton", strict_size=False)).to(DEVICE)
    fully_shard(model, mesh=init_device_mesh(DEVICE, (1,)))
    with pytest.raises(InputError, match=r"encoder.patchify.proj.weight is sharded .* leave this model out of FSDP"):
        model.encode(image())
