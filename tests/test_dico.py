"""The siblings with channel attention: golden vectors of our reading, checkpoints, open names, guidance by tokens."""

from __future__ import annotations

import dataclasses
import json
import warnings
from functools import cache

import pytest
import torch
from golden_cases import GOLDEN, inference_of
from measures import relative_error
from models import TINY_SIBLINGS as TINY
from models import random_model
from safetensors.torch import load_file, save_file

from capacitor_rt import CheckpointError, ConfigError, FullCapacitor, FullCapacitorInferenceConfig, InputError
from capacitor_rt.checkpoint_schema import expected_shapes, read_layout
from capacitor_rt.config import KNOWN_MODELS, READINGS, DicoConfig, ModelConfig
from capacitor_rt.diffusion import token_mask
from capacitor_rt.errors import UnverifiedModelWarning

TOLERANCE = 1e-5
NAMES = ("dico_ir", "dico_m2")
VECTORS = [(name, part) for name in NAMES for part in ("io", "io_b")]


@cache
def io_of(name: str, part: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / name / f"{part}.safetensors")


@cache
def load(name: str, dtype: torch.dtype = torch.float32) -> FullCapacitor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedModelWarning)
        return FullCapacitor.from_pretrained(GOLDEN / name, dtype=dtype)


def under(name: str, **reading: str) -> FullCapacitor:
    """The golden model under another reading."""
    model = load(name)
    config = dataclasses.replace(model.config, dico=dataclasses.replace(model.config.dico, **reading))
    other = FullCapacitor(config)
    other.hold(model.state_dict())
    return other


@pytest.mark.parametrize(("name", "part"), VECTORS)
def test_golden(name, part):
    io, model = io_of(name, part), load(name)
    assert relative_error(model.encode(io["image"]), io["latents"]) < TOLERANCE
    posterior = model.encode_posterior(io["image"])
    assert posterior.logsnr is None and relative_error(posterior.mean, io["latents"]) < TOLERANCE
    decodes = [key for key in io if key.startswith("decode_")]
    assert len(decodes) > 1 and any("pdg" in key for key in decodes)
    for key in decodes:
        image = model.decode(io["latents"], *io[key].shape[2:], inference_of(key))
        assert relative_error(image, io[key]) < TOLERANCE, key


@pytest.mark.parametrize(("name", "part"), VECTORS)
def test_golden_blocks(name, part):
    io, model = io_of(name, part), load(name)
    x = io["block_in"]
    modulation = model.decoder.modulations(torch.ones(x.shape[0]))[0]
    assert relative_error(modulation, io["decoder_block0_modulation_t1"]) < TOLERANCE
    for part_name, block, args in (
        ("encoder", model.encoder.blocks[0], (x,)),
        ("decoder", model.decoder.start_blocks[0], (x, modulation)),
    ):
        inside = {}
        hooks = [
            block.cca.register_forward_hook(lambda m, given, _o: inside.update(attention=m.attention(*given))),  # noqa: B023
            block.norm2.register_forward_hook(lambda _m, given, _o: inside.update(mid=given[0])),  # noqa: B023
        ]
        out = block(*args)
        for hook in hooks:
            hook.remove()
        assert relative_error(inside["attention"].flatten(1), io[f"{part_name}_block0_attention"]) < TOLERANCE
        assert relative_error(inside["mid"], io[f"{part_name}_block0_mid"]) < TOLERANCE
        assert relative_error(out, io[f"{part_name}_block0_out"]) < TOLERANCE


