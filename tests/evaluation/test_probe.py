"""`capacitor-rt probe`: weights that were made under one reading give it away."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from models import TINY_SIBLINGS, random_model
from PIL import Image

from capacitor_rt import FullCapacitor, InputError
from capacitor_rt.config import READINGS, FullCapacitorInferenceConfig
from capacitor_rt.diffusion import noise_levels, unit_noise
from capacitor_rt.errors import UnverifiedModelWarning
from capacitor_rt.evaluation.probe import MARGIN_DB, leaders, probe, readings, with_reading
from capacitor_rt.images.frames import Framing

SIDE = 32
OTHERS = {name: choices[1] for name, choices in READINGS.items()}


@pytest.fixture
def photo(tmp_path):
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(SIDE) / 5)[:, None, None] * np.cos(np.arange(SIDE) / 7)[None, :, None]
    pixels = (128 + 70 * waves + rng.normal(0, 20, (SIDE, SIDE, 3))).clip(20, 235).astype(np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def planted(name: str, truth: dict[str, str], photo) -> FullCapacitor:
    """Random weights under the reading `truth`, whose last layer is solved for: so they reconstruct the photograph."""
    config = dataclasses.replace(TINY_SIBLINGS[name], model_dim=32)
    dico = dataclasses.replace(config.dico, **truth)
    model = random_model(dataclasses.replace(config, dico=dico), seed=3)
    image = torch.from_numpy(np.asarray(Image.open(photo)).copy()).permute(2, 0, 1)[None]
    target = image.double() / 127.5 - 1
    seen: list[torch.Tensor] = []
    hook = model.decoder.out_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    settings = FullCapacitorInferenceConfig(seed=0)
    model.decode(model.encode(image), inference_config=settings)
    hook.remove()
    # one step is linear in x0
    first, last = noise_levels(config, settings)
    ratio = last.sigma / first.sigma
    start = unit_noise(tuple(target.shape), 0, target.device).double() * first.sigma * config.pixel_noise_std
    x0 = (target - ratio * start) / (last.alpha - ratio * first.alpha)
    wanted = torch.nn.functional.pixel_unshuffle(x0, config.patch_size).flatten(2)[0]
    features = seen[0].double().flatten(2)[0]
    with torch.no_grad():
        model.decoder.out_proj.bias.zero_()
        model.decoder.out_proj.weight.copy_((wanted @ torch.linalg.pinv(features))[:, :, None, None])
    # what a file says is the default reading, whatever is true
    return with_reading(model, {name: choices[0] for name, choices in READINGS.items()})


@pytest.mark.parametrize("truth", [{}, OTHERS, {"mlp_norm": "single"}, {"adaln_packing": "grouped"}])
@pytest.mark.parametrize("name", TINY_SIBLINGS)
def test_the_planted_reading_wins(name, truth, photo):
    names = TINY_SIBLINGS[name].dico.open_readings
    truth = {key: value for key, value in truth.items() if key in names}
    model = planted(name, truth, photo)
    scores = list(probe(model, [photo], Framing(SIDE, None)))
    assert len(scores) == 2 ** len(names) == {"irdiffae_v1": 32, "mdiffae_v1": 64, "mdiffae_v2": 32}[name]
    best = leaders(scores)
    expected = {key: choices[0] for key, choices in names.items()} | truth
    # a norm of the encoder's residual behind another one differs by its epsilon alone, so nothing else is as good
    assert [score.reading for score in best] == [expected]
    second = sorted(score.mean for score in scores)[-2]
    print(f"{name} {truth}: {best[0].mean:.1f} dB, then {second:.1f}")
    assert best[0].mean > 40 and best[0].mean > second + MARGIN_DB


def test_readings_share_the_tensors():
    model = random_model(TINY_SIBLINGS["mdiffae_v1"])
    assert readings(model)[0] == model.config.dico.reading
    twin = with_reading(model, OTHERS, settled=True)
    assert twin.config.dico.reading == OTHERS and twin.config.dico.settled
    assert all(t.data_ptr() == model.state_dict()[key].data_ptr() for key, t in twin.state_dict().items())
    with pytest.raises(InputError, match="only irdiffae and mdiffae have readings to probe"):
        readings(random_model())


@pytest.fixture
def command(monkeypatch, capfd):
    """Call `capacitor-rt probe`; gives (exit code, stdout, stderr)."""
    from capacitor_rt.cli import main

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["capacitor-rt", "probe", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (caught.value.code or 0, *capfd.readouterr())

    return call


def test_command(command, photo, tmp_path):
    truth = {"adaln_gate": "raw", "adaln_packing": "grouped"}
    planted("mdiffae_v2", truth, photo).save_pretrained(tmp_path / "model")
    code, out, err = command(tmp_path / "model", photo, "--size", SIDE, "--save", tmp_path / "settled")
    assert code == 0, err
    assert "warning" not in err.lower().replace("without a warning", "")
    lines = out.splitlines()
    assert lines[0].split() == ["PSNR", "dB", *TINY_SIBLINGS["mdiffae_v2"].dico.open_readings]
    assert len(lines) == 32 + 3
    assert lines[1].split()[1:] == ["raw", "raw", "double", "grouped", "on"]
    figures = [float(line.split()[0]) for line in lines[1:33]]
    assert figures == sorted(figures, reverse=True)
    assert "the first is right" in lines[-1] and "NOT the one it loads with" in lines[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settled = FullCapacitor.from_pretrained(tmp_path / "settled")
    assert settled.config.dico.adaln_gate == "raw" and settled.config.dico.adaln_packing == "grouped"
    # a folder that has something in it is left alone
    code, _, err = command(tmp_path / "model", photo, "--size", SIDE, "--save", tmp_path / "settled")
    assert code == 2 and "is not empty" in err


def test_command_does_not_choose_between_equals(command, photo, tmp_path):
    # gates of zero: no reading of them shows
    model = random_model(TINY_SIBLINGS["irdiffae_v1"])
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.gate_conv.zero_()
            block.gate_mlp.zero_()
    model.save_pretrained(tmp_path / "model")
    code, out, err = command(tmp_path / "model", photo, "--size", SIDE, "--save", tmp_path / "settled")
    assert code == 2 and "are not told apart, so none is saved" in err
    assert "do not tell them apart" in out and not (tmp_path / "settled").exists()
    code, out, _ = command(tmp_path / "model", photo, "--size", SIDE, "--json")
    found = json.loads(out)
    assert code == 0 and found["told_apart"] is False and found["sibling"] == "irdiffae_v1"
    assert len(found["scores"]) == 32 and all(len(score["psnr"]) == 1 for score in found["scores"])


def test_command_refuses_other_models(command, photo, tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    code, _, err = command(tmp_path / "model", photo)
    assert code == 2 and "only irdiffae and mdiffae have readings to probe" in err
    with pytest.warns(UnverifiedModelWarning):
        random_model(TINY_SIBLINGS["mdiffae_v1"]).save_pretrained(tmp_path / "sibling")
        FullCapacitor.from_pretrained(tmp_path / "sibling")
    code, _, err = command(tmp_path / "sibling", tmp_path / "none.png")
    assert code == 2 and "does not exist" in err
