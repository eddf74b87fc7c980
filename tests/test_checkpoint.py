"""Checkpoints in every accepted form, and every way in which one can be wrong."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from golden_cases import GOLDEN, golden_io, inference_of
from measures import relative_error
from safetensors.torch import load_file, save_file

from capacitor_rt import CheckpointError, FullCapacitor, InputError, ModelConfig
from capacitor_rt.checkpoint import problems_of, resolve

SETTINGS = json.loads((GOLDEN / "p16" / "config.json").read_text())


@pytest.fixture
def tensors():
    return load_file(GOLDEN / "p16" / "model.safetensors")


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint folder from tensors and settings (None: no config.json)."""

    def write(tensors, settings=SETTINGS):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
        if settings is not None:
            (tmp_path / "config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
        return tmp_path

    return write


def load_quietly(path, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return FullCapacitor.from_pretrained(path, strict_size=False, **kwargs)


def assert_golden(model):
    io = golden_io("p16")
    assert relative_error(model.encode(io["image"]), io["latents"]) < 1e-5
    key = "decode_ddim1_linear_seed7"
    assert relative_error(model.decode(io["latents"], inference_config=inference_of(key)), io[key]) < 1e-5


def squeeze_convolutions(tensors):
    return {k: v.squeeze(-1).squeeze(-1) if v.dim() == 4 and v.shape[2:] == (1, 1) else v for k, v in tensors.items()}


def flatten_patchify(tensors, trailing):
    shape = (56, 768, 1, 1) if trailing else (56, 768)
    return {k: v.reshape(shape) if k.endswith("patchify.proj.weight") else v for k, v in tensors.items()}


def rename_statistics(tensors):
    return {k.replace("latent_norm_running", "bn_latents_running"): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    "transform",
    [
        lambda t: t,
        squeeze_convolutions,
        lambda t: flatten_patchify(t, True),
        lambda t: flatten_patchify(t, False),
        lambda t: {f"model.{k}": v for k, v in t.items()},
        lambda t: {f"module.model.{k}": v for k, v in t.items()},
        lambda t: {k: v for k, v in t.items() if not k.endswith("freqs")},
        rename_statistics,
        lambda t: {k: v.view(1, -1, 1, 1) if k.startswith("latent_norm") else v for k, v in t.items()},
        lambda t: {k: v.flatten() if ".grn." in k else v for k, v in t.items()},
    ],
    ids=["as is", "linears", "patchify 1x1", "patchify 2d", "model.", "module.model.", "no freqs", "stats name",
         "stats 4d", "grn 1d"],
)  # fmt: skip
@pytest.mark.parametrize("with_config", [True, False])
def test_the_same_memory_under_other_names_and_shapes(write, tensors, transform, with_config):
    # without config.json every setting follows from the shapes, the defaults being those of the family
    assert_golden(load_quietly(write(transform(tensors), SETTINGS if with_config else None)))


def test_float16_and_bfloat16_files(write, tensors):
    truth = FullCapacitor.from_pretrained(GOLDEN / "p16")
    for dtype in (torch.float16, torch.bfloat16):
        model = load_quietly(write({k: v.to(dtype) for k, v in tensors.items()}))
        assert model.dtype == torch.float32
        for k, v in model.state_dict().items():
            assert torch.equal(v, truth.state_dict()[k].to(dtype).float()), k


def test_decoder_only(write, tensors):
    folder = write({k: v for k, v in tensors.items() if k.startswith("decoder.")})
    model = load_quietly(folder)
    assert model.encoder is None and not any(n.startswith("encoder") for n, _ in model.named_parameters())
    z = torch.randn(1, 16, 2, 3)
    assert torch.equal(model.whiten(z), z) and torch.equal(model.dewhiten(z), z)
    assert model.decode(z).shape == (1, 3, 32, 48)
    with pytest.raises(InputError, match="decoder only"):
        model.encode(torch.zeros(1, 3, 32, 32))
    model.save_pretrained(folder / "again")
    again, seeded = load_quietly(folder / "again"), inference_of("decode_ddim1_linear_seed7")
    assert torch.equal(again.decode(z, inference_config=seeded), model.decode(z, inference_config=seeded))


def test_statistics_of_four_z_mean_a_latent_patch(write, tensors):
    for name in ("latent_norm_running_mean", "latent_norm_running_var"):
        tensors[name] = tensors[name].repeat(4)
    model = load_quietly(write(tensors))
    assert (model.latent_channels, model.latent_stride) == (64, 32)


def test_shapes_win_over_config_with_a_warning_that_names_both(write, tensors):
    folder = write(tensors, {**SETTINGS, "model_dim": 64, "mlp_ratio": 3.0, "bottleneck_dim": 8})
    with pytest.warns(UserWarning) as caught:
        model = FullCapacitor.from_pretrained(folder, strict_size=False)
    text = " ".join(str(w.message) for w in caught)
    assert "model_dim is 64, but the tensors have 56" in text
    assert "mlp_ratio is 3.0, but the tensors have 4.0" in text
    assert "bottleneck_dim is 8, but the tensors have 16" in text
    assert_golden(model)


def test_unknown_config_key_warns(write, tensors):
    with pytest.warns(UserWarning, match="unknown keys ignored: flux_capacity"):
        FullCapacitor.from_pretrained(write(tensors, {**SETTINGS, "flux_capacity": 1.21}))


def test_one_error_lists_every_problem(write, tensors):
    del tensors["decoder.fuse_in.bias"], tensors["encoder.blocks.1.grn.gamma"]
    tensors["decoder.out_proj.weight"] = tensors["decoder.out_proj.weight"][:700]
    tensors["encoder.blocks.0.layer_scale"] = torch.ones(57)
    tensors["decoder.extra"] = torch.ones(3)
    tensors["decoder.fuse_skip.bias"] = tensors["decoder.fuse_skip.bias"].to(torch.int32)
    tensors["decoder.latent_up.weight"][0, 0] = float("nan")
    folder = write(tensors)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        load_quietly(folder)
    message = str(caught.value)
    assert "7 problems" in message and len(caught.value.problems) == 7
    for line in (
        "missing: decoder.fuse_in.bias [56]",
        "missing: encoder.blocks.1.grn.gamma [1, 224, 1, 1]",
        "misshaped: decoder.out_proj.weight is [700, 56, 1, 1], expected [768, 56, 1, 1]",
        "misshaped: encoder.blocks.0.layer_scale is [57], expected [56]",
        "left over: decoder.extra [3]",
        "wrong type: decoder.fuse_skip.bias is stored as I32",
        "not finite: decoder.latent_up.weight has 1 NaN or Inf among 896 values",
    ):
        assert line in message
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(problems_of(resolve(folder))[1]) == sorted(caught.value.problems)


def test_a_missing_block_is_missing_not_a_smaller_model(write, tensors):
    kept = {k: v for k, v in tensors.items() if not k.startswith(("encoder.blocks.1.", "decoder.end_blocks.1."))}
    with pytest.raises(CheckpointError, match=r"missing: decoder\.end_blocks\.1\.dwconv\.bias") as caught:
        load_quietly(write(kept))
    assert "missing: encoder.blocks.1.layer_scale [56]" in str(caught.value)


def test_not_strict_only_forgives_leftovers(write, tensors):
    tensors["ema_decay"] = torch.ones(1)
    folder = write(tensors)
    with pytest.raises(CheckpointError, match="left over: ema_decay"):
        load_quietly(folder)
    with pytest.warns(UserWarning, match="left over: ema_decay"):
        assert_golden(FullCapacitor.from_pretrained(folder, strict=False, strict_size=False))
    del tensors["decoder.fuse_in.bias"]
    with pytest.raises(CheckpointError, match=r"missing: decoder\.fuse_in\.bias"):
        FullCapacitor.from_pretrained(write(tensors), strict=False)


def test_negative_variance_and_infinite_weights(write, tensors):
    tensors["latent_norm_running_var"][3] = -1.0
    tensors["encoder.to_bottleneck.bias"][0] = float("inf")
    with pytest.raises(CheckpointError) as caught:
        load_quietly(write(tensors))
    assert "negative variance: latent_norm_running_var has 1" in str(caught.value)
    assert "not finite: encoder.to_bottleneck.bias" in str(caught.value)


def test_the_same_tensor_twice(write, tensors):
    tensors["model.decoder.fuse_in.bias"] = tensors["decoder.fuse_in.bias"].clone()
    with pytest.raises(CheckpointError, match=r"twice: .*decoder\.fuse_in\.bias"):
        load_quietly(write(tensors))


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1])
def test_truncated_file(write, tensors, keep):
    folder = write(tensors)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="damaged or cut short; download it again"):
        load_quietly(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON list: expected an object"),
        ({**SETTINGS, "model_dim": "wide"}, "model_dim is 'wide', which is not an int"),
        ({**SETTINGS, "bottleneck_norm_mode": "sometimes"}, "bottleneck_norm_mode 'sometimes' is unknown: use one of"),
        ({**SETTINGS, "logsnr_min": 20.0}, "logsnr_min 20.0 is not below logsnr_max 10.0"),
    ],
)
def test_broken_config(write, tensors, settings, message):
    with pytest.raises(CheckpointError, match=message):
        load_quietly(write(tensors, settings))