def test_golden_tokens_dropped():
    io, model = io_of("dico_m2", "io"), load("dico_m2")
    times = torch.full((io["x_t"].shape[0],), 0.625)
    x0 = model.decoder(io["x_t"], times, io["latents"], dropped=io["token_mask"])
    assert relative_error(x0, io["x0_t0.625_tokenmask"]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_close_as_the_oracle(name):
    io, model = io_of(name, "io"), load(name, torch.bfloat16)
    key = "decode_ddim1_linear_seed7"
    got = {"latents": model.encode(io["image"])}
    got[key] = model.decode(io["latents"], inference_config=inference_of(key))
    for key, value in got.items():
        ours, oracle = (relative_error(x, io[f"f64_{key}"]) for x in (value, io[f"bf16_{key}"]))
        print(f"{name} {key}: {ours:.3e}, oracle {oracle:.3e}")
        assert ours <= oracle, key


@pytest.mark.parametrize(
    ("switch", "reading"),
    [
        ("adaln_gate_raw", {"adaln_gate": "raw"}),
        ("encoder_gate_tanh", {"encoder_gate": "tanh"}),
        ("mlp_norm_single", {"mlp_norm": "single"}),
        ("packing_grouped", {"adaln_packing": "grouped"}),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_golden_other_readings(name, switch, reading):
    io, model = io_of(name, "io_b"), under(name, **reading)
    keys = [key for key in io if key.startswith(f"alt_{switch}_")]
    assert keys
    for key in keys:
        plain = key.removeprefix(f"alt_{switch}_")
        if plain == "latents":
            got = model.encode(io["image"])
        elif plain == "encoder_block0_out":
            got = model.encoder.blocks[0](io["block_in"])
        elif plain == "decoder_block0_out":
            modulation = model.decoder.modulations(torch.ones(len(io["block_in"])))[0]
            got = model.decoder.start_blocks[0](io["block_in"], modulation)
        else:
            got = model.decode(io["latents"], inference_config=inference_of(plain))
        assert relative_error(got, io[key]) < TOLERANCE, key


def test_readings_that_no_vector_has():
    """Where the decoder's first norm stands, and whether the encoder's last one does: against the formula."""
    io = io_of("dico_ir", "io_b")
    off = under("dico_ir", encoder_norm_out="off").encode(io["image"])
    normed = off * torch.rsqrt(off.square().mean(1, keepdim=True) + 1e-6)
    assert relative_error(normed, io["latents"]) < TOLERANCE < relative_error(off, io["latents"])
    late = under("dico_ir", decoder_norm_in="fuse_in").decoder
    x, z = late.patchify(io["image"]), late.latent_norm(late.latent_up(io["latents"]))
    expected = late.norm_in(late.fuse_in(torch.cat([x, z], 1)))
    assert torch.equal(late._fused_inputs(io["image"], io["latents"], None), expected)


# checkpoints


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("irdiffae_v1", 120_957_312, 198),
        ("mdiffae_v1", 81_410_496, 140),
        ("mdiffae_v2", 120_893_664, 191),
    ],
)
def test_published_sizes(name, parameters, tensors):
    config = KNOWN_MODELS[name]
    shapes = expected_shapes(config, config.has_statistics)
    reading = read_layout(shapes, dict.fromkeys(shapes, "F32"), {}, "x")
    assert len(shapes) == tensors and reading.counts()["total"] == parameters
    # the tensors alone tell which model it is
    assert reading.config == config and not (reading.problems or reading.leftovers)


@pytest.mark.parametrize("name", NAMES)
def test_loading_warns_until_settled(name, tmp_path):
    with pytest.warns(UnverifiedModelWarning, match=r"inferred and unverified \(adaln_gate tanh.*capacitor-rt probe"):
        model = FullCapacitor.from_pretrained(GOLDEN / name)
    dico = dataclasses.replace(model.config.dico, settled=True, adaln_gate="raw")
    settled = FullCapacitor(dataclasses.replace(model.config, dico=dico))
    settled.hold(model.state_dict())
    settled.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = FullCapacitor.from_pretrained(tmp_path)
    assert again.config == settled.config
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("name", TINY)
def test_save_and_load(name, tmp_path):
    model = random_model(TINY[name])
    model.save_pretrained(tmp_path)
    with pytest.warns(UnverifiedModelWarning, match=name):
        again = FullCapacitor.from_pretrained(tmp_path)
    assert again.config == model.config
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = model.encode(image)
    torch.testing.assert_close(latents.square().mean(1), torch.ones(2, 2, 3), rtol=5e-3, atol=5e-3)
    assert relative_error(again.encode(image), latents) < TOLERANCE
    assert torch.equal(model.whiten(latents), latents)


OTHER_NAMES = [
    ("cca.proj", "attn.fc"),
    ("conv3", "proj"),
    ("mlp.conv_in", "ffn.up"),
    ("mlp.conv_out", "ffn.down"),
    ("gate_conv", "gamma1"),
    ("gate_mlp", "gamma2"),
    ("decoder.mask_feature", "decoder.mask_token"),
    ("decoder.blocks", "decoder.layers"),
]


@pytest.mark.parametrize("name", TINY)
def test_open_names_are_told_by_place_and_shape(name):
    shapes = expected_shapes(TINY[name], has_statistics=False)
    renamed = {}
    for key in shapes:
        other = key
        for ours, theirs in OTHER_NAMES:
            if f".{ours}." in f".{other}." or other == ours:
                other = f".{other}.".replace(f".{ours}.", f".{theirs}.").strip(".")
        renamed[f"model.{other}"] = key
    assert sum(theirs.removeprefix("model.") != ours for theirs, ours in renamed.items()) > 10
    by_file = {theirs: shapes[ours] for theirs, ours in renamed.items()}
    reading = read_layout(by_file, dict.fromkeys(by_file, "F32"), {}, "x")
    assert reading.problems == [] and reading.leftovers == []
    assert {entry.name: entry.read_as for entry in reading.entries} == renamed
    assert reading.config == TINY[name]


def test_ambiguous_names_are_one_error(tmp_path):
    model = random_model(TINY["irdiffae_v1"])
    tensors = dict(model.state_dict())
    d = model.config.model_dim
    block = "encoder.blocks.0."
    for kind in ("weight", "bias"):
        tensors[f"{block}attn.one.{kind}"] = tensors.pop(f"{block}cca.proj.{kind}").clone()
        tensors[f"{block}attn.two.{kind}"] = torch.zeros_like(tensors[f"{block}attn.one.{kind}"])
    tensors[f"{block}a"], tensors[f"{block}b"] = tensors.pop(f"{block}gate_conv"), tensors.pop(f"{block}gate_mlp")
    tensors["decoder.mask_a"] = tensors.pop("decoder.mask_feature")
    tensors["decoder.token_b"] = torch.zeros(d)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FullCapacitor.from_pretrained(tmp_path)
    for expected in (
        f"ambiguous: {block}attn.one.weight, {block}attn.two.weight could each be {block}cca.proj.weight",
        f"ambiguous: {block}a, {block}b could each be {block}gate_conv or {block}gate_mlp",
        "ambiguous: decoder.mask_a, decoder.token_b could each be decoder.mask_feature",
        f"missing: {block}cca.proj.weight [{d}, {d}, 1, 1]",
    ):
        assert expected in caught.value.problems


def test_config_json():
    golden = json.loads((GOLDEN / "dico_m2" / "config.json").read_text())
    config = ModelConfig.from_dict(golden, sibling="mdiffae_v2")
    assert config.dico == DicoConfig("mdiffae_v2", pdg_mask_ratio=0.75)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert "dico" not in ModelConfig().to_dict()
    for changes, message in (
        ({"adaln_gate": "sigmoid"}, "adaln_gate 'sigmoid' is unknown: use one of 'tanh', 'raw'"),
        ({"pdg_mask_ratio": 1.5}, "pdg_mask_ratio 1.5 is no share"),
        ({"settled": "yes"}, "settled is 'yes', which is not a bool"),
    ):
        with pytest.raises(ConfigError, match=message):
            ModelConfig.from_dict({"dico": {"sibling": "mdiffae_v2"} | changes})
    with pytest.raises(ConfigError, match="do not go with mdiffae_v1, whose decoder is flat"):
        ModelConfig(dico=DicoConfig("mdiffae_v1"))
    assert set(READINGS) == set(DicoConfig("irdiffae_v1").reading) and len(READINGS) == 6


def test_shapes_win_over_the_sibling_that_config_states(tmp_path):
    random_model(TINY["mdiffae_v2"]).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["dico"]["sibling"] = "irdiffae_v1"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="dico.sibling is 'irdiffae_v1', but the tensors are of mdiffae_v2"):
        model = FullCapacitor.from_pretrained(tmp_path)
    assert model.config == TINY["mdiffae_v2"]