def test_a_foreign_file_is_listed_not_crashed_on(write):
    with pytest.raises(CheckpointError, match=r"left over: lm_head\.weight"):
        load_quietly(write({"lm_head.weight": torch.ones(10, 10)}, None))


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        FullCapacitor.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder, nor"):
        FullCapacitor.from_pretrained(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="neither a folder, nor"):
        FullCapacitor.from_pretrained("full_capacitor")


def test_a_single_file_and_a_subfolder(write, tensors):
    folder = write(tensors)
    assert_golden(load_quietly(folder / "model.safetensors"))
    assert_golden(load_quietly(folder.parent, subfolder=folder.name))


def test_save_and_load_are_inverse(tmp_path):
    model = FullCapacitor.from_pretrained(GOLDEN / "p16", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == SETTINGS
    again = load_quietly(tmp_path / "saved", torch_dtype=torch.bfloat16)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for k, v in model.state_dict().items():
        assert torch.equal(state[k], v) and state[k].dtype == v.dtype, k


def test_loaded_models_are_frozen():
    model = FullCapacitor.from_pretrained(GOLDEN / "p16")
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_arguments_that_contradict_or_do_not_exist():
    with pytest.raises(InputError, match="differ"):
        FullCapacitor.from_pretrained(GOLDEN / "p16", dtype=torch.float32, torch_dtype=torch.float16)
    with pytest.raises(InputError, match="not a torch device"):
        FullCapacitor.from_pretrained(GOLDEN / "p16", device="gpu0")
    with pytest.raises(InputError, match="CUDA devices"):
        FullCapacitor.from_pretrained(GOLDEN / "p16", device="cuda:99")


def test_published_size():
    """176 tensors and the parameter counts of the published model follow from the default configuration."""
    with torch.device("meta"):
        model = FullCapacitor(ModelConfig())
    counts = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("encoder", "decoder")}
    assert counts == {"encoder": 52_757_632, "decoder": 61_933_184}
    assert sum(p.numel() for p in model.parameters()) == 114_690_816
    assert len(model.state_dict()) == 176
    assert ModelConfig.from_dict({}) == ModelConfig()


def test_source_names_the_latent_space(write, tensors):
    folder = write(tensors)
    model = load_quietly(folder)
    assert model.source.id == str(folder.resolve()) and model.source.revision is None
    assert len(model.source.sha256) == 64
    assert model.source.latent_space.endswith(f"/whitened@sha256:{model.source.sha256[:16]}")