# serving


@pytest.mark.parametrize("name", ["mdiffae_v1", "mdiffae_v2"])
def test_guidance_by_tokens(name):
    model = random_model(TINY[name])
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 8, 3, 5), torch.randn(2, 3, 24, 40)
    dropped = torch.rand(2, 1, 3, 5) < 0.5
    settings = FullCapacitorInferenceConfig(pdg=True, pdg_drop="tokens", pdg_strength=1.5, seed=3)
    plain = FullCapacitorInferenceConfig(seed=3)
    guided = model.decode(latents, inference_config=settings, noise=noise, dropped=dropped)
    # one step is linear in x0: the strength can be read off
    with_all = model.decode(latents, inference_config=plain, noise=noise)
    none = model.decode(
        latents, inference_config=dataclasses.replace(settings, pdg_strength=0.0), noise=noise, dropped=dropped
    )
    torch.testing.assert_close(guided, none + 1.5 * (with_all - none), rtol=1e-4, atol=1e-5)
    assert (guided - with_all).norm() > 1e-2 * with_all.norm()
    # the mask of a seed
    drawn = token_mask(latents.shape, 0.75, 3)
    by_seed = model.decode(latents, inference_config=settings, noise=noise)
    assert torch.equal(by_seed, model.decode(latents, inference_config=settings, noise=noise, dropped=drawn))


def test_token_mask_keeps_one_of_each_group():
    mask = token_mask((3, 8, 6, 10), 0.75, 5)
    assert mask.dtype == torch.bool and mask.shape == (3, 1, 6, 10)
    kept = (~mask).float()
    assert torch.equal(torch.nn.functional.avg_pool2d(kept, 2), torch.full((3, 1, 3, 5), 0.25))
    places = {tuple(kept[0, 0, y : y + 2, x : x + 2].flatten().tolist()) for y in (0, 2, 4) for x in range(0, 10, 2)}
    assert len(places) > 1
    assert torch.equal(mask, token_mask((3, 1, 6, 10), 0.75, 5))
    assert not torch.equal(mask, token_mask((3, 1, 6, 10), 0.75, 6))
    assert token_mask((1, 1, 3, 5), 0.75, 0).shape == (1, 1, 3, 5)
    assert token_mask((1, 1, 4, 4), 1.0, 0).all() and not token_mask((1, 1, 4, 4), 0.0, 0).any()


@pytest.mark.parametrize(
    ("name", "drop"), [("irdiffae_v1", "tokens"), ("mdiffae_v1", "path"), ("full_capacitor", "tokens")]
)
def test_what_a_model_cannot_drop(name, drop):
    model = random_model(TINY[name]) if name in TINY else random_model()
    latents = torch.zeros(1, model.latent_channels, 1, 1)
    with pytest.raises(ConfigError, match=f"pdg_drop '{drop}' is unknown: use one of"):
        model.decode(latents, inference_config={"pdg": True, "pdg_drop": drop})
    with pytest.raises(InputError, match="dropped is given, and guidance drops nothing"):
        model.decode(latents, dropped=torch.zeros(1, 1, 1, 1, dtype=torch.bool))


def test_sizes_are_multiples_of_the_stride():
    model = random_model(TINY["mdiffae_v2"])
    assert model.encode(torch.full((1, 3, 8, 24), -1.0)).shape == (1, 8, 1, 3)
    with pytest.raises(InputError, match="height 12 is not a multiple of 8: use 8 or 16"):
        model.encode(torch.zeros(1, 3, 12, 24))


def test_inspect_says_what_is_inferred(capfd, monkeypatch):
    from capacitor_rt.cli import main

    monkeypatch.setattr("sys.argv", ["capacitor-rt", "inspect", str(GOLDEN / "dico_ir")])
    with pytest.raises(SystemExit) as caught:
        main()
    out = capfd.readouterr().out
    assert not caught.value.code and "no problems" in out
    assert "  irdiffae_v1, unverified: adaln_gate tanh, encoder_gate raw, mlp_norm double" in out
